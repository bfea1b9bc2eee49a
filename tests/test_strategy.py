"""AutoFLIP on the Message API: it is the inner strategy, around kept values."""

import gc
import itertools
import logging
import math
import tempfile
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from flat import flat
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    RecordDict,
)
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
)
from inprocess import (
    CHANGING,
    LocalGrid,
    adam_reference,
    assert_masks_change,
    assert_same_arrays,
    masks_by_round,
    masks_in,
    momentum_reference,
    net,
    nudging_app,
    only_in,
    plain_net,
    poison,
    run,
    samples,
    state_of,
    toy_app,
    values_in,
)
from numpy.testing import assert_allclose, assert_array_equal

from autoflip_flwr import AutoFLIP, AutoFlipMod
from autoflip_flwr.app import models
from autoflip_flwr.errors import (
    AutoFlipError,
    SettingsError,
)
from autoflip_flwr.settings import BaselineSettings

NODES = [11, 12, 13, 14, 15]


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
        AutoFLIP(make_inner(), **flat(threshold=0.0)),
        LocalGrid(toy_app(), NODES),
        net(),
    )
    assert len(pruned) == len(dense) == 4
    optimizes = isinstance(make_inner(), FedAvgM)
    for ours, theirs in zip(pruned, dense, strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            if optimizes and ("running" in name or "tracked" in name):
                continue  # tests/test_both_apis.py has what we do with them
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
]


#: Bytes of a kept value to a client and back.
WIDTHS = {"float32": (4, 4), "float16": (2, 2), "int8": (1, 1), "int4": (1, 0.5)}


@pytest.mark.slow
def test_the_messages_of_a_large_network_cost_no_more():
    make = partial(models.build, "resnet50", num_classes=10, input_shape=(3, 32, 32))
    test_messages_cost_the_kept_values_the_mask_and_the_buffers(
        partial(make, seed=0), lambda make: nudging_app(), "int4"
    )


@pytest.mark.parametrize("values", WIDTHS)
@pytest.mark.parametrize(("make", "app"), TRAVELLING)
def test_messages_cost_the_kept_values_the_mask_and_the_buffers(make, app, values):
    model = make()
    grid = LocalGrid(app(make), [11, 12])
    strategy = AutoFLIP(
        FedAvg(fraction_evaluate=0), **flat(threshold=0.9, values=values, floor=0)
    )
    run(strategy, grid, model, 1)
    prunable = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    kept = prunable - round(0.9 * prunable)
    there, back = (int(kept * width) for width in WIDTHS[values])
    down = [nbytes(s.content) for s in grid.down if s.phase == "train"]
    up = [nbytes(s.content) for s in grid.up if s.phase == "train"]
    assert len(down) == len(up) == 2
    scales = kept // 64 if there == kept else 0  # four bytes for 256 values
    assert max(down) <= 1.02 * (there + scales + prunable / 8 + buffers) + 4096
    assert max(up) <= 1.02 * (back + scales + buffers) + 4096
    assert min(down) >= there + prunable // 8 + buffers
    assert min(up) >= back + buffers
    explored = [nbytes(s.content) for s in grid.up if s.phase == "explore"]
    assert max(explored) <= prunable + 4096, "a quarter of float32"


def test_a_masks_indices_are_kept_while_it_stays_and_never_of_a_dense_one():
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), threshold=0.8)
    seen = []

    def look(server_round, arrays):
        plan = strategy.rounds.plan
        if plan is not None:
            seen.append((strategy.rounds.density, plan.masks, plan.kept))

    run(strategy, LocalGrid(toy_app(), NODES), net(), 8, after_round=look)
    assert [kept is not None for _, _, kept in seen] == [d < 0.3 for d, _, _ in seen]
    (_, masks, kept), (_, after, still) = seen[-2:]
    assert after is masks
    assert still is kept
    for name, keep in masks.items():
        assert_array_equal(kept[name], np.flatnonzero(keep))
    assert seen[0][2] is None


