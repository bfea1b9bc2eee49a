"""Baselines that ask for gradients, and the gradients that clients see."""

import copy
import math

import numpy as np
import pytest
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from hypothesis import example, given
from hypothesis import strategies as st
from inprocess import (
    LocalGrid,
    samples,
    seeded,
)
from numpy.testing import assert_allclose, assert_array_equal
from preparing import FOUR, PAIR, added, loss_of, prepared, pruning, rows
from torch import nn

from autoflip_flwr import AutoFlipMod
from autoflip_flwr.errors import ExplorationError, MaskError, SettingsError
from autoflip_flwr.method.structured import Units
from autoflip_flwr.pruners.dynamic import FedDST, FedRTS, FedTiny, layer_budgets
from autoflip_flwr.pruners.gradients import SSFL, PruneFL
from autoflip_flwr.settings import BaselineSettings, defaults
from autoflip_flwr.units import optimizers
from autoflip_flwr.wire import codec
from autoflip_flwr.wire import records as wire
from autoflip_flwr.wire.manifest import Manifest

NODES = [11, 12, 13, 14, 15]


# --- ssfl -----------------------------------------------------------------------------


def measure(pruner, weight=1.0, node_id=11, **values):
    """Hand over what a node measured."""
    whole = {n: values.get(n, np.zeros_like(v)) for n, v in PAIR.items()}
    added(pruner, node_id, codec.quantize(whole), weight, PAIR)


def test_ssfl_ranks_the_mean_by_examples_over_all_layers():
    pruner = prepared(SSFL(), PAIR, pruning(0.5))
    measure(pruner, 1, w=rows([8, 1, 2, 1]), v=rows([1, 1, 1, 1]))
    measure(pruner, 3, w=rows([1, 4, 4, 1]), v=rows([1, 1, 5, 1]))
    masks = pruner.masks([], PAIR, 1)
    # w: 11/4, 13/4, 14/4, 1; v: 1, 1, 16/4, 1; counted alike, w's 8 would be in
    assert_array_equal(masks["w"], [[0, 1, 1, 0]])
    assert_array_equal(masks["v"], [[0, 0, 1, 0]])
    assert masks["bias"].all()
    assert pruner.masks([11], FOUR, 9) is masks


def test_ssfl_asks_everyone_until_it_has_a_mask():
    pruner = prepared(SSFL(), PAIR, pruning(0.5))
    ask = pruner.asks(1, connected=[11, 12], sampled=[12])
    assert (list(ask.nodes), ask.measure, ask.current) == ([11, 12], "saliency", False)
    measure(pruner, w=rows([4, 3, 2, 1]), v=rows([4, 3, 2, 1]))
    pruner.check({12: "lost"})
    pruner.masks([12], PAIR, 1)
    assert pruner.asks(2, connected=[11, 12, 13], sampled=[13]) is None


@pytest.mark.parametrize("kind", [SSFL, PruneFL])
def test_without_any_measurement_at_the_start_the_reasons_are_named(kind):
    pruner = prepared(kind(), PAIR, pruning(0.5))
    with pytest.raises(ExplorationError, match=r"none of 2 nodes.*'no disk': \[11\]"):
        pruner.check({11: "no disk", 12: "lost"})


# --- prunefl --------------------------------------------------------------------------


def paired(uses):
    return Units(
        groups=(),
        parameters={},
        buffers={},
        shapes={n: v.shape for n, v in PAIR.items()},
        uses=uses,
    )


def test_prunefl_divides_the_squared_gradient_by_the_time_a_weight_costs():
    # w is used 60 times: t = 1 + 60 / 30 = 3; v is used first: t = 1
    g2 = {"w": rows([12, 6, 9, 3]), "v": rows([3.5, 2.5, 1, 1])}
    pruner = prepared(PruneFL(), PAIR, pruning(0.4), paired({"v": 90, "w": 60}))
    measure(pruner, **g2)
    masks = pruner.masks([], PAIR, 1)
    # four and the bias are kept; w: 4, 2, 3, 1; v: 3.5, 2.5, 1, 1
    assert_array_equal(masks["w"], [[1, 0, 1, 0]])
    assert_array_equal(masks["v"], [[1, 1, 0, 0]])
    assert masks["bias"].all()
    alike = prepared(PruneFL(), PAIR, pruning(0.4))
    measure(alike, **g2)
    masks = alike.masks([], PAIR, 1)
    assert_array_equal(masks["w"], [[1, 1, 1, 0]], "all cost the same")
    assert_array_equal(masks["v"], [[1, 0, 0, 0]])


