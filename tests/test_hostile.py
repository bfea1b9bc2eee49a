"""Peers that lie: whatever they send, it is used for what it is or dropped by name."""

import random
import tracemalloc
from collections import Counter
from functools import partial

import numpy as np
import pytest
from both import NODES, both
from flat import PLAIN, flat
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM
from inprocess import LocalGrid, net, only_in, run, toy_app
from numpy.testing import assert_allclose, assert_array_equal
from preparing import added, prepared
from test_store import SHAPES as SMALL_SHAPES

from autoflip_flwr import AutoFLIP
from autoflip_flwr.errors import GuidanceError, ReplyError, SettingsError, WireError
from autoflip_flwr.method.guidance import combine, middle
from autoflip_flwr.method.mask import change
from autoflip_flwr.pruners import AutoFlipPruner
from autoflip_flwr.settings import PruningSettings
from autoflip_flwr.wire import codec
from autoflip_flwr.wire.manifest import Manifest
from autoflip_flwr.wire.records import (
    HELD,
    MANIFEST,
    MASK,
    PHASE,
    VALUE_TYPE,
    VALUES,
    Plan,
    complete_mask,
    guidance_frames,
    guidance_record,
    named_arrays,
)

# --- frames of any bytes --------------------------------------------------------------

SHAPES = {"conv": (16, 8, 3, 3), "fc": (64, 200), "bias": (64,)}


def valid(seed=0):
    """One whole frame of every kind, and what reads it and looks at what it read."""
    rng = np.random.default_rng(seed)
    arrays = {n: rng.normal(0, 1, s).astype(np.float32) for n, s in SHAPES.items()}
    arrays["count"] = np.zeros((), np.int64)
    masks = {n: rng.random(s) < 0.5 for n, s in SHAPES.items()}
    manifest = Manifest.of(arrays, prunable=list(SHAPES))
    plan = Plan(manifest, masks)
    dense = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    values = {n: arrays[n] for n in SHAPES}
    squares = {n: np.square(v) for n, v in values.items()}
    npy = Array(np.asarray(arrays["fc"])).data

    def finite(found, frame):
        assert all(np.isfinite(value).all() for value in found.values())

    def kept(found, frame):
        assert all(np.isfinite(value).all() for value in found.values())
        assert codec.encode(found, masks) == frame

    def guidance(found, frame):
        codes = b"".join(found.codes[name].tobytes() for name in SHAPES)
        assert frame[codec.HEADER_BYTES * len(SHAPES) :] == codes
        for name, value in found.dense().items():
            assert value.shape == SHAPES[name]
            assert np.isfinite(value).all()
            assert (value >= 0).all()

    def bits(found, frame):
        assert codec.pack_mask(found) == frame

    def read_signs(frame):
        told = guidance_record(codes, frame)
        return codec.unpack_mask(guidance_frames(told)[1], SHAPES)

    def manifest_of(found, frame):
        assert all(entry.size >= 0 for entry in found.entries)
        assert Manifest.from_bytes(found.to_bytes()).entries == found.entries

    def read_config(frame):
        told = {**entries, MASK: frame, PHASE: "train", VALUE_TYPE: "float32"}
        return Plan.of(told).masks

    def read_within(frame):
        state = RecordDict({HELD: ConfigRecord({MASK: mask})})
        config = ConfigRecord({HELD: codec.digest(mask), MASK: frame})
        complete_mask(config, state)
        return config[MASK]

    def within(found, frame):
        assert not codec.unpack_mask(found, SHAPES)["fc"][~masks["fc"]].any()
        assert codec.pack_mask_within(found, mask) in (frame, b"")

    def read_record(frame):
        data = packed[VALUES]
        bad = Array(dtype=data.dtype, shape=data.shape, stype=data.stype, data=frame)
        return plan.unpack(ArrayRecord({**packed, VALUES: bad}))

    def record(found, frame):
        assert all(np.isfinite(value).all() for value in found.values())
        assert plan.pack(found)[VALUES].data == frame

    def read_array(frame):
        good = whole["fc"]
        bad = Array(dtype=good.dtype, shape=good.shape, stype=good.stype, data=frame)
        return named_arrays(ArrayRecord({**whole, "fc": bad}), manifest)["fc"]

    def array(found, frame):
        assert np.isfinite(found).all()
        assert (found.shape, found.dtype) == (SHAPES["fc"], np.float32)

    packed = plan.pack(arrays)
    whole = {n: Array(np.asarray(v)) for n, v in arrays.items()}
    mask, kept_values = codec.pack_mask(masks), codec.encode(values, masks)
    fewer = codec.pack_mask({n: keep & (dense[n] > 0) for n, keep in masks.items()})
    entries, codes = plan.entries("train"), codec.quantize(squares)
    decode = partial(codec.decode, mask=masks, fill=dense)
    return {
        "values": (kept_values, decode, kept),
        **{
            dtype: (
                codec.encode(values, masks, dtype=dtype),
                partial(decode, dtype=dtype),
                finite,
            )
            for dtype in ("int8", "int4")
        },
        "guidance": (
            codes,
            partial(codec.dequantize, shapes=SHAPES),
            guidance,
        ),
        "signs": (mask, read_signs, bits),
        "mask": (mask, partial(codec.unpack_mask, shapes=SHAPES), bits),
        "manifest": (entries[MANIFEST], Manifest.from_bytes, manifest_of),
        "config": (mask, read_config, bits),
        "within": (codec.pack_mask_within(fewer, mask), read_within, within),
        "record": (kept_values, read_record, record),
        "array": (npy, read_array, array),
    }


