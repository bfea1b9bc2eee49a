"""Records: what is packed comes back, and a peer's lies end in a WireError."""

import io
import json
import pickle
import tracemalloc
import zlib

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from autoflip_flwr.errors import SettingsError, WireError
from autoflip_flwr.wire import codec
from autoflip_flwr.wire import records as wire
from autoflip_flwr.wire.manifest import Entry, Manifest
from autoflip_flwr.wire.records import Plan

fuzzing = settings(max_examples=200)


def model():
    """Convolution, BatchNorm and a layer behind them, as a state_dict has them."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv.weight": (4, 2, 3, 3),
        "bn.weight": (4,),
        "bn.bias": (4,),
        "bn.running_mean": (4,),
        "bn.running_var": (4,),
    }
    arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    arrays["bn.num_batches_tracked"] = np.array(2**53 + 1)  # no float64 holds it
    arrays["fc.weight"] = rng.normal(size=(3, 4)).astype(np.float32)
    return arrays


BUFFERS = ["bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
MASKED = ["conv.weight", "bn.weight", "bn.bias", "fc.weight"]


def plan_of(arrays=None, share=0.5, values="float32", **rules):
    manifest = Manifest.of(model() if arrays is None else arrays, **rules)
    rng = np.random.default_rng(1)
    masks = {name: rng.random(shape) < share for name, shape in manifest.shapes.items()}
    return Plan(manifest, masks, values)


def npy(array, **options):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **options)
    return stream.getvalue()


def npy_frame(header, body=b"", version=b"\x01\x00"):
    text = header if isinstance(header, bytes) else header.encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + body


def flower(data, stype="numpy.ndarray", dtype="float32", shape=()):
    return FlowerArray(dtype=dtype, shape=shape, stype=stype, data=data)


def deflated(rows):
    return zlib.compress(json.dumps(rows).encode())


def row(name="a", shape=(1,), dtype="<f4", masked=1):
    """One row of a manifest's text, in the form that a real one has."""
    text = zlib.decompress(Manifest.of({"a": np.zeros(1, np.float32)}).to_bytes())
    return [name, shape, dtype, masked, *json.loads(text)[0][4:]]


# --- manifests --------------------------------------------------------------------


def test_by_default_every_floating_array_but_batchnorms_buffers_is_masked():
    manifest = Manifest.of(model())
    assert [e.name for e in manifest.entries] == list(model())
    assert [e.name for e in manifest.entries if e.masked] == MASKED
    assert list(manifest.shapes) == MASKED
    assert manifest.shapes["conv.weight"] == (4, 2, 3, 3)


def test_prunable_names_decide_whatever_they_look_like():
    manifest = Manifest.of(model(), prunable=["fc.weight", "bn.running_mean"])
    assert list(manifest.shapes) == ["bn.running_mean", "fc.weight"]


@pytest.mark.parametrize(
    ("exclude", "masked"),
    [
        (["bn.*"], ["conv.weight", "fc.weight"]),
        (["*.weight"], ["bn.bias"]),
        (["fc.weight", "conv*"], ["bn.weight", "bn.bias"]),
    ],
)
def test_excluded_patterns_are_never_masked(exclude, masked):
    assert list(Manifest.of(model(), exclude=exclude).shapes) == masked
    found = Manifest.of(model(), prunable=MASKED, exclude=exclude)
    assert list(found.shapes) == masked


def test_integers_and_empty_arrays_are_never_masked():
    arrays = {
        "steps": np.arange(3),
        "flag": np.array([True]),
        "none": np.zeros((0, 3), np.float32),
        "half": np.ones(2, np.float16),
    }
    assert list(Manifest.of(arrays, prunable=list(arrays)).shapes) == ["half"]


def test_buffers_are_not_trainable_and_excluded_parameters_are():
    for rules in ({}, {"prunable": MASKED}):
        manifest = Manifest.of(model(), exclude=["fc.*"], **rules)
        trainable = [e.name for e in manifest.entries if e.trainable]
        assert trainable == MASKED
        assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_what_cannot_be_pruned_is_an_error():
    with pytest.raises(
        SettingsError, match=r"prunable parameters \['fc.bias'\]; known"
    ):
        Manifest.of(model(), prunable=["fc.bias"])
    with pytest.raises(SettingsError, match=r"nothing to prune: exclude \['\*'\]"):
        Manifest.of(model(), exclude=["*"])
    with pytest.raises(SettingsError, match="nothing to prune"):
        Manifest.of({"steps": np.arange(3)})


