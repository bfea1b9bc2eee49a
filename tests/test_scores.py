"""Scores by hand, and what they promise about their inputs."""

from typing import get_args

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_allclose, assert_array_equal

from autoflip_flwr.method.scores import (
    SCORES,
    ScoreName,
    guidance_score,
    saliency_score,
)


def test_every_name_has_a_score():
    assert set(SCORES) == set(get_args(ScoreName))


def test_the_papers_score_is_the_guidance_whatever_the_weights():
    guidance = np.float32([0.0, 3.0, 0.5])
    assert_array_equal(guidance_score(guidance, np.float32([9, -9, 0])), [0, 3, 0.5])


def test_saliency_is_the_weight_times_how_far_it_moved():
    found = saliency_score(np.float32([4.0, 9.0, 0.0]), np.float32([-3.0, 0.0, 5.0]))
    # sqrt(4) * (3 + 0.0001), sqrt(9) * 0.0001, 0 * 5.0001
    assert_allclose(found, [6.0002, 0.0003, 0.0], rtol=1e-5)
    assert found.dtype == np.float32


def test_saliency_takes_weights_of_float64():
    found = saliency_score(np.float32([1.0]), np.float64([2.0]))
    assert found.dtype == np.float32
    assert_allclose(found, [2.0001], rtol=1e-6)


def test_a_bias_that_starts_at_zero_is_ranked_by_how_far_it_moved():
    found = saliency_score(np.float32([1.0, 4.0, 0.25]), np.zeros(3, np.float32))
    assert_array_equal(np.argsort(found), [2, 0, 1])
    assert (found > 0).all()


def test_saliency_writes_over_the_guidance_and_not_over_the_weights():
    guidance, initial = np.float32([4.0]), np.float32([-1.0])
    assert saliency_score(guidance, initial) is guidance
    assert_array_equal(initial, [-1.0])


@settings(max_examples=60)
@given(
    npst.arrays(
        np.float32,
        (2, 7),
        elements=st.floats(0, 2.0**60, width=32, allow_subnormal=False),
    )
)
def test_saliency_is_finite_and_grows_with_guidance_and_with_weight(drawn):
    guidance, weight = drawn
    score = saliency_score(guidance.copy(), weight)
    assert np.isfinite(score).all()
    assert (score >= 0).all()
    assert (saliency_score(2 * guidance, weight) >= score).all()
    assert (saliency_score(guidance.copy(), -2 * weight) >= score).all()
