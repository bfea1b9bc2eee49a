"""Baselines in rounds: density, who is asked, nodes that fail."""

import functools
import itertools
import logging
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from flat import flat
from flwr.app import (
    Array,
    ArrayRecord,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy import FedAvg
from inprocess import (
    LocalGrid,
    arrays_of,
    call_seed,
    masks_in,
    nudging_app,
    only_in,
    run,
    samples,
    seeded,
    state_of,
    toy_app,
    values_in,
)
from numpy.testing import assert_allclose, assert_array_equal
from preparing import loss_of, prepared, pruning
from torch import nn

from autoflip_flwr import AutoFLIP, units
from autoflip_flwr.errors import ExplorationError, MaskError, SettingsError
from autoflip_flwr.pruners.dynamic import FedDST
from autoflip_flwr.pruners.gradients import PruneFL
from autoflip_flwr.settings import BaselineSettings
from autoflip_flwr.units import optimizers
from autoflip_flwr.wire import codec
from autoflip_flwr.wire import records as wire

NODES = [11, 12, 13, 14, 15]
ONE = torch.zeros(1, 6)

OF_UNITS = ["l1", "l2", "similarity", "bn", "eflprune"]
OF_WEIGHTS = ["magnitude", *OF_UNITS]
OF_GRADIENTS = ["ssfl", "prunefl", "feddst", "fedrts", "fedtiny"]
BASELINES = ["random", *OF_WEIGHTS, *OF_GRADIENTS]


# --- in rounds ------------------------------------------------------------------------


def wide() -> nn.Module:
    """2083 weights: 240 + 80, 1600 + 40, 120 + 3."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 40, bias=False),
            nn.BatchNorm1d(40),
            nn.ReLU(),
            nn.Linear(40, 40),
            nn.ReLU(),
            nn.Linear(40, 3),
        )
    )


ALL = 2083
FIFTH = ALL - round(0.8 * ALL)
ROUNDS = 7
EVERY = 3


@dataclass(frozen=True)
class Ran:
    """A run of a baseline, and all that crossed the wire."""

    strategy: AutoFLIP
    grid: LocalGrid
    seen: list[dict[str, np.ndarray]]
    calls: list[dict[str, Any]]

    def of_phase(self, *phases):
        return [sent for sent in self.grid.down if sent.phase in phases]

    def masks(self):
        """Return the mask of each round; its messages have the same."""
        found = {}
        for sent in self.of_phase("train"):
            masks = masks_in(sent, wide())
            known = found.setdefault(sent.config["server-round"], masks)
            assert all((known[n] == keep).all() for n, keep in masks.items())
        assert list(found) == list(range(1, len(found) + 1))
        return found


def baseline(method, fraction=1.0, **settings):
    baselines = {"dense_rounds": 2, "every": EVERY, "until": 5}
    baselines |= settings.pop("baselines", {})
    chosen = {
        "method": method,
        "threshold": 0.8,
        "model": wide(),
        "example_inputs": ONE,
        "seed": 1,
        "baselines": BaselineSettings(**baselines),
        **settings,
    }
    evaluates = fraction if fraction < 1 else 0.0
    inner = FedAvg(fraction_train=fraction, fraction_evaluate=evaluates)
    return AutoFLIP(inner, **flat(**chosen))


def ran(method, *, app=None, tamper=None, rounds=ROUNDS, **settings) -> Ran:
    calls: list[dict[str, Any]] = []
    grid = LocalGrid(app or toy_app(wide, calls=calls, lr=0.3), NODES, tamper=tamper)
    strategy = baseline(method, **settings)
    seen, _ = run(strategy, grid, wide(), rounds)
    return Ran(strategy, grid, seen, calls)


@functools.cache
def plainly(method) -> Ran:
    """Two of five nodes train in each of seven rounds."""
    return ran(method, fraction=0.4)


def dense_rounds(method):
    return 2 if method in OF_WEIGHTS else 0


@pytest.mark.parametrize("method", BASELINES)
def test_every_baseline_sends_exactly_the_density_asked_for(method):
    sent = plainly(method).of_phase("train", "evaluate")
    assert len(sent) == 4 * ROUNDS
    for each in sent:
        masks = masks_in(each, wide())
        values_in(each, masks)  # as many values as the mask keeps, or it fails
        kept = sum(int(keep.sum()) for keep in masks.values())
        dense = each.config["server-round"] <= dense_rounds(method)
        assert kept == (ALL if dense else FIFTH)


@pytest.mark.parametrize("method", BASELINES)
def test_pruned_weights_are_zero_at_clients_and_in_the_returned_model(method):
    found = plainly(method)
    masks = found.masks()
    trained = [c for c in found.calls if c["config"]["autoflip.phase"] == "train"]
    assert len(trained) == 2 * ROUNDS
    for call in trained:
        for name, keep in masks[call["config"]["server-round"]].items():
            assert not call["arrays"][name][~keep].any()
            assert name.endswith("bias") or call["arrays"][name][keep].any()
    for server_round, keeps in masks.items():
        for name, keep in keeps.items():
            assert not found.seen[server_round][name][~keep].any()


@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_learns(method):
    """Both from the start and once it is pruned."""
    x, y = (torch.cat(part) for part in zip(*map(samples, range(5)), strict=True))

    def loss(arrays):
        model = wide()
        model.load_state_dict({n: torch.from_numpy(v) for n, v in arrays.items()})
        with torch.no_grad():
            return loss_of(model.eval(), x, y).item()

    losses = [loss(arrays) for arrays in plainly(method).seen]
    assert losses[-1] < 0.75 * losses[0]
    assert losses[-1] < losses[dense_rounds(method) + 1]


@pytest.mark.parametrize("method", ["random", *OF_WEIGHTS])
def test_baselines_that_judge_weights_ask_nobody(method):
    assert not plainly(method).of_phase("explore")


@pytest.mark.parametrize("method", ["random", "ssfl", "magnitude", "l1", "bn"])
def test_baselines_that_choose_once_keep_their_mask(method):
    masks = plainly(method).masks()
    first = masks[dense_rounds(method) + 1]
    for server_round in range(dense_rounds(method) + 1, ROUNDS + 1):
        for name, keep in first.items():
            assert_array_equal(masks[server_round][name], keep)


@pytest.mark.parametrize(
    "method", ["prunefl", "feddst", "fedrts", "fedtiny", "eflprune"]
)
def test_baselines_that_adjust_change_their_mask_when_they_are_due(method):
    masks = plainly(method).masks()
    changes = [
        later
        for earlier, later in itertools.pairwise(masks)
        if any((masks[earlier][n] != k).any() for n, k in masks[later].items())
    ]
    due = {"prunefl": [4, 7], "feddst": [4], "fedrts": [4], "fedtiny": [4]}
    if method in due:
        assert changes == due[method]
    else:
        assert changes[0] == 3
        assert set(changes) <= {3, 4, 5, 6, 7}


def asked_by_round(found):
    asked: dict[int, list[int]] = {}
    for sent in found.of_phase("explore"):
        asked.setdefault(sent.config["server-round"], []).append(sent.node_id)
    return asked


def sampled_in(found, server_round):
    return [
        sent.node_id
        for sent in found.of_phase("train")
        if sent.config["server-round"] == server_round
    ]


def test_ssfl_asks_all_nodes_once():
    found = plainly("ssfl")
    assert asked_by_round(found) == {1: NODES}
    assert {s.config["autoflip.measure"] for s in found.of_phase("explore")} == {
        "saliency"
    }


def test_prunefl_asks_one_node_and_then_the_sampled():
    found = plainly("prunefl")
    expected = {1: NODES[:1], 4: sampled_in(found, 4), 7: sampled_in(found, 7)}
    assert asked_by_round(found) == expected
    assert all(len(nodes) == 2 for nodes in list(expected.values())[1:])


@pytest.mark.parametrize("method", ["feddst", "fedrts"])
def test_they_ask_the_sampled_and_nobody_after_their_last_round(method):
    found = plainly(method)
    assert asked_by_round(found) == {4: sampled_in(found, 4)}


def test_fedtiny_asks_all_nodes_and_then_the_sampled():
    found = plainly("fedtiny")
    assert asked_by_round(found) == {1: NODES, 4: sampled_in(found, 4)}
    asked = found.of_phase("explore")
    measures = [sent.config["autoflip.measure"] for sent in asked]
    assert measures == ["saliency"] * 5 + ["gradient"] * 2


@pytest.mark.parametrize("method", ["prunefl", "feddst", "fedrts", "fedtiny"])
def test_an_adjustment_is_asked_with_the_kept_values_alone(method):
    found = plainly(method)
    dense = sum(v.nbytes for v in wide().state_dict().values() for v in [v.numpy()])
    asked = [s for s in found.of_phase("explore") if s.config["server-round"] > 1]
    assert asked
    for sent in asked:
        before = sent.config["server-round"] - 1
        masks = masks_in(sent, wide())
        values = values_in(sent, masks)
        for name, keep in masks.items():
            assert_array_equal(keep, found.masks()[before][name])
            assert_array_equal(values[name], found.seen[before][name])
        assert wire.count_bytes(RecordDict({"a": sent.arrays})) < dense


def test_the_first_measurement_is_from_the_whole_initial_model():
    for method in ("ssfl", "prunefl", "fedtiny"):
        sent = plainly(method).of_phase("explore")[0]
        assert "autoflip.mask" not in sent.config
        for name, value in state_of(wide()).items():
            assert_array_equal(arrays_of(sent.arrays)[name], value)


def test_what_nodes_measure_is_their_own_losses_gradient():
    """Up to a byte's precision, for the app's own batches in the app's own order."""
    initial = state_of(wide())
    names = [name for name, _ in wide().named_parameters()]
    shapes = {name: initial[name].shape for name in names}
    replies = [sent for sent in plainly("ssfl").grid.up if sent.phase == "explore"]
    assert [sent.node_id for sent in replies] == NODES
    for partition_id, sent in enumerate(replies):
        x, y = samples(partition_id)
        seed = call_seed({"server-round": 1}, partition_id)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        model, total = wide().train(), []
        zeros = [torch.zeros_like(p) for p in model.parameters()]
        for chosen in torch.split(order, 8):
            parts = torch.autograd.grad(
                loss_of(model, x[chosen], y[chosen]), list(model.parameters())
            )
            total = [a + b for a, b in zip(total or zeros, parts, strict=True)]
        frame = sent.arrays["autoflip.guidance"].data
        received = codec.dequantize(frame, shapes).dense()
        for name, gradient in zip(names, total, strict=True):
            steps = math.ceil(len(y) / 8)
            exact = np.abs(gradient.numpy().astype(float) / steps * initial[name])
            assert_allclose(
                received[name], exact, rtol=0.06, atol=max(exact.max() * 1e-6, 1e-12)
            )


def brought_back(found):
    """Yield for each round what its mask takes back: values sent, values last known."""
    last = state_of(wide())
    before = None
    for server_round, masks in found.masks().items():
        sent = next(
            s
            for s in found.of_phase("train")
            if s.config["server-round"] == server_round
        )
        values = values_in(sent, masks)
        for name, keep in masks.items():
            if before is not None:
                back = keep & ~before[name]
                yield values[name][back], last[name][back]
            last[name] = np.where(keep, found.seen[server_round][name], last[name])
        before = masks


def test_a_weight_that_prunefl_takes_back_has_the_value_it_had():
    pairs = list(brought_back(plainly("prunefl")))
    for sent, known in pairs:
        assert_array_equal(sent, known)
    assert sum(np.count_nonzero(sent) for sent, _ in pairs) > 10


@pytest.mark.parametrize(
    ("method", "least"),
    [("feddst", 11), ("fedrts", 11), ("fedtiny", 5)],  # the last in one block alone
)
def test_a_weight_that_an_exchange_grows_starts_from_zero(method, least):
    pairs = list(brought_back(plainly(method)))
    for sent, known in pairs:
        assert not sent.any()
        assert len(known) == 0 or known.any()
    assert sum(len(sent) for sent, _ in pairs) >= least


def test_fedrts_hears_the_clients_of_a_round():
    found = ran("fedrts", rounds=2, fraction=0.4)
    pruner = found.strategy.rounds.pruner
    split = 0
    for name, keep in found.masks()[1].items():
        alpha, beta = pruner._alpha[name], pruner._beta[name]
        # 1 + 1, and ten of the round where a weight was kept
        assert_allclose(alpha + beta, np.where(keep, 12, 2), rtol=1e-6)
        split += np.count_nonzero((alpha[keep] > 1) & (alpha[keep] < 11))
    assert split, "two clients and the global model have the same largest weights"


@pytest.mark.parametrize("method", ["eflprune", "l1", "bn", "random"])
def test_who_reselects_restores_units_with_the_values_they_had(method):
    app = nudging_app(scale=0.3)  # what is pruned stays, what is kept wanders
    found = ran(method, app=app, baselines={"dense_rounds": 1, "reselect": True})
    pairs = list(brought_back(found))
    for sent, known in pairs:
        assert_array_equal(sent, known)
    assert sum(np.count_nonzero(sent) for sent, _ in pairs) > 10
    rows_of = [masks["0.weight"].any(axis=1) for masks in found.masks().values()]
    assert any((b & ~a).any() for a, b in itertools.pairwise(rows_of))


def test_the_seed_decides_the_random_mask():
    masks = [
        ran("random", app=nudging_app(), rounds=1, seed=seed).masks()[1]
        for seed in (1, 1, 2)
    ]
    same = [(masks[0]["3.weight"] == each["3.weight"]).all() for each in masks]
    assert same == [True, True, False]


def test_whole_units_go_where_the_criterion_is_of_units():
    found = units.trace(wide(), ONE)
    for method in OF_UNITS:
        masks = plainly(method).masks()[ROUNDS]
        used = found.used(masks)
        gone = found.pruned(used, masks)
        unit = 40 + 1 + 40  # at most
        assert ALL - FIFTH - unit < gone <= ALL - FIFTH, method


# --- nodes that fail ------------------------------------------------------------------


def raw_frame(data: bytes) -> ArrayRecord:
    array = Array(dtype="uint8", shape=(len(data),), stype="autoflip.raw", data=data)
    return ArrayRecord({"autoflip.guidance": array})


def with_metrics(**metrics):
    return lambda reply: reply.content.update({"metrics": MetricRecord(metrics)})


FAILURES = [
    pytest.param(lambda r: "lost", "no reply in time", id="lost"),
    pytest.param(lambda r: r.content.clear(), "ArrayRecord", id="empty"),
    pytest.param(
        lambda r: r.content.update({"arrays": raw_frame(b"123")}),
        "got 3 B",
        id="too short",
    ),
    pytest.param(
        lambda r: r.content.update({"arrays": raw_frame(b"\xff" * (8 * 7 + ALL))}),
        "expected levels 0 <= low <= high",
        id="garbage",
    ),
    pytest.param(
        with_metrics(**{"num-examples": 0}), "expected examples", id="no examples"
    ),
    pytest.param(
        with_metrics(**{"num-examples": math.nan}), "finite", id="nan examples"
    ),
]


def left_out(caplog):
    return [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]


@functools.cache
def without_13():
    """Return the mask of the other nodes: 13 is not even connected."""
    configs = {n: {"partition-id": i} for i, n in enumerate(NODES)}
    others = [node_id for node_id in NODES if node_id != 13]
    grid = LocalGrid(toy_app(wide, lr=0.3), others, node_configs=configs)
    run(baseline("ssfl"), grid, wide(), 1)
    return masks_in(next(s for s in grid.down if s.phase == "train"), wide())


@pytest.mark.parametrize(("change", "reason"), FAILURES)
def test_a_measuring_node_that_fails_is_named_and_left_out(change, reason, caplog):
    with caplog.at_level(logging.WARNING, logger="flwr"):
        found = ran("ssfl", rounds=1, tamper=only_in("explore", [13], change))
    (line,) = left_out(caplog)
    assert "node 13" in line
    assert reason in line
    assert found.grid.nodes("train").count(13) == 1, "it takes part all the same"
    # the others' measurements alone make the mask
    for name, keep in without_13().items():
        assert_array_equal(found.masks()[1][name], keep)


def test_a_node_whose_gradients_are_no_numbers_is_named_and_left_out(caplog):
    app = toy_app(wide)

    def poisoned(message, context):
        config = next(iter(message.content.config_records.values()))
        if context.node_id == 13 and config["autoflip.phase"] == "explore":
            key, record = next(iter(message.content.array_records.items()))
            state = {n: np.array(v) for n, v in arrays_of(record).items()}
            state["5.weight"][:] = 3e38  # the outputs overflow, the loss is NaN
            message.content[key] = wire.record_of(state)
        return app(message, context)

    with caplog.at_level(logging.WARNING, logger="flwr"):
        found = ran("ssfl", app=poisoned, rounds=1)
    (line,) = left_out(caplog)
    assert "node 13" in line
    assert sorted(found.grid.nodes("train")) == NODES


@pytest.mark.parametrize("method", ["ssfl", "prunefl"])
def test_if_nobody_measures_at_the_start_there_is_no_run(method):
    lost = only_in("explore", NODES, lambda reply: "lost")
    with pytest.raises(ExplorationError, match=r"'no reply in time': \[11"):
        ran(method, tamper=lost)


@pytest.mark.parametrize("method", ["prunefl", "feddst"])
@pytest.mark.parametrize("change", [FAILURES[0].values[0], FAILURES[2].values[0]])
def test_if_nobody_measures_at_an_adjustment_the_mask_stays(method, change, caplog):
    def tamper(message, reply):
        config = next(iter(message.content.config_records.values()))
        if config["server-round"] == 1:
            return reply
        return only_in("explore", NODES, change)(message, reply)

    with caplog.at_level(logging.WARNING, logger="flwr"):
        found = ran(method, tamper=tamper, rounds=5, fraction=0.4)
    (line,) = left_out(caplog)  # one for both that were asked before round 4
    assert re.search(r"nodes \[\d+, \d+\] are left out", line)
    masks = found.masks()
    assert len(masks) == 5
    for later in (2, 3, 4, 5):
        for name, keep in masks[1].items():
            assert_array_equal(masks[later][name], keep)


def test_an_adjustment_goes_by_those_who_measured(caplog):
    lost = only_in("explore", NODES[1:], lambda reply: "lost")
    with caplog.at_level(logging.WARNING, logger="flwr"):
        found = ran("feddst", tamper=lost, rounds=4)
    (line,) = left_out(caplog)  # one for all four
    assert all(str(node_id) in line for node_id in NODES[1:])
    masks = found.masks()
    assert any((masks[4][n] != keep).any() for n, keep in masks[3].items())


@pytest.mark.parametrize("method", ["ssfl", "prunefl"])
def test_an_app_without_an_optimizer_of_torch_is_told_what_is_missing(method):
    with pytest.raises(ExplorationError, match=r"torch\.optim optimizer.*order"):
        ran(method, app=nudging_app())


def test_feddst_keeps_its_first_mask_where_no_optimizer_shows_gradients(caplog):
    with caplog.at_level(logging.WARNING, logger="flwr"):
        found = ran("feddst", app=nudging_app(), rounds=4, fraction=0.4)
    (line,) = left_out(caplog)  # one for both
    assert "torch.optim optimizer" in line
    for name, keep in found.masks()[1].items():
        assert_array_equal(found.masks()[4][name], keep)


def test_a_baseline_of_units_needs_the_model():
    with pytest.raises(SettingsError, match=r"example_inputs"):
        baseline("l1", example_inputs=None)
    with pytest.raises(
        SettingsError, match=r"L1: pruning whole units needs .*model=Net"
    ):
        ran("l1", model=None, app=nudging_app())


def test_a_model_without_batch_norm_is_refused_by_bn():
    def make():
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    strategy = baseline("bn", model=make())
    with pytest.raises(SettingsError, match="no unit of this model has one"):
        run(strategy, LocalGrid(nudging_app(), NODES), make(), 1)


@pytest.mark.parametrize("method", sorted({*OF_UNITS} - {"bn"}))
def test_unit_baselines_refuse_excludes_that_leave_no_unit_free(method):
    with pytest.raises(MaskError, match="no unit of the model is free"):
        ran(method, rounds=1, exclude=["1.*", "5.*"])


@pytest.mark.parametrize("method", sorted(set(BASELINES) - set(OF_UNITS)))
def test_what_is_excluded_is_kept_whole(method):
    found = ran(method, rounds=1, exclude=["1.*", "5.*"], baselines={"dense_rounds": 0})
    sent = found.of_phase("train")[-1]
    assert {"1.weight", "1.bias", "5.weight", "5.bias"} <= set(sent.arrays)
    masks = found.strategy.rounds.plan.masks
    assert set(masks) == {"0.weight", "3.weight", "3.bias"}
    kept = sum(int(keep.sum()) for keep in masks.values())
    assert kept == 1880 - round(0.8 * 1880)


# --- edges ----------------------------------------------------------------------------


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(SettingsError, match=r"snip.*magnitude.*ssfl"):
        ran("snip", rounds=1)


@pytest.mark.parametrize("method", ["l1", "l2", "similarity", "eflprune"])
def test_a_missing_model_is_noticed_before_anybody_trains(method):
    grid = LocalGrid(nudging_app(), NODES)
    with pytest.raises(SettingsError):
        run(baseline(method, model=None), grid, wide(), ROUNDS)
    assert not grid.sent


def test_bn_with_its_scales_excluded_is_a_settings_error():
    with pytest.raises(SettingsError, match="BatchNorm"):
        ran("bn", rounds=3, exclude=["1.*"])


@pytest.mark.parametrize(
    ("method", "examples"),
    [("ssfl", 1e30), ("prunefl", 1e30), ("feddst", 1e30), ("prunefl", 1e-300)],
)
def test_an_absurd_number_of_examples_ends_no_run(method, examples):
    change = with_metrics(**{"num-examples": examples})
    found = ran(method, rounds=4, tamper=only_in("explore", [11], change))
    assert len(found.masks()) == 4


def test_a_step_with_a_closure_moves_nothing_and_shows_its_gradient():
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = torch.optim.SGD([weight], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = (weight * torch.tensor([3.0, 1.0])).sum()
        loss.backward()
        return loss

    with optimizers.gradients_of([(2,)]) as seen:
        optimizer.step(closure)
    assert_array_equal(weight.detach(), [1, 1])
    assert_array_equal(seen.mean(), [[3, 1]])


def test_feddst_grows_from_zero_whatever_the_pruning_does_with_pruned_weights():
    for sent, _ in brought_back(ran("feddst", rounds=4, pruned_weights="keep")):
        assert not sent.any()


def test_feddst_keeps_the_floor_of_every_layer():
    weights = {
        "a": np.ones((10, 10), np.float32),
        "b": np.ones((30, 30), np.float32),
    }
    masks = prepared(FedDST(), weights, pruning(0.8, floor=0.19)).masks([], weights, 1)
    assert masks["b"].sum() >= 171  # 0.19 of 900; by its dimensions alone it has 150


def test_prunefl_takes_a_model_whose_units_nobody_knows(caplog):
    def bilinear():
        return seeded(lambda: nn.Bilinear(6, 6, 3))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bilinear()

        def forward(self, x):
            return self.inner(x, x)

    strategy = AutoFLIP(**flat(method="prunefl", model=Twice(), example_inputs=ONE))
    assert "PruneFL: all weights count as equally slow" in caplog.text
    assert isinstance(strategy.pruner, PruneFL)