def test_a_pattern_that_matches_nothing_is_an_error():
    for exclude in (["FC.*"], ["fc.*", "weight"], "weight"):
        with pytest.raises(SettingsError, match=r"matches no parameter; known"):
            Manifest.of(model(), exclude=exclude)


def test_a_manifest_comes_back():
    manifest = Manifest.of({**model(), "naïve '\"\n": np.ones((), np.float64)})
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


BAD_MANIFESTS = {
    "nothing": b"",
    "not deflated": b"not deflated",
    "cut": Manifest.of(model()).to_bytes()[:-1],
    "longer": Manifest.of(model()).to_bytes() + b"\0",
    "not JSON": zlib.compress(b"[["),
    "not UTF-8": zlib.compress(b"\xff\xfe\xfd"),
    "deep": zlib.compress(b"[" * 100_000),
    "a long number": zlib.compress(b"9" * 5000),
    "a number": deflated(3),
    "a mapping": deflated({"a": 1}),
    "a short row": deflated([row()[:3]]),
    "a number for a name": deflated([row(name=3)]),
    "a number for a shape": deflated([row(shape=1)]),
    "text for a shape": deflated([row(shape="12")]),
    "a negative length": deflated([row(shape=[-1])]),
    "a broken length": deflated([row(shape=[1.5])]),
    "a true length": deflated([row(shape=[True])]),
    "objects": deflated([row(dtype="O")]),
    "text": deflated([row(dtype="U5")]),
    "fields": deflated([row(dtype="f4,f4")]),
    "no type": deflated([row(dtype="nope")]),
    "null, to numpy float64": deflated([row(dtype=None)]),
    "a comma, to numpy a SyntaxError": deflated([row(dtype=",")]),
    "a leading zero, too": deflated([row(dtype="(01,)f4")]),
    "a far field, to numpy an OverflowError": deflated(
        [row(dtype={"names": ["x"], "formats": ["f4"], "offsets": [2**70]})]
    ),
    "masked integers": deflated([row(dtype="<i8")]),
    "masked complex numbers": deflated([row(dtype="<c8")]),
    "one name for two arrays": deflated([row(), row(shape=[2], masked=0)]),
}