def mutated(frame, rng):
    """Bits flipped, cut, lengthened, spliced, numbers made odd."""
    data = bytearray(frame)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[place - 1] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 1 + max(1, len(data) // 2))]
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 3 and data:
            other = rng.randrange(len(data))
            data[place : place + 16] = data[other : other + 16]
        elif kind == 4:
            odd = rng.choice([np.nan, np.inf, -np.inf, 3e38, -1e-45, -1.0])
            place -= place % 4
            data[place : place + 4] = np.float32(odd).tobytes()
        else:
            data = bytearray(rng.randbytes(rng.randrange(0, 200)))
    return bytes(data)


def fuzz(count, seed=0):
    """Let frames be read; anything but a right reading or a WireError is an error.

    Returns how often each kind was read, how often refused, and the most memory that
    one of it took, of what the whole frame takes.
    """
    rng = random.Random(seed)
    kinds = valid()
    seen, refused = Counter(), Counter()
    whole, most = {}, dict.fromkeys(kinds, 0)
    for name, (frame, read, _) in kinds.items():
        read(frame)  # what is made once
        _, whole[name] = measured(read, frame)
    for number in range(count):
        name = list(kinds)[number % len(kinds)]
        frame, read, check = kinds[name]
        bad = mutated(frame, rng)
        found, taken = measured(read, bad)
        if taken > most[name]:  # what this takes, it takes again; a cache grows once
            most[name] = max(most[name], min(taken, measured(read, bad)[1]))
        if isinstance(found, WireError):
            refused[name] += 1
        else:
            check(found, bad)
            seen[name] += 1
    return seen, refused, {name: most[name] / whole[name] for name in kinds}


def measured(read, frame):
    """Return what is read, or the WireError, and the bytes of frame and reading.

    The frame counts too: an array is a view of it, and takes nothing more.
    """
    tracemalloc.start()
    try:
        found = read(frame)
    except WireError as error:
        found = error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return found, len(frame) + peak


def test_every_kind_of_whole_frame_is_read():
    for frame, read, check in valid().values():
        check(read(frame), frame)


def test_mutated_frames_are_read_for_what_they_are_or_refused():
    read, refused, memory = fuzz(4000)
    assert all(refused[name] > 100 for name in valid())
    assert all(read[name] > 10 for name in valid() if name != "manifest")
    assert max(memory.values()) <= 2, memory


@pytest.mark.slow
def test_a_hundred_thousand_mutated_frames():
    """None takes more than twice the memory of the whole frame of its kind."""
    read, refused, memory = fuzz(100_000, seed=1)
    assert all(refused[name] > 1000 for name in valid())
    assert all(read[name] > 100 for name in valid() if name != "manifest")
    assert max(memory.values()) <= 2, memory


def test_a_whole_frame_takes_a_few_times_the_memory_of_the_dense_arrays():
    dense = sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    for name in ("values", "guidance", "signs", "mask", "manifest"):
        frame, read, _ = valid()[name]
        read(frame)
        assert measured(read, frame)[1] <= 3 * dense, name


# --- whole replies of any content -----------------------------------------------------


def lying(content, rng):
    """Change a reply's content in one of the ways that a node can."""
    extremes = [0, -1, 1e-45, 3e38, 1.7e308, np.nan, np.inf, 2**62, 10**18, [], [3.0]]
    record, metrics = content["arrays"], content["metrics"]
    kind, value, name = (
        rng.randrange(9),
        rng.choice(extremes),
        rng.choice(sorted(record)),
    )
    told = record[name]
    if kind == 0:
        metrics[rng.choice(["num-examples", "train-loss"])] = value
    elif kind == 1:
        metrics["more"] = value
    elif kind == 2:
        told = rng.choice([rng.randbytes(9), b"", "", [], [""]])
        content["more"] = ConfigRecord({"k": told})
    elif kind == 3:
        content.pop(rng.choice(sorted(content)))
    elif kind == 4:
        record.pop(name)
    elif kind == 5:
        data = mutated(told.data, rng)
        record[name] = Array(told.dtype, told.shape, told.stype, data)
    elif kind == 6 and name != VALUES:
        far = 1e30 if told.dtype.startswith("f") else 2**62
        record[name] = Array(np.full_like(told.numpy(), far))
    elif kind == 7:
        values = np.frombuffer(record[VALUES].data, "<f4") * np.float32(rng.random())
        told, data = record[VALUES], values.tobytes()
        record[VALUES] = Array(told.dtype, told.shape, told.stype, data)
    else:
        record["more"] = Array(np.zeros(3))


def copied(content):
    return recorddict_from_proto(recorddict_to_proto(content))


def test_whatever_one_node_replies_the_others_decide():
    """The model is finite, and no farther from theirs than the bounds allow."""
    grid = LocalGrid(toy_app(), NODES)
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), **flat(population_weight=1.0))
    record, config = ArrayRecord(net().state_dict()), ConfigRecord()
    rng = random.Random(0)
    messages = list(strategy.configure_train(1, record, config, grid))
    replies = list(grid.send_and_receive(messages))
    contents = {reply.metadata.src_node_id: reply.content for reply in replies}

    def decided(lie):
        list(strategy.configure_train(1, record, config, grid))
        for reply in replies:
            reply.content = copied(contents[reply.metadata.src_node_id])
            if lie and reply.metadata.src_node_id == 13:
                lie(reply.content)
        made, _ = strategy.aggregate_train(1, replies)
        strategy._returned = None  # the next one begins where this one did
        return {name: array.numpy() for name, array in made.items()}

    honest, dropped = decided(None), 0
    for number in range(200):
        found = decided(lambda content: lying(content, rng))
        dropped += 13 in strategy.rounds.dropped
        for name, value in found.items():
            assert np.isfinite(value).all(), number
            assert np.abs(value - honest[name]).max() < 60, (number, name)
    assert 50 < dropped < 200


