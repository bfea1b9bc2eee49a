"""The strategies that sample and aggregate, by name."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from autoflip_flwr import pruners
from autoflip_flwr.app.build import EQUAL_WEIGHT
from autoflip_flwr.server.strategy import AutoFLIP
from autoflip_flwr.settings import ExplorationSettings, ServerStrategy, Settings

#: Flower's class, and the arguments of it that are settings of ours.
_KINDS: dict[ServerStrategy, tuple[type[FedAvg], tuple[str, ...]]] = {
    "fedavg": (FedAvg, ()),
    "fedavgm": (flower.FedAvgM, ("server_learning_rate", "server_momentum")),
    "fedadam": (flower.FedAdam, ("eta",)),
    "fedprox": (flower.FedProx, ("proximal_mu",)),
    "fedmedian": (flower.FedMedian, ()),
    "krum": (flower.Krum, ("num_malicious_nodes",)),
}
#: What these are called with us, where it is not the same.
_OURS = {"eta": "server_learning_rate", "num_malicious_nodes": "malicious_nodes"}


def build_strategy(
    settings: Settings,
    model: nn.Module,
    example_inputs: torch.Tensor,
    store: Path | None = None,
) -> Strategy:
    """Return the strategy of a run; `store` is the folder for explorers' guidance."""
    method = settings.strategy.name
    if method == "fedavg":
        return _inner(settings, {name for name, _ in model.named_buffers()})
    inner = _inner(settings)
    exploration = settings.exploration
    if method != "autoflip":  # a baseline reads the timeout alone, see `settings.reads`
        exploration = ExplorationSettings(timeout=exploration.timeout)
    return AutoFLIP(
        inner,
        model=model,
        example_inputs=example_inputs,
        pruner=pruners.build(method, settings.baselines),
        pruning=settings.pruning,
        exploration=exploration,
        wire=settings.wire,
        store=store,
        seed=settings.seed,
    )


def _inner(settings: Settings, buffers: Collection[str] = ()) -> FedAvg:
    chosen = settings.strategy
    kind, names = _KINDS[chosen.server]
    if buffers and chosen.server in ("fedavgm", "fedadam"):  # as AutoFLIP does
        kind = _averaging(kind, buffers)
    options = {name: getattr(chosen, _OURS.get(name, name)) for name in names}
    given: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    if not chosen.weighted:
        given["weighted_by_key"] = EQUAL_WEIGHT
    return kind(
        fraction_train=chosen.fraction_train,
        fraction_evaluate=chosen.fraction_evaluate,
        min_train_nodes=1,
        min_evaluate_nodes=1 if chosen.fraction_evaluate else 0,
        min_available_nodes=chosen.min_nodes,
        **given,
    )


def _averaging(kind: type[FedAvg], buffers: Collection[str]) -> type[FedAvg]:
    """Return a strategy whose optimizer leaves buffers at the clients' mean.

    Flower's optimizers move all arrays: momentum carries BatchNorm's running variance
    below zero, and the model returns NaN.
    """

    def aggregate_train(
        self: FedAvg, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        mean, _ = FedAvg.aggregate_train(self, server_round, replies)
        made, metrics = kind.aggregate_train(self, server_round, replies)
        if made is not None and mean is not None:
            made.update({name: mean[name] for name in buffers})
        return made, metrics

    return type(kind.__name__, (kind,), {"aggregate_train": aggregate_train})
