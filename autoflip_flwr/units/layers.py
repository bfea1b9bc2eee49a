"""What a channel is in the tensors of each kind of module."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch_pruning.ops import OPTYPE

from autoflip_flwr.errors import ModelError
from autoflip_flwr.units.recurrent import Steps

#: Modules that make channels of their own.
ROOTS = (_ConvNd, nn.Linear, nn.Embedding, Steps)

#: Modules whose weights are multiplied with activations.
WEIGHTED = (_ConvNd, nn.Linear, Steps)

#: Modules whose weight has its output channels along dimension 1.
COLUMNS = (nn.Embedding, _ConvTransposeNd)

#: Nodes of the graph that hold no tensors.
WITHOUT_TENSORS = frozenset(
    {
        OPTYPE.CONCAT,
        OPTYPE.SPLIT,
        OPTYPE.ELEMENTWISE,
        OPTYPE.RESHAPE,
        OPTYPE.UNBIND,
        OPTYPE.EXPAND,
        OPTYPE.SLICE,
    }
)

_KNOWN = (
    _ConvNd,
    nn.Linear,
    nn.Embedding,
    _NormBase,  # BatchNorm and InstanceNorm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.PReLU,
    nn.LSTM,
    nn.GRU,
    nn.RNN,
)


def check(path: str, module: nn.Module) -> None:
    """Refuse a module whose parameters nobody has a rule for.

    Raises
    ------
    ModelError
        Names the module, its type, and what works instead.
    """
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.RNNBase) and "weight_ih_l0" in own:
        return
    if isinstance(module, _KNOWN) and set(own) <= {"weight", "bias"}:
        return
    ours = not type(module).__module__.startswith("torch.nn")
    if ours and all(_is_vector(parameter) for parameter in own.values()):
        return  # a scale or shift of its own, which the graph follows
    if not own:
        return
    raise ModelError(
        f"the units of {path or 'the model'} are not known: there is no rule for the "
        f"parameters {sorted(own)} of {type(module).__name__}; known are "
        f"{sorted(kind.__name__.lstrip('_') for kind in _KNOWN)} and vectors; use "
        "pruning.units=0, which prunes single weights of any model"
    )


def _is_vector(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 0 or parameter.numel() == max(parameter.shape)


def vector_dim(parameter: torch.Tensor) -> int:
    """Return the dimension along which a vector lies."""
    return max(range(parameter.ndim), key=lambda dim: parameter.shape[dim])


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether each channel of a convolution sees itself alone."""
    return (
        isinstance(module, _ConvNd)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def reason_to_stay_whole(module: Any, out: bool) -> str | None:
    """Return why a module cannot be made smaller exactly; None if it can."""
    if isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
        return f"has {module.groups} groups of channels"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return f"normalizes over the shape {tuple(module.normalized_shape)}"
    if isinstance(module, Steps) and module.projected and out:
        return "projects its hidden state"
    return None


def tensors(module: nn.Module, out: bool) -> Iterator[tuple[str, int]]:
    """Yield the names and dimensions of tensors that a channel is an index of.

    Parameters
    ----------
    module : nn.Module
        Any but recurrent ones.
    out : bool
        Output channels, else input channels.
    """
    if isinstance(module, _ConvNd | nn.Linear) and not is_depthwise(module):
        transposed = isinstance(module, _ConvTransposeNd)
        yield "weight", int(out == transposed)
        if out and module.bias is not None:
            yield "bias", 0
    elif isinstance(module, nn.Embedding):
        yield "weight", 1
    elif not (isinstance(module, nn.PReLU) and module.num_parameters == 1):
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(module, name, None) is not None:
                yield name, 0


def uses(module: nn.Module, output: Any) -> Iterator[tuple[str, int]]:
    """Yield how often a module's weight was used to make an output."""
    channels = module.out_features if isinstance(module, nn.Linear) else None
    if isinstance(module, _ConvNd):
        channels = module.out_channels
    if isinstance(module, _ConvTransposeNd):  # each input pixel uses all of it
        stride = 1
        for step in module.stride:
            stride *= int(step)
        yield "weight", max(1, output.numel() // (module.out_channels * stride))
    elif channels is not None:
        yield "weight", output.numel() // channels
    elif isinstance(module, Steps):
        yield "weight", output.numel() // output.shape[-1]
