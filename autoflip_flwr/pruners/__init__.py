"""AutoFLIP and its baselines, which make the masks.

`Pruner` is the interface, also for your own pruner. `store` keeps the nodes' answers on
the server's disk. May import `method`, `wire.codec`, `settings`, `types` and `errors`;
imports neither torch nor Flower.
"""

from collections.abc import Callable
from typing import get_args

from autoflip_flwr.errors import SettingsError
from autoflip_flwr.pruners.autoflip import AutoFlipPruner
from autoflip_flwr.pruners.base import Ask, Problem, Pruner
from autoflip_flwr.pruners.gradients import SSFL, FedDST, PruneFL
from autoflip_flwr.pruners.weights import (
    L1,
    L2,
    BatchNormScale,
    EFLPrune,
    Magnitude,
    Random,
    Similarity,
)
from autoflip_flwr.settings import BaselineSettings
from autoflip_flwr.types import MethodName

__all__ = [
    "L1",
    "L2",
    "METHODS",
    "SSFL",
    "Ask",
    "AutoFlipPruner",
    "BatchNormScale",
    "EFLPrune",
    "FedDST",
    "Magnitude",
    "Problem",
    "PruneFL",
    "Pruner",
    "Random",
    "Similarity",
    "build",
]

METHODS: tuple[MethodName, ...] = get_args(MethodName)

_JUDGES_WEIGHTS: dict[MethodName, Callable[..., Pruner]] = {
    "magnitude": Magnitude,
    "l1": L1,
    "l2": L2,
    "similarity": Similarity,
    "bn": BatchNormScale,
    "eflprune": EFLPrune,
}


def build(method: MethodName, settings: BaselineSettings | None = None) -> Pruner:
    """Return the pruner of a method, by its name in presets."""
    if method not in METHODS:
        raise SettingsError(f"unknown method {method!r}; known: {list(METHODS)}")
    chosen = settings or BaselineSettings()
    every = {} if chosen.every is None else {"every": chosen.every}
    if method in _JUDGES_WEIGHTS:
        return _JUDGES_WEIGHTS[method](dense_rounds=chosen.dense_rounds)
    if method == "random":
        return Random()
    if method == "ssfl":
        return SSFL()
    if method == "prunefl":
        return PruneFL(**every)
    if method == "feddst":
        return FedDST(**every, replaced=chosen.replaced, until=chosen.until)
    return AutoFlipPruner()
