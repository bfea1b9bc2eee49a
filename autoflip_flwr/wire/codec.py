"""Kept values, masks and local guidance as bytes, and back. NumPy only.

No frame contains a size, a name or a type. The receiver knows them from its own model
or manifest, so a frame cannot make it allocate memory. All numbers are little-endian.
docs/wire-format.md shows the three frames on one screen.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypeVar, get_args, overload

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import GuidanceError, MaskError, WireError
from autoflip_flwr.method.guidance import Values
from autoflip_flwr.method.parallel import parallel_map
from autoflip_flwr.types import Array, Float32, Guidance, Mask, Masks, Params, ValueType

Frame: TypeAlias = bytes | bytearray | memoryview
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
#: Name -> positions of the kept entries in the flat array, ascending.
Indices: TypeAlias = Mapping[str, NDArray[np.intp]]
S = TypeVar("S", bound=np.generic)

VALUE_TYPES: tuple[ValueType, ...] = get_args(ValueType)

#: Values of integer types that share a scale, and the largest code of each type.
BLOCK = 256
_LARGEST = {"int8": 127, "int4": 7}
_LARGEST_SCALE = np.float32(np.finfo(np.float32).max / 128)  # 127 of it are finite

#: Local guidance covers this many octaves below the largest value of a tensor.
_OCTAVES = 40
_LEVELS = 255  # code 0 is exactly zero, 1..255 are logarithmic steps

#: Bytes per tensor in the header of a guidance frame: two float32.
HEADER_BYTES = 8


def indices(masks: Masks) -> Indices:
    """Return the positions of the kept entries, eight bytes each.

    With them `encode` and `decode` take about half of the time.
    """
    return dict(zip(masks, parallel_map(np.flatnonzero, masks.values()), strict=True))


def encode(
    values: Array | Params,
    mask: Mask | Masks,
    *,
    dtype: ValueType = "float32",
    kept: Indices | None = None,
) -> bytes:
    """Write the kept values, in the mask's order of tensors and in C order.

    Parameters
    ----------
    values : array or mapping of name -> array
        Floating values; a mapping has all names of `mask`.
    mask : bool array or mapping of name -> bool array
        True = keep, shapes equal to those of `values`.
    dtype : {"float32", "float16", "int8", "int4"}
        Type of the sent values; larger values saturate (float16: +-65504). ``int8``
        rounds each value to a 127th of the largest of its block of 256. ``int4`` rounds
        to a seventh of it, up or down at random so that the mean is the value; the
        random numbers depend on the values alone.
    kept : mapping of name -> int array, optional
        The `indices` of the mask, if they are at hand.

    Returns
    -------
    bytes
        ``kept * itemsize`` bytes, two values a byte with ``int4``; integers after four
        bytes for each block's scale.

    Raises
    ------
    MaskError
        If names or shapes of values and mask differ.
    WireError
        If a kept value is NaN or infinite, which a peer would reject.
    """
    quantizes = _check_type(dtype) in _LARGEST
    sent_as = np.dtype("float32" if quantizes else dtype).newbyteorder("<")
    pairs = _pairs(values, mask)

    def one(item: tuple[str, Array, Mask]) -> Array:
        name, value, keep = item
        at = np.flatnonzero(keep) if kept is None else kept[name]
        part = value.reshape(-1).take(at)
        remedy = "; the training has diverged (lower the learning rate)"
        _check_finite(name, part, remedy)
        if sent_as.itemsize < part.dtype.itemsize:
            limits = np.finfo(sent_as)
            part = part.clip(limits.min, limits.max)
        return part.astype(sent_as, copy=False)

    parts = parallel_map(one, pairs)
    if quantizes:
        scaled = parallel_map(partial(_scaled, dtype=dtype), parts)
        codes = [codes for _, codes in scaled]
        if dtype == "int4":
            codes = [_paired(np.concatenate(codes))] if codes else []
        parts = [scales for scales, _ in scaled] + codes
    return b"".join(part.data for part in parts)


def _scaled(kept: Float32, *, dtype: ValueType) -> tuple[Float32, NDArray[np.int8]]:
    """Return a scale per block, so that its largest has the largest code, and codes."""
    scales = np.zeros(-(-kept.size // BLOCK), "<f4")
    codes = np.zeros(kept.size, np.int8)
    if kept.size:
        most = _LARGEST[dtype]
        starts = np.arange(0, kept.size, BLOCK)
        largest = np.maximum.reduceat(np.abs(kept), starts)
        scales[:] = np.minimum(largest / np.float32(most), _LARGEST_SCALE)
        steps = kept / np.where(scales > 0, scales, 1).repeat(BLOCK)[: kept.size]
        if dtype == "int4":
            seed = int.from_bytes(digest(kept.data.cast("B")), "little")
            steps += np.random.default_rng(seed).random(kept.size, np.float32)
            np.floor(steps, out=steps)
        codes[:] = np.rint(steps).clip(-most, most)
    return scales, codes


def _paired(codes: NDArray[np.int8]) -> NDArray[np.int8]:
    """Write codes of four bits, two a byte, the first in the lower half."""
    pairs = np.zeros(-(-codes.size // 2), np.int8)
    pairs |= codes[::2] & 15
    pairs[: codes.size // 2] |= codes[1::2] << 4
    return pairs


def _unpaired(pairs: NDArray[np.int8], count: int) -> NDArray[np.int8]:
    codes = np.empty(2 * pairs.size, np.int8)
    codes[::2] = pairs << 4 >> 4  # the shift back keeps the sign
    codes[1::2] = pairs >> 4
    if codes[count:].any():
        raise WireError("expected zero in the half byte after the last value")
    return codes[:count]


def values_bytes(counts: Sequence[int], *, dtype: ValueType) -> int:
    """Return the length of a frame of values; `counts` are those kept per tensor."""
    quantized = _check_type(dtype) in _LARGEST
    scales = sum(-(-count // BLOCK) for count in counts) if quantized else 0
    return 4 * scales + math.ceil(_value_bytes(dtype) * sum(counts))


def _value_bytes(dtype: ValueType) -> float:
    return 0.5 if dtype == "int4" else np.dtype(dtype).itemsize


def flat(frame: Frame, counts: Sequence[int], *, dtype: ValueType) -> Array:
    """Read the kept values of all tensors, flat; `counts` are those of each tensor.

    Raises
    ------
    WireError
        If the length is wrong, or a scale is negative, NaN, infinite or so large that
        its values would be infinite. Values of floating types are not checked.
    """
    kept, quantized = sum(counts), _check_type(dtype) in _LARGEST
    blocks = [-(-count // BLOCK) for count in counts]
    expected = values_bytes(counts, dtype=dtype)
    header = 4 * sum(blocks) if quantized else 0
    size = _value_bytes(dtype)
    if len(frame) != expected:
        also = f"4 x {sum(blocks)} scales + " if header else ""
        raise WireError(
            f"values do not fit the mask: expected {expected} B "
            f"({also}{size} x {kept} kept), got {len(frame)} B"
        )
    if not quantized:
        floats: Array = np.frombuffer(frame, np.dtype(dtype).newbyteorder("<"))
        return floats
    values = np.frombuffer(frame, np.int8, offset=header)
    if dtype == "int4":
        values = _unpaired(values, kept)
    scales = np.frombuffer(frame, "<f4", count=sum(blocks))
    if not ((scales >= 0) & (scales <= _LARGEST_SCALE)).all():
        raise WireError(
            f"expected scales of blocks in [0, {_LARGEST_SCALE:.3g}], got "
            f"{scales.min(initial=0)} to {scales.max(initial=0)}"
        )
    ends = np.cumsum(blocks)
    sizes = np.full(scales.size, BLOCK)
    for end, count in zip(ends, counts, strict=True):
        if count % BLOCK:
            sizes[end - 1] = count % BLOCK
    return np.repeat(scales, sizes) * values


@overload
def decode(
    frame: Frame,
    mask: Mask,
    *,
    dtype: ValueType = ...,
    fill: Array | None = ...,
    kept: Indices | None = ...,
) -> Array: ...


@overload
def decode(
    frame: Frame,
    mask: Masks,
    *,
    dtype: ValueType = ...,
    fill: Params | None = ...,
    kept: Indices | None = ...,
) -> dict[str, Array]: ...


def decode(
    frame: Frame,
    mask: Mask | Masks,
    *,
    dtype: ValueType = "float32",
    fill: Array | Params | None = None,
    kept: Indices | None = None,
) -> Array | dict[str, Array]:
    """Read kept values back into dense arrays; the inverse of `encode`.

    Parameters
    ----------
    frame : bytes
        As long as `encode` makes it.
    mask, dtype, kept
        As in `encode`.
    fill : array or mapping, optional
        Values of the pruned entries, and dtype of the result; float32 zeros by
        default. It is not changed.

    Returns
    -------
    array or dict of name -> array
        An array or a mapping, as `mask`.

    Raises
    ------
    WireError
        If the length is wrong or a value is NaN or infinite.
    """
    masks = mask if isinstance(mask, Mapping) else {_SINGLE: mask}
    fills = fill if isinstance(fill, Mapping) or fill is None else {_SINGLE: fill}
    counts = [
        int(np.count_nonzero(keep)) if kept is None else kept[name].size
        for name, keep in masks.items()
    ]
    values = flat(frame, counts, dtype=dtype)
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
            part = values[offsets[index] : offsets[index + 1]].astype(
                dense.dtype, copy=False
            )
        _check_finite(name, part)
        at = np.flatnonzero(keep) if kept is None else kept[name]
        dense.reshape(-1)[at] = part
        return dense

    names = list(masks)
    dense = dict(zip(names, parallel_map(one, range(len(names))), strict=True))
    return dense if isinstance(mask, Mapping) else dense[_SINGLE]


def pack_mask(masks: Masks) -> bytes:
    """Write a mask as bits, 1 = keep, tensors in order, first entry = highest bit.

    Returns ``ceil(n / 8)`` bytes for `n` entries; unused bits of the last are zero.
    """
    if not masks:
        return b""
    flat = [np.asarray(keep, bool).reshape(-1) for keep in masks.values()]
    return np.packbits(np.concatenate(flat)).tobytes()


def unpack_mask(frame: Frame, shapes: Shapes) -> dict[str, Mask]:
    """Read a mask back; the inverse of `pack_mask`.

    Raises
    ------
    WireError
        If the length is wrong, or a bit after the last entry is set.
    """
    total = sum(map(math.prod, shapes.values()))
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
            f"after entry {total}, got {bits[total:].tolist()}"
        )
    parts = _split(bits[:total].view(np.bool_), shapes)
    return {name: part.reshape(shapes[name]) for name, part in parts.items()}


def digest(mask: Frame) -> bytes:
    """Return the 16 bytes that name a packed mask."""
    return hashlib.blake2b(mask, digest_size=16).digest()


def pack_mask_within(mask: Frame, held: Frame) -> bytes | None:
    """Write a mask as bits of the entries that another mask keeps.

    Parameters
    ----------
    mask, held : bytes
        Of the same model, as `pack_mask` makes them.

    Returns
    -------
    bytes or None
        ``ceil(k / 8)`` bytes if `held` keeps `k` entries; empty if the masks are equal;
        None if `mask` keeps an entry that `held` does not.
    """
    if mask == held:
        return b""
    new, old = np.frombuffer(mask, np.uint8), np.frombuffer(held, np.uint8)
    if new.size != old.size or (new & ~old).any():
        return None
    return np.packbits(np.unpackbits(new)[_kept(old)]).tobytes()


def unpack_mask_within(frame: Frame, held: Frame) -> bytes:
    """Return the packed mask; the inverse of `pack_mask_within`.

    Raises
    ------
    WireError
        If the length is wrong, or a bit after the last entry is set.
    """
    if not frame:
        return bytes(held)
    kept = _kept(np.frombuffer(held, np.uint8))
    within = unpack_mask(frame, {_SINGLE: (kept.size,)})[_SINGLE]
    bits = np.zeros(8 * len(held), np.uint8)
    bits[kept[within]] = 1
    return np.packbits(bits).tobytes()


def _kept(mask: NDArray[np.uint8]) -> NDArray[np.intp]:
    return np.flatnonzero(np.unpackbits(mask))


@dataclass(frozen=True, slots=True)
class QuantizedGuidance:
    """Local guidance with one byte per parameter, a `guidance.LocalMatrix`."""

    codes: Mapping[str, NDArray[np.uint8]]  # shape (size,)
    tables: Mapping[str, Float32]  # shape (256,): the value of each code
    shapes: Shapes

    def scaled(self, name: str, factor: float, *, most: float = math.inf) -> Values:
        """See `guidance.LocalMatrix`."""
        table = np.minimum(self.tables[name] * np.float32(factor), np.float32(most))
        codes = self.codes[name]
        return lambda part, out: np.take(table, codes[part], out=out, mode="clip")

    def dense(self) -> dict[str, Float32]:
        """Return the guidance as float32 arrays of the parameters' shapes."""
        return {
            name: self.tables[name][codes].reshape(self.shapes[name])
            for name, codes in self.codes.items()
        }