@pytest.mark.parametrize("frame", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_bad_manifest_is_a_wire_error(frame):
    with pytest.raises(WireError, match="manifest"):
        Manifest.from_bytes(frame)


def test_rows_like_those_above_but_right_are_read():
    found = Manifest.from_bytes(deflated([row(), row("b", [], "<i8", 0)]))
    assert [(e.name, e.shape, e.dtype, e.masked) for e in found.entries] == [
        ("a", (1,), "<f4", True),
        ("b", (), "<i8", False),
    ]


def test_a_manifest_that_inflates_without_end_is_refused_in_time():
    bomb = zlib.compress(bytes(200 << 20), 9)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="manifest: expected one compressed text"):
            Manifest.from_bytes(bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


# --- plans ------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["train", "evaluate"])
@pytest.mark.parametrize("values", codec.VALUE_TYPES)
def test_a_plan_comes_back_out_of_a_config(phase, values):
    plan = plan_of(values=values)
    config = ConfigRecord(plan.entries(phase))
    found = Plan.of(config)
    assert found.manifest == plan.manifest
    assert found.values == values
    assert list(found.masks) == MASKED
    for name, keep in plan.masks.items():
        assert_array_equal(found.masks[name], keep)
    assert wire.phase_of(config) == phase


def test_an_exploration_comes_back_out_of_a_config():
    manifest = Manifest.of(model())
    asked = wire.Exploration(
        manifest=manifest, epochs=3, patience=2, measure="gradient"
    )
    config = ConfigRecord(asked.entries())
    assert wire.phase_of(config) == "explore"
    assert wire.Exploration.of(config) == asked
    dense = asked.unpack(asked.pack(model()))
    for name, values in model().items():
        assert_array_equal(dense[name], values)


def test_an_exploration_under_a_mask_sends_the_kept_values_alone():
    plan = plan_of()
    asked = wire.Exploration(manifest=plan.manifest, plan=plan)
    found = wire.Exploration.of(ConfigRecord(asked.entries()))
    record = asked.pack(model())
    assert record.count_bytes() == plan.pack(model()).count_bytes()
    dense = found.unpack(record)
    for name, keep in plan.masks.items():
        assert_array_equal(dense[name], np.where(keep, model()[name], 0))


def test_a_start_that_the_client_builds_is_a_digest():
    manifest = Manifest.of(model())
    asked = wire.Exploration(manifest=manifest, start=manifest.digest(model()))
    found = wire.Exploration.of(ConfigRecord(asked.entries()))
    assert found == asked
    assert len(asked.start) == 16
    assert not asked.pack(model())
    for name, values in found.built(wire.record_of(model())).items():
        assert_array_equal(values, model()[name])
    for name, values in model().items():  # each array counts, to the last bit
        other = {**model(), name: values.copy()}
        other[name].reshape(-1).view(np.uint8)[-1] ^= 1
        with pytest.raises(WireError, match="equal the server's, bit for bit"):
            found.built(wire.record_of(other))


@pytest.mark.parametrize("start", ["x" * 16, 3, True])
def test_a_digest_of_another_type_is_refused(start):
    entries = wire.Exploration(manifest=Manifest.of(model())).entries()
    with pytest.raises(WireError, match=r"autoflip\.start: expected bytes"):
        wire.Exploration.of({**entries, wire.START: start})


@pytest.mark.parametrize("measure", ["hessian", "", 3, None])
def test_an_unknown_measure_is_refused(measure):
    entries = wire.Exploration(manifest=Manifest.of(model())).entries()
    with pytest.raises(WireError, match=r"autoflip\.measure"):
        wire.Exploration.of({**entries, wire.MEASURE: measure})


def test_a_message_without_our_phase_is_not_ours():
    assert wire.phase_of({"lr": 0.1}) is None


@pytest.mark.parametrize("key", [wire.MANIFEST, wire.MASK, wire.VALUE_TYPE])
@pytest.mark.parametrize("value", [None, 3, 1.5, [b"x"], True])
def test_a_missing_or_mistyped_entry_is_named(key, value):
    entries = {**plan_of().entries("train"), key: value}
    if value is None:
        del entries[key]
    with pytest.raises(WireError, match=f"{key}: expected .* in the message's config"):
        Plan.of(entries)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {wire.VALUE_TYPE: "int7"},
            r"expected one of \['float32', 'float16', 'int8', 'int4'\]",
        ),
        ({wire.MASK: b""}, r"expected \d+ B \(92 entries / 8\), got 0 B"),
    ],
)
def test_a_plan_with_a_bad_entry_is_refused(entries, message):
    with pytest.raises(WireError, match=message):
        Plan.of({**plan_of().entries("train"), **entries})


@pytest.mark.parametrize("phase", ["fit", "", 3, None, b"train"])
def test_an_unknown_phase_is_refused(phase):
    with pytest.raises(WireError, match="expected explore, train or evaluate"):
        wire.phase_of({wire.PHASE: phase})


@pytest.mark.parametrize(
    ("epochs", "patience"), [(0, 1), (1, 0), (-1, 1), ("1", 1), (1, None), (1.0, 1)]
)
def test_an_impossible_exploration_is_refused(epochs, patience):
    entries = wire.Exploration(manifest=Manifest.of(model())).entries()
    with pytest.raises(WireError, match=r"epochs|patience"):
        wire.Exploration.of({**entries, wire.EPOCHS: epochs, wire.PATIENCE: patience})


@pytest.mark.parametrize(
    "shape",
    [
        [2**40],
        [2**31, 2**31, 2**31],
        [2**70],
        [0, 2**70],  # empty, so an empty mask fits it
        [0, 2**62, 2**62],
        [1] * 100,  # one entry, but more dimensions than numpy has
    ],
)
@pytest.mark.parametrize("mask", [b"", b"\x80"])
def test_a_manifest_that_claims_an_impossible_shape_allocates_nothing(shape, mask):
    config = {
        wire.MANIFEST: deflated([row(shape=shape)]),
        wire.MASK: mask,
        wire.VALUE_TYPE: "float32",
    }
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            Plan.of(config)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000


