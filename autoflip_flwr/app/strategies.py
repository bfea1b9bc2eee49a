"""The strategies that sample and aggregate, by name."""

from pathlib import Path
from typing import Any

import torch
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    Krum,
    Strategy,
)
from torch import nn

from autoflip_flwr import pruners
from autoflip_flwr.app.build import EQUAL_WEIGHT
from autoflip_flwr.server.strategy import AutoFLIP
from autoflip_flwr.settings import ExplorationSettings, ServerStrategy, Settings

#: Flower's class, and which of our settings are which of its arguments.
_KINDS: dict[ServerStrategy, tuple[type[FedAvg], dict[str, str]]] = {
    "fedavg": (FedAvg, {}),
    "fedavgm": (
        FedAvgM,
        {
            "server_learning_rate": "server_learning_rate",
            "server_momentum": "server_momentum",
        },
    ),
    "fedadam": (FedAdam, {"server_learning_rate": "eta"}),
    "fedprox": (FedProx, {"proximal_mu": "proximal_mu"}),
    "fedmedian": (FedMedian, {}),
    "krum": (Krum, {"malicious_nodes": "num_malicious_nodes"}),
}


def build_strategy(
    settings: Settings,
    model: nn.Module,
    example_inputs: torch.Tensor,
    *,
    store: Path | None = None,
) -> Strategy:
    """Return the strategy that a run's settings ask for.

    `example_inputs` is one sample that `model` runs on; `store` is the folder for the
    explorers' guidance, a temporary one by default.
    """
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
    options = {name: getattr(chosen, key) for key, name in names.items()}
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
