"""The nodes' answers on the server's disk, each checked and written once."""

import math
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import CheckpointError, WireError, one_line
from autoflip_flwr.method.guidance import Statistics, statistics
from autoflip_flwr.types import Float32, Mask
from autoflip_flwr.wire.codec import (
    HEADER_BYTES,
    QuantizedGuidance,
    Shapes,
    dequantize,
    frame_bytes,
    level_values,
    unpack_mask,
)

#: Frames of a node on disk: that of the round, and those of the last two checkpoints.
_SLOTS = 3


class GuidanceStore:
    """Local guidance by node id, on disk, one byte per parameter.

    Memory holds one row of numbers per explorer: the mean, and two per tensor. Files
    are written atomically. A node's new frame does not overwrite its last two, because
    the kept checkpoints may need them. `shapes` are those of the prunable parameters.
    """

    def __init__(self, directory: Path, shapes: Shapes) -> None:
        self._directory = directory
        self.shapes = shapes
        self._rows: dict[int, int] = {}
        self._crcs = np.empty(0, np.uint32)
        #: One row: the mean, the least value of each tensor, the largest of each.
        self._numbers = np.empty((0, 1 + 2 * len(shapes)))
        self._slots: dict[int, int] = {}  # kept by `forget`

    def __contains__(self, node_id: int) -> bool:
        return node_id in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def put(self, node_id: int, measured: "Measured") -> None:
        """Replace a node's guidance by a link to the new file."""
        slot = (self._slots.get(node_id, -1) + 1) % _SLOTS
        _link(measured.path, self._path(node_id, slot))
        self._slots[node_id] = slot
        new = measured.statistics
        row = self._rows.setdefault(node_id, len(self._rows))
        if row == len(self._crcs):
            size = max(16, 2 * row)
            self._crcs = np.resize(self._crcs, size)
            self._numbers = np.resize(self._numbers, (size, self._numbers.shape[1]))
        self._crcs[row] = measured.checksum
        self._numbers[row] = [new.mean, *new.low.values(), *new.high.values()]

    def get(self, node_id: int) -> QuantizedGuidance:
        """Map a node's guidance from disk; KeyError if the node has none."""
        if node_id not in self._rows:
            raise KeyError(f"no local guidance of node {node_id}")
        return _read(self._path(node_id, self._slots[node_id]), self.shapes)

    def tables(self, node_ids: Sequence[int], name: str) -> Float32:
        """Return the values of the codes of one tensor, shape (nodes, 256)."""
        offset = _FRAME_AT + HEADER_BYTES * list(self.shapes).index(name)
        tables = np.empty((len(node_ids), 256), np.float32)
        for row, path in zip(tables, self._paths(node_ids), strict=True):
            low, high = np.fromfile(path, "<f4", 2, offset=offset).tolist()
            row[:] = level_values(low, high)
        return tables

    def codes(
        self, node_ids: Sequence[int], name: str, block: int
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield blocks of a flat tensor: the first entry, codes of (nodes, entries)."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        index = list(self.shapes).index(name)
        offset = _FRAME_AT + HEADER_BYTES * len(sizes) + sum(sizes[:index])
        paths = self._paths(node_ids)
        for start in range(0, sizes[index], block):
            count = min(block, sizes[index] - start)
            codes = np.empty((len(paths), count), np.uint8)
            for row, path in zip(codes, paths, strict=True):
                row[:] = np.fromfile(path, np.uint8, count, offset=offset + start)
            yield start, codes

    def statistics(self, node_id: int) -> Statistics:
        """Return mean and extremes of a node's guidance without reading its file."""
        return self._statistics(self._numbers[self._rows[node_id]])

    def means(self) -> list[float]:
        """Return the means of all nodes' guidance."""
        return list(self._numbers[: len(self), 0].tolist())

    def overall(self) -> Statistics:
        """Return mean and extremes over all nodes, of which there is at least one."""
        numbers, tensors = self._numbers[: len(self)], len(self.shapes)
        mean = numbers[:, 0].mean()
        low = numbers[:, 1 : 1 + tensors].min(axis=0)
        high = numbers[:, 1 + tensors :].max(axis=0)
        return self._statistics(np.concatenate([[mean], low, high]))

    def _statistics(self, numbers: NDArray[np.float64]) -> Statistics:
        mean, *extremes = numbers.tolist()
        low = dict(zip(self.shapes, extremes, strict=False))
        high = dict(zip(self.shapes, extremes[len(low) :], strict=True))
        return Statistics(mean=mean, low=low, high=high)

    def forget(self) -> None:
        """Drop all guidance from memory; an earlier checkpoint may need the files."""
        self._rows.clear()

    def clear(self) -> None:
        """Drop all guidance, and delete the files of an earlier run."""
        self.forget()
        self._slots.clear()
        _delete(self._directory, "*.guidance", "*.partial")

    def state(self) -> dict[str, Any]:
        """Return the part in memory, for a checkpoint."""
        return {
            "nodes": np.array([*self._rows], np.uint64),
            "crcs": self._crcs[: len(self)].copy(),
            "numbers": self._numbers[: len(self)].copy(),
            "written": np.array([*self._slots], np.uint64),
            "slots": np.array([*self._slots.values()], np.uint8),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Use the files of an earlier process.

        A file that is missing, torn or newer than the checkpoint is a CheckpointError.
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
                    f"{path} is torn or from a later round: expected the checksum "
                    f"{expected:08x}, got {got:08x}"
                )

    def _paths(self, node_ids: Sequence[int]) -> list[Path]:
        return [self._path(node_id, self._slots[node_id]) for node_id in node_ids]

    def _path(self, node_id: int, slot: int) -> Path:
        return self._directory / f"{node_id}.{slot}.guidance"


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply of a node that was asked to explore or to measure."""

    frame: bytes
    signs: bytes | None = None  # the weights that rose, for a warm start
    examples: float = 1.0  # 1 if the app does not report them


@dataclass(frozen=True, slots=True)
class Measured:
    """An answer that fits the model, on disk."""

    path: Path
    checksum: int  # CRC-32 of the file after its first four bytes
    shapes: Shapes
    examples: float  # of the node, > 0
    statistics: Statistics  # of the whole matrix

    def guidance(self) -> QuantizedGuidance:
        """Map the measured guidance from disk."""
        return _read(self.path, self.shapes)

    def signs(self) -> dict[str, Mask]:
        """Return a bool array per parameter, True where the weight rose.

        Signs that are missing or do not fit the model are a WireError.
        """
        bits = self.path.read_bytes()[_FRAME_AT + frame_bytes(self.shapes) :]
        if not bits:
            raise WireError("expected signs beside the guidance, got none")
        return unpack_mask(bits, self.shapes)


class Answers:
    """The answers of one round, written to disk as they arrive.

    A server that is killed during an exploration later asks only the nodes whose
    answers are missing. Memory does not grow with the size of the answers.
    """

    def __init__(self, directory: Path, shapes: Shapes) -> None:
        self._directory = directory
        self._shapes = shapes
        self._round = 0
        self._results: dict[int, Measured | str] = {}  # str: why there is no answer

    def __contains__(self, node_id: int) -> bool:
        """Tell whether a node has answered or failed in this round."""
        return node_id in self._results

    def begin(self, server_round: int) -> None:
        """Start a round with the answers that an earlier process received in it.

        The files of the last round stay: a run that falls back to the older checkpoint
        starts with that round.
        """
        self._round = server_round
        self.forget()
        _delete(self._directory, "*.partial")  # left by a killed server
        for path in self._directory.glob("*-*.answer*"):
            of_round, _, node_id = path.stem.partition("-")
            if not server_round - 1 <= int(of_round) <= server_round:
                path.unlink()
            elif int(of_round) == server_round:
                self._recall(int(node_id), path)

    def put(self, node_id: int, answer: Answer) -> None:
        """Check and keep a node's answer, or the reason why it is not valid."""
        try:
            examples = float(answer.examples)
            if not (examples > 0 and math.isfinite(examples)):
                raise WireError(f"expected examples > 0, got {answer.examples}")
            guidance = dequantize(answer.frame, self._shapes)
        except (TypeError, ValueError, OverflowError) as error:
            self.fail(node_id, str(error))
            return
        body = b"".join([_EXAMPLES.pack(examples), answer.frame, answer.signs or b""])
        path, checksum = self._write(f"{node_id}.answer", body)
        self._keep(node_id, path, checksum, examples, guidance)

    def get(self, node_id: int) -> Measured | None:
        """Return a node's valid answer of this round, or None."""
        result = self._results.get(node_id)
        return result if isinstance(result, Measured) else None

    def fail(self, node_id: int, reason: str) -> None:
        """Keep the reason why a node has no valid answer in this round."""
        self._results[node_id] = reason = one_line(reason)
        self._write(f"{node_id}.answerless", reason.encode(errors="replace"))

    def failure(self, node_id: int) -> str | None:
        """Return the reason why a node failed; None if it has not failed."""
        result = self._results.get(node_id)
        return result if isinstance(result, str) else None

    def forget(self) -> None:
        """Drop all answers from memory; a resumed run may need the files."""
        self._results = {}

    def clear(self) -> None:
        """Delete all answers."""
        self.forget()
        _delete(self._directory, "*-*.answer*", "*.partial")

    def _recall(self, node_id: int, path: Path) -> None:
        """Read an earlier process's file of this round, if its checksum fits."""
        data = path.read_bytes()
        body, checksum = data[_CRC.size :], zlib.crc32(data[_CRC.size :])
        if data[: _CRC.size] != _CRC.pack(checksum):
            return
        if path.suffix == ".answerless":
            self._results[node_id] = body.decode(errors="replace")
            return
        (examples,) = _EXAMPLES.unpack_from(body)
        guidance = _read(path, self._shapes)
        self._keep(node_id, path, checksum, examples, guidance)

    def _keep(
        self,
        node_id: int,
        path: Path,
        checksum: int,
        examples: float,
        guidance: QuantizedGuidance,
    ) -> None:
        tables, codes = guidance.tables, guidance.codes
        found = statistics((name, tables[name][codes[name]]) for name in codes)
        self._results[node_id] = Measured(path, checksum, self._shapes, examples, found)

    def _write(self, name: str, body: bytes) -> tuple[Path, int]:
        path, checksum = self._directory / f"{self._round}-{name}", zlib.crc32(body)
        write(path, _CRC.pack(checksum) + body)
        return path, checksum


#: File of an answer: checksum of the rest, examples, frame, signs.
#: File of a failure: checksum of the rest, reason.
_CRC, _EXAMPLES = struct.Struct("<I"), struct.Struct("<d")
_FRAME_AT = _CRC.size + _EXAMPLES.size


def _read(path: Path, shapes: Shapes) -> QuantizedGuidance:
    """Map the frame in the file of an answer; signs may follow it."""
    size = frame_bytes(shapes)
    frame = np.memmap(path, np.uint8, mode="r", offset=_FRAME_AT, shape=(size,))
    return dequantize(frame.data, shapes)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give the block another path to write to; rename that file when it is complete.

    If the disk refuses it, the error is a CheckpointError and the old file stays.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # it may be a link to another file
        yield partial
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}; make room, then go "
            "on with resume=true"
        ) from error


def _link(path: Path, to: Path) -> None:
    """Give a file a second name, or copy it where the disk has no hard links."""
    with _replacing(to) as partial:
        try:
            partial.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, partial)


def write(path: Path, data: bytes) -> None:
    """Write a file to disk atomically."""
    with _replacing(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _delete(directory: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in directory.glob(pattern):
            path.unlink()