def test_prunefl_lets_the_smallest_kept_weights_compete_with_those_pruned():
    initial = {"w": np.ones((2, 10), np.float32)}

    def add(*squared):
        added(pruner, 11, codec.quantize({"w": rows(*squared)}), 1.0, initial)

    pruner = prepared(PruneFL(every=1), initial, pruning(0.5))
    add([2] * 10, [1] * 10)
    masks = pruner.masks([], initial, 1)
    assert_array_equal(masks["w"], [[1] * 10, [0] * 10])
    # Of ten kept weights the three smallest (1, -2, 3) compete; the others stay though
    # they have no gradient. What the server holds of pruned ones does not matter.
    weights = {"w": rows([1, -2, 3, -4, 5, 6, 7, 8, 9, 10], [99] * 10)}
    add([16, 0.5, 48, 0, 0, 0, 0, 0, 0, 0], [64, 32, 1, 1, 1, 1, 1, 1, 1, 1])
    masks = pruner.masks([], weights, 2)
    # three places for 16, 0.5, 48 | 64, 32, 1, ...
    assert_array_equal(masks["w"][0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    assert_array_equal(masks["w"][1], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    assert pruner.masks([], weights, 3) is masks, "nobody has measured since"


def test_prunefl_keeps_a_scalar_parameter():
    initial = {"w": np.ones((2, 2), np.float32), "scale": np.ones((), np.float32)}
    pruner = prepared(PruneFL(every=1), initial, pruning(0.4))
    g2 = {"w": rows([4, 3], [2, 1]), "scale": np.float32(0)}
    for server_round in (1, 2):  # chosen, then adjusted
        added(pruner, 11, codec.quantize(g2), 1.0, initial)
        masks = pruner.masks([], initial, server_round)
        assert masks["scale"].shape == ()
        assert masks["scale"]
        assert_array_equal(masks["w"], [[1, 1], [0, 0]])


def test_prunefl_competes_in_every_layer_and_ranks_over_all():
    # the start keeps the first ten of both layers
    initial = {"a": np.ones((2, 10), np.float32), "b": np.ones((2, 10), np.float32)}
    half = {"a": rows([2] * 10, [1] * 10), "b": rows([2] * 10, [1] * 10)}
    pruner = prepared(PruneFL(), initial, pruning(0.5))
    added(pruner, 11, codec.quantize(half), 1.0, initial)
    pruner.masks([], initial, 1)
    sizes = rows(list(range(1, 11)), [0] * 10)
    weights = {"a": sizes, "b": 1000 * sizes}  # three go of b, too, large as they are
    g2 = {"a": rows([1] * 10, [8] * 10), "b": rows([1] * 10, [2] * 10)}
    added(pruner, 11, codec.quantize(g2), 1.0, initial)
    masks = pruner.masks([], weights, 2)
    # six places: all to the pruned of a, which have 8
    assert_array_equal(masks["a"][0], [0] * 3 + [1] * 7)
    assert masks["a"][1].sum() == 6
    assert_array_equal(masks["b"], [[0] * 3 + [1] * 7, [0] * 10])


def test_prunefl_asks_one_node_first_then_the_sampled_every_so_many_rounds():
    pruner = prepared(PruneFL(every=3), PAIR, pruning(0.5))
    ask = pruner.asks(1, connected=[11, 12, 13], sampled=[12, 13])
    assert (list(ask.nodes), ask.current) == ([11], False)
    assert ask.measure == "squared-gradient"
    measure(pruner, w=rows([4, 3, 2, 1]), v=rows([4, 3, 2, 1]))
    pruner.masks([12], PAIR, 1)
    asked = {
        server_round: pruner.asks(server_round, connected=[11, 12], sampled=[12])
        for server_round in range(2, 9)
    }
    assert [n for n, each in asked.items() if each] == [4, 7]
    assert (list(asked[4].nodes), asked[4].current) == ([12], True)


# --- feddst ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "kept", "expected"),
    [
        # in proportion to 4 + 6 and 2 + 3, once the bias is whole: 15 to divide
        ({"a": (4, 6), "b": (2, 3), "c": (3,)}, 18, {"a": 10, "b": 5, "c": 3}),
        # b would get 6 2/3 of 6: it is whole, and a takes the other 14
        ({"a": (4, 6), "b": (2, 3), "c": (3,)}, 23, {"a": 14, "b": 6, "c": 3}),
        # a kernel counts with all four dimensions: 18 to 12
        ({"a": (8, 4, 3, 3), "b": (10, 2)}, 10, {"a": 6, "b": 4}),
        ({"a": (4, 6), "b": (2, 3), "c": (3,)}, 33, {"a": 24, "b": 6, "c": 3}),
        # just enough for the bias and a weight a layer
        ({"a": (4, 6), "b": (2, 3), "c": (3,)}, 5, {"a": 1, "b": 1, "c": 3}),
        ({"c": (3,)}, 3, {"c": 3}),
    ],
)
def test_layers_share_by_the_sum_of_their_dimensions(shapes, kept, expected):
    assert layer_budgets(shapes, kept) == expected


LENGTHS = st.integers(1, 12)
SHAPES = st.lists(
    st.one_of(
        st.tuples(LENGTHS),
        st.tuples(LENGTHS, LENGTHS),
        st.tuples(LENGTHS, LENGTHS, st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=6,
).map(lambda shapes: {f"p{i}": shape for i, shape in enumerate(shapes)})


@given(shapes=SHAPES, share=st.floats(0, 1), more=st.integers(1, 50))
def test_a_larger_budget_takes_nothing_away_but_by_rounding(shapes, share, more):
    total = sum(math.prod(shape) for shape in shapes.values())
    least = sum(math.prod(s) if len(s) < 2 else 1 for s in shapes.values())
    kept = least + round(share * (total - least))
    before = layer_budgets(shapes, kept)
    after = layer_budgets(shapes, min(total, kept + more))
    assert all(after[name] >= before[name] - 1 for name in shapes)


def matrix(replaced=0.5, until=None, every=1):
    """A layer of 2 x 4 of which the larger half is kept, and a bias."""
    initial = {"w": rows([1, -8, 2, 7], [6, 3, -5, 4]), "bias": rows(0, 0)}
    pruner = prepared(
        FedDST(replaced=replaced, until=until, every=every), initial, pruning(4 / 10)
    )
    return pruner, initial


def test_feddst_starts_with_the_largest_weights_of_each_layer():
    pruner, initial = matrix()
    masks = pruner.masks([], initial, 1)
    assert_array_equal(masks["w"], [[0, 1, 0, 1], [1, 0, 1, 0]])
    assert_array_equal(masks["bias"], [1, 1])
    # in proportion to 10 and 5, of 15: from b 3, 4, 5, ... though a's are all larger
    weights = {"a": np.full((4, 6), 100.0), "b": np.arange(1, 7).reshape(2, 3)}
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    masks = prepared(FedDST(), weights, pruning(15 / 30)).masks([], weights, 1)
    assert masks["a"].sum() == 10
    assert_array_equal(masks["b"], [[0, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize("kind", [FedDST, FedRTS])
def test_an_exchange_starts_with_the_weights_of_the_first_round(kind):
    """A warm start has moved them away from the initial ones."""
    pruner = prepared(kind(), {"w": rows([1, 2], [3, 4])}, pruning(1 / 2))
    warm = {"w": rows([-9, 2], [3, 8])}
    assert_array_equal(pruner.masks([], warm, 1)["w"], [[1, 0], [0, 1]])
    assert_array_equal(pruner.masks([], {"w": rows([1, 7], [7, 1])}, 2)["w"], np.eye(2))


def test_feddst_drops_the_smallest_and_grows_where_the_gradient_is_largest():
    pruner, initial = matrix(replaced=0.5)
    pruner.masks([], initial, 1)
    now = {"w": rows([0, 0.5, 0, -9], [-0.25, 0, 3, 0]), "bias": rows(0, 0)}
    for weight, gradient in [
        (1.0, rows([1, 9, 8, 9], [3, 1, 9, 2])),
        (3.0, rows([4, 9, 1, 9], [3, 1, 9, 4])),
    ]:
        frame = codec.quantize({"w": gradient, "bias": rows(1, 1)})
        added(pruner, 11, frame, weight, initial)
    masks = pruner.masks([], now, 2)
    # of -9, 3, 0.5, -0.25 half go; the pruned have 13/4, 11/4 | 1, 14/4, and what has
    # just gone 9 and 3: the one with 9 comes back
    assert_array_equal(masks["w"], [[0, 1, 0, 1], [0, 0, 1, 1]])
    assert_array_equal(masks["bias"], [1, 1])
    assert pruner.masks([], now, 3) is masks, "nobody has measured since"


def test_feddst_that_replaces_all_goes_by_the_gradient_alone():
    initial = {"w": rows([1, 2, 3, 4, 5])}
    pruner = prepared(FedDST(replaced=1.0), initial, pruning(1 / 5))
    added(pruner, 11, codec.quantize({"w": rows([5, 4, 3, 1, 2])}), 1.0, initial)
    assert_array_equal(pruner.masks([], initial, 2)["w"], [[1, 1, 1, 0, 1]])


@pytest.mark.parametrize(
    ("until", "server_round", "replaced"),
    [
        (None, 2, 8),  # 0.8 of 10, in any round
        (None, 90, 8),
        (4, 2, 6),  # 0.4 (1 + cos(pi / 4)) = 0.683
        (4, 3, 4),  # 0.4 (1 + cos(pi / 2)) = 0.4
        (4, 4, 1),  # 0.4 (1 + cos(3 pi / 4)) = 0.117
        (4, 5, 0),
        (0, 2, 0),
    ],
)
def test_feddst_replaces_ever_less_as_a_cosine_falls(until, server_round, replaced):
    initial = {"w": np.arange(1, 21, dtype=np.float32).reshape(2, 10)}
    pruner = prepared(FedDST(replaced=0.8, until=until, every=1), initial, pruning(0.5))
    before = pruner.masks([], initial, 1)["w"]
    assert_array_equal(before, [[0] * 10, [1] * 10])
    ask = pruner.asks(server_round, connected=NODES, sampled=[12, 14])
    assert (ask is not None) == (replaced > 0)
    if ask is not None:
        assert (list(ask.nodes), ask.current) == ([12, 14], True)
        assert ask.measure == "gradient"
    added(pruner, 11, codec.quantize({"w": np.ones((2, 10))}), 1.0, initial)
    after = pruner.masks([], initial, server_round)["w"]
    assert int((before & ~after).sum()) == int((after & ~before).sum()) == replaced


def test_feddst_asks_nobody_before_the_first_round_and_then_at_every_adjustment():
    pruner, initial = matrix(until=8, every=3)
    assert pruner.asks(1, connected=NODES, sampled=NODES[:2]) is None
    pruner.masks([], initial, 1)
    asked = [
        server_round
        for server_round in range(2, 14)
        if pruner.asks(server_round, connected=NODES, sampled=NODES[:2])
    ]
    assert asked == [4, 7]
    pruner.check({})  # it has a mask whatever happens


@pytest.mark.parametrize("kind", [FedDST, FedRTS, FedTiny])
def test_an_exchange_needs_the_number_of_weights(kind):
    with pytest.raises(SettingsError, match=rf"{kind.__name__.lower()}.*got value"):
        prepared(kind(), PAIR, pruning(0.5, mode="value"))


# --- fedrts ---------------------------------------------------------------------------


def believing(**settings):
    """A layer of 2 x 4 of which the last four are kept, and a bias."""
    initial = {"w": rows([1, 2, 3, 4], [5, 6, 7, 8]), "bias": rows(0, 0)}
    settings = {"every": 1, "replaced": 0.5, **settings}
    return prepared(FedRTS(**settings), initial, pruning(4 / 10), seed=1), initial


def test_fedrts_believes_what_clients_and_the_global_model_say():
    pruner, initial = believing()
    first = pruner.masks([], initial, 1)
    assert_array_equal(first["w"], [[0] * 4, [1] * 4])
    # Half of four weights is the core: of one client 7 and 8, of the other, with three
    # times the examples, 5 and -9. Pruned weights do not count.
    pruner.observe({**initial, "w": rows([99] * 4, [5, 6, 7, 8])}, 1)
    pruner.observe({**initial, "w": rows([0] * 4, [5, -9, 0, 1])}, 3)
    pruner.learn(None, first)
    # the core of the global model: 7 and 8
    assert pruner.masks([], {**initial, "w": rows([0] * 4, [1, 6, 7, 8])}, 2) is first
    # x = 1/2 [global] + 1/2 (1/4 [one] + 3/4 [other]): 3/8, 3/8, 1/2 + 1/8, 1/2 + 1/8
    expected = [0.375, 0.375, 0.625, 0.625]
    assert_allclose(pruner._alpha["w"], [[1] * 4, [1 + 10 * x for x in expected]])
    assert_allclose(pruner._beta["w"], [[1] * 4, [11 - 10 * x for x in expected]])
    # of the pruned weights as many as may go get a vote: half of four, at each client
    pruner.asks(3, connected=NODES, sampled=NODES)
    for weight, gradient in [(1, [4, 3, 2, 1]), (1, [1, 2, 3, 4])]:
        grown = codec.quantize({"w": rows(gradient, [9] * 4), "bias": rows(1, 1)})
        added(pruner, 11, grown, weight, initial)
    before = pruner._alpha["w"].copy()
    drawn = pruner.masks([], initial, 3)
    # 1/4 + 1/2 * 1/2: one client of two named each; the kept ones have no outcome
    assert_allclose(pruner._alpha["w"][0], [1 + 10 * 0.5] * 4)
    assert_allclose(pruner._beta["w"][0], [1 + 10 * 0.5] * 4)
    assert_array_equal(pruner._alpha["w"][1], before[1])
    assert drawn["w"].sum() == 4
    assert drawn["bias"].all()


def test_fedrts_keeps_the_largest_draws_of_each_layer():
    pruner, initial = believing()
    kept = pruner.masks([], initial, 1)
    pruner._alpha["w"] = rows([1e6, 1, 1, 1], [1e6, 1, 1e6, 1e6])
    pruner._beta["w"] = rows([1, 1e6, 1e6, 1e6], [1, 1e6, 1, 1])
    pruner.asks(2, connected=NODES, sampled=NODES)
    grown = codec.quantize({"w": rows([9, 8, 1, 1], [9] * 4), "bias": rows(1, 1)})
    added(pruner, 11, grown, 1, initial)
    assert_array_equal(pruner.masks([], initial, 2)["w"], [[1, 0, 0, 0], [1, 0, 1, 1]])
    assert kept["w"].sum() == 4


def test_fedrts_draws_the_same_again_after_a_restart():
    def measured(pruner):
        pruner.asks(2, connected=NODES, sampled=NODES)
        frame = codec.quantize({"w": rows([4, 3, 2, 1], [0] * 4), "bias": rows(1, 1)})
        added(pruner, 11, frame, 1, initial)
        return pruner.masks([], initial, 2)["w"], pruner._alpha["w"]

    pruner, initial = believing()
    first = pruner.masks([], initial, 1)
    pruner.observe({**initial, "w": rows([0] * 4, [5, -9, 0, 1])}, 3)
    pruner.learn(None, first)
    resumed, _ = believing()
    resumed.restore(copy.deepcopy(pruner.state()))
    for one, other in zip(measured(pruner), measured(resumed), strict=True):
        assert_array_equal(one, other)


def test_fedrts_forgets_votes_of_a_round_that_changed_nothing():
    pruner, initial = believing()
    pruner.masks([], initial, 1)
    pruner.observe(initial, 1)
    pruner.masks([], initial, 2)  # round 1 was abandoned
    assert_array_equal(pruner._alpha["w"], np.ones((2, 4)))


# --- fedtiny --------------------------------------------------------------------------


def test_fedtiny_takes_the_candidate_that_loses_the_least_saliency():
    """All weight of the saliency is in one layer, so of it the most is kept."""
    initial = {n: np.arange(1, 101).reshape(10, 10) for n in ("a", "b")}
    initial = {n: value.astype(np.float32) for n, value in initial.items()}
    kept = {}
    for name in ("a", "b"):
        pruner = prepared(FedTiny(), initial, pruning(0.5), seed=3)
        ask = pruner.asks(1, connected=NODES, sampled=NODES[:2])
        assert (list(ask.nodes), ask.measure, ask.current) == (NODES, "saliency", False)
        saliency = {n: np.full((10, 10), float(n == name)) for n in initial}
        added(pruner, 11, codec.quantize(saliency), 1.0, initial)
        masks = pruner.masks([], initial, 1)
        assert sum(int(keep.sum()) for keep in masks.values()) == 100
        kept[name] = {n: int(keep.sum()) for n, keep in masks.items()}
        for n, keep in masks.items():  # the largest weights of the layer
            assert keep.reshape(-1)[-kept[name][n] :].all()
    # of 100, factors of 0.5 and 1.5 would give a layer 25 and the other 75
    assert kept["a"]["a"] > 55
    assert kept["b"]["b"] > 55
    assert max(kept["a"]["a"], kept["b"]["b"]) <= 75


def test_fedtiny_adjusts_one_block_at_a_time_the_last_one_first():
    initial = {f"l{i}": rows([1, 2, 3, 4]) for i in range(6)} | {"bias": rows(0, 0)}
    pruner = prepared(FedTiny(every=2, replaced=0.5), initial, pruning(12 / 26))
    assert pruner.asks(1, connected=NODES, sampled=NODES).measure == "saliency"
    added(pruner, 11, codec.quantize(initial), 1.0, initial)
    before = pruner.masks([], initial, 1)
    changed = []
    for server_round in range(2, 14):
        if pruner.asks(server_round, connected=NODES, sampled=NODES[:2]) is not None:
            gradients = {n: 5 - v for n, v in initial.items()}
            added(pruner, 11, codec.quantize(gradients), 1.0, initial)
        after = pruner.masks([], initial, server_round)
        changed.append([n for n in after if (after[n] != before[n]).any()])
        before = after
    # six layers in five blocks; the last block has two
    blocks = [["l4", "l5"], ["l3"], ["l2"], ["l1"], ["l0"]]
    assert changed[1::2] == [*blocks, blocks[0]]
    assert not any(changed[::2])


def test_fedtiny_grows_by_the_mean_of_what_clients_name():
    initial = {"w": rows([1, 2, 3, 4], [5, 6, 7, 8])}
    pruner = prepared(FedTiny(every=1, replaced=0.25), initial, pruning(4 / 8))
    added(pruner, 11, codec.quantize(initial), 1.0, initial)
    assert_array_equal(pruner.masks([], initial, 1)["w"], [[0] * 4, [1] * 4])
    ask = pruner.asks(2, connected=NODES, sampled=NODES[:2])
    assert (list(ask.nodes), ask.measure, ask.current) == (NODES[:2], "gradient", True)
    # each names one weight: 6 + 0 + 0, 0 + 5 + 4. All told, 5 + 5 + 4 would be first.
    for gradient in ([6, 0, 5, 0], [0, 5, 4, 0], [0, 4, 3, 0]):
        frame = codec.quantize({"w": rows(gradient, [9] * 4)})
        added(pruner, 11, frame, 1.0, initial)
    assert_array_equal(pruner.masks([], initial, 2)["w"], [[0, 1, 0, 0], [0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("kind", "share"), [(FedDST, 0.5), (FedRTS, 0.2), (FedTiny, 0.2)]
)
def test_the_share_is_the_authors_where_none_is_given(kind, share):
    assert kind().replaced == share
    assert kind(replaced=0.01).replaced == 0.01
    name = kind.__name__.lower()
    settings = defaults(f"strategy.name={name}").baselines
    assert settings.replaced == share


@pytest.mark.parametrize("until", [-1, 2.5])
def test_a_last_round_that_cannot_be_is_refused(until):
    with pytest.raises(SettingsError, match=r"until: expected a whole number"):
        BaselineSettings(until=until)


# --- the gradients that an optimizer shows --------------------------------------------

OPTIMIZERS = [
    pytest.param(
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), id="sgd"
    ),
    pytest.param(
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), id="nesterov"
    ),
    pytest.param(lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1), id="adam"),
    pytest.param(lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1), id="adamw"),
    pytest.param(
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, foreach=False),
        id="one by one",
    ),
]


def small_net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)))


def shapes_of(model):
    return [tuple(p.shape) for p in model.parameters()]


def batches():
    x, y = samples(0)
    return [(x[start : start + 8], y[start : start + 8]) for start in (0, 8, 16)]


def step_over(model, optimizer):
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_gradients_are_the_losses_own_and_nothing_moves(make):
    model = small_net()
    optimizer = make(model.parameters())
    step_over(model, optimizer)  # momentum and second moments are under way
    before = {n: v.clone() for n, v in model.state_dict().items()}
    steps = [
        {k: torch.as_tensor(v).clone() for k, v in state.items() if v is not None}
        for state in optimizer.state.values()
    ]
    with optimizers.gradients_of(shapes_of(model)) as seen:
        step_over(model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for old, new in zip(steps, optimizer.state.values(), strict=True):
        assert all(torch.equal(v, torch.as_tensor(new[k])) for k, v in old.items())
    assert seen.steps == 3
    parameters = list(model.parameters())
    each = [torch.autograd.grad(loss_of(model, x, y), parameters) for x, y in batches()]
    for i in range(len(parameters)):
        three = np.stack([gradients[i].numpy() for gradients in each]).astype(float)
        assert_allclose(seen.mean()[i], three.mean(axis=0), rtol=1e-5, atol=1e-8)
        square = (three**2).mean(axis=0)
        assert_allclose(seen.mean_square()[i], square, rtol=1e-5, atol=1e-12)
        assert seen.mean()[i].dtype == seen.mean_square()[i].dtype == np.float32
    step_over(model, optimizer)  # after the block it is as any
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_the_mean_of_squares_is_not_the_square_of_the_mean():
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = torch.optim.SGD([weight], 0.1)
    with optimizers.gradients_of([(2,)]) as seen:
        for slope in ([3.0, 1.0], [-1.0, 1.0]):
            optimizer.zero_grad()
            (weight * torch.tensor(slope)).sum().backward()
            optimizer.step()
    assert_array_equal(seen.mean(), [[1, 1]])
    assert_array_equal(seen.mean_square(), [[5, 1]])


def test_other_optimizers_are_left_alone_while_gradients_are_collected():
    model, other = small_net(), nn.Linear(2, 2)
    before = other.weight.detach().clone()
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    with optimizers.gradients_of(shapes_of(model)) as seen:
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert seen.steps == 0
    assert_allclose(other.weight.detach(), before - 0.1, rtol=1e-6)


def test_a_parameter_without_a_gradient_has_zeros():
    used, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([used, idle], 0.1)
    with optimizers.gradients_of([(2,), (3,)]) as seen:
        used.sum().backward()
        optimizer.step()
    assert_array_equal(seen.mean()[0], [1, 1])
    assert_array_equal(seen.mean()[1], [0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_other_types_are_summed_as_float32(dtype):
    weight = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = torch.optim.SGD([weight], 0.1)
    with optimizers.gradients_of([(2,)]) as seen:
        (weight * 3).sum().backward()
        optimizer.step()
    assert_array_equal(seen.mean(), [[3, 3]])
    assert_array_equal(seen.mean_square(), [[9, 9]])
    assert seen.mean()[0].dtype == np.float32


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_no_gradient(fused):
    """A fused optimizer gets scaled gradients, and is called for those to skip."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with optimizers.gradients_of([(2,)]) as seen:
        for slope in (3.0, np.inf, 5.0):
            scaler.scale((weight * slope).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert seen.steps == 2
    assert_array_equal(seen.mean(), [[4, 4]])
    assert_array_equal(seen.mean_square(), [[17, 17]])
    assert_array_equal(weight.detach(), [1, 1])


def test_sparse_gradients_count_where_they_are():
    table = nn.Embedding(3, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(list(table.parameters()), 0.1)
    with optimizers.gradients_of([(3, 2)]) as seen:
        table(torch.tensor([1, 1])).sum().backward()
        optimizer.step()
    assert_array_equal(seen.mean()[0], [[0, 0], [2, 2], [0, 0]])


# --- what a node answers --------------------------------------------------------------


def two_batches() -> ClientApp:
    """The loss is w . x; first x is (1, 3), then (3, -1)."""
    app = ClientApp(mods=[AutoFlipMod()])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = nn.Linear(2, 1)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.1)
        for x in ([1.0, 3.0], [3.0, -1.0]):
            optimizer.zero_grad()
            model(torch.tensor([x])).sum().backward()
            optimizer.step()
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": 2}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def measured_by(app, arrays, kind, masks=None):
    """Ask one node to measure, of packed weights if there is a mask."""
    manifest = Manifest.of(arrays)
    plan = wire.Plan(manifest, masks) if masks else None
    asked = wire.Exploration(manifest=manifest, plan=plan, measure=kind)
    config = ConfigRecord({"server-round": 1, **asked.entries()})
    content = RecordDict({"arrays": asked.pack(arrays), "config": config})
    grid = LocalGrid(app, [11])
    (reply,) = grid.send_and_receive([Message(content, 11, "train")])
    assert not reply.has_error(), reply.error
    frame = reply.content["arrays"]["autoflip.guidance"].data
    return codec.dequantize(frame, manifest.shapes).dense()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gradient", [[2, 1]]),  # (1 + 3) / 2, (3 - 1) / 2
        ("saliency", [[4, 3]]),  # times |2|, |-3|
        ("squared-gradient", [[5, 5]]),  # (1 + 9) / 2, (9 + 1) / 2
    ],
)
def test_a_node_measures_its_gradients_at_fixed_weights(kind, expected):
    arrays = {"weight": rows([2, -3]), "bias": rows(-7)}
    found = measured_by(two_batches(), arrays, kind)
    assert_allclose(found["weight"], expected, rtol=1e-6)
    assert_allclose(found["bias"], 7 if kind == "saliency" else 1, rtol=1e-6)


def test_of_pruned_weights_too_the_gradient_is_measured():
    arrays = {"weight": rows([2, -3]), "bias": rows(-7)}
    masks = {"weight": np.array([[True, False]]), "bias": np.array([True])}
    found = measured_by(two_batches(), arrays, "gradient", masks)
    assert_allclose(found["weight"], [[2, 1]], rtol=1e-6)
    found = measured_by(two_batches(), arrays, "saliency", masks)
    assert_allclose(found["weight"], [[4, 0]], rtol=1e-6)


@given(shapes=SHAPES, share=st.floats(0, 1))
@example(shapes={"a": (2, 3), "b": (1, 1), "c": (1, 2)}, share=5 / 9)
@example(shapes={"a": (100, 100), "b": (2, 2)}, share=2 / 10_004)
def test_budgets_add_up_and_fit(shapes, share):
    kept = round(share * sum(math.prod(shape) for shape in shapes.values()))
    least = sum(math.prod(s) if len(s) < 2 else 1 for s in shapes.values())
    if kept < least:
        with pytest.raises(MaskError, match=f"to keep {least} .* got {kept}"):
            layer_budgets(shapes, kept)
        return
    budgets = layer_budgets(shapes, kept)
    assert sum(budgets.values()) == kept
    for name, shape in shapes.items():
        assert 1 <= budgets[name] <= math.prod(shape)
        if len(shape) == 1:
            assert budgets[name] == shape[0]
