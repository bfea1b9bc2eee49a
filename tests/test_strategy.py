"""The server's half, in rounds with real clients in this process."""

import gc
import itertools
import logging
import math
import re
import tempfile
import warnings

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    Krum,
)
from inprocess import (
    CHANGING,
    LocalGrid,
    adam_reference,
    arrays_of,
    assert_masks_change,
    call_seed,
    fit,
    masks_in,
    momentum_reference,
    net,
    npy,
    nudging_app,
    only_in,
    plain_net,
    run,
    samples,
    state_of,
    toy_app,
    values_in,
)
from numpy.testing import assert_allclose, assert_array_equal

from autoflip_flwr import AutoFLIP, AutoFlipMod, codec, models, wire
from autoflip_flwr.errors import (
    AutoFlipError,
    ExplorationError,
    GuidanceError,
    MaskError,
    SettingsError,
)
from autoflip_flwr.grid import RunGrid
from autoflip_flwr.mask import change
from autoflip_flwr.pruners import AutoFlipPruner
from autoflip_flwr.settings import PruningSettings

NODES = [11, 12, 13, 14, 15]


def assert_same_arrays(actual, expected):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert_array_equal(actual[name], value, err_msg=name)


def some_of(fraction=0.4):
    """Options of a strategy that samples two of five nodes."""
    return {"fraction_train": fraction, "fraction_evaluate": 0.0}


# --- it is the inner strategy where nothing is pruned ---------------------------------


