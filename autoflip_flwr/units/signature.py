"""Tell models apart that may compute something else, for the cache of traces."""

import hashlib
import io
import pickle
import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from autoflip_flwr.units.inputs import ExampleInputs, arguments
from autoflip_flwr.units.surgery import KEPT

#: What nn.Module itself keeps, and what we note.
_INTERNAL = frozenset({*vars(nn.Module()), KEPT})


def signature(model: nn.Module, example_inputs: ExampleInputs) -> Hashable:
    """Return what a trace depends on; None where that cannot be told.

    Classes, settings and functions of all modules, names and sizes of all tensors,
    which of them are one and the same, and the values of buffers but statistics.
    """
    written = io.BytesIO()
    pickler = _Pickler(written)
    try:
        for path, module in model.named_modules(remove_duplicate=False):
            pickler.dump((path, type(module), module.extra_repr(), _own(module)))
        parameters = list(model.named_parameters(remove_duplicate=False))
        pickler.dump((parameters, arguments(example_inputs)))
    except Exception:  # a setting of a type that cannot be written; a lazy module
        return None
    return hashlib.sha256(written.getbuffer()).digest(), tuple(pickler.code)


class _Pickler(pickle.Pickler):
    """Writes of tensors only what they look like; collects classes and functions."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.code: list[Hashable] = []
        self._tensors: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        """Return what stands for a value; None: it is written as it is."""
        if isinstance(value, torch.Tensor):
            number = self._tensors.setdefault(id(value), len(self._tensors))
            return number, tuple(value.shape), value.dtype
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            self.code.append(value)
            return "code"
        return None


def _own(module: nn.Module) -> dict[str, Any]:
    """Return what a module's own code may look at: flags, sizes, functions, buffers."""
    own = {k: v for k, v in vars(module).items() if k not in _INTERNAL}
    if isinstance(module, nn.RNNBase):
        own = {k: v for k, v in own.items() if not k.startswith(("_flat", "_all"))}
    for name, buffer in module.named_buffers(recurse=False):
        own[name] = buffer
        if not isinstance(module, _NormBase):  # whose buffers are statistics
            values = buffer.detach().flatten().contiguous().view(torch.uint8)
            own[f"{name} values"] = values.cpu().numpy().tobytes()
    return own
