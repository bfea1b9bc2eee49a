"""What makes the masks: AutoFLIP, and the rivals it is compared with."""

from pathlib import Path
from typing import get_args

from autoflip_flwr.groups import Units
from autoflip_flwr.pruners.autoflip import AutoFlipPruner
from autoflip_flwr.pruners.base import Ask, Pruner
from autoflip_flwr.pruners.gradients import (
    FedDstPruner,
    PruneFlPruner,
    SsflPruner,
)
from autoflip_flwr.pruners.weights import (
    BatchNormPruner,
    EflPruner,
    L1Pruner,
    L2Pruner,
    MagnitudePruner,
    RandomPruner,
    SimilarityPruner,
)
from autoflip_flwr.settings import ExplorationSettings, PruningSettings, RivalSettings
from autoflip_flwr.types import MethodName, Params

__all__ = [
    "METHODS",
    "NEEDS_UNITS",
    "Ask",
    "AutoFlipPruner",
    "Pruner",
    "build",
]

_RIVALS: dict[MethodName, type[Pruner]] = {
    "random": RandomPruner,
    "magnitude": MagnitudePruner,
    "l1": L1Pruner,
    "l2": L2Pruner,
    "similarity": SimilarityPruner,
    "bn": BatchNormPruner,
    "eflprune": EflPruner,
    "ssfl": SsflPruner,
    "prunefl": PruneFlPruner,
    "feddst": FedDstPruner,
}

METHODS: tuple[MethodName, ...] = get_args(MethodName)

#: Rivals that prune whole units.
NEEDS_UNITS: frozenset[MethodName] = frozenset(
    {"l1", "l2", "similarity", "bn", "eflprune"}
)


def build(
    method: MethodName,
    initial: Params,
    *,
    pruning: PruningSettings,
    exploration: ExplorationSettings,
    rivals: RivalSettings,
    directory: Path,
    units: Units | None,
    seed: int | None,
    trainable_known: bool,
) -> Pruner:
    """Return the pruner of a method, by name.

    Parameters
    ----------
    method : MethodName
    initial : mapping of name -> array
        The prunable weights of the start.
    pruning, exploration, rivals : settings
    directory : Path
        Where local guidance may lie.
    units : Units or None
    seed : int, optional
        Decides all that is drawn.
    trainable_known : bool
        Whether somebody said what is trainable.
    """
    if method == "autoflip":
        return AutoFlipPruner(
            initial,
            pruning,
            directory,
            units,
            exploration=exploration,
            seed=seed,
            trainable_known=trainable_known,
        )
    return _RIVALS[method](initial, pruning, units, rivals=rivals, seed=seed)
