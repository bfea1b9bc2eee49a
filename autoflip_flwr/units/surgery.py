"""Make a model physically smaller by its empty units, and scatter it back."""

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autoflip_flwr.errors import MaskError
from autoflip_flwr.method.structured import Keep, Units
from autoflip_flwr.types import Masks
from autoflip_flwr.units.norms import PartialGroupNorm, PartialLayerNorm

#: One tensor, or the positional arguments of the model.
ExampleInputs: TypeAlias = torch.Tensor | tuple[Any, ...]

#: Kept indices along each dimension; None: all of them.
Indices: TypeAlias = tuple[NDArray[np.int64] | None, ...]

KEPT = "autoflip_kept"  # attribute of a compact module: its `Indices` by name


def twin(
    model: nn.Module, replaced: Callable[[torch.Tensor], torch.Tensor]
) -> nn.Module:
    """Copy a model's modules, with other tensors in place of its own."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): replaced(tensor) for tensor in tensors})


def arguments(
    example_inputs: ExampleInputs, like: nn.Module | None = None
) -> tuple[Any, ...]:
    """Return example inputs as arguments; copied to the device of a model."""
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    tensors = () if like is None else chain(like.parameters(), like.buffers())
    first = next(iter(tensors), None)
    if first is None:
        return given
    found: tuple[Any, ...] = mapped(lambda value: value.to(first.device).clone(), given)
    return found


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply a function to all tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(mapped(function, item) for item in value)
    return value


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors a model returns, alone or in containers."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)


def shrink(model: nn.Module, units: Units, keep: Keep) -> nn.Module:
    """Return a copy without the units that are not kept.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    units : Units
        The units of the model (`trace`).
    keep : bool array of one per unit
        Recurrent layers of one module stay equally wide: where one keeps more units
        than another, the other is filled up with some that are not kept.

    Returns
    -------
    nn.Module
        Of the model's classes and parameter names, its tensors smaller. Normalization
        over channels still counts the missing ones, as zeros.
    """
    keep = units.levelled(keep)
    kept: dict[str, Indices] = {}
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        indices = units.indices(name, keep)
        if indices is not None:
            kept[name] = indices
        small = nn.Parameter(_select(parameter.detach(), indices))
        memo[id(parameter)] = small.requires_grad_(parameter.requires_grad)
    for name, buffer in model.named_buffers():
        indices = units.indices(name, keep)
        if indices is not None:
            kept[name] = indices
        memo[id(buffer)] = _select(buffer, indices)
    smaller = copy.deepcopy(model, memo)
    for path, module in list(smaller.named_modules()):
        _resize(smaller, path, module, kept)
    setattr(smaller, KEPT, kept)
    return smaller


def expand(small: nn.Module, model: nn.Module) -> nn.Module:
    """Scatter a compact model's parameters and buffers back.

    Parameters
    ----------
    small : nn.Module
        What `compact` made of `model`, trained since or not.
    model : nn.Module
        Written over: parameters of missing units become zero, their buffers stay.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    MaskError
        If `small` was not made of such a model; nothing is written.
    """
    kept = kept_indices(small)
    given = _tensors(small)
    parameters, targets = dict(model.named_parameters()), _tensors(model)
    for name, target in targets.items():
        source = given.get(name)
        if source is None or not _fits(target, source, kept.get(name)):
            raise MaskError(
                f"{name}: the compact model was not made of this one; expected a "
                f"tensor for the shape {tuple(target.shape)}, got "
                f"{None if source is None else tuple(source.shape)}"
            )
    with torch.no_grad():
        for name, target in targets.items():
            source = given[name].to(target)  # its device and type
            _scatter(target, source, kept.get(name), name in parameters)
    return model


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def kept_indices(
    small: nn.Module, default: Mapping[str, Indices] | None = None
) -> Mapping[str, Indices]:
    """Return the kept indices of the tensors that a compact model has smaller.

    `default` is returned for a model that is not compact; without it that is an error.
    """
    kept: Mapping[str, Indices] | None = getattr(small, KEPT, default)
    if kept is None:
        raise MaskError(
            f"expected what compact() returned, got a {type(small).__name__} that was "
            "not made by it"
        )
    return kept


def small_masks(small: nn.Module, masks: Masks) -> dict[str, NDArray[np.bool_]]:
    """Return the part of a mask that falls on a compact model's parameters."""
    kept = kept_indices(small)
    found = {}
    for name, mask in masks.items():
        for dim, index in enumerate(kept.get(name, ())):
            if index is not None:
                mask = mask.take(index, dim)
        found[name] = mask
    return found


def _select(tensor: torch.Tensor, indices: Indices | None) -> torch.Tensor:
    if indices is None:
        return tensor.detach().clone()
    for dim, index in enumerate(indices):
        if index is not None:
            rows = torch.from_numpy(index).to(tensor.device)
            tensor = tensor.index_select(dim, rows)
    return tensor


def _fits(target: torch.Tensor, source: torch.Tensor, indices: Indices | None) -> bool:
    expected = list(target.shape)
    for dim, index in enumerate(indices or ()):
        if index is not None:
            if dim >= len(expected) or index[-1] >= expected[dim]:
                return False
            expected[dim] = len(index)
    return list(source.shape) == expected


def _scatter(
    target: torch.Tensor, source: torch.Tensor, indices: Indices | None, clear: bool
) -> None:
    """Write `source` to the kept places of `target`; clear the others if told to."""
    if indices is None:
        target.copy_(source)
        return
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    for dim in dims[1:]:  # widen all dimensions but the first
        shape = list(source.shape)
        shape[dim] = target.shape[dim]
        wider = source.new_zeros(shape)
        wider.index_copy_(dim, _rows(indices[dim], target), source)
        source = wider
    if clear:
        target.zero_()
    target.index_copy_(dims[0], _rows(indices[dims[0]], target), source)


def _rows(index: NDArray[np.int64] | None, like: torch.Tensor) -> torch.Tensor:
    assert index is not None
    return torch.from_numpy(index).to(like.device)


def _resize(
    model: nn.Module, path: str, module: nn.Module, kept: Mapping[str, Indices]
) -> None:
    """Make a module's sizes those of its tensors."""
    if not any(join(path, name) in kept for name in _own(module)):
        return
    if isinstance(module, _ConvNd):
        rows, columns = module.weight.shape[:2]
        if module.groups > 1:
            module.groups = module.in_channels = module.out_channels = rows
        elif isinstance(module, _ConvTransposeNd):
            module.in_channels, module.out_channels = rows, columns
        else:
            module.out_channels, module.in_channels = rows, columns
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
    elif isinstance(module, _NormBase):
        # Without weights and buffers, as InstanceNorm may be, it knows no width.
        module.num_features = next(iter(_own(module).values())).shape[0]
    elif isinstance(module, nn.LayerNorm):
        _put(model, path, PartialLayerNorm(module))
    elif isinstance(module, nn.GroupNorm):
        (index, *_) = kept[join(path, "weight")]
        assert index is not None
        _put(model, path, PartialGroupNorm(module, index))
    elif isinstance(module, nn.RNNBase):
        module.input_size = _own(module)["weight_ih_l0"].shape[1]
        module.hidden_size = _own(module)["weight_hh_l0"].shape[1]
        module.flatten_parameters()


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(recurse=False)),
        **{k: v for k, v in module.named_buffers(recurse=False) if v.ndim},
    }


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def join(path: str, name: str) -> str:
    """Return the full name of a tensor or module below a path."""
    return f"{path}.{name}" if path else name
