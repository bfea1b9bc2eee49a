"""Scores by hand, and what they promise about their inputs."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from torchvision.models import resnet50

from autoflip_flwr.method.scores import (
    SCORES,
    ScoreName,
    began_large,
    guidance_score,
    saliency_score,
    size_or_growth,
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


def table(*values, columns=16):
    """A row for each value, whose entries all have it."""
    return np.repeat(np.float32(values)[:, None], columns, axis=1)


def test_a_matrix_that_began_large_goes_by_growth_and_a_little_size():
    """Root mean square 1; the limit for 5 outputs is 2 / sqrt(5)."""
    initial, weights = table(1, 1, 1, -1, 1), table(3, -3, 0.5, 0, 1)
    found = size_or_growth(weights, initial)
    # 2 + 0.03, whatever the sign; smaller than at first: 0.005; pruned: 0; as at first
    assert_allclose(found, table(2.03, 2.03, 0.005, 0, 0.01), rtol=1e-6)
    assert found.dtype == np.float32
    assert_array_equal(weights, table(3, -3, 0.5, 0, 1))
    assert_array_equal(initial, table(1, 1, 1, -1, 1))


def test_any_other_tensor_goes_by_size():
    """He's initialization of 16 inputs is 0.35; vectors have no inputs."""
    initial = table(0.35, -0.35, 0.35)
    assert not began_large(initial)
    assert_array_equal(size_or_growth(table(3, -3, 0.5), initial), table(3, 3, 0.5))
    bias = np.float64([9, -9])
    assert_array_equal(size_or_growth(bias, bias), [9, 9])


def test_where_training_hardly_moved_what_began_large_size_decides():
    """So it is with a pretrained network, which is trained by small steps."""
    initial, weights = table(1, -3, 2), table(1.005, -2.999, 2)
    found = size_or_growth(weights, initial)  # by growth alone 0 would be the best
    assert_allclose(found, table(0.01505, 0.02999, 0.02), rtol=1e-4)


@pytest.mark.parametrize(
    ("layer", "large"),
    [
        (nn.Embedding(50, 16), True),
        (nn.Embedding(300, 64), True),
        (nn.Linear(16, 50), False),
        (nn.Conv2d(3, 8, 3), False),
        (nn.LSTM(8, 16), False),
        (nn.MultiheadAttention(16, 4), False),
        (resnet50().layer1[1].conv1, False),  # initialized by its fan-out
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_of_common_layers_embeddings_begin_large(layer, large):
    matrices = [p.detach().numpy() for p in layer.parameters() if p.ndim > 1]
    assert [began_large(matrix) for matrix in matrices] == [large] * len(matrices)
