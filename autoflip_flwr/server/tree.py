"""Trees of plain values, arrays and records as files; nothing is pickled."""

import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from autoflip_flwr.errors import CheckpointError

_FORMAT = "autoflip-checkpoint-3"

_Arrays: TypeAlias = dict[str, NDArray[Any]]

SCALARS = (bool, int, float, str, type(None))


def write(path: Path, tree: dict[str, Any]) -> None:
    """Write a tree of plain values, arrays and records, whole or not at all.

    The file is one of safetensors: the arrays, each once however often the tree holds
    it, and the tree as JSON in the metadata, all with checksums. Nothing is pickled.

    Raises
    ------
    CheckpointError
        If the disk does not take it.
    """
    writer = _Writer()
    text = json.dumps(writer.plain(tree))
    sums = {key: zlib.crc32(_bytes_of(value)) for key, value in writer.arrays.items()}
    sums[""] = zlib.crc32(text.encode())
    metadata = {
        "format": _FORMAT,
        "tree": text,
        "checksums": json.dumps(sums, sort_keys=True),
    }
    partial = path.with_suffix(".partial")
    try:
        save_file(writer.arrays, partial, metadata)
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {error}; the one before it is whole: "
            "make room, then go on with resume=true"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote.

    Raises
    ------
    CheckpointError
        If the file is torn or none of ours.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is torn: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: expected the format {_FORMAT}, got {metadata.get('format')!r}"
        )
    text = metadata.get("tree", "")
    found = {key: zlib.crc32(_bytes_of(value)) for key, value in arrays.items()}
    found[""] = zlib.crc32(text.encode())
    if json.dumps(found, sort_keys=True) != metadata.get("checksums"):
        raise CheckpointError(f"{path} is torn: the checksums are not its contents'")
    tree: dict[str, Any] = _Reader(arrays).value(json.loads(text))
    return tree


class _Writer:
    """Makes JSON of a tree, and gathers its arrays."""

    def __init__(self) -> None:
        self.arrays: _Arrays = {}
        self._keys: dict[int, str] = {}  # by id of what is held in `_held`
        self._held: list[Any] = []

    def plain(self, value: Any) -> Any:
        """Return JSON for a value; a list's first entry tells what it is."""
        if isinstance(value, np.generic):  # before float, which float64 is, too
            return ["scalar", self.plain(np.asarray(value))]
        if isinstance(value, SCALARS):
            return value
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
                raise TypeError(f"a checkpoint cannot hold an array of {value.dtype}")
            if value.dtype == np.bool_:
                bits = self._key(value, lambda: np.packbits(value))
                return ["bits", bits, list(value.shape)]
            return ["array", self._key(value, lambda: value)]
        if isinstance(value, bytes):
            return ["bytes", self._key(value, lambda: np.frombuffer(value, np.uint8))]
        if isinstance(value, Array):
            data = self.plain(value.data)
            return ["flower", value.dtype, list(value.shape), value.stype, data]
        for name, kind in _RECORDS.items():
            if isinstance(value, kind):
                return [name, self.plain(dict(value))]
        if isinstance(value, Mapping):
            pairs = [[self.plain(k), self.plain(v)] for k, v in value.items()]
            return ["dict", *pairs]
        for name, collection in _COLLECTIONS.items():
            if isinstance(value, collection):
                return [name, *map(self.plain, value)]
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")

    def _key(self, held: Any, array: Callable[[], NDArray[Any]]) -> str:
        if id(held) not in self._keys:
            key = self._keys[id(held)] = f"{len(self._keys)}"
            self._held.append(held)  # so that no other gets its id
            made = array()
            little = made.astype(made.dtype.newbyteorder("<"), copy=False)
            self.arrays[key] = np.ascontiguousarray(little).reshape(made.shape)
        return self._keys[id(held)]


class _Reader:
    """Makes a tree of JSON and arrays."""

    def __init__(self, arrays: _Arrays) -> None:
        self._arrays = arrays
        self._bytes: dict[str, bytes] = {}

    def value(self, found: Any) -> Any:
        """Return what `_Writer.plain` was given."""
        if not isinstance(found, list):
            return found
        kind, *rest = found
        if kind == "array":
            return self._arrays[rest[0]]
        if kind == "scalar":
            return self.value(rest[0])[()]
        if kind == "bits":
            count = int(np.prod(rest[1], dtype=np.int64))
            bits = np.unpackbits(self._arrays[rest[0]], count=count)
            return bits.astype(np.bool_).reshape(rest[1])
        if kind == "bytes":
            key = rest[0]
            if key not in self._bytes:
                self._bytes[key] = self._arrays[key].tobytes()
            return self._bytes[key]
        if kind == "flower":
            dtype, shape, stype, data = rest
            return Array(
                dtype=dtype, shape=tuple(shape), stype=stype, data=self.value(data)
            )
        if kind in _RECORDS:
            return _RECORDS[kind](self.value(rest[0]))
        if kind == "dict":
            return {self.value(k): self.value(v) for k, v in rest}
        return _COLLECTIONS[kind](map(self.value, rest))


_RECORDS: dict[str, Any] = {
    "arrays": ArrayRecord,
    "config": ConfigRecord,
    "metrics": MetricRecord,
}
_COLLECTIONS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set}


def storable(value: Any) -> bool:
    """Tell whether `write` takes a value."""
    try:
        _Writer().plain(value)
    except TypeError:
        return False
    return True


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
