"""Who explores, and what becomes of it: late nodes, warm start."""

import logging
import math

import numpy as np
import pytest
import torch
from flat import flat
from flwr.app import (
    Array,
    ArrayRecord,
    Error,
    Message,
)
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    Krum,
)
from inprocess import (
    LocalGrid,
    arrays_of,
    assert_same_arrays,
    call_seed,
    fit,
    masks_by_round,
    masks_in,
    net,
    nudging_app,
    only_in,
    run,
    state_of,
    toy_app,
    values_in,
)
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from autoflip_flwr import AutoFLIP, AutoFlipMod, ExplorationSettings, WireSettings
from autoflip_flwr.errors import (
    ExplorationError,
    SettingsError,
)
from autoflip_flwr.settings import BaselineSettings
from autoflip_flwr.wire import codec
from autoflip_flwr.wire import records as wire

NODES = [11, 12, 13, 14, 15]


def some_of(fraction=0.4):
    """Options of a strategy that samples two of five nodes."""
    return {"fraction_train": fraction, "fraction_evaluate": 0.0}


# --- exploration ----------------------------------------------------------------------


def test_all_connected_nodes_explore_once_before_the_first_round():
    grid = LocalGrid(toy_app(), NODES)
    run(AutoFLIP(FedAvg(**some_of())), grid, net(), 3)
    assert grid.nodes("explore") == NODES
    assert [sent.phase for sent in grid.down[:5]] == ["explore"] * 5
    assert len(grid.nodes("train")) == 6


def test_every_explorer_starts_from_the_same_initial_weights_even_a_late_one():
    model = net()
    grid = LocalGrid(toy_app(), NODES[:3])

    def join(server_round, arrays):
        if server_round == 1:
            grid.join(99, {"partition-id": 7})

    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), **flat())
    run(strategy, grid, model, 3, after_round=join)
    assert grid.nodes("explore") == [11, 12, 13, 99]
    late = next(
        i for i, s in enumerate(grid.down) if (s.phase, s.node_id) == ("explore", 99)
    )
    assert [s.phase for s in grid.down[:late]].count("train") == 3
    for sent in grid.down:
        if sent.phase == "explore":
            assert_same_arrays(arrays_of(sent.arrays), state_of(model))


def test_a_node_that_joins_later_explores_only_when_it_is_sampled():
    grid = LocalGrid(toy_app(), NODES[:2])

    def join(server_round, arrays):
        if server_round == 1:
            for i in range(8):
                grid.join(100 + i, {"partition-id": i})

    strategy = AutoFLIP(FedAvg(**some_of(0.2)), **flat())
    run(strategy, grid, net(), 3, after_round=join)
    trained = set(grid.nodes("train"))
    explored = grid.nodes("explore")
    assert sorted(explored) == sorted(set(explored)), "nobody explores twice"
    assert set(explored) == trained | {11, 12}
    assert len(trained - {11, 12}) > 0
    assert len(trained) < 10, "else the test shows nothing"


def test_a_share_of_the_nodes_explores_and_the_rest_takes_part():
    grid = LocalGrid(toy_app(), range(1, 11))
    run(AutoFLIP(**flat(exploration_fraction=0.3, seed=4)), grid, net(), 2)
    assert len(grid.nodes("explore")) == 3
    assert sorted(grid.nodes("train")[:10]) == list(range(1, 11))


def test_the_seed_decides_who_explores():
    def explorers(seed):
        grid = LocalGrid(nudging_app(), range(1, 31))
        strategy = AutoFLIP(
            FedAvg(fraction_evaluate=0), **flat(exploration_fraction=0.2, seed=seed)
        )
        run(strategy, grid, net(), 1)
        return grid.nodes("explore")

    assert explorers(1) == explorers(1) != explorers(2)


