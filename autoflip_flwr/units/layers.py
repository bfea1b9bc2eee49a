"""What a channel is in the tensors of each kind of module."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autoflip_flwr.errors import ModelError
from autoflip_flwr.units.recurrent import Steps

#: Modules whose weights are multiplied with activations.
WEIGHTED = (_ConvNd, nn.Linear)

#: Modules that make channels of their own.
ROOTS = (*WEIGHTED, nn.Embedding)

#: Modules whose weight has its output channels along dimension 1.
COLUMNS = (nn.Embedding, _ConvTransposeNd)

_KNOWN = (*ROOTS, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU, nn.RNNBase)


def check(path: str, module: nn.Module) -> None:
    """Refuse a module with parameters that we have no rule for (`ModelError`)."""
    own = dict(module.named_parameters(recurse=False))
    ours = not type(module).__module__.startswith("torch.nn")
    if (
        not own
        or (isinstance(module, nn.RNNBase) and "weight_ih_l0" in own)
        or (isinstance(module, _KNOWN) and set(own) <= {"weight", "bias"})
        # A scale or shift of the app's own, which the graph follows.
        or (ours and all(p.numel() == max(p.shape, default=1) for p in own.values()))
    ):
        return
    raise ModelError(
        f"the units of {path or 'the model'} are not known: there is no rule for the "
        f"parameters {sorted(own)} of {type(module).__name__}; known are "
        f"{sorted(kind.__name__.lstrip('_') for kind in _KNOWN)} and vectors; use "
        "pruning.units=0, which prunes single weights of any model"
    )


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


def uses(module: Any, output: torch.Tensor) -> int:
    """Return how often a `WEIGHTED` module's weight was used to make an output."""
    if isinstance(module, _ConvTransposeNd):  # each input pixel uses all of it
        stride = math.prod(int(step) for step in module.stride)
        return max(1, output.numel() // (module.out_channels * stride))
    convolves = isinstance(module, _ConvNd)
    channels = module.out_channels if convolves else module.out_features
    return output.numel() // int(channels)