# --- replies that are far from the others ---------------------------------------------


def scaled(factor):
    def change_reply(reply):
        (key,) = reply.content.array_records
        record = reply.content[key]
        good = record[VALUES]
        values = np.frombuffer(good.data, "<f4") * np.float32(factor)
        record[VALUES] = Array(
            dtype=good.dtype, shape=good.shape, stype=good.stype, data=values.tobytes()
        )

    return change_reply


def examples(count):
    def change_reply(reply):
        reply.content["metrics"]["num-examples"] = count

    return change_reply


def lost(changed, phase, **options):
    """Run without node 13's replies of a phase; return the last model."""
    return changed(only_in(phase, [13], lambda reply: "lost"), **options)[1]


@both
@pytest.mark.parametrize("lie", [scaled(1e6), scaled(-1e30), examples(10**15)])
def test_a_huge_reply_is_dropped_and_named_and_the_others_decide(changed, lie, caplog):
    expected = lost(changed, "train", rounds=2)
    _, found = changed(only_in("train", [13], lie), rounds=2)
    for name, value in expected.items():
        assert_array_equal(found[name], value)
    assert "the reply of node 13 is dropped: expected at most 100 times" in caplog.text


def buffer(name, value):
    def change_reply(reply):
        (key,) = reply.content.array_records
        record = reply.content[key]
        record[name] = Array(np.full_like(record[name].numpy(), value))

    return change_reply


