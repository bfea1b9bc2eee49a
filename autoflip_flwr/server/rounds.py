"""The server's state from round to round: global weights, mask, what was dropped."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoflip_flwr.errors import SettingsError
from autoflip_flwr.method import mask as masking
from autoflip_flwr.method.structured import Units
from autoflip_flwr.pruners import Problem, Pruner
from autoflip_flwr.server.diagnostics import Diagnostics
from autoflip_flwr.settings import ExplorationSettings, PruningSettings
from autoflip_flwr.types import Array, Params, ValueType
from autoflip_flwr.wire.manifest import Manifest
from autoflip_flwr.wire.records import Plan

_log = logging.getLogger("flwr")


class Rounds:
    """What the server knows: the global weights and the round's mask.

    Attributes
    ----------
    arrays : mapping of name -> array
        The global model. Where pruned weights are kept (`pruned_weights="keep"`)
        they are in here, and nowhere else.
    initial : mapping of name -> array
        The weights that nodes explore from (`W0`).
    plan : Plan or None
        Manifest and mask of the current round.
    diagnostics : Diagnostics
    dropped : dict of node id -> reason
        Replies of the current round that were left out.
    """

    def __init__(
        self,
        pruner: Pruner,
        pruning: PruningSettings,
        exploration: ExplorationSettings,
        *,
        directory: Path,
        values: ValueType = "float32",
        units: Units | None = None,
        seed: int | None = None,
    ) -> None:
        self.pruning = pruning
        self.exploration = exploration
        self.pruner = pruner
        self.values = values
        self.directory = directory
        self.arrays: Params = {}
        self.initial: Params = {}
        self.plan: Plan | None = None
        self.diagnostics = Diagnostics(signs=pruning.agreement == "sign")
        self.dropped: dict[int, str] = {}
        self.fresh = True  # not a run that goes on
        self._units = units
        self._seed = seed
        self._previous: Plan | None = None
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """Names, shapes and types of the model's arrays."""
        assert self._manifest is not None, "adopt() first"
        return self._manifest

    @property
    def restores(self) -> bool:
        """Whether pruned weights are remembered, to be offered again."""
        return self.pruner.restores

    def adopt(self, arrays: Params) -> None:
        """Take a global model from outside; the first one is `W0`."""
        if self._manifest is None:
            self._check_units(arrays)
            self._manifest = Manifest.of(
                arrays, prunable=self.pruning.prunable, exclude=self.pruning.exclude
            )
            self.initial = dict(arrays)
            self.pruner.prepare(
                Problem(
                    initial=self.weights(arrays),
                    pruning=self.pruning,
                    exploration=self.exploration,
                    directory=self.directory,
                    units=self._units,
                    seed=self._seed,
                    trainable_known=self.pruning.prunable is not None,
                )
            )
            if self.fresh:
                self.pruner.start()
        self.arrays = dict(arrays)

    def state(self) -> dict[str, Any]:
        """Return what a process that goes on has to know, besides the arrays.

        Plain values and arrays. It may be asked for between rounds.
        """
        return {
            "initial": self.initial,
            "masks": None if self.plan is None else self.plan.masks,
            "pruner": self.pruner.state(),
        }

    def restore(self, state: Mapping[str, Any], arrays: Params) -> None:
        """Go on where `state` was taken, with the global model `arrays`.

        Raises
        ------
        CheckpointError
            If local guidance that it stands on is not there any more.
        """
        self.fresh = False
        self.adopt(state["initial"])
        self.pruner.restore(state["pruner"])
        self.arrays = dict(arrays)
        self.initial = dict(state["initial"])
        masks = state["masks"]
        self.plan = None if masks is None else Plan(self.manifest, masks, self.values)
        self._previous = self.plan

    def begin(self, server_round: int, sampled: Sequence[int]) -> Plan:
        """Make the mask of a round for the sampled nodes."""
        masks = self.pruner.masks(sampled, self.weights(self.arrays), server_round)
        seen = self.diagnostics
        if self.plan is not None:
            before = self.plan.masks
            seen.mask_change = 0.0 if masks is before else masking.change(before, masks)
        seen.begin()
        self._previous = self.plan
        self.plan = Plan(self.manifest, masks, self.values)
        self.dropped = {}
        _log.info("mask: density %.4f, changed %.4f", self.density, seen.mask_change)
        return self.plan

    def drop(self, server_round: int, node_id: int, reason: str) -> None:
        """Leave a node's reply out of the round, and say so."""
        self.dropped[node_id] = reason
        _log.warning(
            "round %d: the reply of node %d is dropped: %s",
            server_round,
            node_id,
            reason,
        )

    def abandon(self, server_round: int, reason: str) -> None:
        """End a round that changed nothing: the model keeps the mask it has."""
        self.plan = self._previous
        _log.warning("round %d: %s: the model stays as it was", server_round, reason)

    def finish(self, aggregated: Params) -> None:
        """Take what the inner strategy made of the replies as the global model.

        Types are restored (Flower averages integers to floats). Entries the round
        pruned have learned nothing: they become zero, or keep the value they had.
        """
        assert self.plan is not None
        keep_values = self.restores
        settled: dict[str, Array] = {}
        for entry in self.manifest.entries:
            value = np.asarray(aggregated[entry.name])
            if entry.dtype[1] in "iu" and value.dtype.kind == "f":
                value = np.rint(value)
            value = np.array(value, dtype=entry.dtype)
            if entry.masked:
                pruned = ~self.plan.masks[entry.name]
                value[pruned] = self.arrays[entry.name][pruned] if keep_values else 0
            settled[entry.name] = value
        self.arrays = settled
        self._previous = self.plan  # from now on the mask this model has
        agreement = self.diagnostics.finish(self.pruner.kept_guidance)
        self.pruner.learn(agreement, self.plan.masks)

    def masked_arrays(self) -> Params:
        """Return the global model as clients know it: pruned entries zero."""
        if self.plan is None:
            return self.arrays
        return masking.apply(self.arrays, self.plan.masks)

    def weights(self, arrays: Params) -> Params:
        """Return the prunable ones of a model's arrays."""
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

    def _check_units(self, arrays: Params) -> None:
        """Refuse units of another model than the one that travels."""
        shapes = {name: np.shape(value) for name, value in arrays.items()}
        for name, shape in (self._units.shapes if self._units else {}).items():
            if shapes.get(name) != shape:
                raise SettingsError(
                    f"{name}: expected the shape {shape} of the model that was handed "
                    f"over, got {shapes.get(name, 'no such array')} in the initial "
                    f"arrays; known: {list(shapes)}"
                )
