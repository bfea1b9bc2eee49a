"""Kept values, masks and local guidance as bytes, and back. NumPy only.

Three frames, none of which carries a size, a name or a type of its own: the
receiver knows them from its own model or manifest, so a frame cannot make it
allocate anything. All numbers are little-endian. docs/wire-format.md shows the
three on one screen.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args, overload

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import GuidanceError, MaskError, WireError
from autoflip_flwr.method.guidance import Values
from autoflip_flwr.method.parallel import parallel_map
from autoflip_flwr.types import Array, Guidance, Masks, Params, ValueType

Frame: TypeAlias = bytes | bytearray | memoryview
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

VALUE_TYPES: tuple[ValueType, ...] = get_args(ValueType)

#: Local guidance is stored over this many octaves below a tensor's largest value.
_OCTAVES = 40
_LEVELS = 255  # code 0 is an exact zero, 1..255 are logarithmic steps

#: Bytes of a guidance frame before the codes, for each tensor: two float32.
HEADER_BYTES = 8


# --- kept values -----------------------------------------------------------------


def encode(
    values: Array | Params,
    mask: NDArray[np.bool_] | Masks,
    *,
    dtype: ValueType = "float32",
) -> bytes:
    """Write the kept values, tensor after tensor in the mask's order, in C order.

    Parameters
    ----------
    values : array or mapping of name -> array
        Floating values; where `mask` is a mapping, every name of it.
    mask : bool array or mapping of name -> bool array
        True = keep, shapes equal to those of `values`.
    dtype : {"float32", "float16"}
        Type of the values on the wire; larger values saturate (float16: +-65504).

    Returns
    -------
    bytes
        ``kept * itemsize`` bytes.

    Raises
    ------
    MaskError
        If names or shapes of values and mask differ.
    WireError
        If a kept value is NaN or infinite: a peer would refuse it.
    """
    wire_type = _wire_type(dtype)
    pairs = _pairs(values, mask)

    def one(item: tuple[str, Array, NDArray[np.bool_]]) -> Array:
        name, value, keep = item
        kept = value.reshape(-1).take(np.flatnonzero(keep))
        if not np.isfinite(kept).all():
            bad = int(kept.size - np.isfinite(kept).sum())
            raise WireError(
                f"{name}: expected finite values, got {bad} NaN or Inf of {kept.size} "
                "kept; the training has diverged (lower the learning rate)"
            )
        if wire_type.itemsize < kept.dtype.itemsize:
            limits = np.finfo(wire_type)
            kept = kept.clip(limits.min, limits.max)
        return kept.astype(wire_type, copy=False)

    return b"".join(part.data for part in parallel_map(one, pairs))


@overload
def decode(
    frame: Frame,
    mask: NDArray[np.bool_],
    *,
    dtype: ValueType = ...,
    fill: Array | None = ...,
) -> Array: ...


@overload
def decode(
    frame: Frame,
    mask: Masks,
    *,
    dtype: ValueType = ...,
    fill: Params | None = ...,
) -> dict[str, Array]: ...


def decode(
    frame: Frame,
    mask: NDArray[np.bool_] | Masks,
    *,
    dtype: ValueType = "float32",
    fill: Array | Params | None = None,
) -> Array | dict[str, Array]:
    """Read kept values back into dense arrays; the inverse of `encode`.

    Parameters
    ----------
    frame : bytes
        Exactly ``kept * itemsize`` bytes.
    mask : bool array or mapping of name -> bool array
        The mask the frame was written with.
    dtype : {"float32", "float16"}
        Type of the values on the wire.
    fill : array or mapping, optional
        What the pruned entries become, and the result's dtype; zeros of float32
        by default. Never written to.

    Returns
    -------
    array or dict of name -> array
        In the form of `mask`.

    Raises
    ------
    WireError
        If the length is wrong or a value is NaN or infinite.
    """
    wire_type = _wire_type(dtype)
    masks = mask if isinstance(mask, Mapping) else {"": mask}
    fills = fill if isinstance(fill, Mapping) or fill is None else {"": fill}
    counts = [int(np.count_nonzero(keep)) for keep in masks.values()]
    expected = sum(counts) * wire_type.itemsize
    if len(frame) != expected:
        raise WireError(
            f"values do not fit the mask: expected {expected} B "
            f"({wire_type.itemsize} x {sum(counts)} kept), got {len(frame)} B"
        )
    kept = np.frombuffer(frame, wire_type)
    offsets = np.cumsum([0, *counts])

    def one(index: int) -> Array:
        name = names[index]
        keep = masks[name]
        dense = (
            np.zeros(keep.shape, np.float32)
            if fills is None
            else np.array(fills[name], order="C")
        )
        with np.errstate(over="ignore"):
            part = kept[offsets[index] : offsets[index + 1]].astype(
                dense.dtype, copy=False
            )
        if not np.isfinite(part).all():
            bad = int(part.size - np.isfinite(part).sum())
            raise WireError(
                f"{name or 'values'}: expected finite values, "
                f"got {bad} NaN or Inf of {part.size} kept"
            )
        dense.reshape(-1)[np.flatnonzero(keep)] = part
        return dense

    names = list(masks)
    dense = dict(zip(names, parallel_map(one, range(len(names))), strict=True))
    return dense if isinstance(mask, Mapping) else dense[""]


# --- masks -----------------------------------------------------------------------


def pack_mask(masks: Masks) -> bytes:
    """Write a mask as bits, 1 = keep, tensors in order, first entry = highest bit.

    Returns ``ceil(n / 8)`` bytes for `n` entries; the last byte's rest is zero.
    """
    if not masks:
        return b""
    flat = [np.asarray(keep, bool).reshape(-1) for keep in masks.values()]
    return np.packbits(np.concatenate(flat)).tobytes()


def unpack_mask(frame: Frame, shapes: Shapes) -> dict[str, NDArray[np.bool_]]:
    """Read a mask back; the inverse of `pack_mask`.

    Raises
    ------
    WireError
        If the length is wrong, or a bit behind the last entry is set.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    total = sum(sizes)
    expected = -(-total // 8)
    if len(frame) != expected:
        raise WireError(
            f"mask does not fit the model: expected {expected} B "
            f"({total} entries / 8), got {len(frame)} B"
        )
    bits = np.unpackbits(np.frombuffer(frame, np.uint8))
    if bits[total:].any():
        raise WireError(
            f"mask is not canonical: expected zero in the {bits.size - total} bits "
            f"behind entry {total}, got {bits[total:].tolist()}"
        )
    flat = bits[:total].view(np.bool_)
    ends = np.cumsum(sizes)
    return {
        name: flat[end - size : end].reshape(shape)
        for (name, shape), size, end in zip(shapes.items(), sizes, ends, strict=True)
    }


# --- local guidance --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QuantizedGuidance:
    """Local guidance in one byte per parameter.

    Attributes
    ----------
    codes : mapping of name -> uint8 array, shape (size,)
    tables : mapping of name -> float32 array, shape (256,)
        The value each code stands for; ``tables[name][0]`` is 0.
    shapes : mapping of name -> shape
    """

    codes: Mapping[str, NDArray[np.uint8]]
    tables: Mapping[str, NDArray[np.float32]]
    shapes: Shapes

    def scaled(self, name: str, factor: float) -> Values:
        """Return a reader of one tensor's flat values, times `factor`."""
        table, codes = self.tables[name] * np.float32(factor), self.codes[name]
        return lambda part, out: np.take(table, codes[part], out=out, mode="clip")

    def dense(self) -> dict[str, NDArray[np.float32]]:
        """Return the float32 guidance, name -> array of the parameter's shape."""
        return {
            name: self.tables[name][codes].reshape(self.shapes[name])
            for name, codes in self.codes.items()
        }


def quantize(guidance: Guidance) -> bytes:
    """Write local guidance in one byte per parameter and eight per tensor.

    Squared deviations span many orders of magnitude, so the steps are
    logarithmic: per tensor 255 of them between its largest value and its least
    positive one (or 2**-40 of the largest, if that is larger), and an exact zero.

    Returns
    -------
    bytes
        For each tensor its least and largest level (2 float32), then a code per
        parameter (uint8), tensors in order.

    Raises
    ------
    GuidanceError
        If a value is negative, NaN or infinite.
    """
    levels: list[tuple[float, float]] = []
    codes: list[NDArray[np.uint8]] = []
    for name, values in guidance.items():
        flat = np.asarray(values, np.float32).reshape(-1)
        if not np.isfinite(flat).all() or (flat < 0).any():
            raise GuidanceError(
                f"{name}: expected finite guidance >= 0, got a negative, NaN or Inf; "
                "the exploration has diverged (lower the learning rate)"
            )
        high = float(flat.max(initial=0.0))
        positive = flat[flat > 0]
        low = float(positive.min()) if positive.size else 0.0
        low = max(low, float(np.float32(high * 2.0**-_OCTAVES)))
        levels.append((low, high))
        codes.append(_codes(flat, low, high))
    header = np.asarray(levels, "<f4").tobytes()
    return b"".join([header, *(part.tobytes() for part in codes)])


def frame_bytes(shapes: Shapes) -> int:
    """Return the length of a guidance frame."""
    return HEADER_BYTES * len(shapes) + sum(map(math.prod, shapes.values()))


def dequantize(frame: Frame, shapes: Shapes) -> QuantizedGuidance:
    """Read local guidance back; the codes are views of `frame`.

    Raises
    ------
    WireError
        If the length is wrong, or a tensor's levels are not finite, negative or
        the wrong way round.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    header = HEADER_BYTES * len(sizes)
    expected = frame_bytes(shapes)
    if len(frame) != expected:
        raise WireError(
            f"guidance does not fit the model: expected {expected} B "
            f"(8 x {len(sizes)} tensors + {sum(sizes)} parameters), "
            f"got {len(frame)} B"
        )
    levels = np.frombuffer(frame, "<f4", count=2 * len(sizes)).reshape(-1, 2)
    flat = np.frombuffer(frame, np.uint8, offset=header)
    ends = np.cumsum(sizes)
    codes: dict[str, NDArray[np.uint8]] = {}
    tables: dict[str, NDArray[np.float32]] = {}
    for name, (low, high), size, end in zip(shapes, levels, sizes, ends, strict=True):
        if not (np.isfinite((low, high)).all() and 0 <= low <= high):
            raise WireError(
                f"{name}: expected levels 0 <= low <= high, got low {low}, high {high}"
            )
        codes[name] = flat[end - size : end]
        tables[name] = level_values(float(low), float(high))
    return QuantizedGuidance(codes, tables, shapes)


def _codes(flat: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    if high == 0.0:
        return np.zeros(flat.size, np.uint8)
    if low >= high:
        return (flat > 0).astype(np.uint8) * np.uint8(_LEVELS)
    with np.errstate(divide="ignore"):
        steps = np.log2(flat, dtype=np.float32)
    steps -= np.float32(np.log2(low))
    steps *= np.float32((_LEVELS - 1) / np.log2(high / low))
    steps += 1.5
    steps.clip(1, _LEVELS, out=steps)
    codes = steps.astype(np.uint8)
    codes[flat == 0] = 0
    return codes


def level_values(low: float, high: float) -> NDArray[np.float32]:
    """Return the value each code of a tensor stands for, shape (256,)."""
    table = np.zeros(_LEVELS + 1, np.float64)
    if high > 0:
        least = low if low > 0 else high
        table[1:] = np.geomspace(least, high, _LEVELS)
    return table.astype(np.float32)


# --- helpers ---------------------------------------------------------------------


def _wire_type(dtype: str) -> np.dtype[Any]:
    if dtype not in VALUE_TYPES:
        raise WireError(f"unknown value type {dtype!r}; known: {list(VALUE_TYPES)}")
    return np.dtype(dtype).newbyteorder("<")


def _pairs(
    values: Array | Params, mask: NDArray[np.bool_] | Masks
) -> list[tuple[str, Array, NDArray[np.bool_]]]:
    if isinstance(mask, Mapping) != isinstance(values, Mapping):
        raise MaskError("expected two arrays or two mappings of name -> array")
    masks = mask if isinstance(mask, Mapping) else {"values": mask}
    arrays = values if isinstance(values, Mapping) else {"values": values}
    missing = [name for name in masks if name not in arrays]
    if missing:
        raise MaskError(f"the mask names parameters without values: {missing}")
    pairs = [(n, np.asarray(arrays[n]), np.asarray(keep)) for n, keep in masks.items()]
    for name, value, keep in pairs:
        if value.shape != keep.shape:
            raise MaskError(
                f"{name}: expected a mask of shape {value.shape}, got {keep.shape}"
            )
    return pairs