# --- packing ----------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_kept_values_and_buffers_come_back(share):
    arrays, plan = model(), plan_of(share=share)
    found = plan.unpack(plan.pack(arrays))
    assert list(found) == list(arrays)
    for name, values in arrays.items():
        assert found[name].dtype == values.dtype
        expected = np.where(plan.masks[name], values, 0) if name in MASKED else values
        assert_array_equal(found[name], expected)


def test_what_is_packed_are_the_kept_values_and_the_buffers_by_name():
    plan = plan_of()
    record = plan.pack(model())
    assert list(record) == [wire.VALUES, *BUFFERS]
    kept = sum(int(keep.sum()) for keep in plan.masks.values())
    assert len(record[wire.VALUES].data) == 4 * kept


@pytest.mark.parametrize(("values", "itemsize"), [("float32", 4), ("float16", 2)])
def test_a_packed_model_is_as_small_as_its_kept_values(values, itemsize):
    arrays = {**model(), "big.weight": np.ones((300, 100), np.float32)}
    plan = plan_of(arrays, share=0.1, values=values)
    kept = sum(int(keep.sum()) for keep in plan.masks.values())
    buffers = sum(arrays[name].nbytes for name in BUFFERS)
    content = RecordDict({"arrays": plan.pack(arrays)})
    dense = RecordDict({"arrays": wire.record_of(arrays)})
    # three buffers with a header of 128 B each, and the names
    assert wire.count_bytes(content) <= kept * itemsize + buffers + 3 * 128 + 300
    assert wire.count_bytes(content) < wire.count_bytes(dense) / 8


def test_pruned_entries_take_the_fill():
    arrays, plan = model(), plan_of()
    fill = {name: np.full(arrays[name].shape, 7, np.float32) for name in MASKED}
    found = plan.unpack(plan.pack(arrays), fill=fill)
    for name in MASKED:
        assert_array_equal(found[name], np.where(plan.masks[name], arrays[name], 7))
        assert (fill[name] == 7).all()


def test_packing_leaves_the_model_alone():
    arrays = model()
    plan_of().pack(arrays)
    for name, values in model().items():
        assert_array_equal(arrays[name], values)


def test_diverged_values_are_not_sent():
    arrays, plan = model(), plan_of(share=1.0)
    arrays["fc.weight"][0, 0] = np.nan
    with pytest.raises(WireError, match=r"fc\.weight: expected finite.*learning rate"):
        plan.pack(arrays)


def packed():
    return dict(plan_of().pack(model()).items())


def wrong_keys(arrays):
    arrays["extra"] = arrays.pop("bn.running_mean")


def missing_values(arrays):
    del arrays[wire.VALUES]


def wrong_stype(arrays):
    arrays[wire.VALUES] = flower(arrays[wire.VALUES].data)


def wrong_dtype(arrays):
    arrays[wire.VALUES] = flower(
        arrays[wire.VALUES].data, arrays[wire.VALUES].stype, "float16"
    )


def cut(arrays):
    values = arrays[wire.VALUES]
    arrays[wire.VALUES] = flower(values.data[:-1], values.stype, values.dtype)


def infinite(arrays):
    values = arrays[wire.VALUES]
    data = np.float32([np.inf]).tobytes() + values.data[4:]
    arrays[wire.VALUES] = flower(data, values.stype, values.dtype)


def infinite_buffer(arrays):
    arrays["bn.running_var"] = FlowerArray(np.full(4, np.inf, np.float32))


def buffer_of_another_type(arrays):
    arrays["bn.num_batches_tracked"] = FlowerArray(np.array(3.0))


def buffer_of_another_shape(arrays):
    arrays["bn.running_mean"] = FlowerArray(np.zeros(5, np.float32))


def buffer_in_raw_bytes(arrays):
    arrays["bn.running_mean"] = flower(bytes(16), "autoflip.raw")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_keys, r"expected the arrays \['autoflip.values', .*, got .*'extra'"),
        (missing_values, "expected the arrays"),
        (wrong_stype, "serialized as 'autoflip.raw', got 'float32' as 'numpy.ndarray'"),
        (wrong_dtype, "expected an array of float32 .*, got 'float16'"),
        (cut, "values do not fit the mask"),
        (infinite, r"conv\.weight: expected finite values, got 1 NaN or Inf"),
        (infinite_buffer, r"bn\.running_var: expected finite values"),
        (buffer_of_another_type, r"tracked: expected <i8\[\], got <f8\[\]"),
        (buffer_of_another_shape, r"running_mean: expected <f4\[4\], got <f4\[5\]"),
        (buffer_in_raw_bytes, r"running_mean: expected an npy array"),
    ],
)
def test_a_record_that_is_not_the_plans_says_why(change, message):
    arrays = packed()
    change(arrays)
    with pytest.raises(WireError, match=message):
        plan_of().unpack(ArrayRecord(arrays))