def test_a_node_without_guidance_counts_as_the_mean_of_those_who_explored():
    """Whoever is sampled: only one node explored, so its guidance decides alone."""
    model = net()
    alone = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    grid = LocalGrid(toy_app(), NODES[:1])
    run(
        AutoFLIP(FedAvg(**alone), **flat(population_weight=1, threshold=0.5)),
        grid,
        model,
        1,
    )
    expected = masks_in(next(s for s in grid.down if s.phase == "train"), model)
    lost = only_in("explore", NODES[1:], lambda reply: "lost")
    grid = LocalGrid(toy_app(), NODES, tamper=lost)
    strategy = AutoFLIP(FedAvg(**some_of()), **flat(population_weight=0, threshold=0.5))
    run(strategy, grid, model, 5)
    with_it = [11 in grid.nodes("train")[2 * i : 2 * i + 2] for i in range(5)]
    assert set(with_it) == {True, False}, "else the test shows nothing"
    for masks in masks_by_round(grid, model):
        assert_same_arrays(masks, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: Message(Error(7, "no disk"), reply_to=r), "no disk"),
        (lambda r: "lost", "no reply in time"),
        (lambda r: r.content.clear(), "ArrayRecord"),
        (
            lambda r: r.content.update(
                {"extra": ArrayRecord(), "other": r.content.pop("arrays")}
            ),
            "exactly one ArrayRecord",
        ),
        (
            lambda r: r.content["arrays"].update({"more": Array(np.zeros(1))}),
            "autoflip.guidance",
        ),
        (
            lambda r: r.content.update({"arrays": raw("autoflip.guidance", b"123")}),
            "got 3 B",
        ),
    ],
    ids=["error", "no reply", "empty", "two records", "more arrays", "too short"],
)
def test_an_explorer_that_fails_is_named_and_left_out(change, reason, caplog):
    def tamper(message, reply):
        if message.metadata.dst_node_id == 13 and "autoflip.patience" in next(
            iter(message.content.config_records.values())
        ):
            answer = change(reply)
            if answer == "lost":
                return None
            if isinstance(answer, Message) and answer.has_error():
                return Message(answer.error, reply_to=message)
        return reply

    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        strategy = AutoFLIP(FedAvg(fraction_evaluate=0))
        run(strategy, grid, net(), 2)
    lines = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(lines) == 1
    assert "node 13" in lines[0]
    assert reason in lines[0]
    assert grid.nodes("train").count(13) == 2, "it takes part all the same"
    assert grid.nodes("explore").count(13) == 1


def raw(key, data, *, dtype="uint8", stype="autoflip.raw"):
    size = len(data) // np.dtype(dtype).itemsize
    return ArrayRecord({key: Array(dtype=dtype, shape=(size,), stype=stype, data=data)})


def test_without_any_explorer_the_error_names_every_reason():
    def tamper(message, reply):
        if message.metadata.dst_node_id == 12:
            return None
        return Message(
            Error(1, f"oops {message.metadata.dst_node_id}"), reply_to=message
        )

    grid = LocalGrid(toy_app(), [11, 12], tamper=tamper)
    with pytest.raises(ExplorationError) as raised:
        run(AutoFLIP(), grid, net(), 1)
    text = str(raised.value)
    assert "none of 2 nodes" in text
    assert "oops 0" in text or "oops 11" in text
    assert "'no reply in time': [12]" in text
    assert not grid.nodes("train")


def test_exploration_waits_as_long_as_it_is_told(clock):
    tamper = only_in("explore", [NODES[0]], lambda reply: "lost")
    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    run(AutoFLIP(**flat(exploration_timeout=17.5)), grid, net(), 1)
    assert clock.slept == pytest.approx(17.5, abs=1)


