"""Make a model physically smaller by its empty units, and scatter it back."""

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autoflip_flwr.errors import MaskError
from autoflip_flwr.method.structured import Indices, Keep, Units
from autoflip_flwr.types import Masks
from autoflip_flwr.units import attention, layers, recurrent
from autoflip_flwr.units.layers import join
from autoflip_flwr.units.partial import PartialNorm

KEPT = "autoflip_kept"  # attribute of a compact module: its `Indices` by name


def twin(
    model: nn.Module, replaced: Callable[[str, torch.Tensor], torch.Tensor]
) -> nn.Module:
    """Copy a model's modules, with other tensors in place of its own."""
    tensors = _tensors(model).items()
    return copy.deepcopy(model, {id(t): replaced(name, t) for name, t in tensors})


def shrink(model: nn.Module, units: Units, keep: Keep) -> nn.Module:
    """Return a copy without the units that are not kept, of the same names.

    Recurrent layers of one module stay equally wide: where one keeps more units than
    another, the other is filled up with some that are not kept. Normalization over
    channels still counts the missing ones, as zeros.
    """
    kept = units.indices(units.levelled(keep))

    def smaller(name: str, tensor: torch.Tensor) -> torch.Tensor:
        selected = _select(tensor.detach(), kept.get(name))
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(selected, requires_grad=tensor.requires_grad)
        return selected

    small = twin(model, smaller)
    for path, module in list(small.named_modules()):
        _resize(small, path, module, kept)
    for path, heads in attention.find(model).items():
        if heads.output in kept:
            attention.resize(small, path, heads)
    recurrent.flatten(small)
    setattr(small, KEPT, kept)
    return small


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
    given, targets = _tensors(small), _tensors(model)
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
            _scatter(target, given[name].to(target), kept.get(name))
    return model


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


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
    own = {}
    for name, mask in masks.items():
        for dim, index in enumerate(kept.get(name, ())):
            if index is not None:
                mask = mask.take(index, dim)
        own[name] = mask
    return own


def _select(tensor: torch.Tensor, indices: Indices | None) -> torch.Tensor:
    if indices is None:
        return tensor.clone()
    for dim, rows in _rows(indices, tensor):
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
    target: torch.Tensor, source: torch.Tensor, indices: Indices | None
) -> None:
    """Write `source` to the kept places of `target`; clear those of a parameter."""
    if indices is None:
        target.copy_(source)
        return
    (first, places), *others = _rows(indices, target)
    for dim, rows in others:  # widen all dimensions but the first
        shape = list(source.shape)
        shape[dim] = target.shape[dim]
        source = source.new_zeros(shape).index_copy_(dim, rows, source)
    if isinstance(target, nn.Parameter):
        target.zero_()
    target.index_copy_(first, places, source)


def _rows(indices: Indices, like: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Return the dimensions that lose something, and what is kept along them."""
    return [
        (dim, torch.from_numpy(index).to(like.device))
        for dim, index in enumerate(indices)
        if index is not None
    ]


def _resize(
    model: nn.Module, path: str, module: nn.Module, kept: Mapping[str, Indices]
) -> None:
    """Make a module's sizes those of its tensors."""
    own = {
        **dict(module.named_parameters(recurse=False)),
        **{k: v for k, v in module.named_buffers(recurse=False) if v.ndim},
    }
    if not any(join(path, name) in kept for name in own):
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
    elif layers.is_conv1d(module):
        vars(module).update(zip(("nx", "nf"), own["weight"].shape, strict=True))
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
    elif isinstance(module, _NormBase):
        # Without weights and buffers, as InstanceNorm may be, it knows no width.
        module.num_features = next(iter(own.values())).shape[0]
    elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
        (channels,) = kept[join(path, "weight")]
        assert channels is not None
        model.set_submodule(path, PartialNorm(module, channels))
    elif isinstance(module, nn.RNNBase):
        module.input_size = own["weight_ih_l0"].shape[1]
        if not module.proj_size:  # else it keeps all its hidden units
            module.hidden_size = own["weight_hh_l0"].shape[1]
