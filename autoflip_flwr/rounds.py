"""The server's state from round to round, without Flower's message types.

The strategy and the adapter for Flower's older API are thin translators around it.
"""

import logging
import math
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr import mask as masking
from autoflip_flwr.codec import VALUE_TYPES, dequantize
from autoflip_flwr.errors import (
    ExplorationError,
    GuidanceError,
    SettingsError,
    WireError,
)
from autoflip_flwr.groups import Units
from autoflip_flwr.manifest import Manifest
from autoflip_flwr.pruner import Pruner
from autoflip_flwr.settings import ExplorationSettings, PruningSettings
from autoflip_flwr.types import Array, Params, ValueType
from autoflip_flwr.wire import Plan

_log = logging.getLogger("flwr")

_BATCH_BYTES = 1 << 30
_LEAST_BATCH = 8


class Rounds:
    """What the server knows: the global weights, who explored, the round's mask.

    Attributes
    ----------
    arrays : mapping of name -> array
        The global model. Where pruned weights are kept (`pruned_weights="keep"`)
        they are in here, and nowhere else.
    plan : Plan or None
        Manifest and mask of the current round.
    mask_change : float
        Share of the mask's entries that the last round changed.
    update_variance : float or None
        Mean over the kept parameters of the variance of the clients' updates.
    dropped : dict of node id -> reason
        Replies of the current round that were left out.
    """

    def __init__(
        self,
        pruning: PruningSettings,
        exploration: ExplorationSettings,
        *,
        values: ValueType = "float32",
        prunable: Sequence[str] | None = None,
        store: Path | None = None,
        seed: int | None = None,
        units: Units | None = None,
    ) -> None:
        self.pruning = pruning
        self.exploration = exploration
        self.arrays: Params = {}
        self.plan: Plan | None = None
        self.mask_change = 0.0
        self.update_variance: float | None = None
        self.dropped: dict[int, str] = {}
        if values not in VALUE_TYPES:
            raise SettingsError(
                f"unknown value type {values!r}; known: {list(VALUE_TYPES)}"
            )
        self._values = values
        self._prunable = prunable
        self._units = units
        self._rng = np.random.default_rng(seed)
        if store is None:
            store = Path(tempfile.mkdtemp("-autoflip"))
            weakref.finalize(self, shutil.rmtree, store, ignore_errors=True)
        self._store = store
        self._previous: Plan | None = None
        self._manifest: Manifest | None = None
        self._pruner: Pruner | None = None
        self._initial: Params = {}
        self._asked: set[int] = set()
        self._restart = False
        self._spread: _Spread | None = None
        self._reasons: dict[int, str] = {}

    @property
    def manifest(self) -> Manifest:
        """Names, shapes and types of the model's arrays."""
        assert self._manifest is not None, "adopt() first"
        return self._manifest

    @property
    def initial(self) -> Params:
        """The weights everyone explores from (`W0`)."""
        return self._initial

    @property
    def pruner(self) -> Pruner:
        """Guidance in, masks out."""
        assert self._pruner is not None, "adopt() first"
        return self._pruner

    def adopt(self, arrays: Params) -> None:
        """Take a global model from outside; the first one is `W0`."""
        if self._manifest is None:
            self._check_units(arrays)
            self._manifest = Manifest.of(
                arrays, prunable=self._prunable, exclude=self.pruning.exclude
            )
            self._initial = dict(arrays)
            self._pruner = Pruner(
                self._weights(arrays), self.pruning, self._store, self._units
            )
        self.arrays = dict(arrays)

    def explorers(
        self, server_round: int, *, connected: Sequence[int], sampled: Sequence[int]
    ) -> list[int]:
        """Return the nodes that are to explore before this round.

        Before the first round (and every `exploration.every` rounds) the share
        `exploration.fraction` of the connected nodes; later, of those sampled for
        the first time.
        """
        every = self.exploration.every
        if every and server_round > 1 and (server_round - 1) % every == 0:
            self._asked.clear()
            self._initial = dict(self.arrays)
            self._restart = True  # the old guidance stays until there is new
        first = not self._asked
        candidates = connected if first else sampled
        new = [node_id for node_id in candidates if node_id not in self._asked]
        self._asked.update(new)
        fraction = self.exploration.fraction
        if fraction == 1.0 or not new:
            return new
        if first:
            count = max(1, round(fraction * len(new)))
            chosen = set(self._rng.choice(len(new), size=count, replace=False).tolist())
            return [node_id for i, node_id in enumerate(new) if i in chosen]
        return [node_id for node_id in new if self._rng.random() < fraction]

    def batches(self, asked: Sequence[int]) -> list[Sequence[int]]:
        """Divide explorers so that a batch's replies fit in about a gigabyte."""
        frame = sum(math.prod(shape) for shape in self.manifest.shapes.values())
        size = max(_LEAST_BATCH, _BATCH_BYTES // max(1, frame))
        return [asked[start : start + size] for start in range(0, len(asked), size)]

    def explored(self, asked: Sequence[int], frames: Mapping[int, bytes | str]) -> None:
        """Take the explorers' frames; a text is the reason why there is none."""
        failed = 0
        for node_id in asked:
            frame = frames.get(node_id, "no reply in time")
            try:
                if isinstance(frame, str):
                    raise WireError(frame)
                dequantize(frame, self.manifest.shapes)
                if self._restart:
                    self.pruner.restart(self._weights(self._initial))
                    self._restart = False
                self.pruner.add(node_id, frame)
            except ValueError as error:
                failed += 1
                self._reasons[node_id] = str(error)
                _log.warning("exploration: node %d is left out: %s", node_id, error)
        _log.info(
            "exploration: %d of %d nodes explored", len(asked) - failed, len(asked)
        )

    def check_explored(self) -> None:
        """Refuse to go on without guidance, or with parameters nobody trains.

        Raises
        ------
        ExplorationError
            If nobody's guidance came.
        GuidanceError
            If a tensor moved for no explorer and nobody said what is trainable: it
            is frozen or a buffer, and would be the first to be pruned.
        """
        if self.pruner.explorers == 0:
            raise ExplorationError(
                f"none of {len(self._reasons)} nodes completed its exploration, so no "
                f"mask can be made; reasons by node: {self._reasons}"
            )
        still = self.pruner.still()
        if still and self._prunable is None:
            raise GuidanceError(
                f"{still} moved for none of {self.pruner.explorers} explorers: frozen "
                "parameters or buffers, which pruning would take first; name them in "
                "`exclude`, or the trainable parameters in `prunable`"
            )

    def begin(self, sampled: Sequence[int]) -> Plan:
        """Make the mask of a round for the sampled nodes."""
        masks = self.pruner.masks(sampled)
        if self.plan is not None:
            before = self.plan.masks
            self.mask_change = 0.0 if masks is before else masking.change(before, masks)
        self._previous = self.plan
        self.plan = Plan(self.manifest, masks, self._values)
        self.dropped = {}
        self.update_variance = None
        self._spread = None
        _log.info("mask: density %.4f, changed %.4f", self.density, self.mask_change)
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

    def observe(self, sent: bytes, received: bytes) -> None:
        """Note one client's update, from the frames that went out and came back."""
        if self._spread is None:
            assert self.plan is not None
            self._spread = _Spread(sent, self.plan.values)
        self._spread.add(received)

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
        keep_values = self.pruning.pruned_weights == "keep"
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
        if self._spread is not None:
            self.update_variance = self._spread.variance()

    def masked_arrays(self) -> Params:
        """Return the global model as clients know it: pruned entries zero."""
        if self.plan is None:
            return self.arrays
        return masking.apply(self.arrays, self.plan.masks)

    @property
    def density(self) -> float:
        """Share of the prunable parameters that the current mask keeps."""
        return 1.0 if self.plan is None else masking.density(self.plan.masks)

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

    def _weights(self, arrays: Params) -> Params:
        return {name: arrays[name] for name in self.manifest.shapes}


class _Spread:
    """Variance of the clients' updates, summed as they come."""

    def __init__(self, sent: bytes, values: ValueType) -> None:
        self._type = np.dtype(values).newbyteorder("<")
        self._start = np.frombuffer(sent, self._type).astype(np.float32)
        self._sum: NDArray[np.float32] = np.zeros_like(self._start)
        self._squares = 0.0
        self._count = 0

    def add(self, received: bytes) -> None:
        update = np.frombuffer(received, self._type).astype(np.float32)
        update -= self._start
        self._squares += float(np.dot(update, update))
        self._sum += update
        self._count += 1

    def variance(self) -> float:
        size = self._sum.size
        if size == 0:
            return 0.0
        of_mean = float(np.dot(self._sum, self._sum)) / self._count
        return max(0.0, (self._squares - of_mean) / (self._count * size))