def test_values_too_large_for_the_models_type_are_refused_or_stay_finite():
    plan = plan_of({"w": np.zeros(1, np.float16)}, share=1.0)
    record = Plan(plan.manifest, plan.masks).pack({"w": np.float32([1e30])})
    try:
        found = plan.unpack(record)
    except WireError:
        return
    assert np.isfinite(found["w"]).all()


# --- numbered arrays of the older API ---------------------------------------------


def test_numbered_arrays_get_their_names_back_by_their_order():
    arrays, plan = model(), plan_of()
    record = plan.pack(arrays)
    numbered = ArrayRecord(
        # what the older API leaves: the bytes, no type and no shape
        {
            str(i): flower(a.data, "numpy.ndarray", "")
            for i, a in enumerate(record.values())
        }
    )
    found = plan.unpack(wire.named(numbered, plan))
    for name, values in plan.unpack(record).items():
        assert_array_equal(found[name], values)


def test_a_record_with_names_is_left_as_it_is():
    plan = plan_of()
    record = plan.pack(model())
    assert wire.named(record, plan) is record


def test_numbered_arrays_of_another_count_are_refused():
    record = ArrayRecord([np.zeros(1)] * 3)
    record = ArrayRecord({str(i): a for i, a in enumerate(record.values())})
    with pytest.raises(WireError, match=r"expected 4 arrays .*, got 3"):
        wire.named(record, plan_of())


def test_dense_records_come_by_name_or_by_number():
    arrays, manifest = model(), Manifest.of(model())
    record = wire.record_of(arrays)
    turned = ArrayRecord({name: record[name] for name in reversed(list(record))})
    numbered = ArrayRecord({str(i): a for i, a in enumerate(record.values())})
    for given_record in (record, turned, numbered):
        found = wire.named_arrays(given_record, manifest)
        assert list(found) == list(arrays)
        for name, values in arrays.items():
            assert_array_equal(found[name], values)
            assert found[name].dtype == values.dtype


def test_dense_records_of_another_model_are_refused():
    manifest = Manifest.of(model())
    arrays = model()
    del arrays["fc.weight"]
    with pytest.raises(WireError, match="expected the arrays"):
        wire.named_arrays(wire.record_of(arrays), manifest)
    record = wire.record_of(model())
    swapped = {str(i): a for i, a in enumerate(record.values())}
    swapped = ArrayRecord({"1": swapped.pop("1"), **swapped})
    with pytest.raises(WireError, match="expected the arrays"):
        wire.named_arrays(swapped, manifest)


def test_other_numeric_types_are_converted_only_on_request():
    arrays, manifest = model(), Manifest.of(model())
    record = wire.record_of({n: np.asarray(v, np.float64) for n, v in arrays.items()})
    with pytest.raises(WireError, match=r"conv\.weight: expected <f4.*, got <f8"):
        wire.named_arrays(record, manifest)
    found = wire.named_arrays(record, manifest, exact=False)
    assert_array_equal(found["conv.weight"], arrays["conv.weight"])
    assert found["bn.num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize(
    ("values", "dtype"), [([1e300], "<f4"), ([1e300], "<i8"), ([1 + 1j], "<f4")]
)
def test_a_conversion_that_would_lose_the_value_is_refused(values, dtype):
    with pytest.raises(WireError, match="w: expected"):
        wire.read_array(
            FlowerArray(np.array(values)), Entry("w", (1,), dtype, False), exact=False
        )


def test_arrays_of_reads_whatever_a_record_holds():
    found = wire.arrays_of(wire.record_of(model()))
    for name, values in model().items():
        assert_array_equal(found[name], values)
        assert found[name].dtype == values.dtype


# --- guidance and messages --------------------------------------------------------


def test_a_guidance_frame_comes_back():
    record = wire.guidance_record(b"\1\2\3")
    assert wire.guidance_frames(record) == (b"\1\2\3", None)


