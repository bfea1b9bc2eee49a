"""Try whether a model without some units computes what the masked model does.

The dependency graph guesses at operations it does not know; this finds wrong guesses.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from autoflip_flwr.errors import ModelError
from autoflip_flwr.groups import Group, Keep, Units
from autoflip_flwr.units.surgery import (
    ExampleInputs,
    arguments,
    shrink,
    tensors_of,
    twin,
)

_log = logging.getLogger("flwr")

_TOLERANCE = 1e-6  # of the largest output, in float64


def prove(model: nn.Module, example_inputs: ExampleInputs, units: Units) -> Units:
    """Compare masked and smaller model, with random weights, in float64.

    Returns
    -------
    Units
        Without the groups that do not work; `Units.whole` says why.

    Raises
    ------
    ModelError
        If the model does not work without units of the other groups together.
    """
    if not units.groups:
        return units
    trial = _randomized(model)
    inputs = tuple(_double(value) for value in arguments(example_inputs, like=trial))
    if _difference(trial, inputs, units, units.groups) is None:
        return units
    reasons = {
        group.name: f"the graph cannot follow its channels: {reason}"
        for group in units.groups
        if (reason := _difference(trial, inputs, units, [group])) is not None
    }
    left = units.without(reasons)
    reason = _difference(trial, inputs, left, left.groups)
    if reason is not None:
        raise ModelError(
            f"{type(model).__name__}: without some units of "
            f"{[group.name for group in left.groups]} the model does not compute what "
            f"it does with them at zero: {reason}; prune single weights with "
            "pruning.units=0"
        )
    _log.warning("left whole: %s", reasons)
    return left


def _randomized(model: nn.Module) -> nn.Module:
    """Copy a model with weights that hide nothing, as zero biases would."""
    random = torch.Generator().manual_seed(0)
    parameters = {id(parameter) for parameter in model.parameters()}

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        if id(tensor) not in parameters:
            return tensor.double()
        shape, longest = tensor.shape, max(tensor.shape, default=1)
        if tensor.numel() == longest:
            value = 0.5 + torch.rand(shape, generator=random, dtype=torch.float64)
        else:
            value = torch.randn(shape, generator=random, dtype=torch.float64)
            value *= (shape[0] / tensor.numel()) ** 0.5
        return nn.Parameter(value.to(tensor.device), requires_grad=False)

    return twin(model, drawn).eval()


def _difference(
    model: nn.Module, inputs: tuple[Any, ...], units: Units, groups: Sequence[Group]
) -> str | None:
    """Return None, or how taking half of the groups' units out fails."""
    keep: Keep = np.ones(units.count, np.bool_)
    rng = np.random.default_rng(0)
    for group in groups:
        lost = rng.permutation(group.size)[: group.size // 2]
        keep[group.start + lost] = False
    masks = units.masks(keep, units.parameters)

    def zeroed(tensor: torch.Tensor) -> torch.Tensor:
        mask = masks.get(names.get(id(tensor), ""))
        if mask is None:
            return tensor
        kept = torch.from_numpy(mask).to(tensor.device)
        return nn.Parameter(torch.where(kept, tensor, 0), requires_grad=False)

    names = {id(p): name for name, p in model.named_parameters()}
    masked = twin(model, zeroed)
    small = shrink(masked, units, keep)
    with torch.no_grad():
        expected = list(tensors_of(masked(*inputs)))
        try:
            got = list(tensors_of(small(*inputs)))
        except Exception as error:  # whatever the model's own code raises
            return str(error).splitlines()[0] if str(error) else type(error).__name__
    for one, other in zip(expected, got, strict=True):
        if one.shape != other.shape:
            return f"its output has the shape {tuple(other.shape)}"
        scale = one.abs().max().clamp_min(1e-30)
        if not bool(((one - other).abs() <= _TOLERANCE * scale).all()):
            return "its output differs"
    return None


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value