def test_everyone_explores_again_from_the_current_global_model():
    model = net()
    grid = LocalGrid(toy_app(), NODES)
    seen, _ = run(
        AutoFLIP(FedAvg(fraction_evaluate=0), **flat(exploration_every=2)),
        grid,
        model,
        5,
    )
    assert grid.nodes("explore") == NODES * 3
    order = [(s.phase, s) for s in grid.down]
    begun = [i for i, (phase, _) in enumerate(order) if phase == "explore"][::5]
    rounds_before = [[p for p, _ in order[:i]].count("train") // 5 for i in begun]
    assert rounds_before == [0, 2, 4]
    for position, server_round in zip(begun, rounds_before, strict=True):
        assert_same_arrays(arrays_of(order[position][1].arrays), seen[server_round])


def test_the_guidance_is_how_far_the_clients_own_training_moved_each_weight():
    """Eq. 2, computed from the app's training alone, up to one byte's precision."""
    model, epochs = net(), 3
    grid = LocalGrid(toy_app(), NODES)
    run(AutoFLIP(**flat(exploration_epochs=epochs)), grid, model, 1)
    initial = state_of(model)
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: initial[name].shape for name in names}
    for partition_id, node_id in enumerate(NODES):
        alone = net()
        one = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
        for epoch in range(epochs):
            config = {"server-round": 1, "autoflip.epoch": epoch}
            seed = call_seed(config, partition_id)
            fit(alone, partition_id, seed=seed, optimizer=lambda _, one=one: one)
        final = state_of(alone)
        reply = next(s for s in grid.up if (s.phase, s.node_id) == ("explore", node_id))
        frame = reply.arrays["autoflip.guidance"].data
        received = codec.dequantize(frame, shapes).dense()
        for name in names:
            exact = (initial[name].astype(float) - final[name]) ** 2
            # 255 logarithmic steps over at most 40 octaves: half a step is 5.6 %.
            assert_allclose(
                received[name], exact, rtol=0.06, atol=exact.max() * 2.0**-39
            )


# --- a start that nodes build -------------------------------------------------------


def built(seed=0, calls=None):
    """A mod that builds the start weights, as the server of these tests does."""

    def start(context):
        if calls is not None:
            calls.append(context.node_id)
        return ArrayRecord(net(seed).state_dict())

    return AutoFlipMod(start=start)


def explored(grid):
    """Node and arrays of each exploration's message, in order."""
    return [(s.node_id, list(s.arrays)) for s in grid.down if s.phase == "explore"]


def own_start(app, rounds=3, **settings):
    """Run with and without weights that nodes build; return both grids and models."""
    found = []
    for own in (False, True):
        grid = LocalGrid(app, NODES)
        strategy = AutoFLIP(
            FedAvg(fraction_evaluate=0),
            exploration=ExplorationSettings(own_start=own, **settings),
            seed=3,
        )
        models, result = run(strategy, grid, net(), rounds)
        found.append((grid, models[-1], result.savings))
    return found


def test_nodes_that_build_the_start_get_no_weights_and_the_run_is_the_same():
    calls = []
    sent, own = own_start(toy_app(mods=[built(calls=calls)]))
    assert calls == NODES  # once each, and only where the server named the weights
    assert explored(own[0]) == [(node_id, []) for node_id in NODES]
    assert_same_arrays(own[1], sent[1])
    weights = sum(values.nbytes for values in state_of(net()).values())
    spared = sent[2].explored - own[2].explored
    assert spared > len(NODES) * weights


@pytest.mark.parametrize(
    ("mod", "told"),
    [
        (AutoFlipMod(), "AutoFlipMod(start=...), or exploration.own-start=false"),
        (built(seed=1), "bit for bit, got others (another seed, checkpoint or"),
        (
            AutoFlipMod(start=lambda _: ArrayRecord(nn.Linear(6, 3).state_dict())),
            "expected the arrays ['0.weight', ",
        ),
        (AutoFlipMod(start=lambda _: 1 / 0), "ZeroDivisionError"),
    ],
    ids=["none", "another", "of another model", "an error"],
)
def test_nodes_that_build_no_such_start_get_it(mod, told, caplog):
    sent, own = own_start(toy_app(mods=[mod]))
    nodes, arrays = zip(*explored(own[0]), strict=True)
    assert list(nodes) == NODES + NODES
    assert [bool(found) for found in arrays] == [False] * 5 + [True] * 5
    assert_same_arrays(own[1], sent[1])
    assert "5 nodes get the start: " in caplog.text
    assert told in caplog.text