def test_a_reply_without_guidance_is_refused():
    with pytest.raises(WireError, match=r"as AutoFlipMod does: ClientApp\(mods="):
        wire.guidance_frames(wire.record_of(model()))
    more = ArrayRecord({**wire.guidance_record(b""), **wire.record_of(model())})
    with pytest.raises(WireError, match=r"expected the array \['autoflip.guidance'\]"):
        wire.guidance_frames(more)
    dense = ArrayRecord({wire.GUIDANCE: FlowerArray(np.zeros(3, np.uint8))})
    with pytest.raises(WireError, match=r"serialized as 'autoflip\.raw'"):
        wire.guidance_frames(dense)


def test_a_reply_tells_the_share_of_pruned_entries_that_moved():
    plan, trained = plan_of(share=0.5), dict(model())
    clean = {
        n: trained[n] * plan.masks[n] if n in plan.masks else trained[n]
        for n in trained
    }
    assert wire.MOVED not in plan.pack_reply(clean, clean)
    pruned = {n: keep.size - int(keep.sum()) for n, keep in plan.masks.items()}
    some = next(iter(plan.masks))
    moved = {**clean, some: np.ones_like(clean[some])}
    for held, share in (((), pruned[some] / sum(pruned.values())), ((some,), 0.0)):
        record, told = wire.take_moved(plan.pack_reply(moved, clean, held))
        assert told == pytest.approx(share, rel=1e-6)
        assert wire.MOVED not in record
        assert_array_equal(plan.unpack(record)[some], plan.masks[some])


@pytest.mark.parametrize("share", [-0.1, 1.5, np.nan, np.inf, None])
def test_another_share_is_refused(share):
    frame = b"" if share is None else np.float32(share).tobytes()
    array = FlowerArray(dtype="float32", shape=(1,), stype="autoflip.raw", data=frame)
    with pytest.raises(WireError, match=r"moved: expected one float32 in \[0, 1\]"):
        wire.take_moved(ArrayRecord({wire.MOVED: array}))


def test_a_message_has_one_array_record_and_one_config():
    arrays, config = wire.record_of(model()), ConfigRecord({"lr": 0.1})
    content = RecordDict({"a": arrays, "c": config})
    assert wire.model_record(content) == ("a", arrays)
    assert wire.only_config(content) == ("c", config)
    for bad, got in (
        (RecordDict({}), "none"),
        (
            RecordDict({"a": arrays, "b": arrays, "c": config, "d": config}),
            r"\['[ac]', '[bd]'\]",
        ),
    ):
        with pytest.raises(WireError, match=f"exactly one ArrayRecord, got {got}"):
            wire.model_record(bad)
        with pytest.raises(WireError, match=f"exactly one ConfigRecord, got {got}"):
            wire.only_config(bad)
    assert wire.model_record(bad, "b") == ("b", arrays)
    with pytest.raises(
        WireError, match=r"or the model's under 'x' \(arrayrecord_key\)"
    ):
        wire.model_record(bad, "x")


def test_bytes_are_those_of_all_records_and_ours_those_fedavg_would_not_send():
    arrays = wire.record_of(model())
    ours = ConfigRecord(plan_of().entries("train"))
    theirs = ConfigRecord({"lr": 0.1, "note": "x" * 100})
    both = ConfigRecord({**ours, **theirs})
    metrics = MetricRecord({"loss": 1.0})
    content = RecordDict({"a": arrays, "c": both, "m": metrics})
    records = (arrays, ours, theirs, metrics)
    assert wire.count_bytes(content) == sum(r.count_bytes() for r in records)
    content["state"] = wire.record_of(model())  # of SCAFFOLD, say
    assert wire.own_bytes(content, "a") == arrays.count_bytes() + ours.count_bytes()
    assert wire.own_bytes(content, None) == ours.count_bytes()
    assert wire.count_bytes(RecordDict({"c": ConfigRecord()})) == 0


# --- hostile arrays ---------------------------------------------------------------


ENTRY = Entry("w", (2, 3), "<f4", False)
HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"


def test_arrays_are_read_in_either_order_of_memory():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for given_values in (values, np.asfortranarray(values)):
        assert_array_equal(wire.read_array(flower(npy(given_values)), ENTRY), values)


class Trap:
    """Remembers that it was unpickled."""

    sprung = False

    def __reduce__(self):
        return (setattr, (Trap, "sprung", True))


