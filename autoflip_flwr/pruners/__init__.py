"""AutoFLIP and its baselines, which make the masks.

`Pruner` is the interface, also for your own pruner. `store` keeps the nodes' answers on
the server's disk. May import `method`, `wire.codec`, `settings`, `types` and `errors`;
imports neither torch nor Flower.
"""

from collections.abc import Callable

from autoflip_flwr.errors import SettingsError
from autoflip_flwr.pruners.autoflip import AutoFlipPruner
from autoflip_flwr.pruners.base import Ask, Problem, Pruner
from autoflip_flwr.pruners.dynamic import FedDST, FedRTS, FedTiny
from autoflip_flwr.pruners.gradients import SSFL, PruneFL
from autoflip_flwr.pruners.weights import (
    L1,
    L2,
    BatchNormScale,
    EFLPrune,
    Magnitude,
    Random,
    Similarity,
)
from autoflip_flwr.settings import BaselineSettings, kebab, reads
from autoflip_flwr.types import MethodName

__all__ = [
    "L1",
    "L2",
    "SSFL",
    "Ask",
    "AutoFlipPruner",
    "BatchNormScale",
    "EFLPrune",
    "FedDST",
    "FedRTS",
    "FedTiny",
    "Magnitude",
    "Problem",
    "PruneFL",
    "Pruner",
    "Random",
    "Similarity",
    "build",
]

_PRUNERS: dict[MethodName, Callable[..., Pruner]] = {
    "autoflip": AutoFlipPruner,
    "random": Random,
    "magnitude": Magnitude,
    "l1": L1,
    "l2": L2,
    "similarity": Similarity,
    "bn": BatchNormScale,
    "eflprune": EFLPrune,
    "ssfl": SSFL,
    "prunefl": PruneFL,
    "feddst": FedDST,
    "fedrts": FedRTS,
    "fedtiny": FedTiny,
}


def build(method: MethodName, settings: BaselineSettings | None = None) -> Pruner:
    """Return the pruner of a method, by its name in presets."""
    if method not in _PRUNERS:
        raise SettingsError(f"unknown method {method!r}; known: {list(_PRUNERS)}")
    values = (settings or BaselineSettings()).model_dump(exclude_none=True)
    return _PRUNERS[method](
        **{k: v for k, v in values.items() if reads(method, f"baselines.{kebab(k)}")}
    )