def test_only_the_nodes_that_fail_get_the_start(caplog):
    def tamper(message, reply):
        named = wire.START in wire.config_of(message)
        if named and message.metadata.dst_node_id == 13:
            return Message(Error(1, "once"), reply_to=message)
        return reply

    grid = LocalGrid(toy_app(mods=[built()]), NODES, tamper=tamper)
    exploration = ExplorationSettings(own_start=True)
    run(AutoFLIP(FedAvg(fraction_evaluate=0), exploration=exploration), grid, net(), 1)
    assert [n for n, _ in explored(grid)] == [*NODES, 13]
    assert "5 of 5 nodes explored" in caplog.text


def test_a_node_that_is_silent_is_not_waited_for_twice():
    grid = LocalGrid(
        toy_app(mods=[built()]),
        NODES,
        tamper=only_in("explore", [13], lambda reply: "lost"),
    )
    exploration = ExplorationSettings(own_start=True, timeout=0.01)
    run(AutoFLIP(FedAvg(fraction_evaluate=0), exploration=exploration), grid, net(), 1)
    assert [n for n, _ in explored(grid)] == NODES


def test_who_explores_again_gets_the_weights_of_the_round():
    grid = LocalGrid(toy_app(mods=[built()]), NODES)
    exploration = ExplorationSettings(own_start=True, every=2)
    run(AutoFLIP(FedAvg(fraction_evaluate=0), exploration=exploration), grid, net(), 3)
    assert [bool(found) for _, found in explored(grid)] == [False] * 5 + [True] * 5


def test_a_start_that_nodes_build_is_not_rounded():
    """With values of eight bits, explorers begin at the weights as they are."""
    seen = []

    class Watched(AutoFlipMod):
        def _train(self, asked, initial, *rest):
            seen.append({name: values.copy() for name, values in initial.items()})
            return super()._train(asked, initial, *rest)

    start = built().start
    grid = LocalGrid(toy_app(mods=[Watched(start=start)]), NODES)
    strategy = AutoFLIP(
        FedAvg(fraction_evaluate=0),
        exploration=ExplorationSettings(own_start=True),
        wire=WireSettings(values="int8"),
    )
    run(strategy, grid, net(), 1)
    assert len(seen) == len(NODES)
    for initial in seen:
        assert_same_arrays(initial, state_of(net()))


# --- warm start -----------------------------------------------------------------------


def warm(inner=None, **settings):
    inner = inner or FedAvg(fraction_evaluate=0)
    return AutoFLIP(inner, **flat(warm_start=True, seed=0, **settings))


def start_of_training(grid, model):
    """The weights of the first training messages, as the kept values have them."""
    first = next(sent for sent in grid.down if sent.phase == "train")
    masks = masks_in(first, model)
    return masks, values_in(first, masks)


def test_training_begins_where_the_explorers_on_average_ended():
    model = net()
    grid = LocalGrid(toy_app(), NODES)
    run(warm(threshold=0.0), grid, model, 1)
    _, found = start_of_training(grid, model)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    total, weight = {n: np.zeros(s) for n, s in shapes.items()}, 0.0
    for reply in grid.up:
        if reply.phase != "explore":
            continue
        frame, signs = wire.guidance_frames(reply.arrays)
        size = codec.dequantize(frame, shapes).dense()
        rises = codec.unpack_mask(signs, shapes)
        for name in shapes:
            moved = np.where(rises[name], 1, -1) * np.sqrt(size[name])
            total[name] += reply.metrics["num-examples"] * moved
        weight += reply.metrics["num-examples"]
    for name, parameter in model.named_parameters():
        expected = parameter.detach().numpy() + total[name] / weight
        assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
        assert not np.array_equal(found[name], parameter.detach().numpy())