def quantize(guidance: Guidance) -> bytes:
    """Write local guidance with one byte per parameter and eight per tensor.

    Squared deviations span many orders of magnitude, so the steps are logarithmic. A
    tensor has 255 of them, from its least positive value (or 2**-40 of its largest, if
    that is larger) to its largest, and an exact zero.

    Returns
    -------
    bytes
        The least and largest level of each tensor (2 float32), then one code per
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
        If the length is wrong, or the levels of a tensor are negative, not finite or
        in the wrong order.
    """
    header, expected = HEADER_BYTES * len(shapes), frame_bytes(shapes)
    if len(frame) != expected:
        raise WireError(
            f"guidance does not fit the model: expected {expected} B "
            f"({HEADER_BYTES} x {len(shapes)} tensors + {expected - header} "
            f"parameters), got {len(frame)} B"
        )
    levels = np.frombuffer(frame, "<f4", count=2 * len(shapes)).reshape(-1, 2)
    tables: dict[str, Float32] = {}
    for name, (low, high) in zip(shapes, levels, strict=True):
        if not (np.isfinite((low, high)).all() and 0 <= low <= high):
            raise WireError(
                f"{name}: expected levels 0 <= low <= high, got low {low}, high {high}"
            )
        tables[name] = level_values(float(low), float(high))
    codes = _split(np.frombuffer(frame, np.uint8, offset=header), shapes)
    return QuantizedGuidance(codes, tables, shapes)


