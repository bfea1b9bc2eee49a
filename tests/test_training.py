"""Our training repeats itself, evaluation counts right."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from tiny import assert_zero_where_pruned, masks_of, network, samples, weights
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from autoflip_flwr.app import training
from autoflip_flwr.app.training import evaluate, train
from autoflip_flwr.errors import ModelError
from autoflip_flwr.settings import TrainingSettings
from autoflip_flwr.units.enforce import enforce


def settings(**values):
    return TrainingSettings(**{"device": "cpu", "batch_size": 4, **values})


# --- training ---------------------------------------------------------------------


def steps_of(model, x, y, **values):
    """How many steps one epoch takes."""
    steps = []
    handle = register_optimizer_step_post_hook(lambda *args: steps.append(1))
    try:
        train(model, x, y, settings(**values), epochs=1, seed=0)
    finally:
        handle.remove()
    return len(steps)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_step_of_training_leaves_pruned_weights_at_zero(optimizer):
    model = network()
    masks = masks_of(model)
    x, y = samples()
    steps = []

    def check(*args):
        assert_zero_where_pruned(model, masks)
        steps.append(1)

    before = weights(model)
    chosen = settings(optimizer=optimizer, weight_decay=0.01)
    with enforce(model, masks):
        handle = register_optimizer_step_post_hook(check)
        try:
            train(model, x, y, chosen, epochs=2, seed=0)
        finally:
            handle.remove()
    assert len(steps) == 6  # two epochs of 12 / 4
    assert (weights(model)["0.weight"] != before["0.weight"])[masks["0.weight"]].all()


def dropout_network():
    model = network()
    model.insert(3, nn.Dropout(0.5))
    return model


def test_the_seed_decides_and_nothing_else():
    x, y = samples()
    losses, results = [], []
    for seed, noise in ((1, 10), (1, 20), (2, 10)):
        model = dropout_network()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise)
            losses.append(train(model, x, y, settings(), epochs=2, seed=seed))
        results.append(weights(model)["0.weight"])
    assert losses[0] == losses[1]
    assert_array_equal(results[0], results[1])
    assert losses[0] != losses[2]


def test_training_leaves_the_global_random_state_alone():
    model = dropout_network()
    before, numpy_before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    train(model, *samples(), settings(), epochs=2, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert_array_equal(np.random.get_state()[1], numpy_before[1])  # noqa: NPY002


def test_training_lowers_the_loss_it_returns():
    model = network()
    x, _ = samples(60)
    y = (x[:, 0] > 0).astype(np.int64)
    first = train(model, x, y, settings(), epochs=1, seed=0)
    last = train(model, x, y, settings(), epochs=15, seed=0)
    assert last < first / 2


def test_inputs_and_labels_are_left_alone():
    x, y = samples()
    copies = x.copy(), y.copy()
    train(network(), x, y, settings(), epochs=1, seed=0)
    assert_array_equal(x, copies[0])
    assert_array_equal(y, copies[1])


@pytest.mark.parametrize(
    ("count", "batch_size", "steps"),
    [(8, 4, 2), (10, 4, 3), (9, 4, 2), (5, 8, 1), (2, 4, 1)],
)
def test_a_last_batch_of_one_is_left_out_so_batchnorm_can_train(
    count, batch_size, steps
):
    # 10 = 4 + 4 + 2 is three steps; 9 = 4 + 4 + 1 is two
    x, y = samples(count)
    assert steps_of(network(), x, y, batch_size=batch_size) == steps


@pytest.mark.parametrize("count", [1, 2, 5])
def test_batches_of_one_reach_every_sample(count):
    x, y = samples(count)
    assert steps_of(nn.Linear(6, 3), x, y, batch_size=1) == count


def test_a_single_sample_is_trained_on():
    x, y = samples(1)
    assert steps_of(nn.Linear(6, 3), x, y) == 1


def test_no_sample_is_an_error():
    with pytest.raises(ModelError, match="one training sample or more, got none"):
        train(network(), *samples(0), settings(), epochs=1, seed=0)


class Switch(nn.Module):
    """One weight: the logits of an input x are (w x, 0)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.cat([x * self.w, torch.zeros_like(x)], dim=1)


