"""What nodes told the server, on its disk: local guidance, and answers of a round."""

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoflip_flwr.codec import QuantizedGuidance, Shapes, dequantize
from autoflip_flwr.errors import CheckpointError
from autoflip_flwr.guidance import Statistics, statistics


class GuidanceStore:
    """Local guidance by node id, one byte per parameter, outside of memory.

    What stays in memory per explorer is a handful of numbers per tensor.

    Parameters
    ----------
    directory : Path
        Made when needed. Files are written atomically. A node's later frame does not
        overwrite the one before it, which an earlier checkpoint may stand on, but the
        one before that.
    shapes : mapping of name -> shape
        The prunable parameters, in order.
    """

    def __init__(self, directory: Path, shapes: Shapes) -> None:
        self._directory = directory
        self._shapes = shapes
        self._entries: dict[int, _Entry] = {}
        self._slots: dict[int, int] = {}  # also of nodes whose guidance is forgotten

    def __contains__(self, node_id: int) -> bool:
        return node_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

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
        slot = 1 - self._slots.get(node_id, 1)
        write(self._path(node_id, slot), frame, sync=True)
        self._slots[node_id] = slot
        self._entries[node_id] = _Entry(zlib.crc32(frame), found)
        return guidance

    def get(self, node_id: int) -> QuantizedGuidance:
        """Return a node's guidance, read from disk as it is used.

        Raises
        ------
        KeyError
            If the node has none.
        """
        if node_id not in self._entries:
            raise KeyError(f"no local guidance of node {node_id}")
        path = self._path(node_id, self._slots[node_id])
        return dequantize(np.memmap(path, np.uint8, mode="r").data, self._shapes)

    def statistics(self, node_id: int) -> Statistics:
        """Mean and extremes of a node's guidance, without reading it."""
        return self._entries[node_id].statistics

    def forget(self) -> None:
        """Hold no guidance any more; the files stay, for an earlier checkpoint."""
        self._entries.clear()

    def clear(self) -> None:
        """Forget all guidance, and delete what an earlier run may have left."""
        self._entries.clear()
        self._slots.clear()
        for path in self._directory.glob("*.guidance"):
            path.unlink()

    def state(self) -> dict[str, Any]:
        """Return what stays in memory."""
        return {
            "slots": dict(self._slots),
            "entries": {n: asdict(entry) for n, entry in self._entries.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take the files of an earlier process for this one's.

        Raises
        ------
        CheckpointError
            If a file is missing, or not the one that the state was made with.
        """
        self._slots = dict(state["slots"])
        self._entries = {
            node_id: _Entry(entry["crc"], Statistics(**entry["statistics"]))
            for node_id, entry in state["entries"].items()
        }
        for node_id, entry in self._entries.items():
            path = self._path(node_id, self._slots[node_id])
            try:
                found = zlib.crc32(path.read_bytes())
            except OSError as error:
                raise CheckpointError(
                    f"the checkpoint needs the guidance in {path}: {error.strerror}"
                ) from error
            if found != entry.crc:
                raise CheckpointError(
                    f"{path} is torn or of a later round: expected the checksum "
                    f"{entry.crc:08x}, got {found:08x}"
                )

    def _path(self, node_id: int, slot: int) -> Path:
        return self._directory / f"{node_id}.{slot}.guidance"


@dataclass(frozen=True, slots=True)
class _Entry:
    crc: int  # CRC-32 of the frame
    statistics: Statistics


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

    def begin(self, server_round: int) -> None:
        """Keep the answers of this round alone."""
        self._round = server_round
        for path in self._directory.glob("*.answer*"):
            if not path.name.startswith(f"{server_round}-"):
                path.unlink()

    def put(self, node_id: int, answer: Answer) -> None:
        """Keep what a node answered in this round."""
        signs = answer.signs or b""
        body = _HEAD.pack(float(answer.examples), len(signs)) + signs + answer.frame
        write(self._path(node_id), _CRC.pack(zlib.crc32(body)) + body)

    def get(self, node_id: int) -> Answer | None:
        """Return what a node answered in this round; None: nothing that is whole."""
        try:
            data = self._path(node_id).read_bytes()
        except FileNotFoundError:
            return None
        body = data[_CRC.size :]
        if data[: _CRC.size] != _CRC.pack(zlib.crc32(body)):
            return None
        examples, length = _HEAD.unpack_from(body)
        frame_at = _HEAD.size + length
        signs = body[_HEAD.size : frame_at]
        return Answer(body[frame_at:], signs or None, examples)

    def fail(self, node_id: int, reason: str) -> None:
        """Keep why there is nothing of a node in this round."""
        write(
            self._path(node_id).with_suffix(".answerless"),
            reason.encode(errors="replace"),
        )

    def failure(self, node_id: int) -> str | None:
        """Return why there is nothing of a node; None: it may still answer."""
        try:
            data = self._path(node_id).with_suffix(".answerless").read_bytes()
        except FileNotFoundError:
            return None
        return data.decode(errors="replace")

    def clear(self) -> None:
        """Delete all answers."""
        self.begin(0)

    def _path(self, node_id: int) -> Path:
        return self._directory / f"{self._round}-{node_id}.answer"


#: An answer's file: checksum of the rest, examples, length of the signs, signs, frame.
_CRC, _HEAD = struct.Struct("<I"), struct.Struct("<dq")


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