def test_rounding_to_bytes_on_the_way_down_does_not_enter_the_model():
    """Clients that learn nothing for ten rounds leave the weights as they were."""
    app = nudging_app(scale=0.0)
    none = BaselineSettings(dense_rounds=0)
    strategy = AutoFLIP(**flat(values="int8", method="magnitude", baselines=none))
    seen, _ = run(strategy, LocalGrid(app, NODES), plain_net(), 10)
    for name, value in seen[1].items():
        assert_allclose(seen[-1][name], value, rtol=1e-5)


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_integers_need_the_global_model_to_be_what_is_sent(values):
    class Shifted(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            moved = {n: Array(v.numpy() + np.float32(1)) for n, v in arrays.items()}
            return super().configure_train(
                server_round, ArrayRecord(moved), config, grid
            )

    strategy = AutoFLIP(Shifted(fraction_evaluate=0), **flat(values=values))
    with pytest.raises(SettingsError, match="Shifted sends other weights than the gl"):
        run(strategy, LocalGrid(toy_app(plain_net), NODES), plain_net(), 1)


@pytest.mark.parametrize(("values", "near"), [("int8", 0.1), ("int4", 0.3)])
def test_with_integers_the_weights_are_nearly_those_of_floats(values, near):
    ends = []
    for sent_as in ("float32", values):
        strategy = AutoFLIP(**flat(threshold=0.5, values=sent_as, seed=0))
        ends.append(run(strategy, LocalGrid(toy_app(), NODES), net(), 3)[0])
    (first, *_, floats), (_, *_, rounded) = ends
    moved = np.concatenate([(floats[n] - first[n]).ravel() for n in floats])
    off = np.concatenate([(floats[n] - rounded[n]).ravel() for n in floats])
    assert 0 < np.linalg.norm(off) < near * np.linalg.norm(moved)


def test_a_train_message_is_one_flat_array_the_buffers_and_the_masks_bits():
    model = net()
    grid = LocalGrid(toy_app(), NODES)
    run(AutoFLIP(**flat(threshold=0.5)), grid, model, 2)
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
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), **flat(threshold=0.6))
    seen, _ = run(strategy, grid, model, 2)
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
    strategy = AutoFLIP(**flat(threshold=0.9, exclude=["3.*", "*.bias"]))
    seen, _ = run(strategy, grid, model, 2)
    sent = next(s for s in grid.down if s.phase == "train")
    assert {"3.weight", "3.bias", "1.bias"} <= set(sent.arrays)
    assert (seen[-1]["3.weight"] != 0).all()
    density = (seen[-1]["0.weight"] != 0).mean()
    assert density < 0.2


def test_only_named_parameters_are_prunable_and_a_typo_is_an_error():
    seen, _ = run(
        AutoFLIP(**flat(threshold=0.5, prunable=["0.weight"])),
        LocalGrid(toy_app(), NODES),
        net(),
        1,
    )
    assert (seen[-1]["0.weight"] == 0).mean() == 0.5
    assert (seen[-1]["3.weight"] != 0).all()
    with pytest.raises(SettingsError, match=r"0\.weigth"):
        run(
            AutoFLIP(**flat(prunable=["0.weigth"])),
            LocalGrid(toy_app(), NODES),
            net(),
            1,
        )


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
    with pytest.raises(SettingsError, match=next(iter(options)).rpartition("_")[2]):
        AutoFLIP(**flat(**options))


@pytest.mark.parametrize("values", ["float64", "bfloat16"])
def test_an_unknown_wire_type_is_refused_when_the_strategy_is_made(values):
    with pytest.raises(AutoFlipError, match="float32"):
        AutoFLIP(**flat(values=values))


# --- pruned weights -------------------------------------------------------------------