@pytest.mark.parametrize(
    ("lie", "options"),
    [
        (buffer("1.running_var", 1e30), {}),
        (buffer("3.weight", 1e20), {"exclude": ["3.*"]}),
    ],
)
@both
def test_what_travels_beside_the_mask_is_compared_too(changed, lie, options, caplog):
    expected = lost(changed, "train", **options)
    _, found = changed(only_in("train", [13], lie), **options)
    for name, value in expected.items():
        assert_array_equal(found[name], value)
    assert "node 13 is dropped" in caplog.text


def test_nobody_is_dropped_where_nothing_is_told_or_few_answer():
    strategy = AutoFLIP(**flat(outlier=None))
    grid = LocalGrid(toy_app(), NODES, tamper=only_in("train", [13], scaled(1e6)))
    run(strategy, grid, net(), 1)
    assert not strategy.rounds.dropped
    with pytest.raises(
        SettingsError, match=r"outlier: expected a number >= 1, or null, got 0\.5"
    ):
        AutoFLIP(**flat(outlier=0.5))


def test_an_aggregate_that_is_not_finite_changes_nothing(caplog):
    class Careless(FedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            name = next(iter(arrays))
            arrays[name] = Array(arrays[name].numpy() * np.float32(np.nan))
            return arrays, metrics

    found = []
    with pytest.raises(ReplyError, match=r"the last one: the aggregate is not finite"):
        run(
            AutoFLIP(Careless()),
            LocalGrid(toy_app(), NODES),
            net(),
            2,
            after_round=lambda _, arrays: found.append(arrays),
        )
    assert "the aggregate is not finite: the model stays as it was" in caplog.text
    for name, value in found[0].items():
        assert_array_equal(found[-1][name], value)


@pytest.mark.parametrize("kind", [FedAvgM, FedAdam])
def test_a_server_optimizer_goes_on_with_what_it_had(kind, caplog):
    """One round's aggregate is not finite; the next ones are as if it had not been."""

    class Once(kind):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            if server_round == 2:
                name = next(iter(arrays))
                bad = np.full_like(arrays[name].numpy(), np.inf)
                arrays[name] = Array(bad)
                self.current_arrays = arrays
            return arrays, metrics

    options = {"server_momentum": 0.9} if kind is FedAvgM else {"eta": 0.01}
    found, _ = run(AutoFLIP(Once(**options)), LocalGrid(toy_app(), NODES), net(), 4)
    assert caplog.text.count("the aggregate is not finite") == 1
    for name, value in found[1].items():
        assert_array_equal(found[2][name], value)
    assert any((found[3][n] != found[2][n]).any() for n in found[2])
    assert all(np.isfinite(v).all() for v in found[4].values())


def test_huge_values_of_one_of_two_are_no_error():
    lie = only_in("train", [11], scaled(3e38))
    strategy = AutoFLIP()
    run(strategy, LocalGrid(toy_app(), [11, 12], tamper=lie), net(), 1)
    assert strategy.rounds.diagnostics.update_variance is None


def louder(factor):
    """Multiply an explorer's guidance."""

    def change_reply(reply):
        (key,) = reply.content.array_records
        record = reply.content[key]
        good = record["autoflip.guidance"]
        data = bytearray(good.data)
        count = 2 * len(dict(net().named_parameters()))
        levels = np.frombuffer(bytes(data), "<f4", count=count) * np.float32(factor)
        data[: levels.nbytes] = levels.tobytes()
        record["autoflip.guidance"] = Array(
            dtype=good.dtype, shape=good.shape, stype=good.stype, data=bytes(data)
        )

    return change_reply


@both
@pytest.mark.parametrize("warm", [False, True])
def test_an_explorer_far_from_the_others_is_left_out_of_mask_and_start(
    changed, warm, caplog
):
    options = {"normalization": "global", "warm_start": warm}
    expected = lost(changed, "explore", **options)
    _, found = changed(only_in("explore", [13], louder(1e6)), **options)
    for name, value in expected.items():
        assert_array_equal(found[name], value)
    assert "node 13 is left out: expected at most 100 times the median" in caplog.text


def test_an_explorer_that_comes_alone_is_compared_with_those_before(caplog):
    grid = LocalGrid(toy_app(), NODES, tamper=only_in("explore", [99], louder(1e12)))

    def join(server_round, arrays):
        if server_round == 1:
            grid.join(99, {"partition-id": 0, "num-partitions": 5})

    run(AutoFLIP(**flat(normalization="global")), grid, net(), 2, after_round=join)
    assert "node 99 is left out: expected at most 100 times the median" in caplog.text


# --- robust combination ---------------------------------------------------------------


def test_median_and_trimmed_mean_by_hand():
    stack = np.float32([[1, 9], [2, 8], [3, 7], [100, 0], [4, 6]])
    assert_array_equal(middle(stack, combination="median"), [3, 7])
    assert_array_equal(middle(stack, combination="trimmed-mean", trim=0.2), [3, 7])
    assert_array_equal(middle(stack, combination="trimmed-mean", trim=0.1), [22, 6])
    assert_array_equal(middle(stack, combination="mean"), [22, 6])


def test_clipped_mean_by_hand():
    """Ten entries: A has all its weight on one, B the same on each."""
    alone, flat_one = np.zeros(10, np.float32), np.ones(10, np.float32)
    alone[0] = 100
    # A: 100 / 10 = 10, at most 5; on average 5 / 10, just what may count.
    # B: 1 each, on average 1: they count half.
    found = combine([{"w": alone}, {"w": flat_one}], combination="clipped-mean")
    assert_allclose(found["w"], [(5 + 0.5) / 2, *[0.25] * 9])
    both = [{"w": flat_one}, {"w": np.zeros(10, np.float32)}]
    silent = combine(both, combination="clipped-mean")  # a silent one counts 1
    assert_allclose(silent["w"], [(0.5 + 1) / 2] * 10)
    with pytest.raises(SettingsError, match="clipped-mean needs the normalization"):
        combine(both, combination="clipped-mean", normalization="layer")


def test_robust_guidance_divides_by_each_clients_mean_first():
    matrices = [{"w": np.float32(row)} for row in ([1, 3], [20, 20], [9e9, 1e9])]
    # divided: 0.5, 1.5 | 1, 1 | 1.8, 0.2
    found = combine(matrices, combination="median")
    assert_allclose(found["w"], [1, 1])
    with pytest.raises(SettingsError, match="median needs the normalization client"):
        combine(matrices, combination="median", normalization="global")
    with pytest.raises(SettingsError, match=r"needs normalization client"):
        PruningSettings(combination="median", normalization="layer")
    with pytest.raises(SettingsError, match=r"trim: expected a number in \[0, 0.5\)"):
        PruningSettings(trim=0.5)
    with pytest.raises(GuidanceError):
        combine([], combination="median")


def pruner_of(folder, guidance, **settings):
    initial = {n: np.ones(s, np.float32) for n, s in SMALL_SHAPES.items()}
    chosen = {
        **PLAIN,
        "threshold": 0.5,
        "population_weight": 1.0,
        "floor": 0.0,
    } | settings
    pruner = prepared(AutoFlipPruner(), initial, PruningSettings(**chosen), folder)
    pruner.start()
    for node, matrix in enumerate(guidance):
        added(pruner, node, codec.quantize(matrix), 1.0, initial)
    return pruner


@pytest.mark.parametrize("combination", ["median", "trimmed-mean", "clipped-mean"])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_the_servers_mask_is_that_of_the_robust_guidance(combination, weight, tmp_path):
    rng = np.random.default_rng(0)
    matrices = [
        {n: rng.lognormal(0, 2, s).astype(np.float32) for n, s in SMALL_SHAPES.items()}
        for _ in range(5)
    ]
    read = [codec.dequantize(codec.quantize(m), SMALL_SHAPES).dense() for m in matrices]
    pruner = pruner_of(
        tmp_path, matrices, combination=combination, population_weight=weight
    )
    found = pruner._scores([1, 3, 4], weight)
    everyone = combine(read, combination=combination)
    sampled = combine([read[1], read[3], read[4]], combination=combination)
    for name, score in found.items():
        expected = (1 - weight) * sampled[name] + weight * everyone[name]
        assert_allclose(score, expected, rtol=1e-5)


EXPLORERS = 20
FAR = {"a": (40, 50), "b": (300,)}


def honest(seed, rng):
    """Explorers that agree in part: a common part times one of their own."""
    common = np.random.default_rng(0)
    return {
        n: (common.lognormal(0, 1.5, s) * rng.lognormal(0, 1, s)).astype(np.float32)
        for n, s in FAR.items()
    }


def few(guidance, count):
    """All weight on some entries of the first tensor."""
    zeros = {n: np.zeros_like(v) for n, v in guidance.items()}
    next(iter(zeros.values())).reshape(-1)[:count] = 1e6
    return zeros


LIES = {
    "times 1e6": lambda g: {n: v * np.float32(1e6) for n, v in g.items()},
    "inverted": lambda g: {n: v.max() - v for n, v in g.items()},
    **{f"on {count}": partial(few, count=count) for count in (5, 20, 80, 150, 600)},
}


@pytest.fixture(
    scope="module", params=["mean", "clipped-mean", "median", "trimmed-mean"]
)
def explored(request, tmp_path_factory):
    """A way to combine guidance, its masks, and how far one honest explorer moves it.

    With the guidance of all.
    """
    rng = np.random.default_rng(1)
    guidance = [honest(seed, rng) for seed in range(EXPLORERS)]
    folder = tmp_path_factory.mktemp("explored")

    def mask(matrices):
        initial = {n: np.ones(s, np.float32) for n, s in FAR.items()}
        chosen = {**PLAIN, "population_weight": 1.0, "combination": request.param}
        settings = PruningSettings(threshold=0.8, **chosen)
        pruner = prepared(AutoFlipPruner(), initial, settings, folder)
        pruner.start()
        for node, matrix in enumerate(matrices):
            added(pruner, node, codec.quantize(matrix), 1.0, initial)
        return pruner.masks([0], initial, 1)

    of_all = mask(guidance)
    others = [guidance[:k] + guidance[k + 1 :] for k in range(EXPLORERS)]
    could = max(change(mask(matrices), of_all) for matrices in others)
    return request.param, mask, guidance, could


@pytest.mark.parametrize("lie", LIES)
def test_a_poisoned_explorer_moves_the_mask_no_further_than_an_honest_one_could(
    lie, explored
):
    """Beside the mask without it: no further than the one that matters most.

    With the clipped mean, a fifth further at most.
    """
    combination, mask, guidance, could = explored
    without = mask(guidance[1:])
    moved = change(without, mask([LIES[lie](guidance[0]), *guidance[1:]]))
    if combination == "mean" and lie.startswith("on "):
        # Its whole weight buys entries a place, which as many others lose: each it has
        # weight on, while that is enough, which it is not beyond its share of all.
        share = int(lie[3:]) / sum(int(np.prod(s)) for s in FAR.values())
        assert moved <= 2 * min(share, 1 / EXPLORERS)
        assert lie != "on 80" or moved > could
    elif combination == "clipped-mean" and lie.startswith("on "):
        # Spread over many entries none is clipped; then its weight is.
        assert moved <= 1.2 * could
    else:
        assert moved <= could
