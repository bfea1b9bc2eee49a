"""Eq. 2 and Eq. 3, by hand and as properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from autoflip_flwr.errors import GuidanceError, SettingsError
from autoflip_flwr.method.guidance import (
    NORMALIZATIONS,
    combine,
    rescaling,
    squared_deviation,
    statistics,
)

properties = settings(max_examples=60)


def matrix(**tensors):
    return {name: np.asarray(values, np.float32) for name, values in tensors.items()}


@st.composite
def local_matrices(draw, max_explorers=4):
    """Heavy-tailed guidance of some explorers, some of it exactly zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shapes = draw(
        st.lists(st.sampled_from([(3,), (2, 4), (1,), ()]), min_size=1, max_size=4)
    )
    sigma = draw(st.sampled_from([0.0, 1.0, 4.0]))
    zeros = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return [
        {
            f"t{index}": np.asarray(
                rng.lognormal(-8, sigma, shape) * (rng.random(shape) >= zeros),
                np.float32,
            )
            for index, shape in enumerate(shapes)
        }
        for _ in range(draw(st.integers(1, max_explorers)))
    ]


# --- Eq. 2 ------------------------------------------------------------------------


def test_squared_deviation_is_the_square_of_the_way_gone():
    initial = matrix(w=[[1.0, -2.0], [0.5, 3.0]], b=[0.0])
    final = matrix(b=[-0.5], w=[[1.5, 1.0], [0.5, 2.0]])
    found = squared_deviation(initial, final)
    # (1 - 1.5)^2, (-2 - 1)^2; (0.5 - 0.5)^2, (3 - 2)^2; (0 + 0.5)^2
    assert_array_equal(found["w"], [[0.25, 9.0], [0.0, 1.0]])
    assert_array_equal(found["b"], [0.25])
    assert list(found) == ["w", "b"]
    assert all(values.dtype == np.float32 for values in found.values())


def test_squared_deviation_leaves_its_inputs_alone():
    initial, final = matrix(w=[1.0, 2.0]), matrix(w=[2.0, 0.0])
    squared_deviation(initial, final)
    assert_array_equal(initial["w"], [1.0, 2.0])
    assert_array_equal(final["w"], [2.0, 0.0])


def test_a_parameter_that_is_one_number_has_a_deviation():
    found = squared_deviation(matrix(temperature=1.0), matrix(temperature=3.0))
    assert found["temperature"].shape == ()
    assert float(found["temperature"]) == 4.0


@pytest.mark.parametrize(
    ("final", "message"),
    [
        (matrix(w=[0.0]), r"expected the parameters \['b', 'w'\], got \['w'\]"),
        (
            matrix(w=[0.0], b=[0.0], c=[0.0]),
            r"expected the parameters \['b', 'w'\], got \['b', 'c', 'w'\]",
        ),
        (matrix(w=[[0.0]], b=[0.0]), r"w: expected shape \(1,\), got \(1, 1\)"),
        (matrix(w=[0.0], b=[np.nan]), "b: expected finite weights.*learning rate"),
        (matrix(w=[np.inf], b=[0.0]), "w: expected finite weights.*learning rate"),
    ],
)
def test_weights_that_do_not_fit_or_diverged_are_named(final, message):
    with pytest.raises(GuidanceError, match=message):
        squared_deviation(matrix(w=[0.0], b=[0.0]), final)


def test_a_deviation_too_large_for_float32_is_a_divergence():
    with pytest.raises(GuidanceError, match=r"w: .*learning rate"):
        squared_deviation(matrix(w=[0.0]), matrix(w=[1e30]))  # 1e60 > 3.4e38


# --- Eq. 3 ------------------------------------------------------------------------


def two_explorers():
    # Over all: min 0, max 8. Per tensor: w 0..8, b 1..3.
    # Means: first (0 + 4 + 2 + 1 + 3) / 5 = 2, second (8 + 4 + 4 + 1 + 3) / 5 = 4.
    first = matrix(w=[0.0, 4.0, 2.0], b=[1.0, 3.0])
    second = matrix(w=[8.0, 4.0, 4.0], b=[1.0, 3.0])
    return [first, second]