def test_nothing_is_unpickled():
    trap = np.empty((2, 3), object)
    trap[:] = Trap()
    for data in (npy(trap, allow_pickle=True), pickle.dumps(Trap())):
        for exact in (True, False):
            with pytest.raises(WireError, match="w: expected"):
                wire.read_array(flower(data), ENTRY, exact=exact)
        record = ArrayRecord({"w": flower(data, dtype="object", shape=(2, 3))})
        with pytest.raises(WireError):
            wire.arrays_of(record)
    assert not Trap.sprung


@pytest.mark.parametrize("dtype", ["nope", "", "O", ",", "f4,f4"])
def test_a_record_that_lies_about_its_type_is_refused(dtype):
    data = npy(np.zeros((2, 3), np.float64))
    record = ArrayRecord({"w": flower(data, dtype=dtype, shape=(2, 3))})
    with pytest.raises(WireError):
        wire.arrays_of(record)


def test_a_truth_value_is_one_bit():
    entry = Entry("open", (3,), "|b1", False)
    body = npy(np.array([True, False, True]))
    assert_array_equal(wire.read_array(flower(body), entry), [True, False, True])
    with pytest.raises(WireError, match="open: expected bytes 0 and 1"):
        wire.read_array(flower(body[:-1] + b"\x02"), entry)


def lying(shape, descr="<f4"):
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}"


@pytest.mark.filterwarnings("ignore")  # numpy grumbles at some of them
@pytest.mark.parametrize(
    "header",
    [
        lying((2**40, 2**20)),
        lying((2**70,)),
        lying((-1, 3)),
        lying((-2, -3)),
        lying((3, 2)),
        lying((6,)),
        lying((2, 3), "<f8"),
        lying((2, 3), ">f4"),
        lying((2, 3), "|O"),
        lying((2, 3), "|V4"),
        lying((2, 3), ()),
        lying((2, 3), ("<f4", (2**31,))),
        lying((2, 3), "(01,)f4"),
        lying((2, 3), [("a", "<f4"), ("a", "<f4")]),
        lying("__import__('os')"),
        "",
        "{",
        "[",
        "'''",
        "{'descr': (",
        "{[]: 1}",
        "{1: 2, 'a': 3}",
        "\0" * 20,
        "(" * 3000,
        "-" * 5000 + "1",
        " " * 20000,
        "é",
    ],
    ids=lambda header: header[:60].encode("unicode_escape").decode(),
)
def test_a_lying_header_is_a_wire_error_and_allocates_nothing(header):
    array = flower(npy_frame(header, bytes(24)))
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="w: expected"):
            wire.read_array(array, ENTRY)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000  # of which numpy's parser takes what it takes


@pytest.mark.parametrize("version", [b"\0\0", b"\2\0", b"\3\0", b"\x09\x09"])
def test_another_version_of_npy_is_refused(version):
    with pytest.raises(WireError, match=r"w: expected npy version \(1, 0\), got"):
        wire.read_array(flower(npy_frame(HEADER, bytes(24), version)), ENTRY)


@pytest.mark.parametrize("length", [0, 23, 25, 240])
def test_a_body_of_the_wrong_length_says_what_fits(length):
    with pytest.raises(WireError, match=rf"w: expected 24 B \(4 x 6\), got {length} B"):
        wire.read_array(flower(npy_frame(HEADER, bytes(length))), ENTRY)


@pytest.mark.parametrize(
    "shape", [(2**32, 2**32), (2**70,), (0, 2**70), (2**31, 2**31, 4), (1,) * 100]
)
def test_a_manifest_and_a_header_that_lie_alike_are_refused(shape):
    count = 1 if len(shape) == 100 else 0  # (2**32)^2 wraps round to 0 in 64 bits
    array = flower(npy_frame(lying(shape), bytes(4 * count)))
    with pytest.raises(WireError, match="w: expected"):
        wire.read_array(array, Entry("w", shape, "<f4", False))


# --- fuzzing ----------------------------------------------------------------------


@st.composite
def hostile(draw, valid):
    """Random bytes, or a valid frame with bytes changed, cut off, added or doubled."""
    kind = draw(st.sampled_from(["random", "mutated", "cut", "longer", "moved"]))
    if kind == "random":
        return draw(st.binary(max_size=200))
    if kind == "cut":
        return valid[: draw(st.integers(0, len(valid) - 1))]
    if kind == "longer":
        return valid + draw(st.binary(min_size=1, max_size=9))
    if kind == "moved":
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(valid))] * 2)))
        return valid[:end] + valid[start:]
    frame = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        frame[draw(st.integers(0, len(valid) - 1))] = draw(st.integers(0, 255))
    return bytes(frame)


