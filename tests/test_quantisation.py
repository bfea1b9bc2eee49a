"""One byte per parameter is enough: masks of real explorations hardly change."""

import numpy as np
import pytest

from autoflip_flwr.app import data, models, training
from autoflip_flwr.method import guidance, mask, scores
from autoflip_flwr.settings import TrainingSettings
from autoflip_flwr.wire import codec

CLIENTS = 5


@pytest.fixture(scope="module")
def explored():
    """W0, and what five explorers of two digits each found in float32."""
    digits = data.load("digits", num_partitions=10, partition="pathological")
    matrices = []
    for client in range(CLIENTS):
        model = models.build("cnn", num_classes=10, input_shape=(1, 8, 8), seed=0)
        initial = {k: v.copy() for k, v in training.state_arrays(model).items()}
        part = digits.partition(client)
        training.train(model, part.x, part.y, TrainingSettings(), epochs=2, seed=client)
        final = training.state_arrays(model)
        matrices.append(guidance.squared_deviation(initial, final))
    return initial, matrices


@pytest.mark.parametrize("normalization", guidance.NORMALIZATIONS)
@pytest.mark.parametrize("score", scores.SCORES)
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 0.9, 0.97])
def test_quantised_guidance_moves_less_than_one_percent_of_a_mask(
    explored, normalization, score, threshold
):
    initial, exact = explored
    shapes = {name: value.shape for name, value in initial.items()}
    stored = [
        codec.dequantize(codec.quantize(matrix), shapes).dense() for matrix in exact
    ]

    def masks(matrices):
        combined = guidance.combine(matrices, normalization=normalization)
        scored = {n: scores.SCORES[score](g, initial[n]) for n, g in combined.items()}
        return mask.from_scores(scored, threshold=threshold)

    moved = mask.change(masks(exact), masks(stored))
    assert moved < 0.01
    one = mask.change(masks(exact[:1]), masks(stored[:1]))
    assert one < 0.01


def test_a_code_takes_one_byte_where_a_float_takes_four(explored):
    initial, matrices = explored
    size = sum(value.size for value in initial.values())
    assert len(codec.quantize(matrices[0])) == size + 8 * len(initial)


def test_updates_are_told_to_a_few_percent(explored):
    """The root of the guidance is how far a weight moved: a warm start's material."""
    initial, matrices = explored
    shapes = {name: value.shape for name, value in initial.items()}
    for exact in matrices:
        stored = codec.dequantize(codec.quantize(exact), shapes).dense()
        for name, value in exact.items():
            error = np.sqrt(stored[name]) - np.sqrt(value)
            assert np.linalg.norm(error) <= 0.03 * np.linalg.norm(np.sqrt(value))
