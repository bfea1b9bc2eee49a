"""The three frames: what is written comes back, and nothing else is accepted."""

import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_allclose, assert_array_equal

from autoflip_flwr.errors import GuidanceError, MaskError, WireError
from autoflip_flwr.method import mask
from autoflip_flwr.method.guidance import combine
from autoflip_flwr.wire import codec

properties = settings(max_examples=100)
shapes = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
guided = st.floats(0, width=32, allow_nan=False, allow_infinity=False)


@st.composite
def models(draw, elements=finite):
    """Values and a mask of up to four tensors."""
    names = draw(st.lists(st.text(max_size=5), max_size=4, unique=True))
    values, masks = {}, {}
    for name in names:
        shape = draw(shapes)
        values[name] = draw(npst.arrays(np.float32, shape, elements=elements))
        masks[name] = draw(npst.arrays(np.bool_, shape))
    return values, masks


# --- kept values ------------------------------------------------------------------


def test_kept_values_follow_each_other_in_the_masks_order():
    values = {"b": np.float32([9.0]), "w": np.float32([[1.0, 2.0], [3.0, 4.0]])}
    masks = {"w": np.array([[True, False], [True, False]]), "b": np.array([True])}
    frame = codec.encode(values, masks)
    assert frame == struct.pack("<3f", 1.0, 3.0, 9.0)
    found = codec.decode(frame, masks)
    assert_array_equal(found["w"], [[1.0, 0.0], [3.0, 0.0]])
    assert_array_equal(found["b"], [9.0])


@properties
@given(model=models())
def test_kept_values_come_back_and_pruned_ones_are_zero(model):
    values, masks = model
    frame = codec.encode(values, masks)
    assert len(frame) == 4 * sum(int(keep.sum()) for keep in masks.values())
    found = codec.decode(frame, masks)
    assert list(found) == list(masks)
    for name, keep in masks.items():
        assert found[name].dtype == np.float32
        assert_array_equal(found[name], np.where(keep, values[name], 0))


@properties
@given(model=models(), dtype=st.sampled_from(codec.VALUE_TYPES))
def test_with_a_masks_indices_the_same_is_written_and_read(model, dtype):
    values, masks = model
    kept = codec.indices(masks)
    frame = codec.encode(values, masks, dtype=dtype)
    assert codec.encode(values, masks, dtype=dtype, kept=kept) == frame
    whole = codec.decode(frame, masks, dtype=dtype, fill=values)
    found = codec.decode(frame, masks, dtype=dtype, fill=values, kept=kept)
    for name, value in whole.items():
        assert_array_equal(found[name], value)


@properties
@given(model=models(elements=st.floats(-65504, 65504, width=16)))
def test_values_that_float16_holds_come_back_exactly_in_half_the_bytes(model):
    values, masks = model
    frame = codec.encode(values, masks, dtype="float16")
    assert len(frame) == 2 * sum(int(keep.sum()) for keep in masks.values())
    found = codec.decode(frame, masks, dtype="float16")
    for name, keep in masks.items():
        assert_array_equal(found[name], np.where(keep, values[name], 0))


def test_float16_rounds_to_the_nearest_and_saturates():
    values = np.float32([1e6, -1e6, 65520.0, 0.1, 1e-9])
    keep = np.ones(5, bool)
    found = codec.decode(
        codec.encode(values, keep, dtype="float16"), keep, dtype="float16"
    )
    # the largest finite float16 is 65504; 0.1 is 1.6 * 2**-4, ten bits of fraction
    # make that 1638 / 1024 * 2**-4 = 0.0999755859375; 1e-9 is below 2**-25
    assert_array_equal(found, np.float32([65504, -65504, 65504, 0.0999755859375, 0]))


@pytest.mark.parametrize("dtype", codec.VALUE_TYPES)
def test_float64_beyond_the_wires_type_saturates_or_is_refused(dtype):
    keep = np.ones(3, bool)
    try:
        frame = codec.encode(np.array([1e300, -1e300, 1.5]), keep, dtype=dtype)
    except WireError:
        return
    found = codec.decode(frame, keep, dtype=dtype)
    # 1.5 is far below the least step of a block of 1e38: nothing
    assert found[2] == (0 if dtype in ("int8", "int4") else 1.5)
    assert_array_equal(np.sign(found[:2]), [1, -1])
    assert np.isfinite(found).all()