def test_global_takes_min_and_max_over_all_matrices_and_parameters():
    found = combine(two_explorers(), normalization="global")
    # (0 + 8) / 2 / 8, (4 + 4) / 2 / 8, (2 + 4) / 2 / 8; 1 / 8, 3 / 8
    assert_array_equal(found["w"], np.float32([0.5, 0.5, 0.375]))
    assert_array_equal(found["b"], np.float32([0.125, 0.375]))


def test_global_subtracts_the_least_value():
    found = combine(
        [matrix(w=[2.0, 4.0], b=[3.0]), matrix(w=[6.0, 4.0], b=[3.0])],
        normalization="global",
    )
    # min 2, max 6: ((2 - 2) + (6 - 2)) / 2 / 4, (2 + 2) / 2 / 4; (1 + 1) / 2 / 4
    assert_allclose(found["w"], [0.5, 0.5], rtol=1e-6)
    assert_allclose(found["b"], [0.25], rtol=1e-6)


def test_layer_takes_them_per_tensor_over_all_matrices():
    found = combine(two_explorers(), normalization="layer")
    # w: min 0, max 8 as above; b: min 1, max 3: (1 - 1) / 2, (3 - 1) / 2
    assert_allclose(found["w"], [0.5, 0.5, 0.375], rtol=1e-6)
    assert_allclose(found["b"], [0.0, 1.0], atol=1e-6)


def test_client_divides_each_matrix_by_its_own_mean():
    found = combine(two_explorers(), normalization="client")
    # w: (0/2 + 8/4) / 2, (4/2 + 4/4) / 2, (2/2 + 4/4) / 2
    assert_allclose(found["w"], [1.0, 1.5, 1.0], rtol=1e-6)
    # b: (1/2 + 1/4) / 2, (3/2 + 3/4) / 2
    assert_allclose(found["b"], [0.375, 1.125], rtol=1e-6)


def test_client_is_the_default():
    explorers = two_explorers()
    expected = combine(explorers, normalization="client")
    assert_array_equal(combine(explorers)["w"], expected["w"])


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_matrices_without_spread_become_ones(normalization, value):
    flat = matrix(w=np.full((2, 2), value), b=[value])
    found = combine([flat, flat], normalization=normalization)
    assert_array_equal(found["w"], np.ones((2, 2)))
    assert_array_equal(found["b"], [1.0])


def test_a_constant_tensor_becomes_ones_under_layer_beside_another_that_is_not():
    found = combine([matrix(w=[5.0, 5.0], b=[0.0, 2.0])], normalization="layer")
    assert_array_equal(found["w"], [1.0, 1.0])
    assert_array_equal(found["b"], [0.0, 1.0])


def test_a_client_that_never_moved_counts_as_ones():
    found = combine([matrix(w=[0.0, 0.0]), matrix(w=[1.0, 3.0])])
    # second: mean 2, so 0.5 and 1.5; (1 + 0.5) / 2, (1 + 1.5) / 2
    assert_allclose(found["w"], [0.75, 1.25], rtol=1e-6)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("global", [0.0, 0.25, 1.0]),  # (x - 1) / (5 - 1)
        ("layer", [0.0, 0.25, 1.0]),
        ("client", [0.375, 0.75, 1.875]),  # x / (8 / 3)
    ],
)
def test_one_explorer_is_enough(normalization, expected):
    found = combine([matrix(w=[1.0, 2.0, 5.0])], normalization=normalization)
    assert_allclose(found["w"], expected, rtol=1e-6)


def test_matrices_may_come_from_an_iterator():
    found = combine(iter(two_explorers()), normalization="global")
    assert_array_equal(found["b"], np.float32([0.125, 0.375]))


@properties
@given(matrices=local_matrices(), normalization=st.sampled_from(["global", "layer"]))
def test_global_and_layer_stay_between_zero_and_one(matrices, normalization):
    for values in combine(matrices, normalization=normalization).values():
        assert values.dtype == np.float32
        assert (values >= 0).all()
        assert (values <= 1 + 1e-6).all()


