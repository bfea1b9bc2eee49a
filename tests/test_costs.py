import copy

import numpy as np
import pytest
import torch
from torch import nn

from autoflip_flwr import units
from autoflip_flwr.app import costs
from autoflip_flwr.app.models import build
from autoflip_flwr.errors import MaskError, ModelError
from autoflip_flwr.settings import TrainingSettings
from autoflip_flwr.units.partial import PartialNorm


def keep(model, share=None, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: np.ones(parameter.shape, bool)
        if share is None
        else rng.random(parameter.shape) < share
        for name, parameter in model.named_parameters()
    }


def digits():
    return build("cnn", num_classes=10, input_shape=(1, 8, 8), seed=0)


def test_a_linear_layer_costs_inputs_times_outputs():
    assert costs.flops(nn.Linear(10, 5), torch.zeros(1, 10)) == 50


def test_a_convolution_costs_its_kernel_at_every_output():
    # 4 filters of 3 x 3 x 2 weights at 6 x 6 places
    model = nn.Conv2d(2, 4, 3)
    assert costs.flops(model, torch.zeros(1, 2, 8, 8)) == 4 * 3 * 3 * 2 * 6 * 6


def test_the_digits_cnn_costs_the_sum_of_its_layers():
    conv1 = 16 * 25 * 8 * 8
    conv2 = 32 * 16 * 25 * 4 * 4
    linear = 128 * 128 + 128 * 10
    expected = conv1 + conv2 + linear
    assert costs.flops(digits(), torch.zeros(1, 1, 8, 8)) == expected


def test_an_lstm_costs_its_cell_at_every_step():
    cell = 4 * ((3 + 5) * 5 + 3 * 5) + 4 * 5  # gates with two biases, then the states
    model = nn.LSTM(3, 5, batch_first=True)
    assert costs.flops(model, torch.zeros(1, 7, 3)) == 7 * cell


def test_one_sample_is_counted_whatever_the_batch():
    assert costs.flops(nn.Linear(10, 5), torch.zeros(8, 10)) == 50


@pytest.mark.parametrize("shape", [(), (0, 10)])
def test_an_example_without_a_sample_is_an_error(shape):
    with pytest.raises(ModelError, match="one sample or more, got an example of shape"):
        costs.flops(nn.Linear(10, 5), torch.zeros(shape))


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_model_as_it_was_and_prints_nothing(training, capfd):
    model = build(
        "char_lstm", num_classes=5, input_shape=(6,), seed=0, embedding=3, hidden=4
    )
    model = nn.Sequential(model, nn.BatchNorm1d(5)).train(training)
    model[1].eval()  # a mixed state has to survive too
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    example = torch.zeros(2, 6, dtype=torch.long)
    costs.flops(model, example)
    costs.theoretical_flops(model, example, keep(model, 0.5))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("total_ops" in module._buffers for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


def test_zeros_in_the_weights_save_nothing():
    model = nn.Linear(10, 5)
    nn.init.zeros_(model.weight)
    assert costs.flops(model, torch.zeros(1, 10)) == 50


def test_parameters_counts_what_is_trained_and_shared_ones_once():
    model = nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 10))
    assert costs.parameters(model) == 115
    model[1].weight.requires_grad_(False)
    assert costs.parameters(model) == 65
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert costs.parameters(tied) == 16


def test_theory_multiplies_a_layer_with_its_density():
    model = nn.Linear(10, 5)
    weight = np.zeros((5, 10), bool)
    weight[:, :3] = True
    masks = {"weight": weight, "bias": np.zeros(5, bool)}
    assert costs.theoretical_flops(model, torch.zeros(1, 10), masks) == 15


def test_theory_treats_each_layer_apart():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5))
    conv = np.zeros((2, 1, 3, 3), bool)
    conv[0] = True
    # conv: 2 x 9 weights at 2 x 2 places, half of them kept; the linear layer whole
    assert (
        costs.theoretical_flops(model, torch.zeros(1, 1, 4, 4), {"0.weight": conv})
        == 36 + 40
    )


def test_an_lstm_has_the_density_of_all_its_matrices_together():
    model = nn.LSTM(5, 5, batch_first=True)
    example = torch.zeros(1, 7, 5)
    masks = {"weight_ih_l0": np.zeros((20, 5), bool)}  # the other matrix is kept
    assert costs.theoretical_flops(model, example, masks) * 2 == costs.flops(
        model, example
    )


def test_a_shared_weight_is_masked_wherever_it_is_used():
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    mask = np.zeros((4, 4), bool)
    mask[0] = True
    for name in ("0.weight", "1.weight"):
        assert costs.theoretical_flops(tied, torch.zeros(1, 4), {name: mask}) == 8


@pytest.mark.parametrize("name", ["cnn", "efficientnet_b3", "char_lstm"])
def test_theory_of_a_full_mask_or_none_is_the_count(name):
    shape, example = {
        "cnn": ((1, 8, 8), torch.zeros(1, 1, 8, 8)),
        "efficientnet_b3": ((3, 32, 32), torch.zeros(1, 3, 32, 32)),
        "char_lstm": ((80,), torch.zeros(1, 80, dtype=torch.long)),
    }[name]
    model = build(name, num_classes=10, input_shape=shape, seed=0)
    count = costs.flops(model, example)
    assert costs.theoretical_flops(model, example, {}) == count
    assert costs.theoretical_flops(model, example, keep(model)) == count
    half = costs.theoretical_flops(model, example, keep(model, 0.5))
    assert half == pytest.approx(count / 2, rel=0.05)


def test_an_empty_mask_leaves_nothing_of_the_weighted_layers():
    model = digits()
    example = torch.zeros(1, 1, 8, 8)
    assert costs.theoretical_flops(model, example, keep(model, 0.0)) == 0


