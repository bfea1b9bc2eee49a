"""The server's store of local guidance: one quantised frame per node, on disk."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from autoflip_flwr.codec import QuantizedGuidance, Shapes, dequantize
from autoflip_flwr.guidance import Statistics, statistics


class GuidanceStore:
    """Local guidance by node id, one byte per parameter, outside of memory.

    What stays in memory per explorer is a handful of numbers per tensor.

    Parameters
    ----------
    directory : Path
        Made if missing. One file per node, written atomically.
    shapes : mapping of name -> shape
        The prunable parameters, in order.
    """

    def __init__(self, directory: Path, shapes: Shapes) -> None:
        self._directory = directory
        self._shapes = shapes
        self._statistics: dict[int, Statistics] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def __contains__(self, node_id: int) -> bool:
        return node_id in self._statistics

    def __len__(self) -> int:
        return len(self._statistics)

    def __iter__(self) -> Iterator[int]:
        return iter(self._statistics)

    def check(self, frame: bytes) -> None:
        """Refuse a frame that does not fit the shapes with a WireError."""
        dequantize(frame, self._shapes)

    def put(self, node_id: int, frame: bytes) -> QuantizedGuidance:
        """Keep a node's frame, replacing an earlier one.

        Raises
        ------
        WireError
            If the frame does not fit the shapes; the store is unchanged.
        """
        guidance = dequantize(frame, self._shapes)
        found = _statistics(guidance)
        path = self._path(node_id)
        partial = path.with_suffix(".partial")
        partial.write_bytes(frame)
        partial.replace(path)
        self._statistics[node_id] = found
        return guidance

    def get(self, node_id: int) -> QuantizedGuidance:
        """Return a node's guidance, read from disk as it is used.

        Raises
        ------
        KeyError
            If the node has none.
        """
        if node_id not in self._statistics:
            raise KeyError(f"no local guidance of node {node_id}")
        frame = np.memmap(self._path(node_id), np.uint8, mode="r")
        return dequantize(frame.data, self._shapes)

    def statistics(self, node_id: int) -> Statistics:
        """Mean and extremes of a node's guidance, without reading it."""
        return self._statistics[node_id]

    def clear(self) -> None:
        """Forget all guidance, and delete what an earlier run may have left."""
        self._statistics.clear()
        for path in self._directory.glob("*.guidance"):
            path.unlink()

    def _path(self, node_id: int) -> Path:
        return self._directory / f"{node_id}.guidance"


def _statistics(guidance: QuantizedGuidance) -> Statistics:
    """Statistics of the whole matrix, holding one dense tensor at a time."""
    total, count = 0.0, 0
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for name, codes in guidance.codes.items():
        found = statistics({name: guidance.tables[name][codes]})
        total += found.mean * codes.size
        count += codes.size
        low[name], high[name] = found.low[name], found.high[name]
    return Statistics(mean=total / count, low=low, high=high)
