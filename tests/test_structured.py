"""Units as index arrays: worked examples by hand, and what holds for any scores."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from autoflip_flwr.errors import MaskError, SettingsError
from autoflip_flwr.method.structured import Group, Limits, Units

NONE = -1


def mlp(hidden: int = 4) -> Units:
    """3 inputs -> `hidden` neurons -> 2 outputs: rows of w1, b1, columns of w2."""
    own = np.arange(hidden)
    return Units(
        groups=(Group("w1", 0, hidden),),
        parameters={"w1": {0: own}, "b1": {0: own}, "w2": {1: own}},
        buffers={},
        shapes={"w1": (hidden, 3), "b1": (hidden,), "w2": (2, hidden), "b2": (2,)},
        uses={"w1": 1, "w2": 1},
    )


def two_groups() -> Units:
    """4 channels, flattened to 8 inputs of 3 neurons, 2 outputs."""
    channel, neuron = np.arange(4), np.arange(4, 7)
    return Units(
        groups=(Group("conv", 0, 4), Group("fc1", 4, 3)),
        parameters={
            "conv": {0: channel},
            "fc1": {0: neuron, 1: np.repeat(channel, 2)},
            "fc2": {1: neuron},
        },
        buffers={"mean": {0: channel}},
        shapes={"conv": (4, 1, 2, 2), "fc1": (3, 8), "fc2": (2, 3), "mean": (4,)},
        uses={"conv": 9, "fc1": 1, "fc2": 1},
    )


SCORES = {
    "w1": np.array([[1, 1, 1], [2, 2, 2], [3, 3, 3], [9, 9, 9]], np.float32),
    "b1": np.array([1, 2, 3, 9], np.float32),
    "w2": np.array([[7, 2, 3, 9], [7, 2, 3, 9]], np.float32),
    "b2": np.array([0, 0], np.float32),
}


def test_a_units_score_is_the_mean_over_all_entries_that_go_with_it():
    # neuron 0: three weights and a bias of 1, two outgoing weights of 7
    expected = [(3 * 1 + 1 + 2 * 7) / 6, 2, 3, 9]
    np.testing.assert_allclose(mlp().means(SCORES), expected)


def test_units_go_in_the_order_of_their_scores():
    units = mlp()  # a neuron is 3 + 1 + 2 = 6 parameters of 22
    assert_array_equal(units.choose(SCORES, budget=5), [1, 1, 1, 1])
    assert_array_equal(units.choose(SCORES, budget=6), [1, 0, 1, 1])
    # neurons 0 and 2 both have the mean 3: the first goes first
    assert_array_equal(units.choose(SCORES, budget=12), [0, 0, 1, 1])
    assert_array_equal(units.choose(SCORES, budget=22), [0, 0, 0, 1])  # one stays


def test_units_go_until_the_operations_are_reached_or_the_budget_ends():
    units = mlp()  # 20 multiply-accumulates, 5 a neuron
    assert_array_equal(units.within(SCORES, budget=22, operations=20), [1, 1, 1, 1])
    assert_array_equal(units.within(SCORES, budget=22, operations=19), [1, 0, 1, 1])
    assert_array_equal(units.within(SCORES, budget=22, operations=10), [0, 0, 1, 1])
    few = units.within(SCORES, budget=6, operations=10)
    assert_array_equal(few, [1, 0, 1, 1], "the budget comes first")


def costly_and_cheap() -> tuple[Units, dict[str, np.ndarray]]:
    """Four units of 100 operations, ten of 10; the mean score of a group is 1."""
    costly, cheap = np.arange(4), np.arange(4, 14)
    units = Units(
        groups=(Group("costly", 0, 4), Group("cheap", 4, 10)),
        parameters={"costly": {0: costly}, "cheap": {0: cheap}},
        buffers={},
        shapes={"costly": (4, 10), "cheap": (10, 10)},
        uses={"costly": 10, "cheap": 1},
    )
    scores = {
        "costly": np.repeat([0.1, 0.2, 0.7, 3.0], 10).reshape(4, 10),
        "cheap": np.repeat(np.arange(2, 12) / 6.5, 10).reshape(10, 10),
    }
    return units, scores


def test_a_unit_that_would_save_far_too_much_stays_and_others_go():
    """A costly unit is 1/5 of 500 operations and 1/14 of 140 parameters.

    A cheap one is 1/50 and 1/14. The costs are 0.136 and 0.046, the scores per cost
    0.7, 1.5, 5.2, 22 and 6.7, 10, 13, ...: three costly ones would go first.
    """
    units, scores = costly_and_cheap()
    keep = units.within(scores, budget=140, operations=300)
    assert_array_equal(keep, [0, 0, 1, 1] + [1] * 10, "two costly ones: 300")
    keep = units.within(scores, budget=140, operations=280)
    assert_array_equal(keep, [0, 0, 1, 1] + [0] * 2 + [1] * 8, "not three: 200")
    keep = units.within(scores, budget=30, operations=280)
    assert_array_equal(keep, [0, 0, 0, 1] + [1] * 10, "three may go, no fourth one")
    keep = units.within(scores, budget=20, operations=280)
    assert_array_equal(keep, [0, 0, 1, 1] + [1] * 10, "300 is the least")


def test_units_without_a_score_go_first_and_those_that_stay_do_not():
    units, scores = costly_and_cheap()
    scores["cheap"][:3] = 0  # three units are empty already
    keep = units.within(scores, budget=140, operations=500)
    assert_array_equal(keep, [1] * 4 + [0] * 3 + [1] * 7)
    assert units.within(scores, budget=29, operations=500).sum() == 12, "of 10 each"
    stay = np.zeros(14, bool)
    stay[[0, 1]] = True
    keep = units.within(scores, budget=140, operations=400, stay=stay)
    assert_array_equal(keep, [1, 1, 0, 1] + [0] * 3 + [1] * 7)


def test_where_the_budget_ends_first_operations_weigh_more():
    """A unit of `a` is 100 operations and 10 parameters, of `b` 10 and 100.

    With equal weights `b` goes first, since its score is less by half.
    """
    a, b = np.arange(4), np.arange(4, 8)
    units = Units(
        groups=(Group("a", 0, 4), Group("b", 4, 4)),
        parameters={"a": {0: a}, "b": {0: b}},
        buffers={},
        shapes={"a": (4, 10), "b": (4, 100)},
        uses={"a": 10, "b": 0.1},
    )
    scores = {name: np.ones(units.shapes[name]) for name in "ab"}
    scores["b"][:2], scores["b"][2:] = 0.1, 1.9  # the mean of `b` stays 1
    assert_array_equal(
        units.within(scores, budget=440, operations=320), [0, 1, 1, 1, 0, 0, 1, 1]
    )
    assert_array_equal(
        units.within(scores, budget=100, operations=340), [0, 1, 1, 1, 1, 1, 1, 1]
    )


def test_a_score_per_cost_by_hand():
    """A channel: 36 + 6 of 174 operations, 4 + 6 of 46 parameters; a neuron: 10, 10."""
    scores = {
        "conv": np.float32([1, 2, 3, 4]).repeat(4).reshape(4, 1, 2, 2),
        "fc1": np.zeros((3, 8), np.float32),
        "fc2": np.full((2, 3), 5, np.float32),
    }
    units = two_groups()
    channel, neuron = (42 / 174 + 10 / 46) / 2, (10 / 174 + 10 / 46) / 2
    relative = np.array([1, 2, 3, 4]) / 2.5  # 0.4, 0.8, 1.2, 1.6 over their mean, 1
    expected = [*relative / channel, *np.ones(3) / neuron]
    np.testing.assert_allclose(units.per_cost(units.means(scores), scores), expected)
    expected = [*relative / (42 / 174), *np.ones(3) / (10 / 174)]
    by_operations = units.per_cost(units.means(scores), scores, weight=1)
    np.testing.assert_allclose(by_operations, expected)


def test_operations_beyond_reach_say_what_limits_them():
    units = mlp()
    units.check_operations(SCORES, share=0.25, budget=18)
    with pytest.raises(MaskError, match=r"of at least 0\.250, got 0\.2\. At most 22 p"):
        units.check_operations(SCORES, share=0.2, budget=22)
    with pytest.raises(MaskError, match=r"of at least 0\.750, .* At most 6 parameters"):
        units.check_operations(SCORES, share=0.5, budget=6)


def test_a_smaller_unit_that_still_fits_counts_as_in_reach():
    """A channel is 10 parameters and 42 operations of 174.

    A second one is 10 more, a neuron beside the first one 6 + 2, and 8 operations.
    """
    units = two_groups()
    names = ["conv", "fc1", "fc2"]
    units.check_operations(names, share=132 / 174, budget=17)
    with pytest.raises(MaskError, match=r"of at least 0\.759, got 0\.72"):
        units.check_operations(names, share=0.72, budget=17)
    units.check_operations(names, share=124 / 174, budget=18)


def test_cheap_units_with_many_operations_count_as_in_reach():
    """A unit of `a`: 1000 parameters and operations; one of `b`: 10 and 900."""
    a, b = np.arange(4), np.arange(4, 12)
    units = Units(
        groups=(Group("a", 0, 4), Group("b", 4, 8)),
        parameters={"a": {0: a}, "b": {0: b}},
        buffers={},
        shapes={"a": (4, 1000), "b": (8, 10)},
        uses={"a": 1, "b": 90},
    )
    # seven of `b` go: 11,200 - 6,300
    units.check_operations(["a", "b"], share=0.44, budget=1000)


def test_masks_empty_the_rows_and_columns_of_a_unit():
    masks = mlp().masks(np.array([True, False, True, True]), SCORES)
    assert_array_equal(masks["w1"], [[1] * 3, [0] * 3, [1] * 3, [1] * 3])
    assert_array_equal(masks["b1"], [1, 0, 1, 1])
    assert_array_equal(masks["w2"], [[1, 0, 1, 1], [1, 0, 1, 1]])
    assert masks["b2"].all()


def test_an_entry_between_two_units_is_counted_once():
    units = two_groups()
    keep = np.array([True, False, True, True, True, True, False])
    # conv: 4 of 16; fc1: 24 - 2 rows of 6; fc2: 2
    assert units.pruned(keep) == 4 + (24 - 2 * 6) + 2
    pruned = sum(int((~m).sum()) for m in units.masks(keep, units.parameters).values())
    assert pruned == 18


def test_operations_follow_what_is_kept():
    units = two_groups()
    assert units.operations() == 16 * 9 + 24 + 6
    keep = np.array([True, False, True, True, True, True, False])
    assert units.operations(keep) == 12 * 9 + 12 + 4


def test_kept_indices_of_parameters_and_buffers():
    units = two_groups()
    keep = np.array([True, False, True, True, True, True, False])
    rows, columns = units.indices(keep)["fc1"]
    assert_array_equal(rows, [0, 1])
    assert_array_equal(columns, [0, 1, 4, 5, 6, 7])
    (channels,) = units.indices(keep)["mean"]
    assert_array_equal(channels, [0, 2, 3])
    assert units.indices(np.ones(7, bool)) == {}


def test_a_unit_is_used_until_nothing_of_it_is_left():
    units = mlp()
    masks = units.masks(np.array([True, False, True, True]), SCORES)
    assert_array_equal(units.used(masks), [1, 0, 1, 1])
    masks["w2"][0, 1] = True  # a single outgoing weight keeps the neuron
    assert units.used(masks).all()
    del masks["b1"]  # a parameter without a mask is kept whole
    masks["w2"][0, 1] = False
    assert units.used(masks).all()


def test_the_largest_weights_of_a_unit_by_hand():
    units = mlp(3)
    scores = {
        "w1": np.array([[1, 5, 2], [9, 9, 9], [3, 3, 4]], np.float32),
        "b1": np.array([9, 9, 9], np.float32),
        "w2": np.array([[7, 9, 1], [8, 9, 0]], np.float32),
    }
    marks = units.largest(scores, np.array([True, False, True]))
    assert_array_equal(marks["w1"], [[0, 1, 0], [0, 0, 0], [0, 0, 1]])
    assert not marks["b1"].any(), "a bias alone makes no unit"
    assert_array_equal(marks["w2"], [[0, 0, 1], [1, 0, 0]])


def test_a_unit_of_several_rows_has_one_largest_weight_in_a_matrix():
    units = Units(
        groups=(Group("heads", 0, 2, width=2),),
        parameters={"q": {0: np.array([0, 0, 1, 1, NONE])}},
        buffers={},
        shapes={"q": (5, 2)},
    )
    scores = {"q": np.array([[1, 2], [4, 3], [5, 6], [0, 1], [9, 9]], np.float32)}
    marks = units.largest(scores, np.ones(2, np.bool_))["q"]
    assert_array_equal(marks, [[0, 0], [1, 0], [0, 1], [0, 0], [0, 0]])


def test_multiples_leave_a_group_whole_or_at_a_multiple():
    units, scores = mlp(11), {"w1": np.arange(33.0).reshape(11, 3)}
    scores |= {"b1": np.arange(11.0), "w2": np.ones((2, 11))}
    left = {
        int(units.choose(scores, budget=budget, limits=Limits(multiple=4)).sum())
        for budget in range(67)
    }
    assert left == {11, 8, 4}


def test_least_units_and_floor_hold():
    units = mlp(10)
    scores = {"w1": np.ones((10, 3)), "b1": np.ones(10), "w2": np.ones((2, 10))}
    assert units.choose(scores, budget=60).sum() == 1
    assert units.choose(scores, budget=60, limits=Limits(min_units=3)).sum() == 3
    assert units.choose(scores, budget=60, limits=Limits(floor=0.41)).sum() == 5


def test_a_group_with_a_parameter_that_is_not_prunable_stays_whole():
    units = two_groups()
    scores = {"conv": np.ones((4, 1, 2, 2)), "fc1": np.ones((3, 8))}
    keep = units.choose(scores, budget=1000)  # fc2 has no score: fc1's neurons stay
    assert keep[4:].all()
    assert keep[:4].sum() == 1
    assert [g.name for g in units.only(scores).groups] == ["conv"]


def test_rows_that_must_be_equally_long_get_units_back():
    first, second = np.arange(4), np.arange(4, 8)
    units = Units(
        groups=(Group("l0", 0, 4), Group("l1", 4, 4)),
        parameters={"hh0": {1: first}, "hh1": {1: second}},
        buffers={},
        shapes={"hh0": (4, 4), "hh1": (4, 4)},
        level=((first, second),),
    )
    keep = units.levelled(np.array([1, 0, 0, 0, 0, 1, 1, 1], bool))
    assert_array_equal(keep, [1, 1, 1, 0, 0, 1, 1, 1])


def test_a_budget_beyond_reach_says_what_limits_it():
    with pytest.raises(MaskError, match=r"at most 18 of 26 .*asked for 19.*w1"):
        mlp().check_budget(SCORES, budget=19)
    mlp().check_budget(SCORES, budget=18)


def test_a_mask_that_empties_a_group_names_it():
    masks = {k: np.zeros(s.shape, bool) for k, s in SCORES.items()}
    with pytest.raises(MaskError, match="all 4 units of w1"):
        mlp().used(masks)


def test_a_mask_of_another_shape_names_the_parameter():
    with pytest.raises(MaskError, match=r"w1: expected a mask of shape \(4, 3\)"):
        mlp().used({"w1": np.ones((4, 2), bool)})


@pytest.mark.parametrize("limits", [{"floor": 1.5}, {"min_units": 0}, {"multiple": 0}])
def test_impossible_limits_are_refused(limits):
    with pytest.raises(SettingsError, match="expected a floor in"):
        Limits(**limits)


@given(
    seed=st.integers(0, 2**32 - 1),
    budget=st.integers(0, 60),
    min_units=st.integers(1, 3),
    multiple=st.integers(1, 3),
)
def test_the_choice_stays_in_budget_and_takes_the_lowest(
    seed, budget, min_units, multiple
):
    units = two_groups()
    rng = np.random.default_rng(seed)
    scores = {name: rng.random(units.shapes[name]) for name in units.parameters}
    limits = Limits(min_units=min_units, multiple=multiple)
    keep = units.choose(scores, budget=budget, limits=limits)
    masks = units.masks(keep, scores)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert pruned == units.pruned(keep, scores) <= budget
    assert_array_equal(units.used(masks), keep)
    means = units.means(scores)
    for group in units.groups:
        kept = keep[group.units]
        count = int(kept.sum())
        assert count >= min(min_units, group.size)
        assert count == group.size or count % multiple == 0
        if 0 < count < group.size:  # within a group the lowest go
            assert means[group.units][kept].min() >= means[group.units][~kept].max()
    more = units.choose(scores, budget=budget + 5, limits=limits)
    assert not (more & ~keep).any()  # with more to prune, the same units and others


@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0.02, 1),
    budget=st.integers(0, 400) | st.just(400),
    min_units=st.integers(1, 3),
    multiple=st.integers(1, 3),
    dead=st.floats(0, 0.5),
)
def test_a_target_is_kept_wherever_one_can_be_reached(
    seed, share, budget, min_units, multiple, dead
):
    """Six filters, read by twelve neurons, read by four outputs."""
    rng = np.random.default_rng(seed)
    filters, neurons = np.arange(6), np.arange(6, 18)
    units = Units(
        groups=(Group("conv", 0, 6), Group("fc1", 6, 12)),
        parameters={
            "conv": {0: filters},
            "fc1": {0: neurons, 1: np.repeat(filters, 3)},
            "fc2": {1: neurons},
        },
        buffers={},
        shapes={"conv": (6, 5), "fc1": (12, 18), "fc2": (4, 12)},
        uses={"conv": float(rng.integers(1, 50)), "fc1": 1, "fc2": 1},
    )
    scores = {name: rng.exponential(size=units.shapes[name]) for name in units.shapes}
    limits = Limits(min_units=min_units, multiple=multiple)
    target = share * units.operations()
    keep = units.within(scores, operations=target, budget=budget, limits=limits)
    assert units.pruned(keep, scores) <= budget
    for group in units.groups:
        left = int(keep[group.units].sum())
        assert left >= min_units
        assert left == group.size or left % multiple == 0
    try:
        units.check_operations(scores, share=share, budget=budget, limits=limits)
    except MaskError:
        return
    assert units.operations(keep) <= target + 0.5  # they are counted in whole numbers
    if budget == 400 and multiple == 1 and units.operations(keep) < 0.98 * target:
        # whichever unit comes back needs more than the target
        back = [units.operations(keep | (np.arange(18) == n)) for n in range(18)]
        assert all(
            need > target for need, kept in zip(back, keep, strict=True) if not kept
        )