def test_the_global_model_is_zero_where_the_round_pruned():
    model = net()
    grid = LocalGrid(toy_app(), NODES)
    seen, _ = run(AutoFLIP(FedAvg(**some_of()), **flat(**CHANGING)), grid, model, 6)
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
    strategy = AutoFLIP(FedAvg(**some_of()), **flat(**CHANGING, pruned_weights="keep"))
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
    strategy = AutoFLIP(
        FedAvg(fraction_train=0.4), **flat(**CHANGING, pruned_weights="keep")
    )
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
        (lambda: FedYogi(eta=0.01), []),
        (lambda: FedAdagrad(eta=0.05), []),
        (lambda: FedTrimmedAvg(beta=0.2), []),
        (lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2), []),
    ],
    ids=lambda each: type(each()).__name__ if callable(each) else "",
)
def test_every_inner_strategy_trains_a_pruned_model(make_inner, mods, pruned_weights):
    model = plain_net()
    app = toy_app(plain_net, mods=[AutoFlipMod(), *mods])
    grid = LocalGrid(app, NODES)
    strategy = AutoFLIP(
        make_inner(),
        **flat(threshold=0.7, population_weight=0.5, pruned_weights=pruned_weights),
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
    seen, _ = run(AutoFLIP(inner, **flat(**CHANGING)), grid, model, 8)
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
    seen, _ = run(AutoFLIP(**flat(threshold=0.7)), grid, model, 3)
    mask = masks_by_round(grid, model)[-1]
    kept = sum(int(keep.sum()) for keep in mask.values())
    for reply in grid.up:
        if reply.phase == "train":
            assert list(reply.arrays) == ["autoflip.values"]
            assert len(reply.arrays["autoflip.values"].data) == 4 * kept
    for name, keep in mask.items():
        assert not seen[-1][name][~keep].any()
        assert np.isfinite(seen[-1][name]).all()


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
    strategy = AutoFLIP(
        make_inner(), **flat(threshold=0.5, pruned_weights=pruned_weights)
    )
    strategy.start(
        LocalGrid(toy_app(), NODES),
        record,
        num_rounds=3,
        train_config=train,
        evaluate_config=evaluate,
    )
    assert {name: array.data for name, array in record.items()} == before
    plain_train, plain_evaluate = ConfigRecord({"lr": 0.1}), ConfigRecord({"batch": 3})
    make_inner().start(
        LocalGrid(toy_app(mods=[]), NODES),
        record,
        num_rounds=3,
        train_config=plain_train,
        evaluate_config=plain_evaluate,
    )
    assert dict(train) == dict(plain_train), "Flower writes the round into them"
    assert dict(evaluate) == dict(plain_evaluate)


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


class Own(FedAvg):
    """As in projects: a state, a schedule, a loop of its own, models it saves."""

    def __init__(self, **options):
        super().__init__(**options)
        self.saved, self.rates, self.began = [], [], 0

    def configure_train(self, server_round, arrays, config, grid):
        config["lr"] = config["lr"] / 2
        self.rates.append(config["lr"])
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.saved.append(arrays)
        return arrays, metrics

    def start(self, grid, initial_arrays, num_rounds=3, **named):
        self.began += 1
        return super().start(grid, initial_arrays, num_rounds + 1, **named)

    def best(self):
        return len(self.saved)


def test_a_strategy_keeps_its_own_attributes_methods_schedule_and_start():
    strategy = AutoFLIP(Own(fraction_evaluate=0))
    grid = LocalGrid(toy_app(), NODES)
    _, result = run(strategy, grid, net(), 3, config=ConfigRecord({"lr": 0.8}))
    assert strategy.began == 1
    assert strategy.best() == len(strategy.saved) == 4, "its loop has a round more"
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]
    # the first round is configured twice: a warm start makes its messages again
    assert strategy.strategy.rates == [0.4, 0.4, 0.2, 0.1, 0.05]
    rates = {s.config["server-round"]: s.config["lr"] for s in grid.down}
    assert rates == {1: 0.4, 2: 0.2, 3: 0.1, 4: 0.05}
    with pytest.raises(AttributeError, match="nothing"):
        _ = strategy.nothing


def test_a_bias_that_a_norm_takes_away_may_rest():
    def biased():
        norm, last = torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 3)
        return torch.nn.Sequential(torch.nn.Linear(6, 16), norm, last)

    grid = LocalGrid(toy_app(biased, lr=1e-3), NODES)
    strategy = AutoFLIP(FedAvg(**some_of()), threshold=0.3)
    run(strategy, grid, biased(), 2)
    masks = strategy.rounds.plan.masks
    assert set(masks) == {n for n, _ in biased().named_parameters()}
    assert all(keep.all() for keep in masks.values() if keep.ndim == 1)