@pytest.mark.parametrize(
    "make_inner",
    [FedAvg, lambda: FedAvg(**some_of()), lambda: FedAvgM(server_momentum=0.9)],
    ids=["all nodes", "some nodes", "momentum"],
)
def test_with_nothing_pruned_every_global_model_is_the_inner_strategys(make_inner):
    dense, _ = run(make_inner(), LocalGrid(toy_app(mods=[]), NODES), net())
    pruned, _ = run(
        AutoFLIP(make_inner(), threshold=0), LocalGrid(toy_app(), NODES), net()
    )
    assert len(pruned) == len(dense) == 4
    for ours, theirs in zip(pruned, dense, strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            if name.endswith("num_batches_tracked"):  # FedAvg leaves fractions
                assert abs(float(ours[name]) - float(value)) <= 1
            else:
                assert_array_equal(ours[name], value, err_msg=name)


def test_buffers_keep_their_type_and_value():
    model = net()
    seen, _ = run(AutoFLIP(threshold=0.5), LocalGrid(toy_app(), NODES), model, 2)
    start, last = state_of(model), seen[-1]
    assert {n: v.dtype for n, v in last.items()} == {
        n: v.dtype for n, v in start.items()
    }
    # Nodes 11..15 make 3, 4, 4, 5 and 5 batches of eight a round.
    counts = np.array([24, 28, 32, 36, 40])
    batches = float(np.average(np.ceil(counts / 8), weights=counts))
    assert abs(int(last["1.num_batches_tracked"]) - 2 * batches) <= 1
    assert (last["1.running_var"] > 0).all()
    assert not np.array_equal(last["1.running_mean"], start["1.running_mean"])


def test_the_default_inner_strategy_is_fedavg():
    assert type(AutoFLIP().strategy) is FedAvg


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

    run(AutoFLIP(FedAvg(fraction_evaluate=0)), grid, model, 3, after_round=join)
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

    run(AutoFLIP(FedAvg(**some_of(0.2))), grid, net(), 3, after_round=join)
    trained = set(grid.nodes("train"))
    explored = grid.nodes("explore")
    assert sorted(explored) == sorted(set(explored)), "nobody explores twice"
    assert set(explored) == trained | {11, 12}
    assert len(trained - {11, 12}) > 0
    assert len(trained) < 10, "else the test shows nothing"


def test_a_share_of_the_nodes_explores_and_the_rest_takes_part():
    grid = LocalGrid(toy_app(), range(1, 11))
    run(AutoFLIP(exploration_fraction=0.3, seed=4), grid, net(), 2)
    assert len(grid.nodes("explore")) == 3
    assert sorted(grid.nodes("train")[:10]) == list(range(1, 11))


def test_the_seed_decides_who_explores():
    def explorers(seed):
        grid = LocalGrid(nudging_app(), range(1, 31))
        strategy = AutoFLIP(
            FedAvg(fraction_evaluate=0), exploration_fraction=0.2, seed=seed
        )
        run(strategy, grid, net(), 1)
        return grid.nodes("explore")

    assert explorers(1) == explorers(1) != explorers(2)


def test_a_node_without_guidance_counts_as_the_mean_of_those_who_explored():
    """Whoever is sampled: only one node explored, so its guidance decides alone."""
    model = net()
    alone = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    grid = LocalGrid(toy_app(), NODES[:1])
    run(AutoFLIP(FedAvg(**alone), population_weight=1, threshold=0.5), grid, model, 1)
    expected = masks_in(next(s for s in grid.down if s.phase == "train"), model)
    lost = only_in("explore", NODES[1:], lambda reply: "lost")
    grid = LocalGrid(toy_app(), NODES, tamper=lost)
    strategy = AutoFLIP(FedAvg(**some_of()), population_weight=0, threshold=0.5)
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
            lambda r: r.content.update({"extra": ArrayRecord()}),
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
    assert "12: 'no reply in time'" in text
    assert not grid.nodes("train")


def test_exploration_waits_as_long_as_it_is_told(clock):
    tamper = only_in("explore", [NODES[0]], lambda reply: "lost")
    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    run(AutoFLIP(exploration_timeout=17.5), grid, net(), 1)
    assert clock.slept == pytest.approx(17.5, abs=1)


def test_everyone_explores_again_from_the_current_global_model():
    model = net()
    grid = LocalGrid(toy_app(), NODES)
    seen, _ = run(
        AutoFLIP(FedAvg(fraction_evaluate=0), exploration_every=2), grid, model, 5
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
    run(AutoFLIP(exploration_epochs=epochs), grid, model, 1)
    initial = state_of(model)
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: initial[name].shape for name in names}
    for partition_id, node_id in enumerate(NODES):
        alone = net()
        for epoch in range(epochs):
            config = {"server-round": 1, "autoflip.epoch": epoch}
            fit(alone, partition_id, seed=call_seed(config, partition_id))
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


# --- what travels ---------------------------------------------------------------------


def nbytes(content):
    return sum(record.count_bytes() for record in content.values())


TRAVELLING = [
    pytest.param(net, toy_app, id="toy"),
    pytest.param(
        lambda: models.build("cnn", num_classes=10, input_shape=(1, 28, 28), seed=0),
        lambda make: nudging_app(),
        id="cnn",
    ),
    pytest.param(
        lambda: models.build(
            "char_lstm", num_classes=80, input_shape=(80,), seed=0, hidden=64
        ),
        lambda make: nudging_app(),
        id="char_lstm",
    ),
    pytest.param(
        lambda: models.build(
            "resnet50", num_classes=10, input_shape=(3, 32, 32), seed=0
        ),
        lambda make: nudging_app(),
        id="resnet50",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("values", ["float32", "float16"])
@pytest.mark.parametrize(("make", "app"), TRAVELLING)
def test_messages_cost_the_kept_values_the_mask_and_the_buffers(make, app, values):
    model = make()
    grid = LocalGrid(app(make), [11, 12])
    strategy = AutoFLIP(
        FedAvg(fraction_evaluate=0), threshold=0.9, values=values, floor=0
    )
    run(strategy, grid, model, 1)
    prunable = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    kept = prunable - round(0.9 * prunable)
    floats = kept * np.dtype(values).itemsize
    down = [nbytes(s.content) for s in grid.down if s.phase == "train"]
    up = [nbytes(s.content) for s in grid.up if s.phase == "train"]
    assert len(down) == len(up) == 2
    assert max(down) <= 1.02 * (floats + prunable / 8 + buffers) + 4096
    assert max(up) <= 1.02 * (floats + buffers) + 4096
    assert min(down) >= floats + prunable // 8 + buffers
    assert min(up) >= floats + buffers
    explored = [nbytes(s.content) for s in grid.up if s.phase == "explore"]
    assert max(explored) <= prunable + 4096, "a quarter of float32"


def test_a_train_message_is_one_flat_array_the_buffers_and_the_masks_bits():
    model = net()
    grid = LocalGrid(toy_app(), NODES)
    run(AutoFLIP(threshold=0.5), grid, model, 2)
    buffers = [name for name, _ in model.named_buffers()]
    for sent in (*grid.down, *grid.up):
        assert len(sent.content.array_records) == (
            0 if (sent in grid.up and sent.phase == "evaluate") else 1
        )
        if sent in grid.up:
            assert len(sent.content.metric_records) == 1
            assert not sent.content.config_records
        if sent.phase == "train":
            assert list(sent.arrays) == ["autoflip.values", *buffers]
            assert sent.arrays["autoflip.values"].shape == (89,)
    packed = next(s for s in grid.down if s.phase == "train")
    assert len(packed.config["autoflip.mask"]) == math.ceil(179 / 8)
    assert sum(int(m.sum()) for m in masks_in(packed, model).values()) == 89


def test_what_arrives_is_the_global_model_under_the_mask():
    model = net()
    calls = []
    grid = LocalGrid(toy_app(calls=calls), NODES)
    seen, _ = run(AutoFLIP(FedAvg(fraction_evaluate=0), threshold=0.6), grid, model, 2)
    trained = [c for c in calls if c["config"]["autoflip.phase"] == "train"]
    sent = [s for s in grid.down if s.phase == "train"]
    for i, (call, message) in enumerate(zip(trained, sent, strict=True)):
        masks = masks_in(message, model)
        for name, value in seen[i // 5].items():
            expected = np.where(masks[name], value, 0) if name in masks else value
            assert call["arrays"][name].dtype == value.dtype
            assert_array_equal(call["arrays"][name], expected)


def test_excluded_parameters_travel_dense_and_are_never_pruned():
    model = net()
    grid = LocalGrid(toy_app(), NODES)
    strategy = AutoFLIP(threshold=0.9, exclude=["3.*", "*.bias"])
    seen, _ = run(strategy, grid, model, 2)
    sent = next(s for s in grid.down if s.phase == "train")
    assert {"3.weight", "3.bias", "1.bias"} <= set(sent.arrays)
    assert (seen[-1]["3.weight"] != 0).all()
    density = (seen[-1]["0.weight"] != 0).mean()
    assert density < 0.2


def test_only_named_parameters_are_prunable_and_a_typo_is_an_error():
    seen, _ = run(
        AutoFLIP(threshold=0.5, prunable=["0.weight"]),
        LocalGrid(toy_app(), NODES),
        net(),
        1,
    )
    assert (seen[-1]["0.weight"] == 0).mean() == 0.5
    assert (seen[-1]["3.weight"] != 0).all()
    with pytest.raises(SettingsError, match=r"0\.weigth"):
        run(AutoFLIP(prunable=["0.weigth"]), LocalGrid(toy_app(), NODES), net(), 1)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 1.5},
        {"mode": "quantil"},
        {"threshold": 0.5, "mode": "compression"},
        {"score": "loss"},
        {"normalization": "none"},
        {"population_weight": -0.1},
        {"floor": 2},
        {"pruned_weights": "drop"},
        {"exploration_epochs": 0},
        {"exploration_fraction": 0},
        {"exploration_patience": 0},
        {"exploration_every": -1},
        {"exploration_timeout": 0},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()),
)
def test_impossible_values_are_refused_when_the_strategy_is_made(options):
    with pytest.raises(SettingsError, match=next(iter(options)).partition("_")[0]):
        AutoFLIP(**options)


@pytest.mark.parametrize("values", ["float64", "bfloat16"])
def test_an_unknown_wire_type_is_refused_when_the_strategy_is_made(values):
    with pytest.raises(AutoFlipError, match="float32"):
        AutoFLIP(values=values)


# --- pruned weights -------------------------------------------------------------------


def masks_by_round(grid, model):
    """The mask of each round, and that it was the same for all of its nodes."""
    by_round = {}
    for sent in grid.down:
        if sent.phase == "train":
            server_round = sent.config["server-round"]
            masks = masks_in(sent, model)
            if server_round in by_round:
                assert_same_arrays(masks, by_round[server_round])
            by_round[server_round] = masks
    return [by_round[i + 1] for i in range(len(by_round))]


def test_the_global_model_is_zero_where_the_round_pruned():
    model = net()
    grid = LocalGrid(toy_app(), NODES)
    seen, _ = run(AutoFLIP(FedAvg(**some_of()), **CHANGING), grid, model, 6)
    masks = masks_by_round(grid, model)
    assert_masks_change(masks)
    for arrays, mask in zip(seen[1:], masks, strict=True):
        for name, keep in mask.items():
            assert not arrays[name][~keep].any()
            assert arrays[name][keep].any()


def test_a_kept_weight_comes_back_with_the_value_it_had():
    model = net()
    calls = []
    grid = LocalGrid(toy_app(calls=calls), NODES)
    strategy = AutoFLIP(FedAvg(**some_of()), **CHANGING, pruned_weights="keep")
    seen, _ = run(strategy, grid, model, 6)
    masks = masks_by_round(grid, model)
    assert_masks_change(masks)
    remembered = {n: v.copy() for n, v in state_of(model).items()}
    trained = [c for c in calls if c["config"]["autoflip.phase"] == "train"]
    returned = 0
    for i, mask in enumerate(masks):
        for call in trained[2 * i : 2 * i + 2]:
            for name, keep in mask.items():
                expected = np.where(keep, remembered[name], 0)
                assert_array_equal(call["arrays"][name], expected)
        for name, keep in mask.items():
            assert not seen[i + 1][name][~keep].any(), "what others see is masked"
            if i:
                returned += int((keep & ~masks[i - 1][name]).sum())
            remembered[name][keep] = seen[i + 1][name][keep]
    assert returned > 20


def test_evaluating_clients_get_the_masked_model_too():
    model = net()
    grid = LocalGrid(toy_app(), NODES)
    strategy = AutoFLIP(FedAvg(fraction_train=0.4), **CHANGING, pruned_weights="keep")
    seen, _ = run(strategy, grid, model, 3)
    sums = [s for s in grid.up if s.phase == "evaluate"]
    assert len(sums) == 15
    for i, reply in enumerate(sums):
        total = sum(np.abs(v).sum() for v in seen[1 + i // 5].values())
        assert reply.metrics["sum"] == pytest.approx(float(total), rel=1e-6)


# --- inner strategies -----------------------------------------------------------------


def mean_loss(arrays):
    """Loss of the global model over all nodes' samples."""
    model = plain_net()
    model.load_state_dict({n: torch.from_numpy(v) for n, v in arrays.items()})
    x, y = (torch.cat(parts) for parts in zip(*map(samples, range(5)), strict=True))
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(x), y).item()


def private():
    return DifferentialPrivacyClientSideFixedClipping(
        FedAvg(fraction_evaluate=0),
        noise_multiplier=0.01,
        clipping_norm=1.0,
        num_sampled_clients=5,
    )


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:flwr")
@pytest.mark.parametrize("pruned_weights", ["zero", "keep"])
@pytest.mark.parametrize(
    ("make_inner", "mods"),
    [
        (FedAvg, []),
        (lambda: FedAvgM(server_momentum=0.9, server_learning_rate=0.5), []),
        (lambda: FedAdam(eta=0.01), []),
        (lambda: FedProx(proximal_mu=0.1), []),
        (FedMedian, []),
        (lambda: Krum(num_malicious_nodes=1), []),
        (private, [fixedclipping_mod]),
    ],
    ids=["FedAvg", "FedAvgM", "FedAdam", "FedProx", "FedMedian", "Krum", "DP"],
)
def test_every_inner_strategy_trains_a_pruned_model(make_inner, mods, pruned_weights):
    model = plain_net()
    app = toy_app(plain_net, mods=[AutoFlipMod(), *mods])
    grid = LocalGrid(app, NODES)
    strategy = AutoFLIP(
        make_inner(),
        threshold=0.7,
        population_weight=0.5,
        pruned_weights=pruned_weights,
    )
    seen, _ = run(strategy, grid, model, 4)
    masks = masks_by_round(grid, model)
    assert len(masks) == 4
    for arrays, mask in zip(seen[1:], masks, strict=True):
        for name, value in arrays.items():
            assert value.dtype == np.float32
            assert np.isfinite(value).all()
            assert not value[~mask[name]].any()
    assert mean_loss(seen[-1]) < min(mean_loss(seen[0]), math.log(3))
    assert not any(
        np.array_equal(a["0.weight"], b["0.weight"])
        for a, b in itertools.pairwise(seen)
    )


def test_what_an_inner_strategy_tells_its_clients_reaches_the_app():
    calls = []
    app = toy_app(plain_net, calls=calls)
    run(
        AutoFLIP(FedProx(proximal_mu=0.25)),
        LocalGrid(app, NODES),
        plain_net(),
        1,
        config=ConfigRecord({"lr": 0.5}),
    )
    assert len(calls) == 10
    assert {(c["config"]["proximal-mu"], c["config"]["lr"]) for c in calls} == {
        (0.25, 0.5)
    }


def client_averages(grid, model, masks):
    """The weighted mean of each round's kept values, read from the messages."""
    averages = []
    for i, mask in enumerate(masks):
        replies = [s for s in grid.up if s.phase == "train"][2 * i : 2 * i + 2]
        weights = [s.metrics["num-examples"] for s in replies]
        dense = [values_in(s, mask) for s in replies]
        averages.append(
            {
                name: np.average(
                    [d[name].astype(float) for d in dense], axis=0, weights=weights
                )
                for name in mask
            }
        )
    return averages


@pytest.mark.parametrize(
    ("inner", "reference"),
    [
        (
            FedAvgM(server_learning_rate=0.7, server_momentum=0.8, **some_of()),
            lambda *a: momentum_reference(*a, lr=0.7, beta=0.8),
        ),
        (
            FedAdam(eta=0.05, tau=1e-3, **some_of()),
            lambda *a: adam_reference(*a, eta=0.05, tau=1e-3),
        ),
    ],
    ids=["FedAvgM", "FedAdam"],
)
def test_an_optimizer_on_the_server_sees_no_gradient_where_a_round_pruned(
    inner, reference
):
    """Masks change with the sampled nodes, and nothing jumps when a weight returns."""
    model = plain_net()
    grid = LocalGrid(toy_app(plain_net), NODES)
    seen, _ = run(AutoFLIP(inner, **CHANGING), grid, model, 8)
    masks = masks_by_round(grid, model)
    assert_masks_change(masks)
    averages = client_averages(grid, model, masks)
    expected = reference(state_of(model), masks, averages)
    for arrays, weights in zip(seen[1:], expected, strict=True):
        for name, value in weights.items():
            assert_allclose(arrays[name], value, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:flwr")
def test_local_differential_privacy_inside_sends_kept_values_only():
    model = plain_net()
    private_mod = LocalDpMod(
        clipping_norm=1.0, sensitivity=0.01, epsilon=1.0, delta=0.01
    )
    app = toy_app(plain_net, mods=[AutoFlipMod(), private_mod])
    grid = LocalGrid(app, NODES)
    seen, _ = run(AutoFLIP(threshold=0.7), grid, model, 3)
    mask = masks_by_round(grid, model)[-1]
    kept = sum(int(keep.sum()) for keep in mask.values())
    for reply in grid.up:
        if reply.phase == "train":
            assert list(reply.arrays) == ["autoflip.values"]
            assert len(reply.arrays["autoflip.values"].data) == 4 * kept
    for name, keep in mask.items():
        assert not seen[-1][name][~keep].any()
        assert np.isfinite(seen[-1][name]).all()


# --- replies that cannot be used ------------------------------------------------------


def put(key, array):
    return lambda reply: reply.content["arrays"].update({key: array})


def poison(value):
    def change(reply):
        array = reply.content["arrays"]["autoflip.values"]
        values = np.frombuffer(array.data, np.float32).copy()
        values[-1] = value
        reply.content["arrays"] = with_values(reply, values.tobytes())

    return change


def with_values(reply, data, *, dtype="float32", stype="autoflip.raw", shape=None):
    record = dict(reply.content["arrays"])
    size = (len(data) // 4,) if shape is None else shape
    record["autoflip.values"] = Array(dtype=dtype, shape=size, stype=stype, data=data)
    return ArrayRecord(record)


def values_as(**how):
    def change(reply):
        data = reply.content["arrays"]["autoflip.values"].data
        data = data[: how.get("length", len(data))] + how.get("more", b"")
        kind = {k: v for k, v in how.items() if k in ("dtype", "stype", "shape")}
        reply.content["arrays"] = with_values(reply, data, **kind)

    return change


def renamed(old, new):
    def change(reply):
        reply.content[new] = reply.content.pop(old)

    return change


def metric(**values):
    return lambda reply: reply.content["metrics"].update(
        {name.replace("_", "-"): value for name, value in values.items()}
    )


BAD_REPLIES = {
    "error": lambda r: Message(Error(9, "broken"), reply_to=request_of(r)),
    "NaN": poison(np.nan),
    "Inf": poison(np.inf),
    "too short": values_as(length=40),
    "odd length": values_as(length=41),
    "too long": values_as(more=b"\0\0\0\0"),
    "empty": values_as(length=0),
    "dtype": values_as(dtype="float16"),
    "stype": values_as(stype="numpy.ndarray"),
    "no values": lambda r: r.content["arrays"].pop("autoflip.values"),
    "no buffer": lambda r: r.content["arrays"].pop("1.running_mean"),
    "another array": put("2.weight", Array(np.zeros(3, np.float32))),
    "buffer NaN": put("1.running_var", Array(np.full(16, np.nan, np.float32))),
    "buffer shape": put("1.running_var", Array(np.ones(15, np.float32))),
    "buffer type": put("1.running_var", Array(np.ones(16, np.float64))),
    "buffer objects": put(
        "1.running_var",
        Array("float32", (16,), "numpy.ndarray", b"\x93NUMPY\x01\x00 garbage"),
    ),
    "buffer header cut": put(
        "1.running_var",
        Array(
            "float32",
            (16,),
            "numpy.ndarray",
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (16,"),
        ),
    ),
    "buffer header of Python 2": put(
        "1.running_var",
        Array(
            "float32",
            (16,),
            "numpy.ndarray",
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (16L,), }"),
        ),
    ),
    "two array records": lambda r: r.content.update({"more": ArrayRecord()}),
    "no array record": lambda r: r.content.pop("arrays"),
    "key of the arrays": renamed("arrays", "weights"),
    "no metrics": lambda r: r.content.pop("metrics"),
    "two metric records": lambda r: r.content.update(
        {"more": MetricRecord({"num-examples": 3})}
    ),
    "key of the metrics": renamed("metrics", "results"),
    "metric NaN": metric(train_loss=math.nan),
    "metric Inf": metric(train_loss=-math.inf),
    "metric NaN in a list": metric(train_loss=[1.0, math.nan]),
    "metric a list": metric(train_loss=[1.0, 2.0]),
    "negative examples": metric(num_examples=-1),
    "examples NaN": metric(num_examples=math.nan),
    "a list of examples": metric(num_examples=[3, 4]),
    "another metric": metric(train_time=1.0),
    "a missing metric": lambda r: r.content["metrics"].pop("train-loss"),
    "no examples": lambda r: r.content["metrics"].pop("num-examples"),
    "nothing": lambda r: r.content.clear(),
}


def request_of(reply):
    return Message(RecordDict(), reply.metadata.src_node_id, "train")


@pytest.mark.parametrize("position", [0, 2], ids=["first", "third"])
@pytest.mark.parametrize("kind", BAD_REPLIES)
def test_a_bad_reply_is_named_and_the_round_goes_on_without_it(kind, position, caplog):
    """The result is the one of a round that node did not answer in."""
    bad = NODES[position]

    def rounds(change):
        grid = LocalGrid(toy_app(), NODES, tamper=only_in("train", [bad], change))
        strategy = AutoFLIP(FedAvg(fraction_evaluate=0), threshold=0.5)
        seen, _ = run(strategy, grid, net(), 2)
        return seen, strategy

    without, _ = rounds(lambda reply: "lost")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="flwr"):
        seen, strategy = rounds(BAD_REPLIES[kind])
    lines = [r.getMessage() for r in caplog.records if "dropped" in r.getMessage()]
    assert len(lines) == 2, "one a round"
    assert all(f"node {bad}" in line for line in lines)
    assert list(strategy.rounds.dropped) == [bad]
    for ours, expected in zip(seen, without, strict=True):
        assert_same_arrays(ours, expected)


@pytest.mark.parametrize(
    "kind", ["error", "metric NaN", "another metric", "key of the metrics", "nothing"]
)
def test_a_bad_evaluation_is_left_out(kind, caplog):
    def metrics(change):
        grid = LocalGrid(toy_app(), NODES, tamper=only_in("evaluate", [12], change))
        _, result = run(AutoFLIP(threshold=0.5), grid, net(), 1)
        return dict(result.evaluate_metrics_clientapp[1])

    def change(reply):
        if kind == "metric NaN":
            reply.content["metrics"]["eval-loss"] = math.nan
            return None
        return BAD_REPLIES[kind](reply)

    expected = metrics(lambda reply: "lost")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert metrics(change) == expected
    assert any("node 12 is dropped" in r.getMessage() for r in caplog.records)


def test_an_honest_explanation_says_what_was_expected_and_what_came(caplog):
    tamper = only_in("train", [13], values_as(length=40))
    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        run(AutoFLIP(threshold=0.5), grid, net(), 1)
    assert any(
        "expected 356 B (4 x 89 kept), got 40 B" in r.getMessage()
        for r in caplog.records
    )


def test_when_every_reply_is_bad_the_model_stays_as_it_was(caplog):
    broken = []

    def tamper(message, reply):
        train = message.metadata.message_type == "train"
        config = next(iter(message.content.config_records.values()))
        if train and config["server-round"] == 2:
            broken.append(message.metadata.dst_node_id)
            return Message(Error(1, "out"), reply_to=message)
        return reply

    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        seen, result = run(AutoFLIP(threshold=0.5), grid, net(), 3)
    assert sorted(broken) == NODES
    assert_same_arrays(seen[2], seen[1])
    assert not np.array_equal(seen[3]["0.weight"], seen[2]["0.weight"])
    assert list(result.train_metrics_clientapp) == [1, 3]
    assert any(
        "round 2: 0 valid replies" in r.getMessage()
        and "stays as it was" in r.getMessage()
        for r in caplog.records
    )


def test_without_valid_replies_a_round_aggregates_to_nothing():
    strategy = AutoFLIP()
    grid = LocalGrid(toy_app(), NODES)
    record = ArrayRecord(net().state_dict())
    messages = list(strategy.configure_train(1, record, ConfigRecord(), grid))
    assert strategy.aggregate_train(1, []) == (None, None)
    replies = [Message(Error(1, "out"), reply_to=m) for m in messages]
    assert strategy.aggregate_train(1, replies) == (None, None)


@pytest.mark.parametrize(("good", "changes"), [(3, True), (2, False)])
def test_a_round_needs_as_many_valid_replies_as_it_is_told(good, changes):
    tamper = only_in("train", NODES[good:], poison(np.nan))
    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    model = net()
    seen, _ = run(AutoFLIP(threshold=0.5, min_replies=3), grid, model, 1)
    moved = not np.array_equal(seen[1]["1.running_mean"], seen[0]["1.running_mean"])
    assert moved is changes


@pytest.mark.parametrize("server_round", [1, 3], ids=["first", "last"])
def test_after_a_round_without_replies_the_model_still_fits_the_mask(server_round):
    """The model that is evaluated and saved is zero wherever the mask says so."""

    def tamper(message, reply):
        config = next(iter(message.content.config_records.values()))
        lost = config["autoflip.phase"] == "train"
        return None if lost and config["server-round"] == server_round else reply

    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    strategy = AutoFLIP(FedAvg(**some_of()), **CHANGING)
    seen, _ = run(strategy, grid, net(), server_round)
    if server_round == 1:
        assert strategy.rounds.plan is None
        assert strategy.rounds.density == 1.0
    else:
        for name, keep in strategy.rounds.plan.masks.items():
            assert not seen[-1][name][~keep].any(), name


# --- nothing of the caller's is written to --------------------------------------------


@pytest.mark.parametrize(
    "make_inner",
    [
        FedAvg,
        lambda: FedAvgM(server_momentum=0.9),
        FedAdam,
        lambda: FedProx(proximal_mu=1.0),
    ],
    ids=["FedAvg", "FedAvgM", "FedAdam", "FedProx"],
)
@pytest.mark.parametrize("pruned_weights", ["zero", "keep"])
def test_the_callers_records_are_left_alone(make_inner, pruned_weights):
    model = net()
    record = ArrayRecord(model.state_dict())
    before = {name: array.data for name, array in record.items()}
    train, evaluate = ConfigRecord({"lr": 0.1}), ConfigRecord({"batch": 3})
    strategy = AutoFLIP(make_inner(), threshold=0.5, pruned_weights=pruned_weights)
    strategy.start(
        LocalGrid(toy_app(), NODES),
        record,
        num_rounds=3,
        train_config=train,
        evaluate_config=evaluate,
    )
    assert {name: array.data for name, array in record.items()} == before
    assert dict(train) == {"lr": 0.1}
    assert dict(evaluate) == {"batch": 3}


def test_an_inner_strategy_may_write_to_the_record_it_is_given():
    class Emptying(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            given = ArrayRecord(dict(arrays))
            messages = super().configure_train(server_round, given, config, grid)
            arrays.clear()
            config["mine"] = 1
            return messages

    record = ArrayRecord(net().state_dict())
    names = list(record)
    AutoFLIP(Emptying()).start(LocalGrid(toy_app(), NODES), record, num_rounds=1)
    assert list(record) == names


#: Numbers of samples, some of whose shares do not add up to one exactly.
COUNTS = np.random.default_rng(0).integers(1, 100, (12, 5)).tolist()


@pytest.mark.parametrize("counts", COUNTS)
def test_a_count_that_all_clients_agree_on_survives_the_average(counts):
    """Flower averages integers as floats, which may end a hair below."""
    batches = 1_000_003
    examples = dict(zip(NODES, counts, strict=True))

    def change(reply):
        reply.content["arrays"]["1.num_batches_tracked"] = Array(np.array(batches))
        reply.content["metrics"]["num-examples"] = examples[reply.metadata.src_node_id]

    grid = LocalGrid(toy_app(), NODES, tamper=only_in("train", NODES, change))
    seen, _ = run(AutoFLIP(FedAvg(fraction_evaluate=0)), grid, net(), 1)
    assert int(seen[-1]["1.num_batches_tracked"]) == batches


# --- repeatability --------------------------------------------------------------------


@pytest.mark.parametrize("make_inner", [FedAvg, lambda: FedAvgM(server_momentum=0.9)])
def test_the_order_in_which_replies_arrive_does_not_matter(make_inner):
    def weights(shuffle):
        grid = LocalGrid(toy_app(), NODES, shuffle=shuffle)
        strategy = AutoFLIP(make_inner(), population_weight=0.3, seed=0)
        return run(strategy, grid, net(), 3)

    first, one = weights(None)
    for shuffle in (list.reverse, lambda replies: replies.sort(key=str)):
        again, other = weights(shuffle)
        for ours, theirs in zip(again, first, strict=True):
            assert_same_arrays(ours, theirs)
        assert str(other.train_metrics_clientapp) == str(one.train_metrics_clientapp)
        assert str(other.evaluate_metrics_clientapp) == str(
            one.evaluate_metrics_clientapp
        )


def test_the_log_names_the_inner_strategy_and_the_pruning(caplog):
    with caplog.at_level(logging.INFO, logger="flwr"):
        AutoFLIP(FedAvgM(server_momentum=0.9), threshold=0.35).summary()
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "0.35" in text
    assert "FedAvgM settings" in text


def test_rounds_report_density_change_variance_and_drops():
    grid = LocalGrid(toy_app(), NODES, tamper=only_in("train", [12], poison(np.nan)))
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), threshold=0.5)
    model = net()
    run(strategy, grid, model, 1)
    sent = next(s for s in grid.down if s.phase == "train")
    start = np.frombuffer(sent.arrays["autoflip.values"].data, np.float32)
    updates = [
        np.frombuffer(s.arrays["autoflip.values"].data, np.float32) - start
        for s in grid.up
        if s.phase == "train" and s.node_id != 12
    ]
    rounds = strategy.rounds
    assert rounds.density == pytest.approx(89 / 179)
    assert rounds.mask_change == 0
    assert list(rounds.dropped) == [12]
    assert rounds.update_variance == pytest.approx(
        float(np.var(updates, axis=0).mean()), rel=1e-4
    )


def test_a_strategy_cleans_up_after_itself_without_a_warning(tmp_path, monkeypatch):
    """Projects that turn warnings into errors use it too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = AutoFLIP()
        run(strategy, LocalGrid(nudging_app(), NODES), plain_net(), 1)
        del strategy
        gc.collect()
    assert [str(w.message) for w in caught if w.category is ResourceWarning] == []
    assert list(tmp_path.iterdir()) == []


def test_the_local_guidance_lives_where_it_is_told(tmp_path):
    grid = LocalGrid(nudging_app(), NODES)
    run(
        AutoFLIP(FedAvg(fraction_evaluate=0), store=tmp_path / "g"),
        grid,
        plain_net(),
        1,
    )
    assert len(list((tmp_path / "g").glob("*.guidance"))) == 5


# --- what the SuperLink says in a node's place ---------------------------------------


def test_a_node_that_is_gone_is_named_though_the_superlink_answers_for_it(caplog):
    """Such a reply carries the SuperLink's id; the message it answers tells."""
    gone = NODES[1]

    def tamper(message, reply):
        if (
            message.metadata.dst_node_id != gone
            or reply.metadata.message_type != "train"
        ):
            return reply
        answer = Message(Error(14, "Node unavailable"), reply_to=message)
        answer.metadata.__dict__["_src_node_id"] = 1
        return answer

    grid = RunGrid(LocalGrid(toy_app(), NODES, tamper=tamper), seed=0, dense_bytes=0)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        run(AutoFLIP(), grid, net(), 1)
    client = NODES.index(gone)
    assert f"exploration: node {client} is left out" in caplog.text
    assert f"the reply of node {client} is dropped" in caplog.text
    assert caplog.text.count(" is left out") == 1


def test_frozen_parameters_are_refused_before_they_are_pruned():
    def frozen():
        model = net()
        next(model.parameters()).requires_grad_(False)
        return model

    name = next(iter(dict(net().named_parameters())))
    with pytest.raises(GuidanceError, match=rf"{re.escape(name)}.*exclude.*prunable"):
        run(AutoFLIP(), LocalGrid(toy_app(frozen), NODES), frozen(), 1)
    run(AutoFLIP(exclude=[name]), LocalGrid(toy_app(frozen), NODES), frozen(), 1)


def test_a_floor_that_leaves_too_little_is_refused_before_anyone_explores():
    grid = LocalGrid(toy_app(), NODES)
    with pytest.raises(MaskError, match="lower the floor or prune less"):
        run(AutoFLIP(threshold=0.9, floor=0.5), grid, net(), 1)
    assert not grid.down


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"threshold": "x"}, r"pruning.threshold: expected float"),
        ({"exploration_epochs": 1.5}, r"exploration.epochs: expected int"),
        ({"score": "magnitude"}, r"pruning.score: expected one of"),
        ({"min_replies": 0}, r"min_replies >= 1"),
    ],
)
def test_an_impossible_argument_is_refused_when_the_strategy_is_made(bad, message):
    with pytest.raises(SettingsError, match=message):
        AutoFLIP(**bad)


