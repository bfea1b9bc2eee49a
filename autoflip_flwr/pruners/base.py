"""What makes the mask of each round: the interface, and what all share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import SettingsError
from autoflip_flwr.method import mask as masking
from autoflip_flwr.method.structured import Limits, Units
from autoflip_flwr.pruners.store import Measured
from autoflip_flwr.settings import ExplorationSettings, PruningSettings
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a pruner is to prune, and how much.

    Attributes
    ----------
    initial : mapping of name -> array
        The prunable weights of the start (`W0`).
    pruning : PruningSettings
    exploration : ExplorationSettings
    directory : Path
        Where it may keep what nodes measured.
    units : Units or None
        The model's units, where they were asked for and the model is known.
    seed : int or None
        Decides all that is drawn.
    trainable_known : bool
        Whether somebody said what is trainable.
    """

    initial: Params
    pruning: PruningSettings = field(default_factory=PruningSettings)
    exploration: ExplorationSettings = field(default_factory=ExplorationSettings)
    directory: Path = Path()
    units: Units | None = None
    seed: int | None = None
    trainable_known: bool = True


class Pruner(ABC):
    """Makes the mask of each round, from what nodes measure or the server knows.

    A subclass writes `masks`, most often as ``return self.cut(scores)``. One that wants
    nodes to measure something writes `asks` and `add`, too. `AutoFLIP` hands it the
    model once, by `prepare`; before that it knows its own settings alone.

    Attributes
    ----------
    needs_units : bool
        Whether it prunes whole units, so that the model must be handed over.
    takes_units : bool
        Whether it looks at the units where the model is known.
    restores : bool
        Whether the server must remember pruned weights, to offer them again.
    settings : PruningSettings
        How much to prune, and what every layer keeps.
    initial : dict of name -> array
        The prunable weights of the start (`W0`).
    shapes : dict of name -> shape
        Of the prunable weights, in the model's order.
    units : Units or None
    rng : numpy.random.Generator
        The only source of what is drawn.
    kept_guidance : float32 array or None
        Guidance of the entries the last mask keeps, flat, in the mask's order.

    Examples
    --------
    ::

        class Smallest(Pruner):
            def masks(self, sampled, weights, server_round):
                return self.cut({name: abs(w) for name, w in weights.items()})


        strategy = AutoFLIP(FedAvg(), threshold=0.8, pruner=Smallest())
    """

    needs_units: ClassVar[bool] = False
    takes_units: ClassVar[bool] = False
    restores = False
    kept_guidance: NDArray[np.float32] | None = None

    def prepare(self, problem: Problem) -> None:
        """Begin anew, with what is to be pruned; wrong settings are refused here."""
        self.settings = problem.pruning
        self.initial: dict[str, Array] = dict(problem.initial)
        self.shapes = {name: np.shape(value) for name, value in self.initial.items()}
        self.units = problem.units
        self.rng = np.random.default_rng(problem.seed)
        self.kept_guidance = None
        masking.check_floor(
            [math.prod(shape) for shape in self.shapes.values()],
            threshold=self.settings.threshold,
            mode=self.settings.mode,
            floor=self.settings.floor,
        )

    def start(self) -> None:  # noqa: B027 - most leave nothing behind
        """Delete what an earlier run may have left; not called where one goes on."""

    def state(self) -> dict[str, Any]:
        """Return what a process that goes on has to know: plain values and arrays."""
        return {"rng": self.rng.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises
        ------
        CheckpointError
            If what it stands on is not there any more.
        """
        self.rng.bit_generator.state = state["rng"]

    def asks(
        self, server_round: int, *, connected: Sequence[int], sampled: Sequence[int]
    ) -> Ask | None:
        """Tell who is to measure what before this round; None: nobody."""
        del server_round, connected, sampled
        return None

    def add(self, node_id: int, measured: Measured, start: Params) -> None:
        """Take what a node measured.

        Parameters
        ----------
        node_id : int
        measured : Measured
            It fits the model.
        start : mapping of name -> array
            The prunable weights it was measured from.
        """
        del node_id, measured, start

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
        return self.known_units().prune(
            scores, budget=budget, limits=limits_of(self.settings), means=unit_scores
        )

    def _what_for(self) -> str:
        """Say what needs the model's units."""
        return f"units={self.settings.units} prunes whole units, which"

    def known_units(self) -> Units:
        """Return the model's units.

        Raises
        ------
        SettingsError
            If the model was not handed over.
        """
        if self.units is None:
            raise SettingsError(
                f"{self._what_for()} needs the model: AutoFLIP(..., model=Net(), "
                "example_inputs=one_sample)"
            )
        return self.units


class FixedPruner(Pruner):
    """Holds on to one mask until there is reason to choose another."""

    def prepare(self, problem: Problem) -> None:
        """Begin without a mask."""
        super().prepare(problem)
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