def test_masks_of_unknown_parameters_name_the_known_ones():
    masks = {"wieght": np.ones((5, 10), bool)}
    with pytest.raises(MaskError, match=r"'wieght'.*known: \['weight', 'bias'\]"):
        costs.theoretical_flops(nn.Linear(10, 5), torch.zeros(1, 10), masks)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((10, 5), bool), r"weight: .* of shape \(5, 10\), got \(10, 5\)"),
        (np.ones((5, 10), np.uint8), r"weight: .*array of bool .*got ndarray of uint8"),
    ],
)
def test_masks_of_another_form_are_errors(mask, message):
    with pytest.raises(MaskError, match=message):
        costs.theoretical_flops(nn.Linear(10, 5), torch.zeros(1, 10), {"weight": mask})


def test_normalization_over_missing_channels_is_counted_like_any():
    norm = nn.LayerNorm(8)
    dense = costs.flops(nn.Sequential(nn.Linear(4, 8), norm), torch.zeros(1, 4))
    partial = nn.Sequential(nn.Linear(4, 8), PartialNorm(norm, np.arange(8)))
    assert costs.flops(partial, torch.zeros(1, 4)) == dense


# --- measured -------------------------------------------------------------------------


def test_memory_of_a_step_adds_up_by_hand():
    # 4 x 3 weights + 3 biases; gradients and momentum as many; the input is kept, and
    # of the loss the logarithms of the softmax (8 x 3), its target and total weight.
    model = nn.Linear(4, 3)
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)
    result = costs.footprint(model, x, y, TrainingSettings(device="cpu"))
    assert result.parameters == 15
    assert result.bytes == 60
    assert result.peak_bytes == 3 * 60 + 8 * 4 * 4 + 8 * 3 * 4 + 8 * 8 + 4
    assert result.inference_seconds > 0
    assert result.step_seconds > 0


def test_measuring_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)
    costs.footprint(model, x, y, TrainingSettings())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.training


def hybrid(share):
    model = digits()
    scores = {
        n: np.random.default_rng(0).random(p.shape) for n, p in keep(model).items()
    }
    example = torch.zeros(1, 1, 8, 8)
    return model, units.mask_units(model, scores, share=share, example_inputs=example)


def samples(count):
    rng = np.random.default_rng(0)
    x = rng.random((count, 1, 8, 8), np.float32)
    return x, rng.integers(0, 10, count)


def test_a_summary_counts_the_network_that_clients_train():
    model, masks = hybrid(0.6)
    result = costs.summary(model, *samples(40), masks, TrainingSettings())
    dense, pruned = result["networks"]["dense"], result["networks"]["pruned"]
    small = units.compact(model, masks, torch.zeros(1, 1, 8, 8))
    assert result["flops"]["pruned"] == costs.flops(small, torch.zeros(1, 1, 8, 8))
    assert result["flops"]["pruned"] < 0.6 * result["flops"]["dense"]
    assert pruned["parameters"] == sum(int(mask.sum()) for mask in masks.values())
    assert pruned["bytes"] == 4 * pruned["parameters"]
    assert dense["parameters"] == costs.parameters(model)
    # With only whole units gone, skipping zeros is what the smaller model does.
    theory, real = result["flops"]["unstructured_in_theory"], result["flops"]["pruned"]
    assert theory == pytest.approx(real, rel=1e-3)


def test_the_whole_model_beside_a_smaller_one_counts_in_its_memory():
    model, masks = hybrid(0.6)
    x, y = samples(32)
    chosen = TrainingSettings(batch_size=32)
    result = costs.summary(model, x, y, masks, chosen)["networks"]
    small = units.compact(model, masks, torch.zeros(1, 1, 8, 8))
    alone = costs.footprint(small, torch.from_numpy(x), torch.from_numpy(y), chosen)
    assert result["pruned"]["peak_bytes"] == alone.peak_bytes + result["dense"]["bytes"]


def test_single_weights_make_nothing_smaller():
    model = digits()
    masks = keep(model, 0.5)
    settings = TrainingSettings(device="cpu")  # a GPU rounds what it holds
    result = costs.summary(model, *samples(8), masks, settings)
    assert result["flops"]["pruned"] == result["flops"]["dense"]
    dense, pruned = result["networks"]["dense"], result["networks"]["pruned"]
    assert pruned["parameters"] == dense["parameters"]
    bits = 4 * sum(mask.size for mask in masks.values() if not mask.all())
    assert pruned["peak_bytes"] == dense["peak_bytes"] + bits
    assert result["flops"]["unstructured_in_theory"] < 0.6 * result["flops"]["dense"]


def test_operations_follow_the_masks_of_the_rounds():
    model = build("cnn", num_classes=10, input_shape=(1, 8, 8), seed=0)
    example = torch.zeros(1, 1, 8, 8)
    counted = costs.Operations(model, example)
    assert counted.dense == costs.flops(model, example)
    whole = {n: np.ones(tuple(p.shape), bool) for n, p in model.named_parameters()}
    half = units.mask_units(
        model,
        {n: np.arange(keep.size).reshape(keep.shape) for n, keep in whole.items()},
        share=0.7,
        example_inputs=example,
    )
    small = units.compact(model, half, example)
    assert counted.of(whole) == counted.dense
    assert counted.of(half) == pytest.approx(costs.flops(small, example), rel=0.01)
    assert counted.of(half) < 0.8 * counted.dense
    # by hand: three passes a sample, explorers through the whole model
    assert counted.trained(half, explore=10, train=100) == round(
        3 * (10 * counted.dense + 100 * counted.of(half))
    )
    assert counted.trained({}, explore=0, train=1) == 3 * counted.dense
