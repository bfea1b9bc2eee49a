"""The strategies that sample and aggregate, by name."""

from pathlib import Path
from typing import Any

import torch
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
    inner = _inner(settings)
    method = settings.strategy.name
    if method == "fedavg":
        return inner
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


def _inner(settings: Settings) -> FedAvg:
    chosen = settings.strategy
    kind, names = _KINDS[chosen.server]
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
