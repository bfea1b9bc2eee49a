"""Tell models apart that may compute something else, for the cache of traces."""

import hashlib
import pickle
import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from autoflip_flwr.units.inputs import ExampleInputs, arguments, mapped
from autoflip_flwr.units.surgery import KEPT

#: What nn.Module itself keeps, and what we note.
_INTERNAL = frozenset({*vars(nn.Module()), KEPT})


def signature(model: nn.Module, example_inputs: ExampleInputs) -> Hashable:
    """Return what a trace depends on; None where that cannot be told.

    Classes, settings, functions and hooks of all modules, names and sizes of all
    tensors, which of them are one and the same, and the values of all but parameters
    and statistics.
    """
    written = _Digest()
    pickler = _Pickler(written)
    try:
        for path, module in model.named_modules(remove_duplicate=False):
            pickler.dump((path, type(module), module.extra_repr(), _own(module)))
        parameters = list(model.named_parameters(remove_duplicate=False))
        pickler.dump((parameters, mapped(_looks, list(arguments(example_inputs)))))
    except Exception:  # a setting of a type that cannot be written; a lazy module
        return None
    return written.value.digest(), tuple(pickler.code)


class _Digest:
    """A file that keeps of what is written no more than a digest."""

    def __init__(self) -> None:
        self.value = hashlib.blake2b()

    def write(self, data: Any) -> None:
        self.value.update(data)


class _Pickler(pickle.Pickler):
    """Writes of parameters only what they look like; collects classes and functions."""

    def __init__(self, file: _Digest) -> None:
        super().__init__(file)
        self.code: list[Hashable] = []
        self._tensors: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        """Return what stands for a value; None: it is written as it is."""
        if isinstance(value, torch.Tensor):
            number = self._tensors.setdefault(id(value), len(self._tensors))
            known = isinstance(value, nn.Parameter)
            return number, _looks(value), None if known else _values(value)
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            self.code.append(value)
            return "code"
        if isinstance(value, types.MethodType):  # of which its name would be written
            self.code.append(value.__func__)
        return None


def _looks(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _values(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data).digest()


def _own(module: nn.Module) -> dict[str, Any]:
    """Return what a module's own code may look at: flags, sizes, functions, buffers."""
    own = {k: v for k, v in vars(module).items() if k not in _INTERNAL}
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    own["hooks"] = hooks
    if isinstance(module, nn.RNNBase):
        own = {k: v for k, v in own.items() if not k.startswith(("_flat", "_all"))}
    statistics = isinstance(module, _NormBase)
    for name, buffer in module.named_buffers(recurse=False):
        own[name] = _looks(buffer) if statistics else buffer
    return own
