"""What a strategy asks of whatever makes the masks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr import mask as masking
from autoflip_flwr.errors import SettingsError
from autoflip_flwr.groups import Limits, Units
from autoflip_flwr.settings import PruningSettings, RivalSettings
from autoflip_flwr.types import Array, Masks, Measure, Params, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What some nodes are to measure before a round.

    Attributes
    ----------
    nodes : sequence of int
    measure : Measure
    renew : bool
        From now on nodes explore from the current global weights, not from `W0`.
    current : bool
        From the current global model under its mask, not from dense weights.
    """

    nodes: Sequence[int]
    measure: Measure = "deviation"
    renew: bool = False
    current: bool = False


class Pruner(ABC):
    """Makes the mask of each round, from what nodes measure or the server knows.

    Parameters
    ----------
    initial : mapping of name -> array
        The prunable weights of the start (`W0`).
    settings : PruningSettings
    units : Units, optional
        The model's units, where whole ones are to be pruned.
    rivals : RivalSettings, optional
        What only rivals have.
    seed : int, optional
        Decides all that is drawn.

    Attributes
    ----------
    restores : bool
        Whether the server must remember pruned weights, to offer them again.
    kept_guidance : float32 array or None
        Guidance of the entries the last mask keeps, flat, in the mask's order.
    """

    restores = False
    kept_guidance: NDArray[np.float32] | None = None

    def __init__(
        self,
        initial: Params,
        settings: PruningSettings,
        units: Units | None = None,
        *,
        rivals: RivalSettings | None = None,
        seed: int | None = None,
    ) -> None:
        self.settings = settings
        self._units = units
        self._rivals = rivals or RivalSettings()
        self._rng = np.random.default_rng(seed)
        self._shapes = {name: np.shape(value) for name, value in initial.items()}
        self._initial: dict[str, Array] = dict(initial)
        self._begin()

    def _begin(self) -> None:
        """Check the settings and prepare, knowing the weights of the start."""
        masking.check_floor(
            [math.prod(shape) for shape in self._shapes.values()],
            threshold=self.settings.threshold,
            mode=self.settings.mode,
            floor=self.settings.floor,
        )

    def start(self) -> None:  # noqa: B027 - most leave nothing behind
        """Delete what an earlier run may have left; not called where one goes on."""

    def state(self) -> dict[str, Any]:
        """Return what a process that goes on has to know: plain values and arrays."""
        return {"rng": self._rng.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises
        ------
        CheckpointError
            If what it stands on is not there any more.
        """
        self._rng.bit_generator.state = state["rng"]

    def asks(
        self, server_round: int, *, connected: Sequence[int], sampled: Sequence[int]
    ) -> Ask | None:
        """Tell who is to measure what before this round; None: nobody."""
        del server_round, connected, sampled
        return None

    def add(self, node_id: int, frame: bytes, weight: float, start: Params) -> None:
        """Take what a node measured.

        Parameters
        ----------
        node_id : int
        frame : bytes
            As `codec.quantize` wrote it.
        weight : float
            How many examples the node has, > 0.
        start : mapping of name -> array
            The prunable weights it was measured from.

        Raises
        ------
        WireError
            If the frame does not fit the model; nothing has changed.
        """
        del node_id, frame, weight, start

    def explored(self) -> list[float]:
        """Return the means of the guidance that earlier explorers sent."""
        return []

    def check(self, reasons: Mapping[int, str]) -> None:
        """Refuse to go on if no mask can be made; `reasons` say why nodes failed.

        Raises
        ------
        ExplorationError
            If it needs what nodes measure, and nobody's came.
        """
        del reasons

    @abstractmethod
    def masks(
        self, sampled: Sequence[int], weights: Params, server_round: int
    ) -> Masks:
        """Make the mask of a round.

        Parameters
        ----------
        sampled : sequence of int
            The nodes of the round.
        weights : mapping of name -> array
            The server's prunable weights.
        server_round : int
            From 1.

        Raises
        ------
        MaskError
            If the mask would cut a layer off.
        """

    def learn(self, agreement: NDArray[np.float32] | None, masks: Masks) -> None:
        """Take what the clients of a round showed.

        Parameters
        ----------
        agreement : float32 array or None
            ``|sum_k w_k sign(update_k)|`` with weights that sum to 1, in [0, 1], of the
            kept entries, flat, in the mask's order; None if nobody asked for it.
        masks : mapping of name -> bool array
            The round's.
        """
        del agreement, masks

    def cut(
        self,
        scores: Scores,
        *,
        unit_budget: int = 0,
        unit_scores: NDArray[np.float64] | None = None,
        overwrite: bool = False,
    ) -> dict[str, NDArray[np.bool_]]:
        """Keep the highest scores, at the density of the settings.

        Parameters
        ----------
        scores : mapping of name -> array
        unit_budget : int
            How many of the pruned entries fall on whole units, at most.
        unit_scores : float64 array, optional
            One score per unit; by default the mean over the entries that go with it.
        overwrite : bool
            The scores may be written over.
        """
        settings = self.settings
        masks = masking.from_scores(
            scores,
            threshold=settings.threshold,
            mode=settings.mode,
            floor=settings.floor,
            units=(
                self._unit_masks(scores, unit_budget, unit_scores)
                if unit_budget
                else None
            ),
            overwrite=overwrite,
        )
        masking.check_layers(masks)
        return masks

    def pruned_count(self, scores: Scores) -> int:
        """Count the entries that the settings prune."""
        settings = self.settings
        return masking.pruned_count(
            scores, threshold=settings.threshold, mode=settings.mode
        )

    def _unit_masks(
        self, scores: Scores, budget: int, unit_scores: NDArray[np.float64] | None
    ) -> Masks:
        """Prune whole units, of at most so many entries."""
        units = self._known_units()
        keep = units.choose(
            scores, budget=budget, limits=limits_of(self.settings), means=unit_scores
        )
        return units.masks(keep, scores)

    def _what_for(self) -> str:
        """Say what needs the model's units."""
        return f"pruning.units {self.settings.units} prunes whole units, which"

    def _known_units(self) -> Units:
        if self._units is None:
            raise SettingsError(
                f"{self._what_for()} needs the model: AutoFLIP(..., model=Net(), "
                "example_inputs=one_sample)"
            )
        return self._units


class FixedPruner(Pruner):
    """Holds on to one mask until there is reason to choose another."""

    def _begin(self) -> None:
        super()._begin()
        self._chosen: Masks | None = None

    def state(self) -> dict[str, Any]:
        """Return the mask, too."""
        return {**super().state(), "chosen": self._chosen}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        super().restore(state)
        self._chosen = state["chosen"]


def limits_of(settings: PruningSettings) -> Limits:
    """Return what every group of units keeps."""
    return Limits(
        floor=settings.floor,
        min_units=settings.min_units,
        multiple=settings.unit_multiple,
    )
