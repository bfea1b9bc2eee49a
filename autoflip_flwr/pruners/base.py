"""`Pruner`, the interface of AutoFLIP and its baselines, and their shared code."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import SettingsError
from autoflip_flwr.method import mask as masking
from autoflip_flwr.method.schedule import density
from autoflip_flwr.method.structured import Keep, Limits, Units
from autoflip_flwr.pruners.store import Measured
from autoflip_flwr.settings import ExplorationSettings, PruningSettings
from autoflip_flwr.types import (
    Array,
    Balance,
    Float32,
    Mask,
    Masks,
    Measure,
    Nodes,
    Params,
    Scores,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request to nodes to measure something before a round."""

    nodes: Nodes
    measure: Measure = "deviation"
    renew: bool = False  # explore from the current global weights from now on, not `W0`
    current: bool = False  # measure the current masked model, not dense weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The model and the settings that a pruner gets."""

    initial: Params  # the initial prunable weights (`W0`)
    pruning: PruningSettings = field(default_factory=PruningSettings)
    exploration: ExplorationSettings = field(default_factory=ExplorationSettings)
    directory: Path = Path()  # for measurements on disk
    units: Units | None = None  # None: not needed, or the model is unknown
    seed: int | None = None
    trainable_known: bool = True  # whether the trainable parameters are known
    rounds: int | None = None  # number of rounds of the run; None: unknown