class Idle(FedAvg):
    """Samples nobody in round 3."""

    def configure_train(self, server_round, arrays, config, grid):
        if server_round == 3:
            return []
        return super().configure_train(server_round, arrays, config, grid)


def test_a_round_without_messages_leaves_model_and_mask_together():
    grid = LocalGrid(toy_app(), NODES)
    strategy = AutoFLIP(Idle(**some_of()), **CHANGING)
    seen, _ = run(strategy, grid, net(), 3)
    for name, keep in strategy.rounds.plan.masks.items():
        assert not seen[-1][name][~keep].any(), name


class Personal(FedAvg):
    """Sends every node a model of its own, in a record that only its message holds."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for position, message in enumerate(messages):
            shifted = {
                name: value + position if value.dtype.kind == "f" else value
                for name, value in arrays_of(message.content["arrays"]).items()
            }
            record = ArrayRecord({name: Array(v) for name, v in shifted.items()})
            message.content = RecordDict(
                {"arrays": record, "config": message.content["config"]}
            )
            del record, shifted
        return messages


def test_a_model_of_ones_own_reaches_each_node():
    grid = LocalGrid(toy_app(plain_net), NODES)
    strategy = AutoFLIP(Personal(fraction_evaluate=0.0), threshold=0.5)
    run(strategy, grid, plain_net(), 1)
    sent = [
        np.frombuffer(s.arrays["autoflip.values"].data, "<f4")
        for s in grid.down
        if s.phase == "train"
    ]
    assert len(sent) == len(NODES)
    for position, values in enumerate(sent):
        assert_allclose(values, sent[0] + position, rtol=1e-4, atol=1e-5)


# --- warm start -----------------------------------------------------------------------


def warm(inner=None, **settings):
    inner = inner or FedAvg(fraction_evaluate=0)
    return AutoFLIP(inner, warm_start=True, seed=0, **settings)


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
        run(AutoFLIP(FedAvg(fraction_evaluate=0), values=values), grid, model, 1)
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
    lost = only_in("train", NODES, lambda reply: "lost")
    first = [True]

    def tamper(message, reply):
        return lost(message, reply) if first[0] else reply

    grid = LocalGrid(toy_app(), NODES, tamper=tamper)

    def join(server_round, arrays):
        if server_round == 1:
            first[0] = False
            grid.join(99, {"partition-id": 0, "num-partitions": 5})

    model = net()
    strategy = warm(threshold=0.0)
    run(strategy, grid, model, 2, after_round=join)
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


# --- refresh --------------------------------------------------------------------------


def refreshing(**settings):
    chosen = {"population_weight": 1.0, "threshold": 0.6, "refresh": 0.5} | settings
    return AutoFLIP(
        FedAvg(fraction_evaluate=0, fraction_train=0.6),
        refresh_every=2,
        refresh_until=5,
        seed=0,
        **chosen,
    )


def test_a_refresh_asks_the_sampled_for_gradients_of_the_masked_model():
    model = net()
    grid = LocalGrid(toy_app(), NODES)
    strategy = refreshing()
    masks = []
    run(
        strategy,
        grid,
        model,
        8,
        after_round=lambda *_: masks.append(
            dict(strategy.rounds.plan.masks) if strategy.rounds.plan else None
        ),
    )
    explored = [s for s in grid.down if s.phase == "explore"]
    asked = [s for s in explored if s.config["autoflip.measure"] == "gradient"]
    assert len(explored) - len(asked) == len(NODES)
    assert {s.config["server-round"] for s in asked} == {3, 5}
    for sent in asked:
        trained = [
            s.node_id
            for s in grid.down
            if s.phase == "train"
            and s.config["server-round"] == sent.config["server-round"]
        ]
        assert sent.node_id in trained
        assert "autoflip.values" in sent.arrays, "kept values travel"
        assert "0.weight" not in sent.arrays
    sizes = {sum(int(k.sum()) for k in m.values()) for m in masks[1:]}
    assert len(sizes) == 1, "the density stays"
    changed = [change(a, b) > 0 for a, b in itertools.pairwise(masks[1:])]
    assert changed == [False, True, False, True, False, False, False]


def test_a_refresh_drops_the_smallest_and_grows_the_steepest_by_hand(tmp_path):
    initial = {"w": np.float32([[1, 2, 3, 4, 5, 6]]), "b": np.float32([1, 1])}
    pruner = AutoFlipPruner(
        initial,
        PruningSettings(
            threshold=0.25, population_weight=1.0, refresh=0.5, refresh_every=1
        ),
        tmp_path,
    )
    assert pruner.asks(1, connected=[7], sampled=[7]).measure == "deviation"
    far = {"w": np.float32([[9, 9, 9, 9, 1, 1]]), "b": np.float32([9, 9])}
    pruner.add(7, codec.quantize(far), 1.0, initial)
    first = pruner.masks([7], initial, 1)
    assert_array_equal(first["w"], [[1, 1, 1, 1, 0, 0]])
    ask = pruner.asks(2, connected=[7], sampled=[7])
    assert (ask.measure, ask.current) == ("gradient", True)
    steep = {"w": np.float32([[9, 9, 9, 9, 2, 3]]), "b": np.float32([0, 0])}
    pruner.add(7, codec.quantize(steep), 1.0, initial)
    now = {"w": np.float32([[-3, 0.5, 2, -1, 0, 0]]), "b": np.float32([0, 0])}
    # half of four go, |0.5| and |-1|; both that were pruned come
    second = pruner.masks([7], now, 2)
    assert_array_equal(second["w"], [[1, 0, 1, 0, 1, 1]])
    assert_array_equal(second["b"], first["b"])
    assert pruner.asks(3, connected=[7], sampled=[]) is not None
    assert pruner.masks([7], now, 3) is second, "nobody answered: the mask stays"
    # a newcomer explores: its guidance is kept, the exchange is not undone
    assert pruner.asks(4, connected=[7, 8], sampled=[8]).measure == "deviation"
    pruner.add(8, codec.quantize(far), 1.0, initial)
    assert pruner.masks([8], now, 4) is second
    assert pruner.explorers == 2


def test_a_refresh_leaves_dead_units_dead():
    strategy = refreshing(
        units=0.8, model=plain_net(), example_inputs=torch.zeros(1, 6), threshold=0.7
    )
    masks = []
    run(
        strategy,
        LocalGrid(toy_app(plain_net), NODES),
        plain_net(),
        6,
        after_round=lambda *_: masks.append(
            dict(strategy.rounds.plan.masks) if strategy.rounds.plan else None
        ),
    )
    units = strategy.rounds._units
    used = [units.used(each) for each in masks[1:]]
    assert not used[0].all()
    assert change(masks[1], masks[-1]) > 0
    for each in used[1:]:
        assert not (each & ~used[0]).any()


@pytest.mark.parametrize(
    "settings", [{"population_weight": 0.8}, {"agreement": "sign"}]
)
def test_a_refresh_needs_one_mask_for_all_rounds(settings):
    with pytest.raises(SettingsError, match=r"pruning\.refresh exchanges"):
        refreshing(**settings)
