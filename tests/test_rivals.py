"""The rivals of AutoFLIP: criteria by hand, gradients as clients see them, rounds."""

import functools
import itertools
import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from hypothesis import example, given
from hypothesis import strategies as st
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
from torch import nn
from torch.nn import functional

from autoflip_flwr import AutoFLIP, AutoFlipMod, codec, training, units, wire
from autoflip_flwr.errors import ExplorationError, MaskError, SettingsError
from autoflip_flwr.groups import Group, Units
from autoflip_flwr.manifest import Manifest
from autoflip_flwr.pruners.adjust import adjusted
from autoflip_flwr.pruners.gradients import (
    FedDstPruner,
    PruneFlPruner,
    SsflPruner,
    layer_budgets,
)
from autoflip_flwr.pruners.weights import (
    BatchNormPruner,
    EflPruner,
    L1Pruner,
    L2Pruner,
    MagnitudePruner,
    RandomPruner,
    SimilarityPruner,
)
from autoflip_flwr.settings import PruningSettings, RivalSettings

NODES = [11, 12, 13, 14, 15]
ONE = torch.zeros(1, 6)

UNIT_RIVALS = ["l1", "l2", "similarity", "bn", "eflprune"]
WEIGHTS_RIVALS = ["magnitude", *UNIT_RIVALS]
GRADIENT_RIVALS = ["ssfl", "prunefl", "feddst"]
RIVALS = ["random", *WEIGHTS_RIVALS, *GRADIENT_RIVALS]


