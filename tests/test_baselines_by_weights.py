"""Baselines that judge the server's weights: criteria by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from preparing import FOUR, PAIR, four, prepared, pruning, rows

from autoflip_flwr.errors import MaskError, SettingsError
from autoflip_flwr.method.structured import Group, Units
from autoflip_flwr.pruners.dynamic import FedDST
from autoflip_flwr.pruners.gradients import SSFL, PruneFL
from autoflip_flwr.pruners.weights import (
    L1,
    L2,
    BatchNormScale,
    EFLPrune,
    Magnitude,
    Random,
    Similarity,
)

# --- whole units by the server's weights ----------------------------------------------


def judged(kind, weights, threshold, owners=None, **settings):
    """Return the mask of a baseline that looks at the weights at once."""
    pruner = prepared(
        kind(dense_rounds=0),
        weights,
        pruning(threshold, **settings),
        owners if owners is not None else four(),
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
        (L1, "ACD", "CD"),
        (EFLPrune, "ACD", "CD"),
        # squares: A 18, B 25, C 72, D 50
        (L2, "BCD", "CD"),
        # squared distances: AB 13, AC 18, AD 8, BC 37, BD 25, CD 2; sums of distances:
        # A 3.6 + 4.2 + 2.8 = 10.7, B 3.6 + 6.1 + 5 = 14.7,
        # C 4.2 + 6.1 + 1.4 = 11.7, D 2.8 + 5 + 1.4 = 9.2
        (Similarity, "ABC", "BC"),
    ],
)
def test_units_go_by_the_criterion(kind, one_gone, two_gone):
    assert units_left(judged(kind, FOUR, 3 / 12)) == one_gone
    assert units_left(judged(kind, FOUR, 6 / 12)) == two_gone


def test_signs_do_not_count():
    flipped = {"w": FOUR["w"] * rows([1], [1], [-1], [-1]), "out": -FOUR["out"]}
    assert units_left(judged(L1, flipped, 3 / 12)) == "ACD"
    assert units_left(judged(L2, flipped, 3 / 12)) == "BCD"


def test_what_goes_out_of_a_unit_is_no_part_of_its_filter():
    # by all that goes with them A would be the largest
    weights = {**FOUR, "out": rows([99, 8, 9, 7])}
    assert units_left(judged(L2, weights, 3 / 12)) == "BCD"


def test_single_weights_by_magnitude_fill_up_to_the_density():
    # of 12 parameters 5 go: neuron B with 3, then D's 2 on the way out, then one 3
    masks = judged(L1, FOUR, 5 / 12)
    assert_array_equal(masks["out"], [[1, 0, 1, 0]])
    assert_array_equal(masks["w"][1:], [[0, 0], [1, 1], [1, 1]])
    assert masks["w"][0].sum() == 1


@pytest.mark.parametrize("kind", [L1, L2])
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
    masks = judged(L1, FOUR, 3 / 12, min_units=4)
    # the smallest single ones: B's 0, D's 2 on the way out, one of A's two 3
    assert_array_equal(masks["out"], [[1, 1, 1, 0]])
    assert_array_equal(masks["w"][1:], [[0, 1], [1, 1], [1, 1]])
    assert masks["w"][0].sum() == 1


@pytest.mark.parametrize("kind", [L1, L2, Similarity])
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
        L1: np.abs(columns).sum(axis=1).argmin(),
        L2: np.linalg.norm(columns, axis=1).argmin(),
        Similarity: np.argmin(between),
    }[kind]
    assert_array_equal(gone, [least])


def test_a_group_that_no_prunable_weights_make_is_refused():
    owners = replace(four(), columns=frozenset({"w"}))
    with pytest.raises(MaskError, match="no prunable weights make the units of"):
        judged(L1, FOUR, 3 / 12, owners)


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
    masks = judged(BatchNormScale, weights, 6 / 26, owners)
    assert_array_equal(masks["bn.weight"], [1, 0, 1, 1])
    assert_array_equal(masks["fc.weight"], [[1, 1], [0, 0], [1, 1], [1, 1]])
    assert_array_equal(masks["mid.weight"], [[1, 0, 1, 1]] * 2)
    masks = judged(BatchNormScale, weights, 12 / 26, owners)
    assert_array_equal(masks["bn.weight"], [0, 0, 1, 1])
    assert masks["out.weight"].all(), "a layer without BatchNorm is left whole"


def test_the_criterion_bn_needs_a_batch_norm():
    with pytest.raises(SettingsError, match=r"bn.*BatchNorm.*no unit.*another"):
        prepared(BatchNormScale(), FOUR, pruning(0.5), four())


@pytest.mark.parametrize("kind", [L1, L2, Similarity, EFLPrune])
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


def test_magnitude_takes_the_smallest_over_all_layers_and_no_bias():
    # of 10 parameters 5 go; 4, -3 and 2 stay, and the bias though it is 0
    masks = judged(Magnitude, PAIR, 0.5)
    assert_array_equal(masks["w"], [[0, 1, 0, 1]])
    assert_array_equal(masks["v"], [[0, 1, 0, 0]])
    assert masks["bias"].all()


def test_weights_are_judged_once_after_the_dense_rounds():
    pruner = prepared(Magnitude(dense_rounds=2), PAIR, pruning(0.5))
    other = {name: value[..., ::-1] for name, value in PAIR.items()}
    for server_round in (1, 2):
        masks = pruner.masks([11], PAIR, server_round)
        assert all(keep.all() for keep in masks.values())
    chosen = pruner.masks([11], other, 3)
    assert_array_equal(chosen["w"], [[1, 0, 1, 0]])
    assert_array_equal(chosen["v"], [[0, 0, 1, 0]])
    for server_round in (4, 5):
        assert pruner.masks([12], PAIR, server_round) is chosen


@pytest.mark.parametrize(
    "pruner", [EFLPrune(dense_rounds=1), L1(dense_rounds=1, reselect=True)]
)
def test_who_reselects_judges_before_every_release_and_takes_units_back(pruner):
    prepared(pruner, FOUR, pruning(3 / 12), four())
    assert pruner.restores
    assert units_left(pruner.masks([], FOUR, 1)) == "ABCD"
    assert units_left(pruner.masks([], FOUR, 2)) == "ACD"
    later = {**FOUR, "w": FOUR["w"].copy()}
    later["w"][0] = 1, 1  # A has shrunk to 2, below the 5 that B still has
    assert units_left(pruner.masks([], later, 3)) == "BCD"


def test_only_baselines_that_bring_values_back_have_the_server_remember_them():
    once = (Magnitude, L1, L2, Similarity, BatchNormScale, Random, SSFL, FedDST)
    assert not any(kind().restores for kind in once)
    assert all(kind(reselect=True).restores for kind in once[:6])
    assert PruneFL().restores


def test_a_random_mask_that_is_drawn_anew_differs_in_every_round():
    pruner = prepared(Random(reselect=True), FOUR, pruning(0.5), seed=3)
    masks = [pruner.masks([], FOUR, server_round) for server_round in (1, 2, 3)]
    bits = [np.packbits([*m["w"].flat, *m["out"].flat]).tobytes() for m in masks]
    assert len(set(bits)) == 3
    fixed = prepared(Random(), FOUR, pruning(0.5), seed=3).masks([], FOUR, 1)
    assert_array_equal(fixed["w"], masks[0]["w"])


def test_the_random_mask_is_the_same_in_every_round_and_the_seed_decides():
    def of(seed):
        return prepared(Random(), FOUR, pruning(0.5), seed=seed)

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
    masks = prepared(Random(), FOUR, pruning(threshold), seed=seed).masks([], FOUR, 1)
    pruned = sum(int((~keep).sum()) for keep in masks.values())
    assert pruned == round(threshold * 12)


@pytest.mark.parametrize("entry", ["w", "out"])
def test_a_random_mask_favours_no_entry(entry):
    kept = sum(
        prepared(Random(), FOUR, pruning(0.5), seed=seed).masks([], FOUR, 1)[entry]
        for seed in range(400)
    )
    # of 400 draws with a half each: 200, give or take four deviations of 10
    assert kept.min() >= 160
    assert kept.max() <= 240


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
    masks = judged(L1, weights, 22 / 26, owners)
    assert_array_equal(masks["w"][:3], [[0, 0]] * 3)
    assert_array_equal(masks["out"][:, :3], [[0] * 3] * 3)
