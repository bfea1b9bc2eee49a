"""Names, shapes and types of a model's arrays, which frames do not contain."""

import fnmatch
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from autoflip_flwr.errors import SettingsError, WireError
from autoflip_flwr.types import Array, Params

#: Names of BatchNorm's buffers, which a state_dict does not mark as buffers.
BUFFER_PATTERNS = ("*running_mean", "*running_var", "*num_batches_tracked")

_MAX_MANIFEST = 1 << 22  # bytes, decompressed
_MAX_DIMENSIONS = 32
_MAX_LENGTH = 1 << 40
_DTYPE = re.compile(r"[<>|=](b1|[iu][1248]|f[248]|c8|c16)")


@dataclass(frozen=True, slots=True)
class Entry:
    """One named array of a model."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    masked: bool  # sent as kept values; otherwise dense, under its name
    trainable: bool = True  # False: a buffer
    # Of a tied weight's second name: the first. It has neither mask nor values of its
    # own, is not sent, and counts nowhere.
    of: str = ""

    def __post_init__(self) -> None:
        texts = self.name, self.dtype, self.of
        if not all(isinstance(text, str) for text in texts):
            raise WireError(f"expected names and a type as text, got {self}")
        if not _DTYPE.fullmatch(self.dtype):
            raise WireError(f"{self.name}: expected a numeric type, got {self.dtype!r}")
        if len(self.shape) > _MAX_DIMENSIONS or not all(
            type(length) is int and 0 <= length <= _MAX_LENGTH for length in self.shape
        ):
            raise WireError(
                f"{self.name}: expected at most {_MAX_DIMENSIONS} lengths from 0 to "
                f"{_MAX_LENGTH}, got the shape {self.shape}"
            )
        if math.prod(max(1, length) for length in self.shape) > _MAX_LENGTH:
            raise WireError(
                f"{self.name}: expected at most {_MAX_LENGTH} entries, "
                f"got the shape {self.shape}"
            )
        if self.of and (self.masked or self.trainable):
            raise WireError(
                f"{self.name}: expected a second name without mask and training, got "
                f"masked {self.masked}, trainable {self.trainable}"
            )
        if self.masked and self.dtype[1] != "f":
            raise WireError(f"{self.name}: expected floats to mask, got {self.dtype!r}")

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


def largest_message(dense_bytes: int) -> int:
    """Return the bytes that a message about arrays of so many bytes has at most.

    Twice the arrays, for an app's own, and 1 MiB for config and metrics.
    """
    return 2 * dense_bytes + (1 << 20)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Names, shapes and types of a model's arrays, in the model's order."""

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        first = {e.name: (e.shape, e.dtype) for e in self.entries if not e.of}
        for entry in self.entries:
            if entry.of and first.get(entry.of) != (entry.shape, entry.dtype):
                raise WireError(
                    f"{entry.name}: expected the second name of an array "
                    f"{entry.dtype}{list(entry.shape)}, got {entry.of!r}: "
                    f"{first.get(entry.of, 'no such array')}"
                )

    @classmethod
    def of(
        cls,
        arrays: Params,
        *,
        prunable: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        ties: Mapping[str, str] = MappingProxyType({}),
    ) -> "Manifest":
        """Describe a model's arrays.

        `prunable` are the names of the trainable parameters, by default of all floating
        arrays but BatchNorm's buffers; `exclude` are shell patterns of names that are
        never pruned; `ties` are second names of tied weights -> the first. A rule for
        one of its names is one for the weight. An unknown name, nothing to prune, or
        different values under the names of a weight, is a SettingsError.

        BatchNorm's buffers are told by their names, or, where names are numbers, by the
        count of batches that stands behind them.
        """
        ties = {n: first for n, first in ties.items() if {n, first} <= set(arrays)}
        for name, first in ties.items():
            if not np.array_equal(arrays[name], arrays[first]):
                raise SettingsError(
                    f"{name} is {first} in the model that was handed over, one weight; "
                    "the initial arrays have different values: take them from a model "
                    "that ties them"
                )
        trainable = None if prunable is None else set(prunable)
        if unknown := sorted((trainable or set()) - set(arrays)):
            raise SettingsError(
                f"unknown prunable parameters {unknown}; known: {list(arrays)}"
            )
        statistics = _numbered_statistics(arrays)
        patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        idle = [p for p in patterns if not any(_matches(n, [p]) for n in arrays)]
        if idle:
            raise SettingsError(
                f"exclude {idle} matches no parameter; known: {list(arrays)}"
            )

        def entry(name: str, values: Array) -> Entry:
            array = name, values.shape, values.dtype.str
            if name in ties:
                return Entry(*array, masked=False, trainable=False, of=ties[name])
            names = [name, *(n for n, first in ties.items() if first == name)]
            floating = np.issubdtype(values.dtype, np.floating)
            trains = floating and not _matches(name, BUFFER_PATTERNS)
            trains = trains and name not in statistics
            if trainable is not None:
                trains = not trainable.isdisjoint(names)
            prunes = trains and floating and values.size > 0
            masked = prunes and not any(_matches(n, patterns) for n in names)
            return Entry(*array, masked, trains)

        entries = tuple(entry(name, values) for name, values in arrays.items())
        if not any(entry.masked for entry in entries):
            raise SettingsError(
                f"nothing to prune: exclude {list(patterns)} covers every floating "
                f"parameter of {list(arrays)}"
            )
        return cls(entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the prunable arrays, in order."""
        return {entry.name: entry.shape for entry in self.entries if entry.masked}

    @property
    def distinct(self) -> "Manifest":
        """The arrays that travel: each weight under its first name."""
        return Manifest(tuple(entry for entry in self.entries if not entry.of))

    @property
    def whole(self) -> list[Entry]:
        """The arrays that travel dense, under their names."""
        return [entry for entry in self.distinct.entries if not entry.masked]

    def tied(self, arrays: Params) -> dict[str, Array]:
        """Return the arrays in order; second names get the array of the first."""
        return {entry.name: arrays[entry.of or entry.name] for entry in self.entries}

    def digest(self, arrays: Params) -> bytes:
        """Return the 16 bytes (BLAKE2b) that name these values of the model."""
        named = hashlib.blake2b(digest_size=16)
        for entry in self.distinct.entries:
            named.update(np.ascontiguousarray(arrays[entry.name]).data)
        return named.digest()

    @property
    def dense_bytes(self) -> int:
        """Bytes of all arrays, dense."""
        return sum(e.size * np.dtype(e.dtype).itemsize for e in self.entries)

    @property
    def largest_message(self) -> int:
        """Bytes that the records of a message have at most."""
        return largest_message(self.dense_bytes)

    def to_bytes(self) -> bytes:
        """Return the manifest as JSON, compressed by zlib."""
        rows = [
            [e.name, list(e.shape), e.dtype, int(e.masked), int(e.trainable)]
            + [e.of] * bool(e.of)
            for e in self.entries
        ]
        return zlib.compress(json.dumps(rows, separators=(",", ":")).encode(), 9)

    @classmethod
    def from_bytes(cls, frame: bytes) -> "Manifest":
        """Read a manifest; a bad one is a WireError."""
        try:
            inflate = zlib.decompressobj()
            text = inflate.decompress(frame, _MAX_MANIFEST)
            if not inflate.eof or inflate.unused_data:
                raise WireError(
                    f"expected one compressed text of at most {_MAX_MANIFEST} B, "
                    f"got {len(text)} B and more"
                )
            entries = tuple(
                Entry(name, tuple(shape), dtype, bool(masked), bool(trainable), *of)
                for name, shape, dtype, masked, trainable, *of in json.loads(text)
            )
            if len({entry.name for entry in entries}) != len(entries):
                raise WireError("expected different names, got one twice")
        except (zlib.error, ValueError, TypeError, RecursionError) as error:
            raise WireError(f"manifest: {error}") from error
        return cls(entries)


def _numbered_statistics(arrays: Params) -> set[str]:
    """Return the means and variances of BatchNorms whose names are numbers.

    In a ``state_dict`` they stand before a count of batches, an integer alone.
    """
    names = list(arrays)
    found: set[str] = set()
    for mean, variance, count in zip(names, names[1:], names[2:], strict=False):
        shape = arrays[mean].shape
        of_channels = len(shape) == 1 and arrays[variance].shape == shape
        is_count = arrays[count].shape == () and arrays[count].dtype.kind in "iu"
        if count.isdecimal() and is_count and of_channels:
            found |= {mean, variance}
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