def test_explorers_get_half_the_bytes_where_values_have_half(caplog):
    model = net()
    grids = [LocalGrid(toy_app(), NODES) for _ in range(2)]
    for grid, values in zip(grids, ("float32", "float16"), strict=True):
        run(
            AutoFLIP(FedAvg(fraction_evaluate=0), **flat(values=values)), grid, model, 1
        )
    full, half = (next(s for s in grid.down if s.phase == "explore") for grid in grids)
    size = sum(p.numel() for p in model.parameters())
    assert len(half.arrays["autoflip.values"].data) == 2 * size
    assert "autoflip.values" not in full.arrays
    assert len(half.config["autoflip.mask"]) == math.ceil(size / 8)
    assert {s.phase for s in grids[1].up} == {"explore", "train"}
    assert "left out" not in caplog.text


def test_a_warm_start_costs_an_eighth_of_a_byte_per_parameter():
    model = net()
    grids = [LocalGrid(toy_app(), NODES) for _ in range(2)]
    run(AutoFLIP(FedAvg(fraction_evaluate=0)), grids[0], model, 1)
    run(warm(), grids[1], model, 1)
    size = sum(p.numel() for p in model.parameters())
    cold, hot = (
        next(s for s in grid.up if s.phase == "explore").arrays for grid in grids
    )
    extra = len(hot["autoflip.signs"].data)
    assert extra == math.ceil(size / 8)
    assert len(hot["autoflip.guidance"].data) == len(cold["autoflip.guidance"].data)


def test_the_callers_record_is_left_as_it_is_by_a_warm_start():
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    record = ArrayRecord(model.state_dict())
    data = {name: array.data for name, array in record.items()}
    warm().start(LocalGrid(toy_app(), NODES), record, num_rounds=1)
    assert {name: array.data for name, array in record.items()} == data
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "inner",
    [
        FedAvg(fraction_evaluate=0),
        FedAvgM(fraction_evaluate=0, server_momentum=0.9),
        FedAdam(fraction_evaluate=0, eta=0.1),
    ],
    ids=lambda inner: type(inner).__name__,
)
def test_the_server_optimizer_starts_from_the_warm_weights(inner):
    """A pseudo-gradient that held the way from W0 would leap."""
    model = net()
    app, still = toy_app(), nudging_app(scale=0.0)

    def only_explores(message, context):
        configs = message.content.config_records.values()
        explores = any(c.get("autoflip.phase") == "explore" for c in configs)
        return (app if explores else still)(message, context)

    grid = LocalGrid(only_explores, NODES)
    seen, _ = run(warm(inner, threshold=0.0), grid, model, 3)
    _, start = start_of_training(grid, model)
    for arrays in seen[1:]:
        for name, value in start.items():
            assert_allclose(arrays[name], value, atol=1e-5)  # FedAdam's root of zero


def test_an_explorer_without_signs_is_left_out_of_a_warm_start(caplog):
    def unsigned(reply):
        (key,) = reply.content.array_records
        record = reply.content[key]
        reply.content[key] = ArrayRecord(
            {"autoflip.guidance": record["autoflip.guidance"]}
        )

    tamper = only_in("explore", [NODES[0]], unsigned)
    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    run(warm(), grid, net(), 1)
    assert f"node {NODES[0]} is left out: expected signs" in caplog.text


