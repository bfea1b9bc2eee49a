"""What nodes told the server, on its disk: local guidance, and answers of a round."""

import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.codec import (
    HEADER_BYTES,
    QuantizedGuidance,
    Shapes,
    dequantize,
    level_values,
)
from autoflip_flwr.errors import CheckpointError
from autoflip_flwr.guidance import Statistics, statistics

#: Frames of a node on the disk: of the round, and of the two checkpoints before it.
_SLOTS = 3


class GuidanceStore:
    """Local guidance by node id, one byte per parameter, outside of memory.

    What stays in memory per explorer is a row of numbers: its mean, two per tensor.

    Parameters
    ----------
    directory : Path
        Made when needed. Files are written atomically. A node's later frame does not
        overwrite the two before it, which the checkpoints that are kept may stand on.
    shapes : mapping of name -> shape
        The prunable parameters, in order.
    """

    def __init__(self, directory: Path, shapes: Shapes) -> None:
        self._directory = directory
        self._shapes = shapes
        self._rows: dict[int, int] = {}
        self._crcs = np.empty(0, np.uint32)
        #: Of a row: the mean, the least and then the largest values of all tensors.
        self._numbers = np.empty((0, 1 + 2 * len(shapes)))
        self._slots: dict[int, int] = {}  # also of nodes whose guidance is forgotten

    def __contains__(self, node_id: int) -> bool:
        return node_id in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

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
        found = statistics_of(guidance)
        slot = (self._slots.get(node_id, -1) + 1) % _SLOTS
        write(self._path(node_id, slot), frame, sync=True)
        self._slots[node_id] = slot
        row = self._rows.setdefault(node_id, len(self._rows))
        if row == len(self._crcs):
            size = max(16, 2 * row)
            self._crcs = np.resize(self._crcs, size)
            self._numbers = np.resize(self._numbers, (size, self._numbers.shape[1]))
        self._crcs[row] = zlib.crc32(frame)
        self._numbers[row] = found.mean, *found.low.values(), *found.high.values()
        return guidance

    def get(self, node_id: int) -> QuantizedGuidance:
        """Return a node's guidance, read from disk as it is used.

        Raises
        ------
        KeyError
            If the node has none.
        """
        if node_id not in self._rows:
            raise KeyError(f"no local guidance of node {node_id}")
        path = self._path(node_id, self._slots[node_id])
        return dequantize(np.memmap(path, np.uint8, mode="r").data, self._shapes)

    def tables(self, node_ids: Sequence[int], name: str) -> NDArray[np.float32]:
        """Return what the codes of one tensor stand for, shape (nodes, 256)."""
        offset = HEADER_BYTES * list(self._shapes).index(name)
        found = np.empty((len(node_ids), 256), np.float32)
        for row, path in zip(found, self._paths(node_ids), strict=True):
            low, high = np.fromfile(path, "<f4", 2, offset=offset).tolist()
            row[:] = level_values(low, high)
        return found

    def codes(
        self, node_ids: Sequence[int], name: str, block: int
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Read one tensor of many nodes a block at a time.

        Yields
        ------
        start : int
            Of the block in the flat tensor.
        codes : uint8 array, shape (nodes, <= block)
        """
        sizes = {each: math.prod(shape) for each, shape in self._shapes.items()}
        before = list(sizes)[: list(sizes).index(name)]
        offset = HEADER_BYTES * len(sizes) + sum(sizes[each] for each in before)
        paths = self._paths(node_ids)
        for start in range(0, sizes[name], block):
            count = min(block, sizes[name] - start)
            found = np.empty((len(paths), count), np.uint8)
            for row, path in zip(found, paths, strict=True):
                row[:] = np.fromfile(path, np.uint8, count, offset=offset + start)
            yield start, found

    def statistics(self, node_id: int) -> Statistics:
        """Mean and extremes of a node's guidance, without reading it."""
        return self._statistics(self._numbers[self._rows[node_id]])

    def means(self) -> list[float]:
        """Return the means of all nodes' guidance."""
        found: list[float] = self._numbers[: len(self), 0].tolist()
        return found

    def overall(self) -> Statistics:
        """Mean and extremes of all nodes' guidance together; of one or more."""
        numbers, tensors = self._numbers[: len(self)], len(self._shapes)
        mean = numbers[:, 0].mean()
        low = numbers[:, 1 : 1 + tensors].min(axis=0)
        high = numbers[:, 1 + tensors :].max(axis=0)
        return self._statistics(np.concatenate([[mean], low, high]))

    def _statistics(self, numbers: NDArray[np.float64]) -> Statistics:
        mean, *extremes = numbers.tolist()
        low = dict(zip(self._shapes, extremes, strict=False))
        high = dict(zip(self._shapes, extremes[len(low) :], strict=True))
        return Statistics(mean=mean, low=low, high=high)

    def forget(self) -> None:
        """Hold no guidance any more; the files stay, for an earlier checkpoint."""
        self._rows.clear()

    def clear(self) -> None:
        """Forget all guidance, and delete what an earlier run may have left."""
        self._rows.clear()
        self._slots.clear()
        _delete(self._directory, "*.guidance", "*.partial")

    def state(self) -> dict[str, Any]:
        """Return what stays in memory."""
        return {
            "nodes": np.array([*self._rows], np.uint64),
            "crcs": self._crcs[: len(self)].copy(),
            "numbers": self._numbers[: len(self)].copy(),
            "written": np.array([*self._slots], np.uint64),
            "slots": np.array([*self._slots.values()], np.uint8),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take the files of an earlier process for this one's.

        Raises
        ------
        CheckpointError
            If a file is missing, or not the one that the state was made with.
        """
        written, slots = state["written"].tolist(), state["slots"].tolist()
        self._slots = dict(zip(written, slots, strict=True))
        self._crcs, self._numbers = state["crcs"], state["numbers"]
        self._rows = {n: row for row, n in enumerate(state["nodes"].tolist())}
        for node_id, expected in zip(self._rows, self._crcs.tolist(), strict=True):
            path = self._path(node_id, self._slots[node_id])
            try:
                found = zlib.crc32(path.read_bytes())
            except OSError as error:
                raise CheckpointError(
                    f"the checkpoint needs the guidance in {path}: {error.strerror}"
                ) from error
            if found != expected:
                raise CheckpointError(
                    f"{path} is torn or of a later round: expected the checksum "
                    f"{expected:08x}, got {found:08x}"
                )

    def _paths(self, node_ids: Sequence[int]) -> list[Path]:
        return [self._path(node_id, self._slots[node_id]) for node_id in node_ids]

    def _path(self, node_id: int, slot: int) -> Path:
        return self._directory / f"{node_id}.{slot}.guidance"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node replied that was asked to explore, or to measure."""

    frame: bytes
    signs: bytes | None = None  # which weights rose, for a warm start
    examples: float = 1.0  # 1 where the app does not say


class Answers:
    """The answers of one round, on disk as they come.

    So a server that is killed while nodes explore asks only those again whose answer
    had not come, and memory does not grow with their number.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._round = 0
        self._told: set[int] = set()

    def __contains__(self, node_id: int) -> bool:
        """Tell whether a node has answered, or failed to, in this round."""
        return node_id in self._told

    def begin(self, server_round: int) -> None:
        """Go on with this round: with what an earlier process has of it.

        The answers of the round before stay: a run that falls back to the checkpoint
        before the newest begins with that round.
        """
        self._round = server_round
        self._told = set()
        _delete(self._directory, "*.partial")  # of a server that was killed
        for path in self._directory.glob("*-*.answer*"):
            of_round, _, node_id = path.stem.partition("-")
            if not server_round - 1 <= int(of_round) <= server_round:
                path.unlink()
            elif int(of_round) == server_round and _body_of(path) is not None:
                self._told.add(int(node_id))

    def put(self, node_id: int, answer: Answer) -> None:
        """Keep what a node answered in this round."""
        signs = answer.signs or b""
        head = _HEAD.pack(float(answer.examples), len(signs))
        self._write(node_id, ".answer", head, signs, answer.frame)

    def get(self, node_id: int) -> Answer | None:
        """Return what a node answered in this round; None: nothing that is whole."""
        body = _body_of(self._path(node_id, ".answer"))
        if body is None:
            return None
        examples, length = _HEAD.unpack_from(body)
        frame_at = _HEAD.size + length
        signs = body[_HEAD.size : frame_at]
        return Answer(body[frame_at:], signs or None, examples)

    def fail(self, node_id: int, reason: str) -> None:
        """Keep why there is nothing of a node in this round."""
        self._write(node_id, ".answerless", reason.encode(errors="replace"))

    def failure(self, node_id: int) -> str | None:
        """Return why there is nothing of a node; None: it may still answer."""
        body = _body_of(self._path(node_id, ".answerless"))
        return None if body is None else body.decode(errors="replace")

    def clear(self) -> None:
        """Delete all answers."""
        self._round, self._told = 0, set()
        _delete(self._directory, "*-*.answer*", "*.partial")

    def _write(self, node_id: int, suffix: str, *parts: bytes) -> None:
        body = b"".join(parts)
        checksum = _CRC.pack(zlib.crc32(body))
        write(self._path(node_id, suffix), checksum + body)
        self._told.add(node_id)

    def _path(self, node_id: int, suffix: str) -> Path:
        return self._directory / f"{self._round}-{node_id}{suffix}"


#: An answer's file: checksum of the rest, examples, length of the signs, signs, frame.
#: A failure's: checksum, reason.
_CRC, _HEAD = struct.Struct("<I"), struct.Struct("<dq")


def _body_of(path: Path) -> bytes | None:
    """Read a file that begins with its checksum; None: there is none that is whole."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    body = data[_CRC.size :]
    return body if data[: _CRC.size] == _CRC.pack(zlib.crc32(body)) else None


def write(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Write a file whole or not at all; with `sync` it is on the disk then.

    Raises
    ------
    CheckpointError
        If the disk does not take it.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}; make room, then go on with "
            "resume=true"
        ) from error


def _delete(directory: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in directory.glob(pattern):
            path.unlink()


def statistics_of(guidance: QuantizedGuidance) -> Statistics:
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
