"""Eq. 4 by hand and as properties: how many are pruned, which, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_allclose, assert_array_equal

from autoflip_flwr.errors import MaskError, SettingsError
from autoflip_flwr.method import mask

properties = settings(max_examples=150)

shapes = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
any_score = st.floats(width=32, allow_nan=False)  # negative, zero and infinite too
tied_score = st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0])
eighths = st.integers(0, 8).map(lambda k: k / 8)  # floor * size is exact in binary


@st.composite
def scores(draw, elements=None):
    if elements is None:
        elements = any_score if draw(st.booleans()) else tied_score
    count = draw(st.integers(1, 4))
    return {
        f"t{index}": draw(npst.arrays(np.float32, draw(shapes), elements=elements))
        for index in range(count)
    }


def flat(masks):
    return np.concatenate([np.ravel(keep) for keep in masks.values()])


def scores_of(**tensors):
    return {name: np.asarray(values, np.float32) for name, values in tensors.items()}


# --- worked examples --------------------------------------------------------------


def test_value_keeps_what_reaches_the_threshold():
    found = mask.from_scores(
        scores_of(w=[[0.3, 0.29], [0.0, 1.0]], b=[0.31]), threshold=0.3, mode="value"
    )
    assert_array_equal(found["w"], [[True, False], [False, True]])
    assert_array_equal(found["b"], [True])


def test_quantile_prunes_the_lowest_share_of_all_tensors_together():
    found = mask.from_scores(
        scores_of(w=[[5.0, 1.0], [4.0, 9.0]], b=[2.0]), threshold=0.4
    )
    # round(0.4 * 5) = 2 are pruned: 1 and 2
    assert_array_equal(found["w"], [[True, False], [True, True]])
    assert_array_equal(found["b"], [False])
    assert list(found) == ["w", "b"]
    assert all(keep.dtype == np.bool_ for keep in found.values())


def test_compression_keeps_one_of_so_many():
    found = mask.from_scores(
        scores_of(w=[5.0, 1.0, 4.0, 9.0], b=[2.0, 0.0]), threshold=3, mode="compression"
    )
    # round(6 / 3) = 2 are kept: 9 and 5
    assert_array_equal(found["w"], [True, False, False, True])
    assert_array_equal(found["b"], [False, False])


def test_the_floor_is_taken_from_the_other_tensors():
    found = mask.from_scores(
        scores_of(small=[0.1, 0.2, 0.3, 0.4], large=[1, 2, 3, 4, 5, 6]),
        threshold=0.5,
        floor=0.5,
    )
    # 5 of 10 are pruned. Without a floor all of `small` and the 1 would be. It keeps
    # ceil(0.5 * 4) = 2, its best; so `large` loses 5 - 2 = 3.
    assert_array_equal(found["small"], [False, False, True, True])
    assert_array_equal(found["large"], [False, False, False, True, True, True])


def test_two_tensors_may_need_the_floor_one_after_the_other():
    found = mask.from_scores(
        scores_of(a=[1, 2], b=[3, 4], c=[5, 6, 7, 8]), threshold=0.5, floor=0.5
    )
    # 4 of 8 are pruned: a and b. a keeps the 2, b the 4, so c loses two: 5 and 6.
    assert_array_equal(found["a"], [False, True])
    assert_array_equal(found["b"], [False, True])
    assert_array_equal(found["c"], [False, False, True, True])


def test_value_with_a_floor_keeps_a_tensors_best_and_costs_the_others_nothing():
    found = mask.from_scores(
        scores_of(w=[0.1, 0.2, 0.15], b=[0.5, 0.25]),
        threshold=0.3,
        mode="value",
        floor=0.25,
    )
    # ceil(0.25 * 3) = 1 of w, although all are below 0.3
    assert_array_equal(found["w"], [False, True, False])
    assert_array_equal(found["b"], [True, False])


@pytest.mark.parametrize(
    ("threshold", "pruned"),
    [
        (0.0, []),
        (0.25, [3]),  # 1 of 4: after the fourth, 4 * 1 / 4 reaches 1
        (0.5, [1, 3]),  # 2 of 4: every second
        (0.75, [1, 2, 3]),  # 3 of 4: 0.75, 1.5, 2.25, 3 reaches 1, 2, 3
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_ties_go_at_even_distances(threshold, pruned):
    found = mask.from_scores(scores_of(w=np.ones(4)), threshold=threshold)
    assert_array_equal(np.flatnonzero(~found["w"]), pruned)


def test_tied_tensors_pay_by_their_size_not_by_their_place():
    found = mask.from_scores(
        scores_of(a=np.zeros((10, 10)), b=np.zeros(20), c=np.zeros((4, 10))),
        threshold=0.75,
    )
    assert {n: int((~k).sum()) for n, k in found.items()} == {"a": 75, "b": 15, "c": 30}


def test_minus_zero_ties_with_zero():
    found = mask.from_scores(scores_of(w=[0.0, -0.0, -0.0, 0.0]), threshold=0.5)
    assert_array_equal(found["w"], [True, False, True, False])


def test_infinite_scores_have_a_place_in_the_order():
    found = mask.from_scores(
        scores_of(w=[np.inf, 0.0, -np.inf, 1e30, np.inf, -1e30]), threshold=0.5
    )
    assert_array_equal(found["w"], [True, False, False, True, True, False])


# --- how many ---------------------------------------------------------------------


@properties
@given(scores=scores(), threshold=st.floats(0, 1))
def test_quantile_prunes_exactly_its_share(scores, threshold):
    found = mask.from_scores(scores, threshold=threshold)
    assert {n: k.shape for n, k in found.items()} == {
        n: s.shape for n, s in scores.items()
    }
    keep = flat(found)
    assert int((~keep).sum()) == round(threshold * keep.size)


@properties
@given(scores=scores(), threshold=st.floats(1, 1e6))
def test_compression_keeps_exactly_its_share(scores, threshold):
    keep = flat(mask.from_scores(scores, threshold=threshold, mode="compression"))
    assert int(keep.sum()) == round(keep.size / threshold)


@properties
@given(scores=scores(), threshold=st.floats(0, 1), floor=eighths)
def test_the_floor_holds_and_the_total_stays_exact_where_it_can(
    scores, threshold, floor
):
    least = {n: math.ceil(floor * s.size) for n, s in scores.items()}
    total = sum(s.size for s in scores.values())
    kept = total - round(threshold * total)
    if sum(least.values()) > kept:
        message = (
            f"keeps at least {sum(least.values())} of {total} .*only {kept} .*"
            "lower the floor or prune less"
        )
        with pytest.raises(MaskError, match=message):
            mask.from_scores(scores, threshold=threshold, floor=floor)
        return
    found = mask.from_scores(scores, threshold=threshold, floor=floor)
    assert int(flat(found).sum()) == kept
    for name, keep in found.items():
        assert int(keep.sum()) >= least[name]


# --- which ------------------------------------------------------------------------


@properties
@given(
    scores=scores(),
    threshold=st.floats(0, 1),
    floor=st.sampled_from([0.0, 0.125, 0.25, 0.5]),
)
def test_what_is_kept_scores_no_less_than_what_is_pruned(scores, threshold, floor):
    try:
        found = mask.from_scores(scores, threshold=threshold, floor=floor)
    except MaskError:
        assert floor > 0
        return
    for name, keep in found.items():
        worst_kept = scores[name][keep].min(initial=np.inf)
        assert worst_kept >= scores[name][~keep].max(initial=-np.inf)
        if int(keep.sum()) == math.ceil(floor * keep.size):
            continue  # held up by the floor, it may keep less than others lose
        for other, theirs in found.items():
            assert worst_kept >= scores[other][~theirs].max(initial=-np.inf)


@properties
@given(scores=scores(elements=tied_score), threshold=st.floats(0, 1))
def test_ties_at_the_cut_are_spread_evenly(scores, threshold):
    keep = flat(mask.from_scores(scores, threshold=threshold))
    values = flat(scores)
    for value in set(values.tolist()):
        lost = ~keep[values == value]
        if lost.any() and not lost.all():
            exact = np.arange(1, lost.size + 1) * (lost.sum() / lost.size)
            assert (np.abs(np.cumsum(lost) - exact) < 1 + 1e-9).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_quantile_agrees_with_sorting(seed, threshold, sign):
    rng = np.random.default_rng(seed)
    tensors = {"w": (300, 700), "b": (77,), "v": (41, 5, 3), "one": ()}
    values = {
        n: np.asarray(sign * rng.lognormal(0, 4, s), np.float32)
        for n, s in tensors.items()
    }
    together = np.concatenate([np.ravel(v) for v in values.values()])
    pruned = round(threshold * together.size)
    expected = np.ones(together.size, bool)
    expected[np.argsort(together, kind="stable")[:pruned]] = False
    cut = np.sort(together)[max(pruned - 1, 0)]
    clear = together != cut  # the cut itself may be tied
    found = flat(mask.from_scores(values, threshold=threshold))
    assert int((~found).sum()) == pruned
    assert_array_equal(found[clear], expected[clear])
    assert clear.mean() > 0.999


def test_the_memory_layout_of_scores_does_not_matter():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    plain = mask.from_scores({"w": values}, threshold=0.5)
    turned = mask.from_scores({"w": np.asfortranarray(values)}, threshold=0.5)
    strided = mask.from_scores(
        {"w": np.repeat(values, 2, axis=1)[:, ::2]}, threshold=0.5
    )
    assert_array_equal(turned["w"], plain["w"])
    assert_array_equal(strided["w"], plain["w"])


@properties
@given(
    scores=scores(),
    threshold=st.floats(0, 1),
    mode=st.sampled_from(["quantile", "value"]),
)
def test_scores_are_left_alone_and_the_mask_is_the_same_twice(scores, threshold, mode):
    before = {n: s.copy() for n, s in scores.items()}
    results = []
    for _ in range(2):
        try:
            results.append(mask.from_scores(scores, threshold=threshold, mode=mode))
        except MaskError:
            results.append(None)
    for name in scores:
        assert_array_equal(scores[name], before[name])
        if results[0] is not None:
            assert_array_equal(results[0][name], results[1][name])


def test_no_scores_make_an_empty_mask():
    assert mask.from_scores({}, threshold=0.5) == {}


# --- what is refused --------------------------------------------------------------


def test_value_that_empties_a_tensor_names_it_the_share_and_the_remedy():
    scores = scores_of(**{"fc.weight": [0.5, 0.05], "conv.weight": [0.1, 0.2]})
    # 3 of 4 are below 0.3
    with pytest.raises(
        MaskError,
        match=r"0\.3 prunes all 2 parameters of conv\.weight \(75\.0% .*"
        r"lower the threshold, set a floor above 0, or use mode 'quantile'",
    ):
        mask.from_scores(scores, threshold=0.3, mode="value")


@pytest.mark.parametrize("mode", mask.MODES)
def test_a_nan_score_is_named(mode):
    with pytest.raises(MaskError, match="b: expected scores without NaN"):
        mask.from_scores(
            scores_of(w=[1.0], b=[0.0, np.nan]), threshold=1.0, mode=mode, floor=1.0
        )


@pytest.mark.parametrize(
    ("mode", "threshold", "message"),
    [
        ("quantile", -0.1, r"share to prune in \[0, 1\], got -0\.1"),
        ("quantile", 1.1, r"share to prune in \[0, 1\], got 1\.1"),
        ("quantile", math.nan, r"share to prune in \[0, 1\], got nan"),
        ("compression", 0.99, r"ratio all/kept >= 1, got 0\.99"),
        ("compression", math.inf, "ratio all/kept >= 1, got inf"),
        ("compression", math.nan, "ratio all/kept >= 1, got nan"),
        ("value", math.nan, "got NaN"),
        ("median", 0.5, r"'median'.*quantile.*value.*compression"),
    ],
)
def test_impossible_thresholds_are_refused(mode, threshold, message):
    with pytest.raises(SettingsError, match=message):
        mask.from_scores(scores_of(w=[1.0]), threshold=threshold, mode=mode)


@pytest.mark.parametrize("floor", [-0.1, 1.5, math.nan])
def test_impossible_floors_are_refused(floor):
    with pytest.raises(SettingsError, match=rf"floor in \[0, 1\], got {floor}"):
        mask.from_scores(scores_of(w=[1.0]), threshold=0.5, floor=floor)


# --- what a mask does -------------------------------------------------------------


def keep_some():
    return {"w": np.array([[True, False], [False, True]]), "b": np.array([True])}


def test_apply_zeroes_the_pruned_and_copies_the_rest():
    params = {
        "w": np.float32([[1, 2], [3, 4]]),
        "b": np.float64([5]),
        "steps": np.array(7),
    }
    found = mask.apply(params, keep_some())
    assert_array_equal(found["w"], [[1, 0], [0, 4]])
    assert_array_equal(found["b"], [5])
    assert_array_equal(found["steps"], 7)
    assert list(found) == list(params)
    assert [v.dtype for v in found.values()] == [v.dtype for v in params.values()]
    for name, values in found.items():
        assert not np.shares_memory(values, params[name])
    assert_array_equal(params["w"], [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": np.zeros((2, 2))}, r"unknown parameters \['b'\]"),
        (
            {"w": np.zeros(4), "b": np.zeros(1)},
            r"w: expected a mask of shape \(4,\), got \(2, 2\)",
        ),
    ],
)
def test_apply_refuses_a_mask_of_another_model(params, message):
    with pytest.raises(MaskError, match=message):
        mask.apply(params, keep_some())


def test_density_counts_entries_not_tensors():
    assert mask.density(keep_some()) == 3 / 5
    assert mask.density({}) == 1.0


def test_change_is_the_share_of_entries_that_differ():
    before, after = keep_some(), keep_some()
    assert mask.change(before, after) == 0.0
    after["w"] = ~after["w"]
    assert mask.change(before, after) == 4 / 5
    after["b"] = ~after["b"]
    assert mask.change(before, after) == 1.0
    assert mask.change({}, {}) == 0.0


def test_a_mask_that_cuts_a_layer_off_is_refused_with_its_share():
    masks = {"fc.weight": np.ones((2, 3), bool), "head.weight": np.zeros((1, 2), bool)}
    with pytest.raises(
        MaskError, match=r"all 2 parameters of head\.weight \(25\.00% .*set a floor"
    ):
        mask.check_layers(masks)


def test_a_bias_may_be_pruned_whole():
    mask.check_layers({"w": np.eye(2, dtype=bool), "b": np.zeros(2, bool)})


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("threshold", [0.0001, 0.3, 0.8, 0.9999])
def test_the_cut_of_a_large_model_is_exact(threshold, ties):
    """Large models are bracketed by a sample first; sorting all of them agrees."""
    rng = np.random.default_rng(0)
    scores = {
        "a": rng.lognormal(sigma=3, size=(1000, 900)).astype(np.float32),
        "b": np.sort(rng.random(70_001, np.float32)),
    }
    if ties:
        scores["a"] = np.round(np.log(scores["a"])).astype(np.float32)
    masks = mask.from_scores(scores, threshold=threshold)
    everything = np.concatenate([score.ravel() for score in scores.values()])
    kept = np.concatenate([keep.ravel() for keep in masks.values()])
    assert kept.size - kept.sum() == round(threshold * kept.size)
    assert everything[kept].min() >= everything[~kept].max()


# --- LAMP -----------------------------------------------------------------------------


def lamp(scores, kept, **more):
    total = sum(np.size(score) for score in scores.values())
    masks = mask.from_scores(scores, threshold=1 - kept / total, balance="lamp", **more)
    return {name: np.flatnonzero(keep).tolist() for name, keep in masks.items()}


def test_lamp_by_hand():
    """1/14, 4/13 and 1 in one layer, 100/500 and 1 in the other."""
    scores = {"small": np.float32([1, 3, 2]), "large": np.float32([20, 10])}
    assert lamp(scores, 2) == {"small": [1], "large": [0]}
    assert lamp(scores, 3) == {"small": [1, 2], "large": [0]}
    assert lamp(scores, 4) == {"small": [1, 2], "large": [0, 1]}
    masks = mask.from_scores(scores, threshold=0.4)
    assert masks["small"].tolist() == [False, True, False], "one cut for all"


def test_lamp_keeps_to_floors_whole_tensors_and_units():
    scores = {"a": np.float32([1, 2, 3, 4]), "b": np.float32([1, 1, 1, 9])}
    assert lamp(scores, 3) == {"a": [2, 3], "b": [3]}
    assert {n: len(v) for n, v in lamp(scores, 4).items()} == {"a": 3, "b": 1}
    assert {n: len(v) for n, v in lamp(scores, 4, floor=0.5).items()} == {
        "a": 2,
        "b": 2,
    }
    assert lamp(scores, 5, whole=["b"]) == {"a": [3], "b": [0, 1, 2, 3]}
    units = {"a": np.array([True, True, False, False]), "b": np.ones(4, np.bool_)}
    assert lamp(scores, 2, units=units) == {"a": [1], "b": [3]}


def reference_lamp(scores, kept):
    """How many entries of each tensor are among the `kept` largest LAMP scores."""
    every = []
    for row, score in enumerate(scores.values()):
        squares = np.sort(np.square(score.astype(np.float64)).reshape(-1))[::-1]
        every += [(s, row) for s in squares / np.cumsum(squares)]
    rows = [row for _, row in sorted(every, reverse=True)[:kept]]
    return np.bincount(rows, minlength=len(scores))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_lamp_is_that_of_the_paper_to_a_hundredth(share):
    rng = np.random.default_rng(0)
    scores = {
        "narrow": rng.normal(0, 1, (300, 20)),
        "tiny": rng.normal(0, 1e-6, (50, 50)),
        "heavy": rng.lognormal(0, 2, 4000),
    }
    scores = {n: np.abs(v).astype(np.float32) for n, v in scores.items()}
    total = sum(v.size for v in scores.values())
    masks = mask.from_scores(scores, threshold=1 - share, balance="lamp")
    found = [int(keep.sum()) for keep in masks.values()]
    assert sum(found) == total - round((1 - share) * total)
    expected = reference_lamp(scores, sum(found))
    assert_allclose(found, expected, atol=0.01 * total)
    for name, keep in masks.items():  # the largest of each
        assert scores[name][keep].min() >= scores[name][~keep].max(initial=0)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.integers(0, 99),
)
def test_lamp_keeps_exactly_as_many_even_of_zeros_and_infinities(
    sizes, threshold, floor, seed
):
    rng = np.random.default_rng(seed)
    odd = np.float32([0, -0.0, 1e-30, 1, 3e38, np.inf])
    scores = {f"t{i}": rng.choice(odd, size) for i, size in enumerate(sizes)}
    kept = sum(sizes) - round(threshold * sum(sizes))
    assume(sum(math.ceil(floor * size) for size in sizes) <= kept)
    masks = mask.from_scores(scores, threshold=threshold, floor=floor, balance="lamp")
    assert sum(int(keep.sum()) for keep in masks.values()) == kept
    for name, keep in masks.items():
        assert keep.sum() >= math.ceil(floor * keep.size)
        kept_ones, others = scores[name][keep], scores[name][~keep]
        assert kept_ones.min(initial=np.inf) >= others.max(initial=0)
