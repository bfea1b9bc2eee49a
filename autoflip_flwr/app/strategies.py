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
from autoflip_flwr.server.strategy import AutoFLIP
from autoflip_flwr.settings import ServerStrategy, Settings

_KINDS: dict[ServerStrategy, type[FedAvg]] = {
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedprox": FedProx,
    "fedmedian": FedMedian,
    "krum": Krum,
}


def build_strategy(
    settings: Settings,
    model: nn.Module,
    example_inputs: torch.Tensor,
    *,
    store: Path | None = None,
) -> Strategy:
    """Return the strategy that a run's settings ask for.

    Parameters
    ----------
    settings : Settings
    model : nn.Module
        Says what is trainable, and what its units are.
    example_inputs : torch.Tensor
        One sample that it runs on.
    store : Path, optional
        Where what clients found is kept; a temporary folder by default.
    """
    inner = _inner(settings)
    method = settings.strategy.name
    if method == "fedavg":
        return inner
    return AutoFLIP(
        inner,
        model=model,
        example_inputs=example_inputs,
        pruner=pruners.build(method, settings.baselines),
        pruning=settings.pruning,
        exploration=settings.exploration,
        wire=settings.wire,
        store=store,
        seed=settings.seed,
    )


def _inner(settings: Settings) -> FedAvg:
    chosen = settings.strategy
    options: dict[str, Any] = {}
    if chosen.server == "fedprox":
        options["proximal_mu"] = chosen.proximal_mu
    if chosen.server == "krum":
        options["num_malicious_nodes"] = chosen.malicious_nodes
    if chosen.server_learning_rate is not None:
        key = {"fedavgm": "server_learning_rate", "fedadam": "eta"}.get(chosen.server)
        if key:
            options[key] = chosen.server_learning_rate
    if chosen.server_momentum is not None and chosen.server == "fedavgm":
        options["server_momentum"] = chosen.server_momentum
    return _KINDS[chosen.server](
        fraction_train=chosen.fraction_train,
        fraction_evaluate=chosen.fraction_evaluate,
        min_train_nodes=1,
        min_evaluate_nodes=1 if chosen.fraction_evaluate else 0,
        min_available_nodes=chosen.min_nodes,
        **options,
    )
