"""What nodes have explored, and its combination into one guidance (Eq. 3)."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from autoflip_flwr.method.guidance import (
    SUMS,
    LocalMatrix,
    Rescaling,
    Statistics,
    add_normalized,
    clipped,
    clipped_weight,
    middle,
    rescaling,
)
from autoflip_flwr.method.parallel import parallel_map
from autoflip_flwr.pruners.store import GuidanceStore, Measured
from autoflip_flwr.settings import PruningSettings
from autoflip_flwr.types import Float32, Nodes

#: Values, over all explorers, that robust combination reads at a time.
_ROBUST_BLOCK = 1 << 22

#: Name of a tensor -> its combined guidance, flat.
Combined: TypeAlias = Callable[[str], Float32]


class Explorers:
    """The local guidance of all nodes that have explored, by node id.

    Memory does not grow with their number. Their matrices stay on disk; the sum over
    all of them is one running sum. A combination over some of them sums their one-byte
    codes tensor by tensor.
    """

    def __init__(self, store: GuidanceStore, settings: PruningSettings) -> None:
        self._store = store
        self._settings = settings
        self._sizes = {name: math.prod(shape) for name, shape in store.shapes.items()}
        self._sum: dict[str, Float32] | None = None  # over all, in the store's order
        self._clipped_weights: dict[int, float] = {}  # of nodes, for `clipped-mean`

    def __contains__(self, node_id: int) -> bool:
        return node_id in self._store

    def __len__(self) -> int:
        return len(self._store)

    def __iter__(self) -> Iterator[int]:
        return iter(self._store)

    def add(self, node_id: int, measured: Measured) -> None:
        """Take a node's guidance, in place of an earlier one of it."""
        replaced = node_id in self._store
        self._store.put(node_id, measured)
        self._clipped_weights.pop(node_id, None)
        if replaced:
            self._sum = None  # all guidance on disk is summed again
        elif self._settings.combination in SUMS and (
            self._sum is not None or len(self._store) == 1
        ):
            self._add_to_sum(node_id, measured.guidance())

    def dense(self, node_id: int) -> dict[str, Float32]:
        """Return a node's guidance as arrays."""
        return self._store.get(node_id).dense()

    def means(self) -> list[float]:
        """Return the mean guidance of each node."""
        return self._store.means()

    def overall(self) -> Statistics:
        """Return mean and extremes over all nodes, of which there is at least one."""
        return self._store.overall()

    def combined(self, sampled: Nodes, share: float) -> Combined:
        """Return a function: name -> guidance of the tensor, flat.

        ``(1 - share) * that of the sampled + share * that of all``, each a mean,
        clipped mean, median or trimmed mean, as the settings say.
        """
        summed = self._settings.combination in SUMS
        return (self._mean if summed else self._robust)(sampled, share)

    def release(self) -> None:
        """Free the running sum; the next combination reads all guidance again."""
        self._sum = None

    def forget(self) -> None:
        """Drop all guidance; an earlier checkpoint may need the files."""
        self._store.forget()
        self._clipped_weights.clear()
        self._sum = None

    def clear(self) -> None:
        """Drop all guidance, and delete the files of an earlier run."""
        self.forget()
        self._store.clear()

    def state(self) -> dict[str, Any]:
        """Return what is in memory and cannot be computed from the files."""
        return self._store.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`; a CheckpointError if a file of it has changed."""
        self._store.restore(state)

    def _mean(self, sampled: Nodes, share: float) -> Combined:
        """Return a function: name -> mean guidance of the tensor."""
        local = [self._store.get(n) for n in sampled] if share < 1 else []
        every = [self._store.statistics(n) for n in sampled]
        normalization = self._settings.normalization
        everyone = self._sum_of_all() if share > 0 else {}
        overall = self._store.overall()

        def one(name: str) -> Float32:
            total = np.zeros(self._sizes[name], np.float32)
            if local:
                scale = rescaling(every, name, normalization=normalization)
                scale = self._clipped(scale, sampled)
                add_normalized(total, name, local, scale, weight=1 - share)
            if everyone:
                mean = self._mean_of_sum(overall, name)
                total += np.float32(share * mean.scales[0]) * everyone[name]
                total += np.float32(share * mean.offset)
            return np.maximum(total, 0, out=total)  # rounding can go below zero

        return one

    def _robust(self, sampled: Nodes, share: float) -> Combined:
        """Return a function: name -> median or trimmed mean of the tensor's guidance.

        It reads each explorer's file once per mask.
        """
        parts = [(1 - share, list(sampled)), (share, [*self._store])]
        parts = [(weight, nodes) for weight, nodes in parts if weight > 0]
        nodes = list(dict.fromkeys(n for _, group in parts for n in group))
        rows = {node_id: row for row, node_id in enumerate(nodes)}

        def one(name: str) -> Float32:
            total = np.zeros(self._sizes[name], np.float32)
            tables = self._normalized(nodes, name)
            block = max(1, _ROBUST_BLOCK // len(nodes))
            for start, codes in self._store.codes(nodes, name, block):
                values = np.take_along_axis(tables, codes, axis=1)
                for weight, group in parts:
                    total[start : start + block] += np.float32(weight) * middle(
                        values[[rows[n] for n in group]],
                        combination=self._settings.combination,
                        trim=self._settings.trim,
                    )
            return total

        return one

    def _normalized(self, node_ids: Nodes, name: str) -> Float32:
        """Return the values of nodes' codes, each divided by its node's mean."""
        tables = self._store.tables(node_ids, name)
        for table, node_id in zip(tables, node_ids, strict=True):
            own = [self._store.statistics(node_id)]
            alone = rescaling(own, name, normalization="client")
            table *= np.float32(alone.scales[0])
            table += np.float32(alone.offset)
        return tables

    def _sum_of_all(self) -> Mapping[str, Float32]:
        """Return the sum of all matrices; with `client`, each divided by its mean."""
        if self._sum is None:
            for node_id in self._store:
                self._add_to_sum(node_id, self._store.get(node_id))
        assert self._sum is not None
        return self._sum

    def _add_to_sum(self, node_id: int, guidance: LocalMatrix) -> None:
        if self._sum is None:
            self._sum = {
                n: np.zeros(size, np.float32) for n, size in self._sizes.items()
            }
        total = self._sum
        if self._settings.normalization == "client":
            alone = [self._store.statistics(node_id)]
            scale = rescaling(alone, next(iter(self._sizes)), normalization="client")
        else:
            scale = Rescaling([1.0], 0.0)
        scale = self._clipped(scale, [node_id])
        parallel_map(
            lambda name: add_normalized(total[name], name, [guidance], scale),
            self._sizes,
        )

    def _clipped(self, rescale: Rescaling, nodes: Nodes) -> Rescaling:
        """Return the map of the combination, for the guidance of some nodes."""
        if self._settings.combination == "mean":
            return rescale
        for node_id in nodes:
            if node_id not in self._clipped_weights:
                self._clipped_weights[node_id] = clipped_weight(
                    self._store.get(node_id),
                    self._sizes,
                    self._store.statistics(node_id).mean,
                )
        return clipped(rescale, [self._clipped_weights[node_id] for node_id in nodes])

    def _mean_of_sum(self, overall: Statistics, name: str) -> Rescaling:
        """Return the map from the running sum to the normalized mean of all nodes."""
        normalization = self._settings.normalization
        if normalization == "client":
            return Rescaling([1.0 / len(self._store)], 0.0)
        whole = rescaling([overall], name, normalization=normalization)
        return Rescaling([whole.scales[0] / len(self._store)], whole.offset)