def test_a_single_array_needs_no_name():
    values, keep = np.float32([1.0, 2.0, 3.0]), np.array([True, False, True])
    frame = codec.encode(values, keep)
    assert frame == struct.pack("<2f", 1.0, 3.0)
    found = codec.decode(frame, keep)
    assert_array_equal(found, [1.0, 0.0, 3.0])
    found = codec.decode(frame, keep, fill=np.float64([7, 8, 9]))
    assert_array_equal(found, [1.0, 8.0, 3.0])
    assert found.dtype == np.float64


def test_the_memory_layout_of_values_and_mask_does_not_matter():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    keep = np.array([[True, False, True], [False, True, True]])
    expected = codec.encode(values, keep)
    assert expected == struct.pack("<4f", 0, 2, 4, 5)
    assert codec.encode(np.asfortranarray(values), np.asfortranarray(keep)) == expected
    found = codec.decode(expected, np.asfortranarray(keep))
    assert_array_equal(found, [[0, 0, 2], [0, 4, 5]])


@properties
@given(model=models(), seed=st.integers(0, 100))
def test_pruned_entries_take_the_fill_which_is_left_alone(model, seed):
    values, masks = model
    rng = np.random.default_rng(seed)
    fill = {n: rng.normal(size=k.shape).astype(np.float64) for n, k in masks.items()}
    fill = {n: np.asfortranarray(v) if seed % 2 else v for n, v in fill.items()}
    before = {n: np.array(v) for n, v in fill.items()}
    found = codec.decode(codec.encode(values, masks), masks, fill=fill)
    for name, keep in masks.items():
        assert found[name].dtype == np.float64
        assert_array_equal(found[name], np.where(keep, values[name], before[name]))
        assert_array_equal(fill[name], before[name])


@properties
@given(model=models())
def test_encoding_leaves_values_and_mask_alone(model):
    values, masks = model
    before = {n: (values[n].copy(), masks[n].copy()) for n in masks}
    codec.encode(values, masks, dtype="float16")
    for name, (value, keep) in before.items():
        assert_array_equal(values[name], value)
        assert_array_equal(masks[name], keep)


def test_decoded_arrays_can_be_written_to():
    keep = np.ones(2, bool)
    found = codec.decode(struct.pack("<2f", 1, 2), keep)
    found[0] = 5.0
    assert_array_equal(found, [5.0, 2.0])


@pytest.mark.parametrize("length", [0, 3, 7, 9, 12, 800])
def test_values_of_the_wrong_length_say_what_fits(length):
    message = rf"expected 8 B \(4 x 2 kept\), got {length} B"
    with pytest.raises(WireError, match=message):
        codec.decode(b"\0" * length, {"w": np.array([True, False, True])})


def test_the_value_type_decides_the_length():
    with pytest.raises(WireError, match=r"expected 2 B \(2 x 1 kept\), got 4 B"):
        codec.decode(b"\0" * 4, np.array([True]), dtype="float16")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", codec.VALUE_TYPES)
def test_nan_and_inf_pass_neither_way(bad, dtype):
    values = {"a": np.float32([1.0]), "w": np.float32([1.0, bad, bad])}
    masks = {"a": np.array([True]), "w": np.array([True, True, False])}
    with pytest.raises(WireError, match="w: expected finite values, got 1 NaN or Inf"):
        codec.encode(values, masks, dtype=dtype)
    if dtype in ("int8", "int4"):
        codes = [1, 1, 1] if dtype == "int8" else [0x11, 0x01]
        frame = struct.pack(f"<2f{len(codes)}b", 1.0, bad, *codes)
        told = "expected scales of blocks"
    else:
        kind = np.dtype(dtype).newbyteorder("<")
        frame, told = np.array([1.0, 1.0, bad], kind).tobytes(), "w: expected finite"
    with pytest.raises(WireError, match=told):
        codec.decode(frame, masks, dtype=dtype)