def _codes(flat: Float32, low: float, high: float) -> NDArray[np.uint8]:
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


def level_values(low: float, high: float) -> Float32:
    """Return the value of each code of a tensor, shape (256,); code 0 is 0."""
    table = np.zeros(_LEVELS + 1, np.float64)
    if high > 0:
        least = low if low > 0 else high
        table[1:] = np.geomspace(least, high, _LEVELS)
    return table.astype(np.float32)


#: Name of an array that is not in a mapping.
_SINGLE = "values"


def _check_finite(name: str, kept: Array, remedy: str = "") -> None:
    finite = np.isfinite(kept)
    if not finite.all():
        raise WireError(
            f"{name}: expected finite values, got {int(kept.size - finite.sum())} NaN "
            f"or Inf of {kept.size} kept{remedy}"
        )


def _split(flat: NDArray[S], shapes: Shapes) -> dict[str, NDArray[S]]:
    """Return each tensor's part of the flat entries, without a copy."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    ends = np.cumsum(sizes)
    pairs = zip(shapes, sizes, ends, strict=True)
    return {name: flat[end - size : end] for name, size, end in pairs}


def _check_type(dtype: str) -> str:
    if dtype not in VALUE_TYPES:
        raise WireError(f"unknown value type {dtype!r}; known: {list(VALUE_TYPES)}")
    return dtype


def _pairs(values: Array | Params, mask: Mask | Masks) -> list[tuple[str, Array, Mask]]:
    if isinstance(mask, Mapping) != isinstance(values, Mapping):
        raise MaskError("expected two arrays or two mappings of name -> array")
    masks = mask if isinstance(mask, Mapping) else {_SINGLE: mask}
    arrays = values if isinstance(values, Mapping) else {_SINGLE: values}
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
