"""A network of 99 weights, masks and samples for it."""

import numpy as np
import torch
from torch import nn

torch.set_num_threads(1)  # too small to share out


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
        )


def masks_of(model, share=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.random(tuple(parameter.shape)) < share
        for name, parameter in model.named_parameters()
    }


def samples(count=12, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 6)).astype(np.float32)
    return x, rng.integers(0, 3, count)


def weights(model):
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}


def assert_zero_where_pruned(model, masks):
    for name, values in weights(model).items():
        assert not values[~masks[name]].any(), name


def step(model, optimizer, number, masks=None):
    """One step on a batch of its own; with `masks`, on masked gradients."""
    x, y = samples(8, seed=number)
    optimizer.zero_grad()
    output = model(torch.from_numpy(x))
    nn.functional.cross_entropy(output, torch.from_numpy(y)).backward()
    for name, parameter in model.named_parameters():
        if masks is not None:
            parameter.grad.mul_(torch.from_numpy(masks[name]))
    optimizer.step()