def test_a_pruned_nan_does_not_travel():
    keep = np.array([True, False])
    frame = codec.encode(np.float32([1.0, np.nan]), keep)
    assert_array_equal(codec.decode(frame, keep), [1.0, 0.0])


def test_values_and_masks_that_do_not_fit_are_named():
    keep = {"w": np.ones((2, 2), bool)}
    with pytest.raises(MaskError, match=r"without values: \['w'\]"):
        codec.encode({"v": np.zeros((2, 2))}, keep)
    with pytest.raises(MaskError, match=r"w: .* shape \(4,\), got \(2, 2\)"):
        codec.encode({"w": np.zeros(4)}, keep)
    with pytest.raises(MaskError, match="two arrays or two mappings"):
        codec.encode(np.zeros((2, 2)), keep)


def test_an_unknown_value_type_lists_the_known():
    with pytest.raises(WireError, match=r"'int7'.*float32.*float16.*int8"):
        codec.encode(np.zeros(1), np.ones(1, bool), dtype="int7")
    with pytest.raises(WireError, match=r"'int7'.*float32.*float16.*int8"):
        codec.decode(b"", np.ones(1, bool), dtype="int7")


def test_bytes_with_a_scale_by_hand():
    """A block of two values, of which the larger is 127 steps, and one of zeros."""
    values = {"a": np.float32([2.54, -1.0, 7.0]), "z": np.float32([0.0])}
    masks = {"a": np.array([True, True, False]), "z": np.array([True])}
    frame = codec.encode(values, masks, dtype="int8")
    assert frame == struct.pack(
        "<2f3b", np.float32(2.54) / np.float32(127), 0, 127, -50, 0
    )
    found = codec.decode(frame, masks, dtype="int8")
    assert_allclose(found["a"], [2.54, -1.0, 0.0], rtol=1e-6)
    assert_array_equal(found["z"], [0.0])


@properties
@given(
    model=models(st.floats(-(2.0**99), 2.0**99, width=32)),
    stretch=st.integers(1, 200),
)
def test_bytes_are_off_by_half_a_step_of_their_block(model, stretch):
    values, masks = model
    values = {n: np.tile(v.reshape(-1), stretch) for n, v in values.items()}
    masks = {n: np.tile(k.reshape(-1), stretch) for n, k in masks.items()}
    found = codec.decode(codec.encode(values, masks, dtype="int8"), masks, dtype="int8")
    for name, keep in masks.items():
        kept, back = values[name][keep], found[name][keep]
        assert (found[name][~keep] == 0).all()
        for start in range(0, kept.size, codec.BLOCK):
            block = slice(start, start + codec.BLOCK)
            step = np.abs(kept[block]).max().astype(np.float64) / 127
            off = np.abs(kept[block].astype(np.float64) - back[block])
            assert off.max() <= step * 0.5001 + 1e-42  # the least scale is 1e-45


def test_half_bytes_by_hand():
    """Multiples of a step stay as they are; the first code is the lower half."""
    values = {"a": np.float32([7.0, -3.0, 9.0, 1.0]), "z": np.float32([-7.0, 0.0])}
    masks = {"a": np.array([True, True, False, True]), "z": np.array([True, True])}
    frame = codec.encode(values, masks, dtype="int4")
    #       codes 7 -3 | 1 -7 | 0     -3 = 1101, -7 = 1001
    assert frame == struct.pack("<2f3B", 1.0, 1.0, 0xD7, 0x91, 0x00)
    found = codec.decode(frame, masks, dtype="int4")
    assert_array_equal(found["a"], [7.0, -3.0, 0.0, 1.0])
    assert_array_equal(found["z"], [-7.0, 0.0])


@properties
@given(model=models(st.floats(-(2.0**99), 2.0**99, width=32)))
def test_half_bytes_are_off_by_less_than_a_step_and_repeat(model):
    values, masks = model
    frame = codec.encode(values, masks, dtype="int4")
    assert frame == codec.encode(values, masks, dtype="int4")
    found = codec.decode(frame, masks, dtype="int4")
    for name, keep in masks.items():
        kept, back = values[name][keep].astype(np.float64), found[name][keep]
        step = np.abs(kept).max(initial=0) / 7
        assert (np.abs(kept - back) <= step * 1.0001 + 1e-42).all()