def test_training_and_the_proximal_term_by_hand():
    x, y = np.float32([[1.0]]), np.array([0])
    chosen = settings(learning_rate=1.0, momentum=0.0)
    # Step 1 at w = 0: p = 1/2, gradient p - 1 = -1/2, loss log 2, w = 1/2.
    model = Switch()
    loss = train(model, x, y, chosen, epochs=1, seed=0, proximal_mu=2.0)
    assert_allclose(loss, math.log(2), rtol=1e-6)
    assert_allclose(model.w.item(), 0.5, rtol=1e-6)
    # Step 2: p = 1 / (1 + e^-0.5) = 0.6224593; gradient p - 1 = -0.3775407, and from
    # mu / 2 * w^2 = 0.25 another mu * w = 1; w = 0.5 - 0.6224593 = -0.1224593.
    # The loss is -log(0.6224593) + 0.25 = 0.4740770 + 0.25.
    model = Switch()
    loss = train(model, x, y, chosen, epochs=2, seed=0, proximal_mu=2.0)
    assert_allclose(loss, 0.7240770, rtol=1e-6)
    assert_allclose(model.w.item(), -0.1224593, rtol=1e-5)
    # Without it: w = 0.5 + 0.3775407.
    model = Switch()
    loss = train(model, x, y, chosen, epochs=2, seed=0)
    assert_allclose(loss, 0.4740770, rtol=1e-6)
    assert_allclose(model.w.item(), 0.8775407, rtol=1e-6)


def test_a_strong_proximal_term_keeps_the_weights_near_their_start():
    start = weights(network())["0.weight"]
    distances = []
    for mu in (0.0, 1.0, 10.0):
        model = network()
        chosen = settings(learning_rate=0.02, momentum=0.0)
        train(model, *samples(), chosen, epochs=10, seed=0, proximal_mu=mu)
        distances.append(np.square(weights(model)["0.weight"] - start).sum())
    assert distances[0] > distances[1] > distances[2] > 0


def test_the_penalty_of_network_slimming_by_hand():
    norm = nn.BatchNorm1d(2)
    plain = nn.BatchNorm1d(2, affine=False)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -0.25]))
    model = nn.Sequential(norm, plain, nn.LayerNorm(2))
    assert training.scales(model).item() == 0.75
    assert training.scales(nn.Linear(2, 2)).item() == 0
    # Two samples that differ in nothing: BatchNorm gives 0, so its scale has no
    # gradient but the penalty's, 0.1 of its sign; the learning rate is 1.
    x, y = np.float32([[1, 2], [1, 2]]), np.array([0, 0])
    chosen = settings(learning_rate=1.0, momentum=0.0, scale_penalty=0.1)
    loss = train(model, x, y, chosen, epochs=1, seed=0)
    assert_allclose(loss, math.log(2) + 0.1 * 0.75, rtol=1e-6)
    assert_allclose(norm.weight.detach(), [0.4, -0.15], rtol=1e-6)


def test_optimizers_take_what_the_settings_say():
    model = network()
    sgd = training.optimizer_of(
        model, settings(learning_rate=0.3, momentum=0.4, weight_decay=0.05)
    )
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["lr"] == 0.3
    assert sgd.defaults["momentum"] == 0.4
    assert sgd.defaults["weight_decay"] == 0.05
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        made = training.optimizer_of(model, settings(optimizer=name, weight_decay=0.05))
        assert isinstance(made, kind)
        assert made.defaults["weight_decay"] == 0.05
        assert len(made.param_groups[0]["params"]) == 6