class Pruner(ABC):
    """Makes the mask of each round.

    A subclass implements `masks`, usually as ``return self.cut(scores)``. If it needs
    measurements of nodes, it also implements `asks` and `add`. `AutoFLIP` calls
    `prepare` once with the model and the settings, before all other methods.

    Attributes
    ----------
    explores : bool
        Whether it asks nodes to explore. If not, a warm start asks them.
    needs_units : bool
        Whether it prunes whole units; then the user must pass the model.
    takes_units : bool
        Whether it uses the units if the model is known.
    restores : bool
        Whether the server keeps the values of pruned weights, so that they can return.
    settings : PruningSettings
    initial : dict of name -> array
        The initial prunable weights (`W0`).
    shapes : dict of name -> shape
        Of the prunable weights, in the model's order.
    units : Units or None
    spared : tuple of str
        Vectors that are kept whole.
    rng : numpy.random.Generator
        The only source of randomness.
    kept_guidance : float32 array or None
        Guidance of the entries that the last mask keeps, flat, in the mask's order.

    Examples
    --------
    ::

        class Smallest(Pruner):
            def masks(self, sampled, weights, server_round):
                return self.cut({name: abs(w) for name, w in weights.items()})


        strategy = AutoFLIP(FedAvg(), threshold=0.8, pruner=Smallest())
    """

    explores: ClassVar[bool] = False
    needs_units: ClassVar[bool] = False
    takes_units: ClassVar[bool] = False
    restores = False
    kept_guidance: Float32 | None = None

    #: Attributes that a checkpoint holds, besides the state of `rng`.
    _saved: ClassVar[tuple[str, ...]] = ()

    def prepare(self, problem: Problem) -> None:
        """Start with a model and settings; raise an error if they do not fit."""
        self.settings = problem.pruning
        self.initial: dict[str, Array] = dict(problem.initial)
        self.shapes = {name: np.shape(value) for name, value in self.initial.items()}
        self.units = problem.units
        self.rng = np.random.default_rng(problem.seed)
        self.kept_guidance = None
        self._gradual_rounds = self.settings.falling_rounds(problem.rounds)
        self.spared = self._spared_vectors()
        floor = self.settings.floor
        masking.check_floor(
            [math.prod(shape) for shape in self.shapes.values()],
            threshold=self.settings.threshold,
            mode=self.settings.mode,
            floors=[1.0 if name in self.spared else floor for name in self.shapes],
        )

    def start(self) -> None:  # noqa: B027 - most pruners write no files
        """Delete the files of an earlier run; not called when a run resumes."""

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: plain values and arrays."""
        parts = {name.lstrip("_"): getattr(self, name) for name in self._saved}
        return {
            "rng": self.rng.bit_generator.state,
            "gradual_rounds": self._gradual_rounds,  # a longer run keeps the schedule
            **{k: v.state() if hasattr(v, "state") else v for k, v in parts.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`; a CheckpointError if a file of it has changed."""
        self.rng.bit_generator.state = state["rng"]
        self._gradual_rounds = state["gradual_rounds"]
        for name in self._saved:
            part, value = getattr(self, name), state[name.lstrip("_")]
            if hasattr(part, "restore"):
                part.restore(value)
            else:
                setattr(self, name, value)

    def asks(
        self, server_round: int, *, connected: Nodes, sampled: Nodes
    ) -> Ask | None:
        """Return which nodes measure what before this round, or None."""
        del server_round, connected, sampled
        return None

    def add(self, node_id: int, measured: Measured, start: Params) -> None:
        """Take the measurement of a node, which fits the model.

        `start` are the prunable weights that the node started from.
        """
        del node_id, measured, start

    def guidance(self) -> dict[str, Float32]:
        """Return the mean guidance of all explorers; empty where there is none."""
        return {}

    def explored(self) -> list[float]:
        """Return the mean guidance of each earlier explorer."""
        return []

    def check(self, reasons: Mapping[int, str]) -> None:
        """Raise an ExplorationError if no mask can be made.

        `reasons` tell why nodes failed to measure.
        """
        del reasons

    @abstractmethod
    def masks(self, sampled: Nodes, weights: Params, server_round: int) -> Masks:
        """Make the mask of a round.

        Parameters
        ----------
        sampled : sequence of int
            Ids of the nodes of the round.
        weights : mapping of name -> array
            The server's prunable weights.
        server_round : int
            From 1.

        Raises
        ------
        MaskError
            If the mask would cut a layer off.
        """

    def observe(self, weights: Params, examples: float) -> None:
        """Take the weights of one client after its training, the pruned ones unchanged.

        `weights` has all arrays of the model; `examples` is the client's weight.
        """
        del weights, examples

    def learn(self, agreement: Float32 | None, masks: Masks) -> None:
        """Take the agreement of the clients of a round, float32 in [0, 1].

        ``|sum_k w_k sign(update_k)|`` with weights that sum to 1, of the entries that
        `masks` keep, flat, in their order. None if the settings do not use it.
        """
        del agreement, masks

    def cut(
        self,
        scores: Scores,
        *,
        threshold: float | None = None,
        balance: Balance = "global",
        unit_budget: int = 0,
        unit_scores: NDArray[np.float64] | None = None,
        keep: Keep | None = None,
        overwrite: bool = False,
    ) -> dict[str, Mask]:
        """Keep the largest scores, and all vectors where the settings spare them.

        Parameters
        ----------
        scores : mapping of name -> array
        threshold : float, optional
            That of a round, see `threshold_of`; by default that of the settings.
        balance : {"global", "lamp"}
            How tensors share what is kept, see `mask.from_scores`.
        unit_budget : int
            At most so many of the pruned entries belong to whole pruned units.
        unit_scores : float64 array, optional
            One score per unit; by default the mean over the entries of the unit.
        keep : bool array, optional
            The units to keep, in place of a budget. Single weights empty none of them.
        overwrite : bool
            Whether the scores may be overwritten.
        """
        settings = self.settings
        unit_masks = held = None
        if keep is not None:
            held = self.known_units().largest(scores, keep)
        elif unit_budget:
            keep = self.known_units().choose(
                scores,
                budget=unit_budget,
                limits=limits_of(settings),
                means=unit_scores,
            )
        if keep is not None:
            unit_masks = self.known_units().masks(keep, scores)
        masks = masking.from_scores(
            scores,
            threshold=settings.threshold if threshold is None else threshold,
            mode=settings.mode,
            floor=settings.floor,
            whole=self.spared,
            balance=balance,
            units=unit_masks,
            held=held,
            overwrite=overwrite,
        )
        masking.check_layers(masks)
        return masks

    def _spared_vectors(self) -> tuple[str, ...]:
        """Return the vectors, unless they were most of what the settings keep."""
        settings = self.settings
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        vectors = tuple(n for n, shape in self.shapes.items() if len(shape) < 2)
        kept = float(sum(sizes.values()))
        if settings.mode != "value":
            kept -= self.pruned_count(self.initial)
        most = sum(sizes[name] for name in vectors)
        floor = settings.floor
        others = sum(math.ceil(floor * n) for v, n in sizes.items() if v not in vectors)
        small = most <= min(kept / 2, kept - others)
        return vectors if small and not settings.vectors else ()

    def threshold_of(self, server_round: int) -> float:
        """Return the threshold of a round, which rises to that of the settings.

        ``value`` has no density that could fall: its threshold is the same always.
        """
        settings = self.settings
        if settings.mode == "value" or server_round > self._gradual_rounds:
            return settings.threshold
        ratio = settings.mode == "compression"
        final = 1 / settings.threshold if ratio else 1 - settings.threshold
        share = density(
            server_round,
            first=settings.initial_density,
            final=final,
            rounds=self._gradual_rounds,
        )
        if share <= final:
            return settings.threshold
        return 1 / share if ratio else 1 - share

    def pruned_count(self, scores: Scores, threshold: float | None = None) -> int:
        """Count the entries that a threshold prunes, by default the settings'."""
        settings = self.settings
        return masking.pruned_count(
            scores,
            threshold=settings.threshold if threshold is None else threshold,
            mode=settings.mode,
        )

    def known_units(self) -> Units:
        """Return the model's units; a SettingsError if the model is unknown."""
        if self.units is None:
            named = type(self).__name__
            cause = named if self.needs_units else f"units={self.settings.units}"
            raise SettingsError(
                f"{cause} prunes whole units, which needs the model: "
                "AutoFLIP(..., model=Net(), example_inputs=one_sample)"
            )
        return self.units


class FixedPruner(Pruner):
    """Keeps one mask until the subclass chooses another."""

    _saved: ClassVar[tuple[str, ...]] = ("_chosen",)

    def prepare(self, problem: Problem) -> None:
        """Start without a mask."""
        super().prepare(problem)
        self._chosen: Masks | None = None


def limits_of(settings: PruningSettings) -> Limits:
    """Return what every group of units keeps at least."""
    return Limits(
        floor=settings.floor,
        min_units=settings.min_units,
        multiple=settings.unit_multiple,
    )