def test_half_bytes_are_right_in_the_mean():
    """0.3 steps become 0 or 1; over many values their mean is 0.3."""
    values = np.full(100_000, 0.3, np.float32)
    values[:: codec.BLOCK] = 7.0  # the step is 1
    keep = np.ones(values.size, bool)
    found = codec.decode(codec.encode(values, keep, dtype="int4"), keep, dtype="int4")
    rest = values == np.float32(0.3)
    assert set(found[rest]) == {0.0, 1.0}
    assert_allclose(found[rest].mean(), 0.3, atol=4 * np.sqrt(0.21 / rest.sum()))


def test_half_bytes_of_another_number_or_with_a_rest_are_refused():
    keep = np.ones(3, bool)
    frame = codec.encode(np.float32([1, 2, 3]), keep, dtype="int4")
    with pytest.raises(
        WireError, match=r"expected 6 B \(4 x 1 scales \+ 0.5 x 3 kept\)"
    ):
        codec.decode(frame + b"\0", keep, dtype="int4")
    with pytest.raises(WireError, match="zero in the half byte after the last value"):
        codec.decode(frame[:-1] + bytes([frame[-1] | 0x10]), keep, dtype="int4")


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 3e36])
def test_scales_that_cannot_be_are_refused(scale):
    frame = struct.pack("<f1b", scale, 1)
    with pytest.raises(
        WireError, match=r"expected scales of blocks in \[0, 2\.66e\+36\]"
    ):
        codec.decode(frame, np.array([True]), dtype="int8")
    with pytest.raises(WireError, match=r"expected 6 B \(4 x 1 scales \+ 1 x 2 kept\)"):
        codec.decode(frame, np.array([True, True]), dtype="int8")


# --- masks ------------------------------------------------------------------------


def test_bits_run_on_over_tensors_from_the_highest():
    masks = {
        "a": np.array([True, False, True]),
        "b": np.array([[True, False], [False, False]]),
        "c": np.array([False, True]),
    }
    # 101 1000 01 -> 1011 0000 | 1000 0000
    assert codec.pack_mask(masks) == bytes([0xB0, 0x80])
    found = codec.unpack_mask(b"\xb0\x80", {"a": (3,), "b": (2, 2), "c": (2,)})
    for name, keep in masks.items():
        assert_array_equal(found[name], keep)


@properties
@given(model=models())
def test_a_mask_comes_back_from_an_eighth_of_a_byte_per_entry(model):
    _, masks = model
    frame = codec.pack_mask(masks)
    assert len(frame) == math.ceil(sum(keep.size for keep in masks.values()) / 8)
    found = codec.unpack_mask(frame, {n: k.shape for n, k in masks.items()})
    assert list(found) == list(masks)
    for name, keep in masks.items():
        assert found[name].dtype == np.bool_
        assert_array_equal(found[name], keep)


@pytest.mark.parametrize("bit", range(7))
def test_a_bit_behind_the_last_entry_is_refused(bit):
    frame = bytes([0xB0, 0x80 | 1 << bit])
    with pytest.raises(WireError, match="not canonical: expected zero in the 7 bits"):
        codec.unpack_mask(frame, {"w": (9,)})


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_mask_of_the_wrong_length_says_what_fits(length):
    with pytest.raises(
        WireError, match=rf"expected 2 B \(9 entries / 8\), got {length} B"
    ):
        codec.unpack_mask(b"\0" * length, {"w": (3, 3)})


# --- local guidance ---------------------------------------------------------------


def test_guidance_is_two_levels_a_tensor_then_a_logarithmic_code_a_parameter():
    frame = codec.quantize(
        {"w": np.float32([[0.0, 1.0], [4.0, 16.0]]), "b": np.float32([2.0])}
    )
    # 254 steps from 1 to 16: 4 is half of the way, code 1 + 127. b is constant: 255.
    expected = struct.pack("<4f", 1, 16, 2, 2) + bytes([0, 1, 128, 255, 255])
    assert frame == expected
    found = codec.dequantize(frame, {"w": (2, 2), "b": (1,)}).dense()
    assert_allclose(found["w"], [[0, 1], [4, 16]], rtol=1e-6)
    assert_array_equal(found["b"], [2.0])
    assert found["w"].dtype == np.float32