def test_an_explorer_is_told_what_the_strategy_tells_that_node():
    class Telling(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            for message in super().configure_train(server_round, arrays, config, grid):
                node_id = message.metadata.dst_node_id
                content = RecordDict(dict(message.content))
                content["config"] = ConfigRecord({**content["config"], "you": node_id})
                yield Message(content, node_id, "train")

    grid = LocalGrid(toy_app(), NODES)
    strategy = AutoFLIP(Telling(**some_of()), **flat(warm_start=False))
    run(strategy, grid, net(), 1)
    sampled = set(grid.nodes("train"))
    assert 0 < len(sampled) < len(NODES)
    told = {s.node_id: s.config["you"] for s in grid.down if s.phase == "explore"}
    assert set(told) == set(NODES)
    assert {n for n, you in told.items() if n == you} == sampled
    assert {s.node_id: s.config["you"] for s in grid.down if s.phase == "train"} == {
        n: n for n in sampled
    }


def saving(kind):
    """A strategy that saves what it aggregates, as one does with its best model."""

    class Saver(kind):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            saved.append({n: a.numpy().copy() for n, a in arrays.items()})
            return arrays, metrics

    saved = []
    return Saver(**some_of()), saved


@pytest.mark.parametrize("kind", [FedAvg, FedAvgM, FedMedian])
def test_what_an_inner_strategy_saves_is_the_masked_model(kind):
    model = net()
    grid = LocalGrid(toy_app(), NODES)
    inner, saved = saving(kind)
    run(AutoFLIP(inner, **flat(**CHANGING)), grid, model, 4)
    masks = masks_by_round(grid, model)
    assert_masks_change(masks)
    for arrays, mask in zip(saved, masks, strict=True):
        for name, keep in mask.items():
            assert not arrays[name][~keep].any(), name
            assert arrays[name][keep].any()


def test_what_an_inner_strategy_keeps_of_earlier_rounds_stays_as_it_was():
    kept = []

    class Keeper(FedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            kept.append(arrays)
            return arrays, metrics

    grid = LocalGrid(toy_app(), NODES)
    seen, _ = run(AutoFLIP(Keeper(**some_of()), **flat(**CHANGING)), grid, net(), 4)
    for record, arrays in zip(kept, seen[1:], strict=True):
        assert_same_arrays({n: a.numpy() for n, a in record.items()}, arrays)


@pytest.mark.parametrize(
    "make_inner",
    [FedAvgM, FedAdam, partial(QFedAvg, 0.1, train_loss_key="train-loss")],
    ids=["FedAvgM", "FedAdam", "QFedAvg"],
)
def test_a_round_without_replies_leaves_server_and_inner_model_alike(make_inner):
    """The round begins again with the same weights, and so does the inner strategy."""
    lost = []

    def tamper(message, reply):
        config = next(iter(message.content.config_records.values()))
        second = config["server-round"] == 2 and config["autoflip.phase"] == "train"
        if second and len(lost) < 2:  # of five nodes two are sampled
            lost.append(reply)
            return None
        return reply

    strategy = AutoFLIP(make_inner(**some_of()), **flat(**CHANGING))
    grid = LocalGrid(toy_app(plain_net), NODES, tamper=tamper)
    seen, _ = run(strategy, grid, plain_net(), 4)
    again = [s for s in grid.down if s.phase == "train"][2:6]
    assert [s.config["server-round"] for s in again] == [2] * 4
    (_, before), (_, after) = (
        (masks, values_in(sent, masks))
        for sent in (again[0], again[2])
        for masks in [masks_in(sent, plain_net())]
    )
    for name, value in before.items():
        both = (value != 0) & (after[name] != 0)
        assert both.any()
        assert_array_equal(value[both], after[name][both])
    for name, keep in strategy.rounds.plan.masks.items():
        assert not seen[-1][name][~keep].any()
    assert any((seen[2][n] != seen[1][n]).any() for n in seen[2])


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
        strategy = AutoFLIP(make_inner(), **flat(population_weight=0.3, seed=0))
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
    assert rounds.diagnostics.mask_change == 0
    assert list(rounds.dropped) == [12]
    assert rounds.diagnostics.update_variance == pytest.approx(
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
