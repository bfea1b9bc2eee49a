"""Tell models apart that may compute something else, for the cache of traces."""

import dataclasses
import enum
import functools
import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from autoflip_flwr.units.surgery import KEPT, ExampleInputs, arguments

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum)
_CODE = (type, types.FunctionType, types.BuiltinFunctionType)
_VALUES = (*_PLAIN, *_CODE, torch.dtype, torch.device)

_LARGEST = 1 << 16  # entries of a buffer that is compared by value

#: What nn.Module itself keeps, and what we note.
_INTERNAL = frozenset({*vars(nn.Module()), KEPT})


class _UnknownError(Exception):
    """A setting has a type that we cannot compare by value."""


def signature(model: nn.Module, example_inputs: ExampleInputs) -> Hashable:
    """Return what a trace depends on; None where that cannot be told.

    Classes, settings and functions of all modules, names and sizes of all tensors,
    which of them are one and the same, and the values of buffers but statistics.
    """
    try:
        modules = tuple(
            (path, type(module), module.extra_repr(), _settings(module))
            for path, module in model.named_modules(remove_duplicate=False)
        )
        seen: dict[int, int] = {}
        tensors = tuple(
            (name, _frozen(value), seen.setdefault(id(value), len(seen)))
            for name, value in model.named_parameters(remove_duplicate=False)
        )
        return modules, tensors, _frozen(arguments(example_inputs))
    except (_UnknownError, RuntimeError):  # lazy modules have no shapes yet
        return None


def _settings(module: nn.Module) -> Hashable:
    """Return what a module's own code may look at: flags, sizes, functions."""
    own = {k: v for k, v in vars(module).items() if k not in _INTERNAL}
    if isinstance(module, nn.RNNBase):
        own = {k: v for k, v in own.items() if not k.startswith(("_flat", "_all"))}
    statistics = isinstance(module, _NormBase)
    buffers = {
        name: value if statistics else _content(value)
        for name, value in module.named_buffers(recurse=False)
    }
    return _frozen(own), _frozen(buffers)


def _content(value: torch.Tensor) -> tuple[Hashable, str]:
    if value.numel() > _LARGEST:
        raise _UnknownError
    return _frozen(value), str(value.flatten().tolist())


def _frozen(value: Any) -> Hashable:
    if isinstance(value, _VALUES):
        return type(value), value
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, functools.partial):
        return _frozen((value.func, value.args, value.keywords))
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return type(value), _frozen(fields)
    if isinstance(value, dict):
        return tuple((_frozen(key), _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple | torch.Size):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, set | frozenset):
        return frozenset(_frozen(item) for item in value)
    if type(value).__module__.startswith("transformers."):  # a model's configuration
        return type(value), _frozen(vars(value))
    raise _UnknownError