def test_values_further_down_than_forty_octaves_take_the_least_level():
    values = np.float32([2.0**20, 2.0**-20, 2.0**-21, 2.0**-100])
    found = dequantized({"w": values})["w"]
    assert_array_equal(found, np.float32([2.0**20, 2.0**-20, 2.0**-20, 2.0**-20]))


def dequantized(guidance):
    shapes = {name: values.shape for name, values in guidance.items()}
    return codec.dequantize(codec.quantize(guidance), shapes).dense()


@properties
@given(
    guidance=st.dictionaries(
        st.text(max_size=4),
        shapes.flatmap(lambda shape: npst.arrays(np.float32, shape, elements=guided)),
        max_size=3,
    )
)
def test_guidance_takes_a_byte_a_parameter_and_is_off_by_half_a_step(guidance):
    frame = codec.quantize(guidance)
    sizes = [values.size for values in guidance.values()]
    assert len(frame) == 8 * len(sizes) + sum(sizes)
    for name, values in dequantized(guidance).items():
        original = guidance[name]
        assert values.shape == original.shape
        assert_array_equal(values == 0, original == 0)  # an exact zero stays one
        if not original.any():
            continue
        high = float(original.max())
        low = max(float(original[original > 0].min()), high * 2.0**-40)
        # 254 steps of ratio r = (high / low)^(1/254); the nearest level on the log
        # scale is at most half a step away: a factor of r^(1/2) = (high/low)^(1/508)
        half = (high / low) ** (1 / 508)
        if low < np.finfo(np.float32).tiny:
            continue  # subnormal numbers have too few digits to be compared by ratio
        inside = original >= low
        ratio = values[inside].astype(np.float64) / original[inside]
        assert (ratio <= half * (1 + 1e-5)).all()
        assert (ratio >= 1 / half * (1 - 1e-5)).all()


@properties
@given(npst.arrays(np.float32, st.integers(1, 40), elements=guided))
def test_quantisation_never_turns_an_order_round(values):
    order = np.argsort(values, kind="stable")
    assert (np.diff(dequantized({"w": values})["w"][order]) >= 0).all()


def test_neighbouring_floats_are_never_turned_round():
    start = np.float32(1.0).view(np.uint32)
    values = (start + np.arange(200_000, dtype=np.uint32) * 7).view(np.float32)
    values = np.concatenate([values, np.float32([1e-12])])
    found = dequantized({"w": values})["w"][:-1]
    assert (np.diff(found) >= 0).all()


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1.0, float(np.float32(3e38))])
def test_the_same_value_everywhere_comes_back_exactly(value):
    values = np.full((2, 3), value, np.float32)
    assert_array_equal(dequantized({"w": values})["w"], values)


@properties
@given(npst.arrays(np.float32, st.integers(1, 20), elements=guided))
def test_the_extremes_come_back(values):
    found = dequantized({"w": values})["w"]
    assert_allclose(found.max(), values.max(), rtol=1e-6)
    if values.min() >= values.max() * 2.0**-40:
        assert_allclose(found.min(), values.min(), rtol=1e-6)


@pytest.mark.parametrize("bad", [-1e-9, np.nan, np.inf])
def test_guidance_that_is_none_is_named(bad):
    with pytest.raises(GuidanceError, match="b: expected finite guidance >= 0"):
        codec.quantize({"w": np.float32([1.0]), "b": np.float32([0.0, bad])})


@pytest.mark.parametrize(
    ("low", "high"),
    [(np.nan, 1), (0, np.nan), (0, np.inf), (-1, 1), (2, 1), (-2, -1), (np.inf, 1)],
)
def test_levels_that_are_none_are_named(low, high):
    frame = struct.pack("<4f", 0, 1, low, high) + bytes(2)
    with pytest.raises(WireError, match="b: expected levels 0 <= low <= high, got"):
        codec.dequantize(frame, {"w": (1,), "b": (1,)})