def rows(*values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def pruning(threshold: float, **settings: Any) -> PruningSettings:
    return PruningSettings(threshold=threshold, **settings)


# --- whole units by the server's weights ----------------------------------------------

#: A: 3, 3; B: 0, 5; C: 6, 6; D: 5, 5, and what goes out of each.
FOUR = {"w": rows([3, 3], [0, 5], [6, 6], [5, 5]), "out": rows([7, 8, 9, 2])}


def four() -> Units:
    """Four neurons with two weights in and one out, of 12 parameters."""
    own = np.arange(4)
    return Units(
        groups=(Group("w", 0, 4),),
        parameters={"w": {0: own}, "out": {1: own}},
        buffers={},
        shapes={"w": (4, 2), "out": (1, 4)},
    )


def judged(kind, weights, threshold, owners=None, **settings):
    """Return the mask of a rival that looks at the weights at once."""
    pruner = kind(
        weights,
        pruning(threshold, **settings),
        owners if owners is not None else four(),
        rivals=RivalSettings(dense_rounds=0),
    )
    return pruner.masks([], weights, 1)


def units_left(masks) -> str:
    """Name the neurons of `FOUR` that are whole; the others must be gone."""
    whole = masks["w"].all(axis=1) & masks["out"][0]
    gone = ~masks["w"].any(axis=1) & ~masks["out"][0]
    assert (whole | gone).all(), masks
    return "".join(np.array(list("ABCD"))[whole])


@pytest.mark.parametrize(
    ("kind", "one_gone", "two_gone"),
    [
        # sums: A 6, B 5, C 12, D 10
        (L1Pruner, "ACD", "CD"),
        (EflPruner, "ACD", "CD"),
        # squares: A 18, B 25, C 72, D 50
        (L2Pruner, "BCD", "CD"),
        # squared distances: AB 13, AC 18, AD 8, BC 37, BD 25, CD 2; sums of distances:
        # A 3.6 + 4.2 + 2.8 = 10.7, B 3.6 + 6.1 + 5 = 14.7,
        # C 4.2 + 6.1 + 1.4 = 11.7, D 2.8 + 5 + 1.4 = 9.2
        (SimilarityPruner, "ABC", "BC"),
    ],
)
def test_units_go_by_the_criterion(kind, one_gone, two_gone):
    assert units_left(judged(kind, FOUR, 3 / 12)) == one_gone
    assert units_left(judged(kind, FOUR, 6 / 12)) == two_gone


def test_signs_do_not_count():
    flipped = {"w": FOUR["w"] * rows([1], [1], [-1], [-1]), "out": -FOUR["out"]}
    assert units_left(judged(L1Pruner, flipped, 3 / 12)) == "ACD"
    assert units_left(judged(L2Pruner, flipped, 3 / 12)) == "BCD"


def test_what_goes_out_of_a_unit_is_no_part_of_its_filter():
    # by all that goes with them A would be the largest
    weights = {**FOUR, "out": rows([99, 8, 9, 7])}
    assert units_left(judged(L2Pruner, weights, 3 / 12)) == "BCD"


def test_single_weights_by_magnitude_fill_up_to_the_density():
    # of 12 parameters 5 go: neuron B with 3, then D's 2 on the way out, then one 3
    masks = judged(L1Pruner, FOUR, 5 / 12)
    assert_array_equal(masks["out"], [[1, 0, 1, 0]])
    assert_array_equal(masks["w"][1:], [[0, 0], [1, 1], [1, 1]])
    assert masks["w"][0].sum() == 1


@pytest.mark.parametrize("kind", [L1Pruner, L2Pruner])
def test_every_layer_loses_the_same_share_whatever_its_scale(kind):
    weights = {
        "first": rows([0.8], [0.7], [0.6], [0.5], [0.4], [0.3], [0.2], [0.1]),
        "second": rows([40] * 8, [30] * 8),
        "last": rows([50, 50]),
    }
    eight, two = np.arange(8), np.array([8, 9])
    owners = Units(
        groups=(Group("first", 0, 8), Group("second", 8, 2)),
        parameters={
            "first": {0: eight},
            "second": {0: two, 1: eight},
            "last": {1: two},
        },
        buffers={},
        shapes={name: value.shape for name, value in weights.items()},
    )
    # two of eight neurons, 1 + 2 parameters each, go before one of two
    masks = judged(kind, weights, 6 / 26, owners)
    assert_array_equal(masks["first"][:, 0], [1, 1, 1, 1, 1, 1, 0, 0])
    assert_array_equal(masks["second"], [[1, 1, 1, 1, 1, 1, 0, 0]] * 2)
    assert masks["last"].all()
    # that one has 6 more on its way in and 1 on its way out
    masks = judged(kind, weights, 13 / 26, owners)
    assert_array_equal(masks["first"][:, 0], [1, 1, 1, 1, 1, 1, 0, 0])
    assert_array_equal(masks["second"], [[1, 1, 1, 1, 1, 1, 0, 0], [0] * 8])
    assert_array_equal(masks["last"], [[1, 0]])


def test_units_stay_where_none_may_go_and_single_weights_go_alone():
    masks = judged(L1Pruner, FOUR, 3 / 12, min_units=4)
    # the smallest single ones: B's 0, D's 2 on the way out, one of A's two 3
    assert_array_equal(masks["out"], [[1, 1, 1, 0]])
    assert_array_equal(masks["w"][1:], [[0, 1], [1, 1], [1, 1]])
    assert masks["w"][0].sum() == 1


@pytest.mark.parametrize("kind", [L1Pruner, L2Pruner, SimilarityPruner])
def test_units_of_embeddings_are_judged_by_their_columns(kind):
    # three words, four features; the linear layer after them has no say
    weights = {
        "words": rows([0.1, 5, 4, 3], [0.1, 9, 4, 3], [0.1, 1, 4, 3]),
        "out": rows([99, 1, 1, 1]),
    }
    owner = np.arange(4)
    owners = Units(
        groups=(Group("words", 0, 4),),
        parameters={"words": {1: owner}, "out": {1: owner}},
        buffers={},
        shapes={name: value.shape for name, value in weights.items()},
        columns=frozenset({"words"}),
    )
    masks = judged(kind, weights, 4 / 16, owners)
    gone = np.flatnonzero(~masks["words"].any(axis=0))
    columns = weights["words"].T
    between = [sum(np.linalg.norm(a - b) for b in columns) for a in columns]
    least = {
        L1Pruner: np.abs(columns).sum(axis=1).argmin(),
        L2Pruner: np.linalg.norm(columns, axis=1).argmin(),
        SimilarityPruner: np.argmin(between),
    }[kind]
    assert_array_equal(gone, [least])


def test_a_group_that_no_prunable_weights_make_is_refused():
    owners = replace(four(), columns=frozenset({"w"}))
    with pytest.raises(MaskError, match="no prunable weights make the units of"):
        judged(L1Pruner, FOUR, 3 / 12, owners)


def normalized() -> tuple[dict[str, np.ndarray], Units]:
    """Four neurons with a BatchNorm (5 parameters each), two without (3 each)."""
    weights = {
        "fc.weight": rows([1, 1], [9, 9], [1, 1], [1, 1]),
        "bn.weight": rows(0.5, -0.1, 0.9, -2.0),
        "bn.bias": rows(5, 5, 5, 5),
        "mid.weight": rows([5, 5, 5, 5], [6, 6, 6, 6]),
        "out.weight": rows([7, 7]),
    }
    own, mid = np.arange(4), np.array([4, 5])
    owners = Units(
        groups=(Group("fc", 0, 4), Group("mid", 4, 2)),
        parameters={
            "fc.weight": {0: own},
            "bn.weight": {0: own},
            "bn.bias": {0: own},
            "mid.weight": {0: mid, 1: own},
            "out.weight": {1: mid},
        },
        buffers={"bn.running_mean": {0: own}, "bn.running_var": {0: own}},
        shapes={
            **{name: value.shape for name, value in weights.items()},
            "bn.running_mean": (4,),
            "bn.running_var": (4,),
        },
    )
    return weights, owners


def test_channels_go_by_the_absolute_scale_of_their_batch_norm():
    weights, owners = normalized()
    # a neuron is 2 + 1 + 1 + 2 = 6 of 26: first 0.1, then 0.5; never -2
    masks = judged(BatchNormPruner, weights, 6 / 26, owners)
    assert_array_equal(masks["bn.weight"], [1, 0, 1, 1])
    assert_array_equal(masks["fc.weight"], [[1, 1], [0, 0], [1, 1], [1, 1]])
    assert_array_equal(masks["mid.weight"], [[1, 0, 1, 1]] * 2)
    masks = judged(BatchNormPruner, weights, 12 / 26, owners)
    assert_array_equal(masks["bn.weight"], [0, 0, 1, 1])
    assert masks["out.weight"].all(), "a layer without BatchNorm is left whole"


def test_the_criterion_bn_needs_a_batch_norm():
    with pytest.raises(SettingsError, match=r"bn.*BatchNorm.*no unit.*another"):
        BatchNormPruner(FOUR, pruning(0.5), four())


@pytest.mark.parametrize("kind", [L1Pruner, L2Pruner, SimilarityPruner, EflPruner])
@given(
    seed=st.integers(0, 2**32 - 1),
    threshold=st.floats(0, 0.8),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_a_criterion_prunes_exactly_the_share_asked_for(kind, seed, threshold, scale):
    rng = np.random.default_rng(seed)
    weights = {
        n: (scale * rng.normal(size=v.shape)).astype(np.float32)
        for n, v in FOUR.items()
    }
    masks = judged(kind, weights, threshold)
    pruned = sum(int((~keep).sum()) for keep in masks.values())
    assert pruned == round(threshold * 12)


# --- single weights, and when weights are judged --------------------------------------

PAIR = {
    "w": rows([0.5, -3, 0.1, 2]),
    "v": rows([-0.2, 4, -1, 0.3]),
    "bias": rows(0, 0),
}


def test_magnitude_takes_the_smallest_over_all_layers_and_no_bias():
    # of 10 parameters 5 go; 4, -3 and 2 stay, and the bias though it is 0
    masks = judged(MagnitudePruner, PAIR, 0.5)
    assert_array_equal(masks["w"], [[0, 1, 0, 1]])
    assert_array_equal(masks["v"], [[0, 1, 0, 0]])
    assert masks["bias"].all()


def test_weights_are_judged_once_after_the_dense_rounds():
    pruner = MagnitudePruner(PAIR, pruning(0.5), rivals=RivalSettings(dense_rounds=2))
    other = {name: value[..., ::-1] for name, value in PAIR.items()}
    for server_round in (1, 2):
        masks = pruner.masks([11], PAIR, server_round)
        assert all(keep.all() for keep in masks.values())
    chosen = pruner.masks([11], other, 3)
    assert_array_equal(chosen["w"], [[1, 0, 1, 0]])
    assert_array_equal(chosen["v"], [[0, 0, 1, 0]])
    for server_round in (4, 5):
        assert pruner.masks([12], PAIR, server_round) is chosen


def test_eflprune_judges_before_every_release_and_takes_units_back():
    pruner = EflPruner(
        FOUR, pruning(3 / 12), four(), rivals=RivalSettings(dense_rounds=1)
    )
    assert pruner.restores
    assert units_left(pruner.masks([], FOUR, 1)) == "ABCD"
    assert units_left(pruner.masks([], FOUR, 2)) == "ACD"
    later = {**FOUR, "w": FOUR["w"].copy()}
    later["w"][0] = 1, 1  # A has shrunk to 2, below the 5 that B still has
    assert units_left(pruner.masks([], later, 3)) == "BCD"


def test_only_rivals_that_bring_values_back_have_the_server_remember_them():
    kinds = (MagnitudePruner, L1Pruner, L2Pruner, SimilarityPruner, SsflPruner)
    assert not any(kind.restores for kind in (*kinds, FedDstPruner, RandomPruner))
    assert PruneFlPruner.restores


def test_the_random_mask_is_the_same_in_every_round_and_the_seed_decides():
    def of(seed):
        return RandomPruner(FOUR, pruning(0.5), seed=seed)

    pruner = of(3)
    first = pruner.masks([11], FOUR, 1)
    again = pruner.masks([12, 13], {n: v * 2 for n, v in FOUR.items()}, 7)
    for name, keep in first.items():
        assert_array_equal(again[name], keep)
        assert_array_equal(of(3).masks([], FOUR, 1)[name], keep)
    others = [of(seed).masks([], FOUR, 1) for seed in range(10)]
    assert len({np.packbits(each["w"]).tobytes() for each in others}) > 1


@given(seed=st.integers(0, 2**32 - 1), threshold=st.floats(0, 0.8))
def test_a_random_mask_prunes_exactly_its_share(seed, threshold):
    masks = RandomPruner(FOUR, pruning(threshold), seed=seed).masks([], FOUR, 1)
    pruned = sum(int((~keep).sum()) for keep in masks.values())
    assert pruned == round(threshold * 12)


@pytest.mark.parametrize("entry", ["w", "out"])
def test_a_random_mask_favours_no_entry(entry):
    kept = sum(
        RandomPruner(FOUR, pruning(0.5), seed=seed).masks([], FOUR, 1)[entry]
        for seed in range(400)
    )
    # of 400 draws with a half each: 200, give or take four deviations of 10
    assert kept.min() >= 160
    assert kept.max() <= 240


# --- ssfl -----------------------------------------------------------------------------


def measure(pruner, weight=1.0, node_id=11, **values):
    """Hand over what a node measured."""
    whole = {n: values.get(n, np.zeros_like(v)) for n, v in PAIR.items()}
    pruner.add(node_id, codec.quantize(whole), weight, PAIR)


def test_ssfl_ranks_the_mean_by_examples_over_all_layers():
    pruner = SsflPruner(PAIR, pruning(0.5))
    measure(pruner, 1, w=rows([8, 1, 2, 1]), v=rows([1, 1, 1, 1]))
    measure(pruner, 3, w=rows([1, 4, 4, 1]), v=rows([1, 1, 5, 1]))
    masks = pruner.masks([], PAIR, 1)
    # w: 11/4, 13/4, 14/4, 1; v: 1, 1, 16/4, 1; counted alike, w's 8 would be in
    assert_array_equal(masks["w"], [[0, 1, 1, 0]])
    assert_array_equal(masks["v"], [[0, 0, 1, 0]])
    assert masks["bias"].all()
    assert pruner.masks([11], FOUR, 9) is masks


def test_ssfl_asks_everyone_until_it_has_a_mask():
    pruner = SsflPruner(PAIR, pruning(0.5))
    ask = pruner.asks(1, connected=[11, 12], sampled=[12])
    assert (list(ask.nodes), ask.measure, ask.current) == ([11, 12], "saliency", False)
    measure(pruner, w=rows([4, 3, 2, 1]), v=rows([4, 3, 2, 1]))
    pruner.check({12: "lost"})
    pruner.masks([12], PAIR, 1)
    assert pruner.asks(2, connected=[11, 12, 13], sampled=[13]) is None


@pytest.mark.parametrize("kind", [SsflPruner, PruneFlPruner])
def test_without_any_measurement_at_the_start_the_reasons_are_named(kind):
    pruner = kind(PAIR, pruning(0.5))
    with pytest.raises(ExplorationError, match=r"none of 2 nodes.*11: 'no disk'"):
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
    pruner = PruneFlPruner(PAIR, pruning(0.4), paired({"v": 90, "w": 60}))
    measure(pruner, **g2)
    masks = pruner.masks([], PAIR, 1)
    # four and the bias are kept; w: 4, 2, 3, 1; v: 3.5, 2.5, 1, 1
    assert_array_equal(masks["w"], [[1, 0, 1, 0]])
    assert_array_equal(masks["v"], [[1, 1, 0, 0]])
    assert masks["bias"].all()
    alike = PruneFlPruner(PAIR, pruning(0.4))
    measure(alike, **g2)
    masks = alike.masks([], PAIR, 1)
    assert_array_equal(masks["w"], [[1, 1, 1, 0]], "all cost the same")
    assert_array_equal(masks["v"], [[1, 0, 0, 0]])


def test_prunefl_lets_the_smallest_kept_weights_compete_with_those_pruned():
    initial = {"w": np.ones((2, 10), np.float32)}

    def add(*squared):
        pruner.add(11, codec.quantize({"w": rows(*squared)}), 1.0, initial)

    pruner = PruneFlPruner(initial, pruning(0.5), rivals=RivalSettings(every=1))
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


def test_prunefl_competes_in_every_layer_and_ranks_over_all():
    # the start keeps the first ten of both layers
    initial = {"a": np.ones((2, 10), np.float32), "b": np.ones((2, 10), np.float32)}
    half = {"a": rows([2] * 10, [1] * 10), "b": rows([2] * 10, [1] * 10)}
    pruner = PruneFlPruner(initial, pruning(0.5))
    pruner.add(11, codec.quantize(half), 1.0, initial)
    pruner.masks([], initial, 1)
    sizes = rows(list(range(1, 11)), [0] * 10)
    weights = {"a": sizes, "b": 1000 * sizes}  # three go of b, too, large as they are
    g2 = {"a": rows([1] * 10, [8] * 10), "b": rows([1] * 10, [2] * 10)}
    pruner.add(11, codec.quantize(g2), 1.0, initial)
    masks = pruner.masks([], weights, 2)
    # six places: all to the pruned of a, which have 8
    assert_array_equal(masks["a"][0], [0] * 3 + [1] * 7)
    assert masks["a"][1].sum() == 6
    assert_array_equal(masks["b"], [[0] * 3 + [1] * 7, [0] * 10])


def test_prunefl_asks_one_node_first_then_the_sampled_every_so_many_rounds():
    pruner = PruneFlPruner(PAIR, pruning(0.5), rivals=RivalSettings(every=3))
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
    pruner = FedDstPruner(
        initial,
        pruning(4 / 10),
        rivals=RivalSettings(replaced=replaced, until=until, every=every),
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
    masks = FedDstPruner(weights, pruning(15 / 30)).masks([], weights, 1)
    assert masks["a"].sum() == 10
    assert_array_equal(masks["b"], [[0, 1, 1], [1, 1, 1]])


def test_feddst_drops_the_smallest_and_grows_where_the_gradient_is_largest():
    pruner, initial = matrix(replaced=0.5)
    pruner.masks([], initial, 1)
    now = {"w": rows([0, 0.5, 0, -9], [-0.25, 0, 3, 0]), "bias": rows(0, 0)}
    for weight, gradient in [
        (1.0, rows([1, 9, 8, 9], [3, 1, 9, 2])),
        (3.0, rows([4, 9, 1, 9], [3, 1, 9, 4])),
    ]:
        frame = codec.quantize({"w": gradient, "bias": rows(1, 1)})
        pruner.add(11, frame, weight, initial)
    masks = pruner.masks([], now, 2)
    # of -9, 3, 0.5, -0.25 half go; the pruned have 13/4, 11/4 | 1, 14/4, and what has
    # just gone 9 and 3: the one with 9 comes back
    assert_array_equal(masks["w"], [[0, 1, 0, 1], [0, 0, 1, 1]])
    assert_array_equal(masks["bias"], [1, 1])
    assert pruner.masks([], now, 3) is masks, "nobody has measured since"


def test_feddst_that_replaces_all_goes_by_the_gradient_alone():
    initial = {"w": rows([1, 2, 3, 4, 5])}
    pruner = FedDstPruner(initial, pruning(1 / 5), rivals=RivalSettings(replaced=1))
    pruner.add(11, codec.quantize({"w": rows([5, 4, 3, 1, 2])}), 1.0, initial)
    assert_array_equal(pruner.masks([], initial, 2)["w"], [[1, 1, 1, 0, 1]])


def test_an_exchange_grows_no_more_than_there_is():
    keep = np.array([False, True, True, True, True])
    size, gradient = np.arange(1, 6, dtype=np.float32), np.ones(5, np.float32)
    # all four kept ones were to be replaced, but one was pruned: it takes 2's place
    assert_array_equal(adjusted(keep, size, gradient, 1.0), [1, 0, 1, 1, 1])
    # nothing may grow: nothing goes
    found = adjusted(keep, size, gradient, 1.0, free=np.zeros(5, np.bool_))
    assert_array_equal(found, keep)


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
    pruner = FedDstPruner(
        initial,
        pruning(0.5),
        rivals=RivalSettings(replaced=0.8, until=until, every=1),
    )
    before = pruner.masks([], initial, 1)["w"]
    assert_array_equal(before, [[0] * 10, [1] * 10])
    ask = pruner.asks(server_round, connected=NODES, sampled=[12, 14])
    assert (ask is not None) == (replaced > 0)
    if ask is not None:
        assert (list(ask.nodes), ask.current) == ([12, 14], True)
        assert ask.measure == "gradient"
    pruner.add(11, codec.quantize({"w": np.ones((2, 10))}), 1.0, initial)
    after = pruner.masks([], initial, server_round)["w"]
    assert int((before & ~after).sum()) == int((after & ~before).sum()) == replaced


def test_feddst_asks_nobody_before_the_first_round_and_then_at_every_adjustment():
    pruner, _ = matrix(until=8, every=3)
    asked = [
        server_round
        for server_round in range(1, 14)
        if pruner.asks(server_round, connected=NODES, sampled=NODES[:2])
    ]
    assert asked == [4, 7]
    pruner.check({})  # it has a mask whatever happens


def test_feddst_needs_the_number_of_weights():
    with pytest.raises(SettingsError, match=r"feddst.*got value"):
        FedDstPruner(PAIR, pruning(0.5, mode="value"))


@pytest.mark.parametrize("until", [-1, 2.5])
def test_a_last_round_that_cannot_be_is_refused(until):
    with pytest.raises(SettingsError, match=r"rivals.until"):
        RivalSettings(until=until)


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


def loss_of(model, x, y):
    return functional.cross_entropy(model(x), y)


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
    with training.gradients_of(shapes_of(model)) as seen:
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
    with training.gradients_of([(2,)]) as seen:
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
    with training.gradients_of(shapes_of(model)) as seen:
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert seen.steps == 0
    assert_allclose(other.weight.detach(), before - 0.1, rtol=1e-6)


def test_a_parameter_without_a_gradient_has_zeros():
    used, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([used, idle], 0.1)
    with training.gradients_of([(2,), (3,)]) as seen:
        used.sum().backward()
        optimizer.step()
    assert_array_equal(seen.mean()[0], [1, 1])
    assert_array_equal(seen.mean()[1], [0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_other_types_are_summed_as_float32(dtype):
    weight = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = torch.optim.SGD([weight], 0.1)
    with training.gradients_of([(2,)]) as seen:
        (weight * 3).sum().backward()
        optimizer.step()
    assert_array_equal(seen.mean(), [[3, 3]])
    assert_array_equal(seen.mean_square(), [[9, 9]])
    assert seen.mean()[0].dtype == np.float32


def test_sparse_gradients_count_where_they_are():
    table = nn.Embedding(3, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(list(table.parameters()), 0.1)
    with training.gradients_of([(3, 2)]) as seen:
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
    """A run of a rival, and all that crossed the wire."""

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


def rival(method, fraction=1.0, **settings):
    rivals = {"dense_rounds": 2, "every": EVERY, "until": 5}
    rivals |= settings.pop("rivals", {})
    chosen = {
        "method": method,
        "threshold": 0.8,
        "model": wide(),
        "example_inputs": ONE,
        "seed": 1,
        "rivals": RivalSettings(**rivals),
        **settings,
    }
    evaluates = fraction if fraction < 1 else 0.0
    inner = FedAvg(fraction_train=fraction, fraction_evaluate=evaluates)
    return AutoFLIP(inner, **chosen)


def ran(method, *, app=None, tamper=None, rounds=ROUNDS, **settings) -> Ran:
    calls: list[dict[str, Any]] = []
    grid = LocalGrid(app or toy_app(wide, calls=calls, lr=0.3), NODES, tamper=tamper)
    strategy = rival(method, **settings)
    seen, _ = run(strategy, grid, wide(), rounds)
    return Ran(strategy, grid, seen, calls)


@functools.cache
def plainly(method) -> Ran:
    """Two of five nodes train in each of seven rounds."""
    return ran(method, fraction=0.4)


def dense_rounds(method):
    return 2 if method in WEIGHTS_RIVALS else 0


@pytest.mark.parametrize("method", RIVALS)
def test_every_rival_sends_exactly_the_density_asked_for(method):
    sent = plainly(method).of_phase("train", "evaluate")
    assert len(sent) == 4 * ROUNDS
    for each in sent:
        masks = masks_in(each, wide())
        values_in(each, masks)  # as many values as the mask keeps, or it fails
        kept = sum(int(keep.sum()) for keep in masks.values())
        dense = each.config["server-round"] <= dense_rounds(method)
        assert kept == (ALL if dense else FIFTH)


@pytest.mark.parametrize("method", RIVALS)
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


@pytest.mark.parametrize("method", RIVALS)
def test_a_rival_learns(method):
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


@pytest.mark.parametrize("method", ["random", *WEIGHTS_RIVALS])
def test_rivals_that_judge_weights_ask_nobody(method):
    assert not plainly(method).of_phase("explore")


@pytest.mark.parametrize("method", ["random", "ssfl", "magnitude", "l1", "bn"])
def test_rivals_that_choose_once_keep_their_mask(method):
    masks = plainly(method).masks()
    first = masks[dense_rounds(method) + 1]
    for server_round in range(dense_rounds(method) + 1, ROUNDS + 1):
        for name, keep in first.items():
            assert_array_equal(masks[server_round][name], keep)


@pytest.mark.parametrize("method", ["prunefl", "feddst", "eflprune"])
def test_rivals_that_adjust_change_their_mask_when_they_are_due(method):
    masks = plainly(method).masks()
    changes = [
        later
        for earlier, later in itertools.pairwise(masks)
        if any((masks[earlier][n] != k).any() for n, k in masks[later].items())
    ]
    due = {"prunefl": [4, 7], "feddst": [4]}
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


def test_feddst_asks_the_sampled_and_nobody_after_its_last_round():
    found = plainly("feddst")
    assert asked_by_round(found) == {4: sampled_in(found, 4)}


@pytest.mark.parametrize("method", ["prunefl", "feddst"])
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
    for method in ("ssfl", "prunefl"):
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


def test_a_weight_that_feddst_grows_starts_from_zero():
    pairs = list(brought_back(plainly("feddst")))
    for sent, known in pairs:
        assert not sent.any()
        assert len(known) == 0 or known.any()
    assert sum(len(sent) for sent, _ in pairs) > 10


def test_eflprune_restores_units_with_the_values_they_had():
    app = nudging_app(scale=0.3)  # what is pruned stays, what is kept wanders
    found = ran("eflprune", app=app, rivals={"dense_rounds": 1})
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
    for method in UNIT_RIVALS:
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
    run(rival("ssfl"), grid, wide(), 1)
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
    with pytest.raises(ExplorationError, match=r"11: 'no reply in time'"):
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
    assert len(left_out(caplog)) == 2, "both that were asked before round 4 are named"
    masks = found.masks()
    assert len(masks) == 5
    for later in (2, 3, 4, 5):
        for name, keep in masks[1].items():
            assert_array_equal(masks[later][name], keep)


def test_an_adjustment_goes_by_those_who_measured(caplog):
    lost = only_in("explore", NODES[1:], lambda reply: "lost")
    with caplog.at_level(logging.WARNING, logger="flwr"):
        found = ran("feddst", tamper=lost, rounds=4)
    assert len(left_out(caplog)) == 4
    masks = found.masks()
    assert any((masks[4][n] != keep).any() for n, keep in masks[3].items())


@pytest.mark.parametrize("method", ["ssfl", "prunefl"])
def test_an_app_without_an_optimizer_of_torch_is_told_what_is_missing(method):
    with pytest.raises(ExplorationError, match=r"optimizer of torch\.optim.*order"):
        ran(method, app=nudging_app())


def test_feddst_keeps_its_first_mask_where_no_optimizer_shows_gradients(caplog):
    with caplog.at_level(logging.WARNING, logger="flwr"):
        found = ran("feddst", app=nudging_app(), rounds=4, fraction=0.4)
    lines = left_out(caplog)
    assert len(lines) == 2
    assert all("optimizer of torch.optim" in line for line in lines)
    for name, keep in found.masks()[1].items():
        assert_array_equal(found.masks()[4][name], keep)


def test_a_rival_of_units_needs_the_model():
    with pytest.raises(SettingsError, match=r"example_inputs"):
        rival("l1", example_inputs=None)
    with pytest.raises(SettingsError, match=r"l1 looks at .*model=Net"):
        ran("l1", model=None, app=nudging_app())


def test_a_model_without_batch_norm_is_refused_by_bn():
    def make():
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    strategy = rival("bn", model=make())
    with pytest.raises(SettingsError, match="no unit of this model has one"):
        run(strategy, LocalGrid(nudging_app(), NODES), make(), 1)


@pytest.mark.parametrize("method", sorted({*UNIT_RIVALS} - {"bn"}))
def test_unit_rivals_refuse_excludes_that_leave_no_unit_free(method):
    with pytest.raises(MaskError, match="no unit of the model is free"):
        ran(method, rounds=1, exclude=["1.*", "5.*"])


@pytest.mark.parametrize("method", sorted(set(RIVALS) - set(UNIT_RIVALS)))
def test_what_is_excluded_is_kept_whole(method):
    found = ran(method, rounds=1, exclude=["1.*", "5.*"], rivals={"dense_rounds": 0})
    sent = found.of_phase("train")[-1]
    assert {"1.weight", "1.bias", "5.weight", "5.bias"} <= set(sent.arrays)
    masks = found.strategy.rounds.plan.masks
    assert set(masks) == {"0.weight", "3.weight", "3.bias"}
    kept = sum(int(keep.sum()) for keep in masks.values())
    assert kept == 1880 - round(0.8 * 1880)


# --- edges ----------------------------------------------------------------------------


def test_all_units_that_may_go_do_go_where_rounding_takes_a_hair_away():
    # Of 26 parameters 22 go; three of four neurons are 15 of them.
    own = np.arange(4)
    weights = {
        "w": rows([1, 1], [1, 1], [10, 0], [6, 6]),
        "out": rows([1, 1, 9, 6], [1, 1, 9, 6], [1, 1, 9, 6]),
        "b": rows(9, 9, 9),
        "c": rows(9, 9, 9),
    }
    owners = Units(
        groups=(Group("w", 0, 4),),
        parameters={"w": {0: own}, "out": {1: own}},
        buffers={},
        shapes={name: value.shape for name, value in weights.items()},
    )
    assert int(15 / 22 * 22) == 14
    masks = judged(L1Pruner, weights, 22 / 26, owners)
    assert_array_equal(masks["w"][:3], [[0, 0]] * 3)
    assert_array_equal(masks["out"][:, :3], [[0] * 3] * 3)


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(SettingsError, match=r"snip.*magnitude.*ssfl"):
        ran("snip", rounds=1)


@pytest.mark.parametrize("method", ["l1", "l2", "similarity", "eflprune"])
def test_a_missing_model_is_noticed_before_anybody_trains(method):
    grid = LocalGrid(nudging_app(), NODES)
    with pytest.raises(SettingsError):
        run(rival(method, model=None), grid, wide(), ROUNDS)
    assert not grid.sent


def test_bn_with_its_scales_excluded_is_a_settings_error():
    with pytest.raises(SettingsError, match="BatchNorm"):
        ran("bn", rounds=3, exclude=["1.*"])


@pytest.mark.parametrize(
    ("method", "examples"),
    [("ssfl", 1e300), ("prunefl", 1e300), ("feddst", 1e300), ("prunefl", 1e-300)],
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

    with training.gradients_of([(2,)]) as seen:
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
    masks = FedDstPruner(weights, pruning(0.8, floor=0.19)).masks([], weights, 1)
    assert masks["b"].sum() >= 171  # 0.19 of 900; by its dimensions alone it has 150


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


def test_prunefl_takes_a_model_whose_units_nobody_knows(caplog):
    def bilinear():
        return seeded(lambda: nn.Bilinear(6, 6, 3))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bilinear()

        def forward(self, x):
            return self.inner(x, x)

    strategy = AutoFLIP(method="prunefl", model=Twice(), example_inputs=ONE)
    assert "prunefl: all weights count as equally slow" in caplog.text
    assert strategy.method == "prunefl"
