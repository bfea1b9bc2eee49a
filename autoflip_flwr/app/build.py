"""What both of our apps make of a run's settings: the model and the data."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import MetricRecord
from numpy.typing import NDArray
from torch import nn

from autoflip_flwr.app import data, models
from autoflip_flwr.app.data import Samples
from autoflip_flwr.errors import DataError, NodesError
from autoflip_flwr.method.privacy import GuidancePrivacy
from autoflip_flwr.settings import Settings, TrainingSettings, load
from autoflip_flwr.wire.records import EPOCH

_NOISE = 4  # stream of randomness that wrong labels are drawn from

#: Metric of every reply whose value is one: the weight of an unweighted mean.
EQUAL_WEIGHT = "equal-weight"


def settings_of(run_config: Mapping[str, Any]) -> Settings:
    """Return the settings a run config names: preset and overrides."""
    return load(str(run_config["preset"]), str(run_config.get("overrides", "")))


def build_model(settings: Settings) -> nn.Module:
    """Build the model for the data; equal seeds give equal weights (`W0`)."""
    spec = data.spec(settings.data.name)
    return models.build(
        settings.model.name,
        num_classes=spec.num_classes,
        input_shape=spec.input_shape,
        seed=settings.seed,
        **settings.model.options(),
    )


def example_inputs(settings: Settings) -> torch.Tensor:
    """Return one blank sample that the model runs on."""
    spec = data.spec(settings.data.name)
    kind = torch.int64 if spec.is_text else torch.float32
    return torch.zeros(1, *spec.input_shape, dtype=kind)


def node_samples(
    settings: Settings, node_config: Mapping[str, Any]
) -> tuple[Samples, Samples]:
    """Return a node's samples: for training, and held out for its own evaluation.

    A node has data of its own (``data-path``), or one part of common data
    (``partition-id``, ``num-partitions``).
    """
    if "data-path" in node_config:
        samples = data.load_node(settings.data.name, str(node_config["data-path"]))
    elif "partition-id" in node_config and "num-partitions" in node_config:
        count = int(node_config["num-partitions"])
        parts = data.divided(settings.data, count, seed=settings.seed)
        samples = parts.partition(int(node_config["partition-id"]))
    else:
        raise DataError(
            "expected 'data-path', or 'partition-id' and 'num-partitions', in the "
            f"node config, got {sorted(node_config)}; start the SuperNode with "
            "--node-config 'data-path=\"...\"'"
        )
    count = round((settings.data.holdout or 0) * len(samples))
    order = np.random.default_rng(settings.seed).permutation(len(samples))
    apart, rest = order[:count], order[count:]
    return (
        Samples(x=samples.x[rest], y=_noisy(samples.y[rest], settings, node_config)),
        Samples(x=samples.x[apart], y=samples.y[apart]),
    )


def _noisy(
    labels: NDArray[np.int64], settings: Settings, node_config: Mapping[str, Any]
) -> NDArray[np.int64]:
    """Replace a share of the labels by classes that are drawn evenly, node by node."""
    rng = np.random.default_rng([settings.seed, _NOISE, *_words_of(node_config)])
    count = round(settings.data.label_noise * len(labels))
    noisy = labels.copy()
    classes = data.spec(settings.data.name).num_classes
    noisy[rng.permutation(len(labels))[:count]] = rng.integers(classes, size=count)
    return noisy


def client_id(node_config: Mapping[str, Any]) -> int | str:
    """Return who a node is when it comes back; -1 where its config does not say."""
    if "client-id" in node_config:
        return str(node_config["client-id"])
    return int(node_config.get("partition-id", -1))


def guidance_privacy(settings: Settings) -> GuidancePrivacy | None:
    """Return what clients do to their guidance before it leaves; None: nothing."""
    chosen = settings.exploration
    if not chosen.privacy_noise:
        return None
    return GuidancePrivacy(clip=chosen.privacy_clip, noise=chosen.privacy_noise)


def check_nodes(settings: Settings, connected: int) -> None:
    """Refuse to wait for nodes that do not come."""
    needed = settings.strategy.min_nodes
    if connected < needed:
        raise NodesError(
            f"preset {settings.preset} needs {needed} nodes (strategy.min-nodes), "
            f"{connected} are connected after {settings.strategy.wait:g} s. In a "
            f"simulation: `autoflip run {settings.preset}`, or `flwr run` with "
            f'--federation-config "num-supernodes={needed} client-resources-num-cpus=1"'
            ". With real nodes: start more, or set strategy.min-nodes or "
            "strategy.wait (seconds)"
        )


def call_seed(
    settings: Settings, config: Mapping[str, Any], node_config: Mapping[str, Any]
) -> int:
    """Return the seed of one call: by run, round, exploration epoch and node."""
    place = int(config.get("server-round", 0)), int(config.get(EPOCH, -1)) + 1
    words = [settings.seed, *place, *_words_of(node_config)]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _words_of(node_config: Mapping[str, Any]) -> list[int]:
    """Return what a node's randomness follows from."""
    words = [int(node_config.get("partition-id", 0))]
    if "data-path" in node_config:  # which may be the same in all containers
        name = node_config.get("client-id", node_config["data-path"])
        words.append(zlib.crc32(str(name).encode()))
    return words


def training_of_round(
    settings: Settings, config: Mapping[str, Any]
) -> TrainingSettings:
    """Return the training settings of the message's round: the learning rate decays."""
    training = settings.training
    past = max(0, int(config.get("server-round", 1)) - 1)
    rate = training.learning_rate * training.learning_rate_decay**past
    return training.model_copy(update={"learning_rate": rate})


def metrics_of(settings: Settings, samples: int, **values: float) -> MetricRecord:
    """Return the metrics of a reply, with what the strategy weights it by."""
    equal = {} if settings.strategy.weighted else {EQUAL_WEIGHT: 1.0}
    return MetricRecord({"num-examples": samples, **equal, **values})