@properties
@given(matrices=local_matrices())
def test_client_has_mean_one_and_no_negative_value(matrices):
    found = combine(matrices, normalization="client")
    flat = np.concatenate([np.ravel(values) for values in found.values()])
    assert (flat >= 0).all()
    assert_allclose(flat.mean(), 1.0, rtol=1e-4)


@properties
@given(matrices=local_matrices(), scale=st.floats(1e-3, 1e3), data=st.data())
def test_client_does_not_see_the_size_of_one_clients_steps(matrices, scale, data):
    which = data.draw(st.integers(0, len(matrices) - 1))
    scaled = [
        {n: np.float32(v * scale) for n, v in m.items()} if k == which else m
        for k, m in enumerate(matrices)
    ]
    before, after = combine(matrices), combine(scaled)
    for name in before:
        assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-7)


@properties
@given(
    matrices=local_matrices(),
    normalization=st.sampled_from(NORMALIZATIONS),
    random=st.randoms(use_true_random=False),
)
def test_the_order_of_the_explorers_does_not_matter(matrices, normalization, random):
    shuffled = list(matrices)
    random.shuffle(shuffled)
    before = combine(matrices, normalization=normalization)
    after = combine(shuffled, normalization=normalization)
    for name in before:
        assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-6)


@properties
@given(matrices=local_matrices(), normalization=st.sampled_from(NORMALIZATIONS))
def test_combine_leaves_its_inputs_alone(matrices, normalization):
    copies = [{n: np.array(v) for n, v in m.items()} for m in matrices]
    combine(matrices, normalization=normalization)
    for one, other in zip(matrices, copies, strict=True):
        for name in one:
            assert_array_equal(one[name], other[name])


# --- errors -----------------------------------------------------------------------


def test_no_explorer_is_an_error():
    with pytest.raises(GuidanceError, match="at least one explorer, got none"):
        combine([])
    with pytest.raises(GuidanceError, match="at least one explorer, got none"):
        rescaling([], "w", normalization="client")


def test_an_unknown_normalization_lists_the_known():
    with pytest.raises(SettingsError, match=r"'sphere'.*client.*global.*layer"):
        combine([matrix(w=[1.0])], normalization="sphere")


def test_matrices_of_two_models_are_refused():
    with pytest.raises(GuidanceError, match=r"parameters \['w'\], got \['v'\]"):
        combine([matrix(w=[1.0]), matrix(v=[1.0])])
    with pytest.raises(GuidanceError, match=r"w: expected shape \(1,\), got \(2,\)"):
        combine([matrix(w=[1.0]), matrix(w=[1.0, 2.0])])


@pytest.mark.parametrize("nothing", [{}, matrix(w=[])])
def test_a_matrix_without_parameters_is_an_error(nothing):
    with pytest.raises(GuidanceError, match="at least one parameter, got none"):
        combine([nothing])


def test_statistics_are_the_mean_of_all_and_the_extremes_of_each():
    found = statistics(matrix(w=[1.0, 2.0, 6.0], b=[3.0]).items())
    assert found.mean == 3.0  # (1 + 2 + 6 + 3) / 4
    assert found.low == {"w": 1.0, "b": 3.0}
    assert found.high == {"w": 6.0, "b": 3.0}


def test_guidance_too_small_to_invert_states_no_preference():
    tiny = {"w": np.array([0.0, 1e-38], np.float32)}
    for normalization in NORMALIZATIONS:
        found = combine([tiny], normalization=normalization)
        assert np.isfinite(found["w"]).all()
        assert_array_equal(found["w"], [1, 1])


def test_float32_matrices_are_summed_in_float64():
    """Scales of 1 / (max - min) are large where all values are nearly equal."""
    matrix = {"a": np.float32([0.00047395]), "b": np.float32([0.00046682])}
    combined = combine([matrix], normalization="global")
    assert_array_equal(combined["a"], np.float32([1]))
    assert_array_equal(combined["b"], np.float32([0]))