def test_a_warm_start_happens_once_even_if_the_first_round_is_lost():
    lost = []

    def lose(reply):
        if len(lost) == len(NODES):
            return None
        lost.append(reply)
        if len(lost) == len(NODES):  # before the round begins again
            grid.join(99, {"partition-id": 0, "num-partitions": 5})
        return "lost"

    grid = LocalGrid(toy_app(), NODES, tamper=only_in("train", NODES, lose))
    model = net()
    strategy = warm(threshold=0.0)
    run(strategy, grid, model, 1)
    explored = [s for s in grid.down if s.phase == "explore"]
    assert explored[-1].node_id == 99
    assert explored[-1].config["autoflip.measure"] == "deviation"
    sent = [s for s in grid.down if s.phase == "train"]
    one, two = (values_in(s, masks_in(s, model)) for s in (sent[0], sent[-1]))
    for name in one:
        assert_array_equal(one[name], two[name])


@pytest.mark.parametrize("inner", [Krum(num_malicious_nodes=1), FedMedian()])
def test_a_warm_start_is_refused_beside_robust_aggregation(inner):
    with pytest.raises(SettingsError, match=rf"warm_start.*{type(inner).__name__}"):
        warm(inner)


def test_a_warm_start_is_refused_with_privacy_at_the_server():
    private = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(fraction_evaluate=0),
        noise_multiplier=1.0,
        clipping_norm=1.0,
        num_sampled_clients=5,
    )
    with pytest.raises(SettingsError, match=r"warm_start.*DifferentialPrivacyServer"):
        warm(private)


def test_exploring_again_does_not_move_the_weights():
    grid = LocalGrid(toy_app(), NODES)
    run(warm(exploration_every=1), grid, net(), 2)
    first, second = [
        [s for s in grid.down if s.phase == "explore"][i] for i in (0, len(NODES))
    ]
    assert first.config["autoflip.measure"] == "update"
    assert second.config["autoflip.measure"] == "deviation"


def test_a_baseline_may_have_the_same_warm_start():
    """Its explorers are asked for the start alone; the mask is of the moved weights."""
    ours, theirs = (LocalGrid(toy_app(), NODES) for _ in range(2))
    run(warm(), ours, net(), 1)
    strategy = warm(method="magnitude", baselines=BaselineSettings(dense_rounds=0))
    run(strategy, theirs, net(), 2)
    assert theirs.nodes("explore") == NODES
    starts, masks = [], []
    for grid in (ours, theirs):
        sent = next(s for s in grid.down if s.phase == "train")
        masks.append(masks_in(sent, net())["0.weight"])
        starts.append(values_in(sent, masks_in(sent, net()))["0.weight"])
    both = masks[0] & masks[1]
    assert both.any()
    assert_array_equal(starts[0][both], starts[1][both])
    largest = np.abs(starts[1])[masks[1]].min()
    assert (np.abs(starts[0])[masks[0] & ~masks[1]] <= largest).all()


def test_a_warm_start_that_nobody_answers_leaves_a_baseline_its_start(caplog):
    lost = only_in("explore", NODES, lambda reply: "lost")
    grid = LocalGrid(toy_app(), NODES, tamper=lost)
    strategy = warm(method="magnitude", baselines=BaselineSettings(dense_rounds=0))
    with caplog.at_level(logging.INFO, logger="flwr"):
        run(strategy, grid, net(), 2)
    assert caplog.text.count("0 of 5 nodes explored") == 1, "not again in round 2"
    assert strategy.rounds.density < 1


class OwnKrum(Krum):
    """A robust strategy under a name of its own."""


@pytest.mark.parametrize(
    "make",
    [
        OwnKrum,
        lambda: type("OwnPrivate", (DifferentialPrivacyServerSideFixedClipping,), {})(
            FedAvg(), 1.0, 1.0, 2
        ),
    ],
    ids=["robust", "private"],
)
def test_no_default_goes_around_what_a_subclass_protects(make):
    assert AutoFLIP(FedAvg()).rounds.exploration.warm_start
    assert not AutoFLIP(make()).rounds.exploration.warm_start
    with pytest.raises(SettingsError, match="warm_start would move the model"):
        AutoFLIP(make(), exploration=ExplorationSettings(warm_start=True))