def test_an_optimizer_steps_as_torch_s_does_and_a_message_imports_no_compiler():
    """In a process of its own, as a message to a node: others here have imported it."""
    code = """
import sys, numpy as np, torch
from autoflip_flwr import units
from autoflip_flwr.app import training
from autoflip_flwr.settings import TrainingSettings

def trained(made):
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    for i, value in enumerate(model.parameters()):
        torch.nn.init.constant_(value, 0.5 + i)
    optimizer = made(model)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.full((1, 3), step + 1.0, dtype=torch.float64)
        model(x).square().sum().backward()
        optimizer.step()
    return torch.cat([value.flatten() for value in model.parameters()])

kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
given = {"momentum": 0.9, "weight_decay": 0.1}
every = {n: TrainingSettings(optimizer=n, **given) for n in kinds}
ours = {n: trained(lambda m: training.optimizer_of(m, every[n])) for n in kinds}
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
assert units.trace(net, torch.zeros(1, 3)).count == 4
assert not {"torch._dynamo", "timm", "torchvision"} & set(sys.modules)
for name, kind in kinds.items():
    options = {"lr": every[name].learning_rate, "weight_decay": 0.1}
    options |= {"momentum": 0.9} if name == "sgd" else {}
    theirs = trained(lambda m: kind(m.parameters(), **options))
    assert torch.equal(ours[name], theirs), name
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


# --- evaluation -------------------------------------------------------------------


def test_top_one_and_top_five_by_hand():
    logits = np.float32([[7, 6, 5, 4, 3, 2, 1]] * 4)
    # class 0 is the likeliest, 4 the fifth, 5 and 6 are not among the five
    found = evaluate(nn.Identity(), logits, np.array([0, 4, 5, 6]), device="cpu")
    assert found.accuracy == 0.25
    assert found.accuracy_top5 == 0.5
    assert found.samples == 4


def test_the_loss_is_the_mean_over_the_samples():
    logits = np.log(np.float32([[1, 1], [1, 3], [1, 3]]))
    # -log(1/2), -log(1/4), -log(3/4)
    expected = (math.log(2) + math.log(4) + math.log(4 / 3)) / 3
    found = evaluate(nn.Identity(), logits, np.array([0, 0, 1]), device="cpu")
    assert_allclose(found.loss, expected, rtol=1e-6)


def test_with_five_classes_or_fewer_the_five_likeliest_are_all():
    logits = np.float32([[1, 0, 0], [1, 0, 0]])
    found = evaluate(nn.Identity(), logits, np.array([1, 0]), device="cpu")
    assert found.accuracy == 0.5
    assert found.accuracy_top5 == 1.0


def test_more_samples_than_a_batch_are_all_counted():
    labels = np.arange(1300) % 10
    logits = np.eye(10, dtype=np.float32)[np.where(np.arange(1300) < 130, 0, labels)]
    found = evaluate(nn.Identity(), logits, labels, device="cpu")
    # the first 130 say class 0, right for every tenth: 1170 + 13 of 1300
    assert found.samples == 1300
    assert_allclose(found.accuracy, 1183 / 1300)
    # with one hit at e : 9 of the rest, log(1 + 9/e) right and one more wrong
    right, wrong = math.log(1 + 9 / math.e), math.log(1 + 9 / math.e) + 1
    assert_allclose(found.loss, (1183 * right + 117 * wrong) / 1300, rtol=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_changes_neither_weights_nor_statistics_nor_mode(mode):
    model = network().train(mode)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    evaluate(model, *samples(), device="cpu")
    assert model.training is mode
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_layer_frozen_in_evaluation_mode_stays_frozen():
    model = network().train()
    model[1].eval()
    evaluate(model, *samples(), device="cpu")
    assert model[0].training
    assert not model[1].training


def test_batchnorm_uses_its_running_statistics_in_evaluation():
    model = nn.BatchNorm1d(2, affine=False, eps=0.0)
    model.running_mean[:] = torch.tensor([0.0, 1.0])
    found = evaluate(model, np.float32([[0.5, 0.6]]), np.array([0]), device="cpu")
    assert found.accuracy == 1.0  # 0.5 - 0 beats 0.6 - 1


def test_no_sample_to_evaluate_is_an_error():
    with pytest.raises(ModelError, match="one sample or more to evaluate, got none"):
        evaluate(network(), *samples(0))


# --- arrays -----------------------------------------------------------------------


def test_state_arrays_go_into_another_model():
    one, two = network(0), network(1)
    train(one, *samples(), settings(), epochs=1, seed=0)
    training.load_arrays(two, training.state_arrays(one))
    for name, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], value)
    assert two.state_dict()["1.num_batches_tracked"].dtype == torch.int64
    assert int(two.state_dict()["1.num_batches_tracked"]) == 3


def test_loaded_arrays_are_copied():
    model = network()
    arrays = {n: v.copy() for n, v in training.state_arrays(model).items()}
    arrays["3.bias"].setflags(write=False)
    training.load_arrays(model, arrays)
    with torch.no_grad():
        model[3].bias.fill_(5.0)
    assert not (arrays["3.bias"] == 5.0).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("3.bias"), r"do not fit the model.*3\.bias"),
        (lambda arrays: arrays.update(extra=np.zeros(1)), "do not fit .*extra"),
        (
            lambda arrays: arrays.update({"3.bias": np.zeros(4, np.float32)}),
            r"do not fit the model.*3\.bias",
        ),
    ],
)
def test_arrays_of_another_model_are_refused(change, message):
    model = network()
    arrays = dict(training.state_arrays(model))
    change(arrays)
    with pytest.raises(ModelError, match=f"(?s){message}"):
        training.load_arrays(model, arrays)


def test_devices_by_name():
    assert training.device_of("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert training.device_of("auto") == torch.device(expected)
    with pytest.raises(ModelError, match="unknown device 'toaster'"):
        training.device_of("toaster")