PLAN = plan_of()
TEXT = zlib.decompress(PLAN.manifest.to_bytes())
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2**80)
    | st.floats()
    | st.sampled_from(["w", "<f4", "<f2", "<i8", "|O", "", ",", "(2,)f4", "V4", "M8"])
    | st.text(max_size=4)
)
junk = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)
rows = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]) | junk,
        st.lists(st.sampled_from([0, 1, 2, 3, 2**40, 2**70]), max_size=4) | junk,
        st.sampled_from(["<f4", "<f2", ">f8", "<i8", "|b1"]) | junk,
        st.integers(0, 1) | junk,
    ).map(lambda four: row(*four)),
    max_size=3,
)
manifests = st.one_of(
    hostile(PLAN.manifest.to_bytes()),
    hostile(TEXT).map(zlib.compress),
    rows.map(deflated),
    junk.map(deflated),
)


@pytest.mark.filterwarnings("ignore")  # numpy: some names of types are deprecated
@fuzzing
@given(frame=manifests)
def test_hostile_manifests_are_read_or_raise_wire_error_and_nothing_else(frame):
    try:
        manifest = Manifest.from_bytes(frame)
    except WireError:
        return
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@pytest.mark.filterwarnings("ignore")
@fuzzing
@given(
    frame=manifests | st.just(PLAN.manifest.to_bytes()),
    mask=hostile(codec.pack_mask(PLAN.masks)) | st.binary(max_size=2),
)
def test_hostile_plans_are_read_or_raise_wire_error_and_nothing_else(frame, mask):
    config = {wire.MANIFEST: frame, wire.MASK: mask, wire.VALUE_TYPE: "float32"}
    try:
        plan = Plan.of(config)
    except WireError:
        return
    kept = sum(int(keep.sum()) for keep in plan.masks.values())
    record = ArrayRecord(
        {wire.VALUES: flower(np.full(kept, 1e30, "<f4").tobytes(), "autoflip.raw")}
    )
    try:
        found = plan.unpack(record)
    except WireError:
        return
    assert all(np.isfinite(values).all() for values in found.values())


RECORD = PLAN.pack(model())
texts = st.sampled_from(["", "float32", "float16", "numpy.ndarray", "autoflip.raw"])


@pytest.mark.filterwarnings("ignore")
@fuzzing
@given(data=st.data())
def test_hostile_records_are_read_or_raise_wire_error_and_nothing_else(data):
    arrays = dict(RECORD.items())
    key = data.draw(st.sampled_from(list(arrays)))
    old = arrays[key]
    arrays[key] = FlowerArray(
        dtype=data.draw(st.just(old.dtype) | texts),
        shape=data.draw(
            st.just(old.shape) | st.lists(st.integers(-1, 9), max_size=2).map(tuple)
        ),
        stype=data.draw(st.just(old.stype) | texts),
        data=data.draw(st.just(old.data) | hostile(old.data)),
    )
    try:
        found = PLAN.unpack(ArrayRecord(arrays))
    except WireError:
        return
    for entry in PLAN.manifest.entries:
        assert found[entry.name].shape == entry.shape
        assert np.isfinite(found[entry.name]).all()


literals = st.recursive(
    st.sampled_from(
        ["'descr'", "'shape'", "'<f4'", "(2, 3)", "()", "1", "{", "(", "'", "\\", "L"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4).map("".join)
        | st.lists(inner, max_size=3).map(lambda parts: "{" + ":".join(parts) + "}")
    ),
    max_leaves=8,
)


@pytest.mark.filterwarnings("ignore")
@fuzzing
@given(
    header=hostile(HEADER.encode()) | literals.map(str.encode),
    body=st.just(bytes(24)) | st.binary(max_size=32),
    exact=st.booleans(),
)
def test_hostile_headers_are_read_or_raise_wire_error_and_nothing_else(
    header, body, exact
):
    try:
        found = wire.read_array(flower(npy_frame(header, body)), ENTRY, exact=exact)
    except WireError:
        return
    assert found.shape == (2, 3)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
