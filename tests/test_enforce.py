"""Pruned weights stay at zero in anybody's training, and only they."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from tiny import (
    assert_zero_where_pruned,
    masks_of,
    network,
    samples,
    step,
    weights,
)
from torch import nn

from autoflip_flwr.errors import MaskError
from autoflip_flwr.units.enforce import (
    enforce,
    enforce_unseen,
    marked,
    trainable_names,
)
from autoflip_flwr.units.optimizers import Continued, gradients_of

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum and decay": lambda p: torch.optim.SGD(
        p, 0.1, momentum=0.9, weight_decay=0.01
    ),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


# --- the mask ---------------------------------------------------------------------


@optimizers
def test_pruned_weights_are_zero_after_every_step_and_the_rest_train_on(make):
    model, reference = network(), network()
    masks = masks_of(model)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter[torch.from_numpy(~masks[name])] = 0
    expected_optimizer = make(reference.parameters())
    with enforce(model, masks) as entered:
        assert entered is model
        assert_zero_where_pruned(model, masks)
        optimizer = make(model.parameters())
        for number in range(6):
            step(model, optimizer, number)
            assert_zero_where_pruned(model, masks)
            # a pruned weight without a gradient cannot move: the kept ones must follow
            step(reference, expected_optimizer, number, masks)
            for name, values in weights(reference).items():
                assert_array_equal(weights(model)[name], values)
    assert_zero_where_pruned(model, masks)


@optimizers
def test_an_optimizer_with_a_past_moves_no_pruned_weight(make):
    model = network()
    optimizer = make(model.parameters())
    for number in range(4):
        step(model, optimizer, number)
    masks = masks_of(model)
    reference = copy.deepcopy(model)
    expected_optimizer = make(reference.parameters())
    expected_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():  # the reference has never seen the pruned weights
        for name, parameter in reference.named_parameters():
            pruned = torch.from_numpy(~masks[name])
            parameter[pruned] = 0
            for value in expected_optimizer.state[parameter].values():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    value[pruned] = 0
    with enforce(model, masks):
        for number in range(4, 8):
            step(model, optimizer, number)
            assert_zero_where_pruned(model, masks)
            step(reference, expected_optimizer, number, masks)
    for name, values in weights(reference).items():
        assert_array_equal(weights(model)[name], values)


@pytest.mark.parametrize("seen", [True, False])
def test_a_closure_that_is_evaluated_at_several_points_finds_the_masked_optimum(seen):
    # Least squares: LBFGS must end at the optimum of the kept weights alone.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = x @ torch.arange(1.0, 7.0, dtype=torch.float64)[:, None]
    keep = np.array([[True, False, True, False, False, True]])
    kept = torch.from_numpy(keep[0])
    expected = torch.linalg.lstsq(x[:, kept], y).solution[:, 0]
    model = nn.Linear(6, 1, bias=False).double()
    masks = {"weight": keep}
    with torch.no_grad():
        zeros = marked(model.weight.numpy().copy(), keep)
        model.weight.copy_(torch.from_numpy(zeros))
    with enforce(model, masks) if seen else enforce_unseen(masks):
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=30, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    got = model.weight.detach()[0]
    torch.testing.assert_close(got[kept], expected, rtol=1e-5, atol=1e-5)
    assert not got[~kept].any()


def test_the_arguments_of_a_step_arrive_as_they_were_given():
    class Told(torch.optim.SGD):
        def step(self, loss, scale=1):
            self.told = loss, scale

    model = network()
    optimizer = Told(model.parameters(), 0.1)
    with enforce(model, masks_of(model)):
        optimizer.step(0.5, 3)
        assert optimizer.told == (0.5, 3)
        optimizer.step(lambda: 0.25, scale=2)
        closure, scale = optimizer.told
        assert (closure(), scale) == (0.25, 2)


def test_a_pruned_weight_that_overflowed_is_zero_again():
    model = nn.Linear(2, 1, bias=False)
    keep = np.array([[True, False]])
    with torch.no_grad():
        model.weight[0, 1] = math.inf
    with enforce(model, {"weight": keep}):
        assert model.weight[0, 1] == 0
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        model.weight.grad = torch.tensor([[1.0, math.inf]])
        optimizer.step()
        assert model.weight[0, 1] == 0


def test_weights_written_inside_the_block_are_zero_after_it():
    model = network()
    masks = masks_of(model)
    with enforce(model, masks), torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    assert_zero_where_pruned(model, masks)
    for name, values in weights(model).items():
        assert_array_equal(values, masks[name].astype(np.float32))


def pruned_share_that_moves(model, masks):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for number in range(3):
        step(model, optimizer, number)
    pruned = np.concatenate([v[~masks[n]] for n, v in weights(model).items()])
    return (pruned != 0).mean()


def test_after_the_block_the_mask_is_forgotten():
    model = network()
    masks = masks_of(model)
    with enforce(model, masks):
        assert pruned_share_that_moves(model, masks) == 0
    assert pruned_share_that_moves(model, masks) > 0.5


def test_after_an_error_inside_the_block_too():
    model = network()
    masks = masks_of(model)

    def diverge():
        with enforce(model, masks), torch.no_grad():
            model[0].weight.fill_(1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        diverge()
    assert_zero_where_pruned(model, masks)
    assert pruned_share_that_moves(model, masks) > 0.5


def test_a_refused_mask_leaves_the_model_alone():
    model = network()
    before = weights(model)
    masks = {**masks_of(model), "9.weight": np.zeros(3, bool)}
    with pytest.raises(MaskError, match=r"'9\.weight'"), enforce(model, masks):
        pass
    for name, values in weights(model).items():
        assert_array_equal(values, before[name])


@optimizers
def test_another_model_in_the_same_process_trains_as_if_alone(make):
    model, other, alone = network(0), network(1), network(1)
    masks = masks_of(model)
    alone_optimizer = make(alone.parameters())
    with enforce(model, masks):
        optimizer, other_optimizer = make(model.parameters()), make(other.parameters())
        for number in range(3):
            step(model, optimizer, number)
            step(other, other_optimizer, number)
            assert_zero_where_pruned(model, masks)
    for number in range(3):
        step(alone, alone_optimizer, number)
    for name, values in weights(alone).items():
        assert_array_equal(weights(other)[name], values)


def test_two_models_keep_their_own_masks():
    one, two = network(0), network(1)
    masks, others = masks_of(one, seed=1), masks_of(two, seed=2)
    with enforce(one, masks), enforce(two, others):
        both = torch.optim.SGD([*one.parameters(), *two.parameters()], 0.1)
        for number in range(3):
            step(one, both, number)
            step(two, both, number)
            assert_zero_where_pruned(one, masks)
            assert_zero_where_pruned(two, others)


def test_positions_in_the_state_stand_for_names():
    model = network()
    names = list(model.state_dict())
    masks = masks_of(model)
    numbered = {str(names.index(name)): keep for name, keep in masks.items()}
    assert list(numbered) == ["0", "1", "2", "3", "7", "8"]  # 4 to 6: the buffers
    with enforce(model, numbered):
        assert pruned_share_that_moves(model, masks) == 0


def test_a_mask_may_name_some_of_the_parameters():
    model = network()
    before = weights(model)
    with enforce(model, {"3.bias": np.array([True, False, True])}):
        pass
    assert model[3].bias[1] == 0
    before["3.bias"][1] = 0
    for name, values in weights(model).items():
        assert_array_equal(values, before[name])


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"fc": np.zeros(3, bool)}, r"'fc', which is no parameter.*known: \['0\.wei"),
        ({"99": np.zeros(3, bool)}, "'99', which is no parameter"),
        ({"1.running_mean": np.zeros(8, bool)}, r"model=Net\(\), .* tell buffers"),
        ({"4": np.zeros(8, bool)}, "'4', which is no parameter"),  # running_mean
        (
            {"3.bias": np.zeros(4, bool)},
            r"3\.bias: expected a mask of shape \(3,\), got \(4,\)",
        ),
        ({"8": np.zeros(4, bool)}, r"8: expected a mask of shape \(3,\)"),
    ],
)
def test_masks_of_another_model_are_refused(masks, message):
    with pytest.raises(MaskError, match=message), enforce(network(), masks):
        pass


def test_trainable_names_are_the_parameters_with_gradients():
    model = network()
    model[0].bias.requires_grad_(False)
    assert trainable_names(model) == [
        "0.weight",
        "1.weight",
        "1.bias",
        "3.weight",
        "3.bias",
    ]


def test_a_model_that_moves_inside_the_block_stays_masked():
    """`train` may move the model after `enforce` has begun (to a GPU, to float64)."""
    model = nn.Linear(4, 3)
    keep = np.zeros((3, 4), np.bool_)
    keep[0] = True
    with enforce(model, {"weight": keep}):
        model.double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
        optimizer.step()
        weight = model.weight.detach().numpy()
        assert not weight[~keep].any()
        assert weight[keep].all()


def test_the_optimizer_of_the_next_call_goes_on_with_the_state_of_the_last():
    """Six steps of one Adam are those of three that take two steps each."""
    alone, called = network(), network()
    one = torch.optim.Adam(alone.parameters(), lr=0.1)
    optimizers = Continued()
    for call in range(0, 6, 2):
        with optimizers.call():
            made = torch.optim.Adam(called.parameters(), lr=0.1)
            for at in (call, call + 1):
                step(called, made, at)
                step(alone, one, at)
    for name, value in weights(alone).items():
        assert_array_equal(weights(called)[name], value, err_msg=name)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda model: torch.optim.Adam(list(model.parameters())[:2], lr=0.1),
    ],
    ids=["another class", "other parameters"],
)
def test_an_optimizer_of_another_kind_starts_anew(make):
    model, optimizers = network(), Continued()
    with optimizers.call():
        step(model, torch.optim.Adam(model.parameters(), lr=0.1), 0)
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    with optimizers.call():
        step(model, make(model), 1)
    step(fresh, make(fresh), 1)
    for name, value in weights(fresh).items():
        assert_array_equal(weights(model)[name], value, err_msg=name)


def test_clients_in_threads_of_one_process_do_not_see_each_others_optimizers():
    """torch calls its hooks for the optimizers of all threads."""
    turn = threading.Barrier(2, timeout=60)

    def client(seed, wait, model):
        optimizers, kept = Continued(), masks_of(model)
        for call in (0, 3):
            with optimizers.call():
                made = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
                for at in range(call, call + 3):
                    wait()
                    step(model, made, 10 * seed + at)
        trained = weights(model)
        with gradients_of([tuple(p.shape) for p in model.parameters()]) as seen:
            made = torch.optim.SGD(model.parameters(), lr=0.01)
            for at in range(3):
                wait()
                step(model, made, 10 * seed + at)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                marks = marked(parameter.detach().numpy(), kept[name])
                parameter.copy_(torch.from_numpy(marks))
        with enforce_unseen(kept) as held:
            wait()
            if seed:  # the other moves its pruned weights, and no optimizer sees it
                step(model, torch.optim.SGD(model.parameters(), lr=0.01), 0)
            wait()
        return trained, seen.steps, seen.mean(), bool(held)

    with ThreadPoolExecutor(2) as pool:
        models = network(), network()  # here: they draw from what threads share
        both = list(pool.map(client, (0, 1), (turn.wait, turn.wait), models))
    for seed, (trained, steps, gradients, held) in enumerate(both):
        alone, _, expected, _ = client(seed, lambda: None, network())
        for name, value in alone.items():
            assert_array_equal(trained[name], value, err_msg=name)
        for got, wanted in zip(gradients, expected, strict=True):
            assert_array_equal(got, wanted)
        assert (steps, held) == (3, bool(seed))


def inside(*path):
    """The network under a path of modules, as wrappers put it."""
    model = network()
    for name in reversed(path):
        model = nn.ModuleDict({name: model})
    return model


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        (network(), "_orig_mod."),
        (network(), "module._orig_mod."),
        (inside("module"), ""),
        (inside("module", "_orig_mod"), ""),
        (inside("base_model", "model"), "base_model.model."),
        (inside("base_model", "model"), ""),
        (inside("backbone"), ""),
        (inside("module", "backbone"), "_orig_mod."),
    ],
)
def test_what_wrappers_put_into_names_is_understood(model, prefix):
    masks = {f"{prefix}{name}": keep for name, keep in masks_of(network()).items()}
    with enforce(model, masks):
        pass
    inner = next(m for m in model.modules() if isinstance(m, nn.Sequential))
    assert_zero_where_pruned(inner, masks_of(network()))


def test_a_name_that_two_parts_could_have_is_refused():
    two = nn.ModuleDict({"student": network(), "teacher": network()})
    cure = r"'0\.weight', which is no parameter.*hand over the module whose state_dict"
    with pytest.raises(MaskError, match=cure), enforce(two, masks_of(network())):
        pass
    with enforce(two, {f"student.{n}": k for n, k in masks_of(network()).items()}):
        pass
    assert all((p != 0).any() for p in two["teacher"].parameters() if p.ndim > 1)


# --- clipping of each sample's gradient -----------------------------------------------


class ClippingEachSample(torch.optim.Optimizer):
    """Stands in for Opacus's optimizer and the hooks of its module.

    As there, a module's backward hook makes `grad_sample`, and an optimizer around
    another, whose own step no hook of torch's sees, clips it.
    """

    def __init__(self, model, optimizer, look=lambda parameter: None):
        self.original_optimizer, self.look = optimizer, look
        for module in model.children():
            module.weight.grad_sample = None
            module.register_full_backward_hook(self.samples)
            module.register_forward_pre_hook(self.inputs)

    def inputs(self, module, arguments):
        module.read = arguments[0].detach()

    def samples(self, module, _, outputs):
        made = len(module.read) * torch.einsum("bi,bj->bij", outputs[0], module.read)
        accumulated = module.weight.grad_sample
        both = isinstance(accumulated, list)
        module.weight.grad_sample = [*accumulated, made] if both else made

    @property
    def param_groups(self):
        return self.original_optimizer.param_groups

    def step(self):
        own = self.param_groups[0]["params"]
        for parameter in own:
            self.look(parameter)
            if isinstance(parameter.grad_sample, list):
                parameter.grad_sample = torch.cat(parameter.grad_sample)
        norms = sum(p.grad_sample.flatten(1).square().sum(1) for p in own).sqrt()
        factors = (0.1 / norms).clamp(max=1)
        for parameter in own:
            parameter.grad = torch.einsum("b,bij->ij", factors, parameter.grad_sample)
        self.original_optimizer.step()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("seen", [True, False])
def test_clipping_each_sample_sees_kept_entries_alone_from_the_second_step(
    seen, accumulated
):
    def trained(*, by_hand):
        torch.manual_seed(0)
        layers = nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)
        model = nn.Sequential(*layers)
        masks = masks_of(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                values = marked(parameter.numpy().copy(), masks[name])
                parameter.copy_(torch.from_numpy(values))
        keeps = {p: torch.from_numpy(masks[n]) for n, p in model.named_parameters()}
        touched = []

        def look(parameter):
            pruned = ~keeps[parameter]
            each = parameter.grad_sample
            each = torch.cat(each) if isinstance(each, list) else each
            if by_hand and number:
                each[:, pruned] = 0
                parameter.grad_sample = each
            touched.append(bool(each[:, pruned].any()))

        clipping = ClippingEachSample(
            model, torch.optim.SGD(model.parameters(), 0.5, momentum=0.9), look
        )
        held = enforce(model, masks) if seen else enforce_unseen(masks)
        with nullcontext() if by_hand else held:
            for number in range(4):
                for parameter in keeps:
                    parameter.grad_sample = [] if accumulated > 1 else None
                for part in range(accumulated):
                    x, y = samples(8, seed=10 * number + part)
                    output = model(torch.from_numpy(x).requires_grad_())
                    nn.functional.cross_entropy(output, torch.from_numpy(y)).backward()
                clipping.step()
                if by_hand:
                    with torch.no_grad():
                        for parameter, keep in keeps.items():
                            parameter.mul_(keep)
                assert_zero_where_pruned(model, masks)
        assert touched == [True, True] + 6 * [False]
        assert not any(parameter._backward_hooks for parameter in keeps)
        return weights(model)

    expected = trained(by_hand=True)
    for name, value in trained(by_hand=False).items():
        assert_array_equal(value, expected[name])
