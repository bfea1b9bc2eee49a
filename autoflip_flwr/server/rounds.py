"""The server's state from round to round: global weights, mask, dropped replies."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from autoflip_flwr.errors import CheckpointError, SettingsError, one_line
from autoflip_flwr.method import mask as masking
from autoflip_flwr.method.structured import Units
from autoflip_flwr.pruners import Problem, Pruner
from autoflip_flwr.server.diagnostics import Diagnostics
from autoflip_flwr.server.held import HeldMasks
from autoflip_flwr.settings import ExplorationSettings, PruningSettings
from autoflip_flwr.types import Array, Masks, Params, ValueType
from autoflip_flwr.wire import codec
from autoflip_flwr.wire.manifest import Manifest
from autoflip_flwr.wire.records import Plan

_log = logging.getLogger("flwr")

#: Of a denser mask indices take more than 0.6 of the model's memory.
_SPARSE = 0.3


@dataclass(eq=False, repr=False)
class Rounds:
    """The global weights and the mask of the round."""

    pruner: Pruner
    pruning: PruningSettings
    exploration: ExplorationSettings
    directory: Path = field(kw_only=True)
    values: ValueType = field(default="float32", kw_only=True)
    units: Units | None = field(default=None, kw_only=True)
    ties: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        # The global model. With `pruned_weights="keep"` it includes the values of
        # pruned weights; no other copy of them exists.
        self.arrays: Params = {}
        self.initial: Params = {}  # what nodes explore from (`W0`)
        self.plan: Plan | None = None  # manifest and mask of the current round
        self.diagnostics = Diagnostics(signs=self.pruning.agreement == "sign")
        self.held = HeldMasks()
        self.dropped: dict[int, str] = {}  # node -> why its reply of the round is
        self.number = 0  # of the round
        self.fresh = True  # False in a resumed run
        self.total: int | None = None  # rounds of the run; None: unknown
        self.trained: bool | None = None  # by any round; None: none has begun
        self.reason = ""  # why the last abandoned round changed nothing
        self._previous: Plan | None = None
        self._unmasked: Params = {}  # the weights that an open round began with
        self._manifest: Manifest | None = None

    @property
    def adopted(self) -> bool:
        """Whether a global model has come: the run has begun."""
        return self._manifest is not None

    @property
    def manifest(self) -> Manifest:
        """Names, shapes and types of the model's arrays."""
        assert self._manifest is not None, "adopt() first"
        return self._manifest

    def adopt(self, arrays: Params) -> None:
        """Take a global model from outside; the first one is `W0`."""
        if self._manifest is None:
            self._check_shapes(arrays)
            self._manifest = Manifest.of(
                arrays,
                prunable=self.pruning.prunable,
                exclude=self.pruning.exclude,
                ties=self.ties,
            )
            self.initial = dict(arrays)
            self.pruner.prepare(
                Problem(
                    initial=self.weights(arrays),
                    pruning=self.pruning,
                    exploration=self.exploration,
                    directory=self.directory,
                    units=self.units,
                    seed=self.seed,
                    trainable_known=self.pruning.prunable is not None,
                    rounds=self.total,
                )
            )
            if self.fresh:
                self.pruner.start()
        self.arrays = dict(arrays)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without the global model.

        Plain values and arrays; to be called between rounds.
        """
        return {
            "initial": self.initial,
            "masks": None if self.plan is None else self.plan.masks,
            "pruner": self.pruner.state(),
        }

    def restore(self, state: Mapping[str, Any], arrays: Params) -> None:
        """Go on from `state` with the global model `arrays`.

        It is a CheckpointError if local guidance that the state needs is missing.
        """
        self.fresh = False
        self.adopt(state["initial"])
        self.pruner.restore(state["pruner"])
        self.arrays = dict(arrays)
        self.initial = dict(state["initial"])
        masks = state["masks"]
        if masks is not None and set(masks) != set(self.manifest.shapes):
            raise CheckpointError(
                f"expected masks of {list(self.manifest.shapes)}, got {list(masks)}: "
                "the strategy knew the model, or its tied weights, otherwise; begin "
                "the run again in another folder"
            )
        self.plan = None if masks is None else Plan(self.manifest, masks, self.values)
        self._previous = self.plan

    def begin(self, server_round: int, sampled: Sequence[int]) -> Plan:
        """Make the mask of a round for the sampled nodes.

        From here on `arrays` are masked, unless the pruner restores what it pruned: so
        a reply that is filled with them, and what comes of it, is the masked model.
        """
        self.number = server_round
        masks = self.pruner.masks(sampled, self.weights(self.arrays), server_round)
        if self.plan is not None:
            before = self.plan.masks
            changed = 0.0 if masks is before else masking.change(before, masks)
            self.diagnostics.mask_change = changed
        self.diagnostics.begin()
        self.trained = self.trained or False
        self._previous = self.plan
        self.plan = Plan(self.manifest, masks, self.values, self._indices(masks))
        self.dropped = {}
        self._unmasked = self.arrays
        if not self.pruner.restores:
            self.arrays = self.masked_arrays()
        changed = self.diagnostics.mask_change
        _log.info("mask: density %.4f, changed %.4f", self.density, changed)
        return self.plan

    def _indices(self, masks: Masks) -> codec.Indices | None:
        """Return the indices of a mask, which are kept for as long as it stays."""
        if self._previous is not None and self._previous.masks is masks:
            return self._previous.kept
        sparse = masking.density(masks) <= _SPARSE
        return codec.indices(masks) if sparse else None

    def drop(self, node_id: int, reason: str) -> None:
        """Leave a node's reply out of the round, with a log line."""
        self.dropped[node_id] = reason = one_line(reason)
        _log.warning(
            "round %d: the reply of node %d is dropped: %s",
            *(self.number, node_id, reason),
        )

    def abandon(self, reason: str) -> None:
        """End a round without a change: the model keeps its weights and its mask."""
        self.plan, self.reason = self._previous, reason
        self.arrays, self._unmasked = self._unmasked or self.arrays, {}
        _log.warning("round %d: %s: the model stays as it was", self.number, reason)

    def finish(self, aggregated: Params) -> None:
        """Take the aggregate of the inner strategy as the global model.

        Arrays get their own type back, since Flower averages integers and truth values
        to floats. No client trained the pruned entries: they become zero, or keep their
        value.
        """
        assert self.plan is not None
        settled: dict[str, Array] = {}
        for entry in self.manifest.distinct.entries:
            value = np.asarray(aggregated[entry.name])
            if entry.dtype[1] in "iub" and value.dtype.kind == "f":
                value = np.rint(value)
            value = np.array(value, dtype=entry.dtype)
            if entry.masked:
                pruned = ~self.plan.masks[entry.name]
                before = self.arrays[entry.name]
                value[pruned] = before[pruned] if self.pruner.restores else 0
            settled[entry.name] = value
        self.arrays = self.manifest.tied(settled)
        self.trained, self._unmasked = True, {}
        self._previous = self.plan  # the mask of the new model
        agreement = self.diagnostics.finish(self.pruner.kept_guidance)
        self.pruner.learn(agreement, self.plan.masks)

    def masked_arrays(self) -> Params:
        """Return the global model as clients know it: pruned entries zero."""
        if self.plan is None:
            return self.arrays
        return self.manifest.tied(masking.apply(self.arrays, self.plan.masks))

    def weights(self, arrays: Params) -> Params:
        """Return the prunable arrays of a model."""
        return {name: arrays[name] for name in self.manifest.shapes}

    @property
    def density(self) -> float:
        """Share of the prunable parameters that the current mask keeps."""
        return 1.0 if self.plan is None else masking.density(self.plan.masks)

    @property
    def pruned(self) -> int:
        """Number of parameters that the current mask prunes."""
        masks = {} if self.plan is None else self.plan.masks
        return sum(int(keep.size - np.count_nonzero(keep)) for keep in masks.values())

    def _check_shapes(self, arrays: Params) -> None:
        """Refuse a model that was handed over and is not the federation's.

        It may have arrays that do not travel, unless units were traced on it.
        """
        shapes = {name: np.shape(value) for name, value in arrays.items()}
        expected = {n: shape for n, shape in self.shapes.items() if n in shapes}
        expected |= self.units.shapes if self.units else {}
        for name, shape in expected.items():
            if shapes.get(name) != shape:
                raise SettingsError(
                    f"{name}: expected the shape {shape} of the model that was handed "
                    f"over, got {shapes.get(name, 'no such array')} in the initial "
                    f"arrays; known: {list(shapes)}"
                )