@pytest.mark.parametrize("length", [0, 8, 13, 15, 14000])
def test_guidance_of_the_wrong_length_says_what_fits(length):
    with pytest.raises(
        WireError,
        match=rf"expected 14 B \(8 x 1 tensors \+ 6 parameters\), got {length} B",
    ):
        codec.dequantize(b"\0" * length, {"w": (2, 3)})


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 0.9])
def test_quantisation_moves_less_than_a_hundredth_of_the_mask(threshold):
    rng = np.random.default_rng(0)
    tensors = {"conv": (16, 1, 5, 5), "fc": (128, 512), "b": (128,), "head": (10, 128)}
    explorers = [
        {
            # sigma 3 is about eight decades from end to end, each tensor at its own
            name: rng.lognormal(-12 - 2 * index, 3.0, shape).astype(np.float32)
            for index, (name, shape) in enumerate(tensors.items())
        }
        for _ in range(5)
    ]
    exact = mask.from_scores(combine(explorers), threshold=threshold)
    coarse = mask.from_scores(
        combine([dequantized(matrix) for matrix in explorers]), threshold=threshold
    )
    assert mask.change(exact, coarse) < 0.01


# --- hostile bytes ----------------------------------------------------------------


MASKS = {
    "w": np.array([[True, False, True], [True, True, False]]),
    "b": np.array([False, True, True]),
}
SHAPES = {name: keep.shape for name, keep in MASKS.items()}
VALUES = {"w": np.float32([[1, 2, 3], [4, 5, 6]]), "b": np.float32([7, 8, 9])}
VALID = {
    "values": codec.encode(VALUES, MASKS),
    "mask": codec.pack_mask(MASKS),
    "guidance": codec.quantize(VALUES),
}


@st.composite
def hostile(draw, valid):
    """Random bytes, or a valid frame with bytes changed, cut off or added."""
    kind = draw(st.sampled_from(["random", "same length", "mutated", "cut", "longer"]))
    if kind == "random":
        return draw(st.binary(max_size=64))
    if kind == "same length":
        return draw(st.binary(min_size=len(valid), max_size=len(valid)))
    if kind == "cut":
        return valid[: draw(st.integers(0, len(valid) - 1))]
    if kind == "longer":
        return valid + draw(st.binary(min_size=1, max_size=9))
    frame = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        frame[draw(st.integers(0, len(valid) - 1))] = draw(st.integers(0, 255))
    return bytes(frame)


@settings(max_examples=300)
@given(frame=hostile(VALID["values"]), dtype=st.sampled_from(codec.VALUE_TYPES))
def test_hostile_values_decode_or_raise_wire_error_and_nothing_else(frame, dtype):
    try:
        found = codec.decode(frame, MASKS, dtype=dtype)
    except WireError:
        return
    for name, keep in MASKS.items():
        assert np.isfinite(found[name]).all()
        assert not found[name][~keep].any()
    if dtype not in ("int8", "int4"):  # many scales tell the same values
        assert codec.encode(found, MASKS, dtype=dtype) == frame


@settings(max_examples=300)
@given(frame=hostile(VALID["mask"]))
def test_hostile_masks_decode_or_raise_wire_error_and_nothing_else(frame):
    try:
        found = codec.unpack_mask(frame, SHAPES)
    except WireError:
        return
    assert codec.pack_mask(found) == frame


@settings(max_examples=300)
@given(frame=hostile(VALID["guidance"]))
def test_hostile_guidance_decodes_or_raises_wire_error_and_nothing_else(frame):
    try:
        found = codec.dequantize(frame, SHAPES).dense()
    except WireError:
        return
    for name, shape in SHAPES.items():
        assert found[name].shape == shape
        assert np.isfinite(found[name]).all()
        assert (found[name] >= 0).all()


@pytest.mark.parametrize(
    "read",
    [
        lambda frame: codec.decode(frame, np.ones(4, bool)),
        lambda frame: codec.unpack_mask(frame, {"w": (2**40, 2**40)}),
        lambda frame: codec.dequantize(frame, {"w": (2**40, 2**40)}),
        lambda frame: codec.dequantize(frame, {"w": (4,)}),
    ],
)
def test_a_frame_of_the_wrong_length_makes_nobody_allocate(read):
    frame = bytes(1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            read(frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000
