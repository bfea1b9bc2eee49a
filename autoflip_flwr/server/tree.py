"""Trees of plain values, arrays and records as files; nothing is pickled."""

import json
import os
import zlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from autoflip_flwr.errors import CheckpointError

_FORMAT = "autoflip-checkpoint-4"

_Arrays: TypeAlias = dict[str, NDArray[Any]]

SCALARS = (bool, int, float, str, type(None))

_RECORDS: dict[str, Any] = {
    "arrays": ArrayRecord,
    "config": ConfigRecord,
    "metrics": MetricRecord,
}
_COLLECTIONS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set}


def write(path: Path, tree: dict[str, Any]) -> None:
    """Write a tree of plain values, arrays and records, whole or not at all.

    The file has the format of safetensors. It stores each array once, however often
    the tree holds it. Its metadata has the tree as JSON, and checksums of both. A disk
    that is full or fails is a CheckpointError.
    """
    writer = _Writer()
    text = json.dumps(writer.plain(tree))
    metadata = {
        "format": _FORMAT,
        "tree": text,
        "checksums": _checksums(writer.arrays, text),
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
            f"cannot write the checkpoint {path}: {error}; the previous one is intact: "
            "make room, then go on with resume=true"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote; a file that is torn is a CheckpointError."""
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
    if _checksums(arrays, text) != metadata.get("checksums"):
        raise CheckpointError(f"{path} is torn: its contents do not fit its checksums")
    tree: dict[str, Any] = _value(json.loads(text), dict(arrays))
    return tree


def storable(value: Any) -> bool:
    """Tell whether `write` accepts a value."""
    try:
        _Writer().plain(value)
    except TypeError:
        return False
    return True


class _Writer:
    """Turns a tree into JSON and collects its arrays."""

    def __init__(self) -> None:
        self.arrays: _Arrays = {}
        # By id. The objects are held, so their ids stay unique.
        self._stored: dict[int, tuple[str, Any]] = {}

    def plain(self, value: Any) -> Any:
        """Return JSON for a value; the first entry of a list names its type."""
        if isinstance(value, np.generic):  # before float, since a float64 is a float
            return ["scalar", self.plain(np.asarray(value))]
        if type(value) in SCALARS:
            return value
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
                raise TypeError(f"a checkpoint cannot hold an array of {value.dtype}")
            if value.dtype == np.bool_:
                bits = self._store(value, np.packbits(value))
                return ["bits", bits, list(value.shape)]
            return ["array", self._store(value, value)]
        if isinstance(value, bytes):
            return ["bytes", self._store(value, np.frombuffer(value, np.uint8))]
        if isinstance(value, Array):
            data = self.plain(value.data)
            return ["flower", value.dtype, list(value.shape), value.stype, data]
        for name, kind in _RECORDS.items():
            if isinstance(value, kind):
                return [name, self.plain(dict(value))]
        # No class derived from these: it would come back as another type.
        if type(value) is dict:
            pairs = [[self.plain(k), self.plain(v)] for k, v in value.items()]
            return ["dict", *pairs]
        for name, collection in _COLLECTIONS.items():
            if type(value) is collection:
                return [name, *map(self.plain, value)]
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")

    def _store(self, source: Any, array: NDArray[Any]) -> str:
        """Store the array of a source once; return its key in the file."""
        if id(source) not in self._stored:
            key = f"{len(self._stored)}"
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            self.arrays[key] = np.ascontiguousarray(little).reshape(array.shape)
            self._stored[id(source)] = key, source
        return self._stored[id(source)][0]


def _value(plain: Any, arrays: dict[str, Any]) -> Any:
    """Return the value that `_Writer.plain` turned into JSON."""
    if not isinstance(plain, list):
        return plain
    kind, *rest = plain
    if kind == "array":
        return arrays[rest[0]]
    if kind == "scalar":
        return _value(rest[0], arrays)[()]
    if kind == "bits":
        key, shape = rest
        count = int(np.prod(shape, dtype=np.int64))
        bits = np.unpackbits(arrays[key], count=count)
        return bits.astype(np.bool_).reshape(shape)
    if kind == "bytes":
        key = rest[0]
        if not isinstance(arrays[key], bytes):  # one object for all that share it
            arrays[key] = arrays[key].tobytes()
        return arrays[key]
    if kind == "flower":
        dtype, shape, stype, data = rest
        data = _value(data, arrays)
        return Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)
    if kind in _RECORDS:
        return _RECORDS[kind](_value(rest[0], arrays))
    if kind == "dict":
        return {_value(k, arrays): _value(v, arrays) for k, v in rest}
    return _COLLECTIONS[kind](_value(item, arrays) for item in rest)


def _checksums(arrays: _Arrays, text: str) -> str:
    """Return the CRC-32 of each array and, under "", of the tree, as JSON."""
    sums = {
        key: zlib.crc32(array.reshape(-1).view(np.uint8).data)
        for key, array in arrays.items()
    }
    return json.dumps({**sums, "": zlib.crc32(text.encode())}, sort_keys=True)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
