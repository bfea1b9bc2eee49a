"""What nodes measured, on the server's disk: each answer checked and written once."""

import math
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import CheckpointError, WireError
from autoflip_flwr.method.guidance import Statistics, statistics
from autoflip_flwr.wire.codec import (
    HEADER_BYTES,
    QuantizedGuidance,
    Shapes,
    dequantize,
    frame_bytes,
    level_values,
    unpack_mask,
)

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

    def put(self, node_id: int, measured: "Measured") -> None:
        """Keep a node's guidance in place of an earlier one, as a link to its file."""
        slot = (self._slots.get(node_id, -1) + 1) % _SLOTS
        _link(measured.path, self._path(node_id, slot))
        self._slots[node_id] = slot
        numbers = measured.statistics
        row = self._rows.setdefault(node_id, len(self._rows))
        if row == len(self._crcs):
            size = max(16, 2 * row)
            self._crcs = np.resize(self._crcs, size)
            self._numbers = np.resize(self._numbers, (size, self._numbers.shape[1]))
        self._crcs[row] = measured.checksum
        self._numbers[row] = (
            numbers.mean,
            *numbers.low.values(),
            *numbers.high.values(),
        )

    def get(self, node_id: int) -> QuantizedGuidance:
        """Return a node's guidance, read from disk as it is used.

        Raises
        ------
        KeyError
            If the node has none.
        """
        if node_id not in self._rows:
            raise KeyError(f"no local guidance of node {node_id}")
        return _read(self._path(node_id, self._slots[node_id]), self._shapes)

    def tables(self, node_ids: Sequence[int], name: str) -> NDArray[np.float32]:
        """Return what the codes of one tensor stand for, shape (nodes, 256)."""
        offset = _FRAME_AT + HEADER_BYTES * list(self._shapes).index(name)
        tables = np.empty((len(node_ids), 256), np.float32)
        for row, path in zip(tables, self._paths(node_ids), strict=True):
            low, high = np.fromfile(path, "<f4", 2, offset=offset).tolist()
            row[:] = level_values(low, high)
        return tables

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
        header = _FRAME_AT + HEADER_BYTES * len(sizes)
        offset = header + sum(sizes[each] for each in before)
        paths = self._paths(node_ids)
        for start in range(0, sizes[name], block):
            count = min(block, sizes[name] - start)
            codes = np.empty((len(paths), count), np.uint8)
            for row, path in zip(codes, paths, strict=True):
                row[:] = np.fromfile(path, np.uint8, count, offset=offset + start)
            yield start, codes

    def statistics(self, node_id: int) -> Statistics:
        """Mean and extremes of a node's guidance, without reading it."""
        return self._statistics(self._numbers[self._rows[node_id]])

    def means(self) -> list[float]:
        """Return the means of all nodes' guidance."""
        means: list[float] = self._numbers[: len(self), 0].tolist()
        return means

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
                got = zlib.crc32(path.read_bytes()[_CRC.size :])
            except OSError as error:
                raise CheckpointError(
                    f"the checkpoint needs the guidance in {path}: {error.strerror}"
                ) from error
            if got != expected:
                raise CheckpointError(
                    f"{path} is torn or of a later round: expected the checksum "
                    f"{expected:08x}, got {got:08x}"
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


@dataclass(frozen=True, slots=True)
class Measured:
    """An answer that fits the model, checked, summed up and on the disk.

    Attributes
    ----------
    path : Path
    checksum : int
        CRC-32 of the file behind its first four bytes.
    shapes : mapping of name -> shape
    examples : float
        How many the node has, > 0.
    statistics : Statistics
        Mean and extremes of the whole matrix.
    """

    path: Path
    checksum: int
    shapes: Shapes
    examples: float
    statistics: Statistics

    def guidance(self) -> QuantizedGuidance:
        """Return what was measured, read from the disk as it is used."""
        return _read(self.path, self.shapes)

    def signs(self) -> dict[str, NDArray[np.bool_]]:
        """Return which weights rose.

        Raises
        ------
        WireError
            If the node did not say, or its bits do not fit.
        """
        size = frame_bytes(self.shapes)
        bits = self.path.read_bytes()[_FRAME_AT + size :]
        if not bits:
            raise WireError("expected signs beside the guidance, got none")
        return unpack_mask(bits, self.shapes)


class Answers:
    """The answers of one round, on disk as they come.

    So a server that is killed while nodes explore asks only those again whose answer
    had not come, and memory does not grow with the size of the answers.

    Parameters
    ----------
    directory : Path
    shapes : mapping of name -> shape
        The prunable parameters, in order.
    """

    def __init__(self, directory: Path, shapes: Shapes) -> None:
        self._directory = directory
        self._shapes = shapes
        self._round = 0
        self._measured: dict[int, Measured] = {}
        self._reasons: dict[int, str] = {}

    def __contains__(self, node_id: int) -> bool:
        """Tell whether a node has answered, or failed to, in this round."""
        return node_id in self._measured or node_id in self._reasons

    def begin(self, server_round: int) -> None:
        """Go on with this round: with what an earlier process has of it.

        The answers of the round before stay: a run that falls back to the checkpoint
        before the newest begins with that round.
        """
        self._round = server_round
        self._measured, self._reasons = {}, {}
        _delete(self._directory, "*.partial")  # of a server that was killed
        for path in self._directory.glob("*-*.answer*"):
            of_round, _, node_id = path.stem.partition("-")
            if not server_round - 1 <= int(of_round) <= server_round:
                path.unlink()
            elif int(of_round) == server_round:
                self._recall(int(node_id), path)

    def put(self, node_id: int, answer: Answer) -> None:
        """Check what a node answered in this round; keep it, or why it is of no use."""
        try:
            examples = float(answer.examples)
            if not (examples > 0 and math.isfinite(examples)):
                raise WireError(f"expected examples, got {answer.examples}")
            guidance = dequantize(answer.frame, self._shapes)
        except (TypeError, ValueError, OverflowError) as error:
            self.fail(node_id, str(error))
            return
        path = self._path(node_id, ".answer")
        parts = _EXAMPLES.pack(examples), answer.frame, answer.signs or b""
        checksum = self._write(path, *parts)
        self._measured[node_id] = Measured(
            path, checksum, self._shapes, examples, statistics_of(guidance)
        )

    def get(self, node_id: int) -> Measured | None:
        """Return what a node measured in this round; None: nothing that is of use."""
        return self._measured.get(node_id)

    def fail(self, node_id: int, reason: str) -> None:
        """Keep why there is nothing of a node in this round."""
        path = self._path(node_id, ".answerless")
        self._write(path, reason.encode(errors="replace"))
        self._reasons[node_id] = reason

    def failure(self, node_id: int) -> str | None:
        """Return why there is nothing of a node; None: it may still answer."""
        return self._reasons.get(node_id)

    def forget(self) -> None:
        """Hold no answers any more; the files stay, for a run that goes on."""
        self._measured, self._reasons = {}, {}

    def clear(self) -> None:
        """Delete all answers."""
        self.forget()
        _delete(self._directory, "*-*.answer*", "*.partial")

    def _recall(self, node_id: int, path: Path) -> None:
        """Take an earlier process's file of this round, if it is whole."""
        data = path.read_bytes()
        body, checksum = data[_CRC.size :], zlib.crc32(data[_CRC.size :])
        if data[: _CRC.size] != _CRC.pack(checksum):
            return
        if path.suffix == ".answerless":
            self._reasons[node_id] = body.decode(errors="replace")
            return
        (examples,) = _EXAMPLES.unpack_from(body)
        frame = body[_EXAMPLES.size : _EXAMPLES.size + frame_bytes(self._shapes)]
        guidance = dequantize(frame, self._shapes)
        self._measured[node_id] = Measured(
            path, checksum, self._shapes, examples, statistics_of(guidance)
        )

    def _write(self, path: Path, *parts: bytes) -> int:
        body = b"".join(parts)
        checksum = zlib.crc32(body)
        write(path, _CRC.pack(checksum) + body, sync=True)
        return checksum

    def _path(self, node_id: int, suffix: str) -> Path:
        return self._directory / f"{self._round}-{node_id}{suffix}"


#: An answer's file: checksum of the rest, examples, frame, signs. A failure's:
#: checksum, reason.
_CRC, _EXAMPLES = struct.Struct("<I"), struct.Struct("<d")
_FRAME_AT = _CRC.size + _EXAMPLES.size


def _read(path: Path, shapes: Shapes) -> QuantizedGuidance:
    """Map the frame of an answer's file; signs may follow it."""
    size = frame_bytes(shapes)
    frame = np.memmap(path, np.uint8, mode="r", offset=_FRAME_AT, shape=(size,))
    return dequantize(frame.data, shapes)


def _link(path: Path, to: Path) -> None:
    """Give a file a second name, in place of what has it; or copy it there.

    Raises
    ------
    CheckpointError
        If the disk does not take it.
    """
    partial = to.with_suffix(".partial")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        try:
            partial.hardlink_to(path)
        except OSError:  # a file system without such names
            shutil.copyfile(path, partial)
        partial.replace(to)
    except OSError as error:
        raise _not_written(to, error) from error


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
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write {path}: {error.strerror}; make room, then go on with resume=true"
    )


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
        own = statistics({name: guidance.tables[name][codes]})
        total += own.mean * codes.size
        count += codes.size
        low[name], high[name] = own.low[name], own.high[name]
    return Statistics(mean=total / count, low=low, high=high)
