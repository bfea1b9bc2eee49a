"""What a channel is in the tensors of each kind of module."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autoflip_flwr.errors import ModelError
from autoflip_flwr.units.recurrent import Steps

_KNOWN = (
    _ConvNd,
    nn.Linear,
    nn.Embedding,
    _NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.PReLU,
    nn.RNNBase,
    nn.MultiheadAttention,
)

#: Their parameters are to the graph what those of an app's own modules are.
_MATRICES = (nn.ParameterList, nn.ParameterDict, nn.EmbeddingBag)


def join(path: str, name: str) -> str:
    """Return the full name of a tensor or module below a path."""
    return f"{path}.{name}" if path and name else path or name


def check(path: str, module: nn.Module) -> None:
    """Refuse a module with parameters that we have no rule for (`ModelError`)."""
    own = dict(module.named_parameters(recurse=False))
    torchs = type(module).__module__.startswith("torch.nn")
    ours = not torchs or isinstance(module, _MATRICES)
    if (
        not own
        or isinstance(module, nn.MultiheadAttention)
        or (isinstance(module, nn.RNNBase) and "weight_ih_l0" in own)
        or (isinstance(module, _KNOWN) and set(own) <= {"weight", "bias"})
        # Parameters of the app's own, which the graph follows if they are vectors.
        or ours
        or all(map(is_vector, own.values()))
    ):
        return
    raise ModelError(
        f"the units of {path or 'the model'} are not known: there is no rule for the "
        f"parameters {sorted(own)} of {type(module).__name__}; known are "
        f"{sorted(kind.__name__.lstrip('_') for kind in _KNOWN)} and modules of the "
        "app's own; use pruning.units=0, which prunes single weights of any model"
    )


def is_vector(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has one dimension, besides those of size 1."""
    return tensor.numel() == max(tensor.shape, default=1)


class Transposed(nn.Linear):
    """What transformers' Conv1D, a transposed linear layer, is to the graph."""

    def __init__(self, module: Any) -> None:
        super().__init__(module.nx, module.nf, device="meta")  # draws nothing there
        self.weight = nn.Parameter(module.weight.detach().T)
        self.bias = module.bias


def is_conv1d(module: Any) -> bool:
    """Tell whether this is transformers' Conv1D, or stands for it."""
    kind = type(module)
    known = kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    return known or isinstance(module, Transposed)


def is_linear(module: Any) -> bool:
    """Tell whether a module is a matrix, and a bias."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_root(module: Any) -> bool:
    """Tell whether a module makes channels of its own, and is not recurrent."""
    return isinstance(module, _ConvNd | nn.Embedding) or is_linear(module)


def has_columns(module: Any) -> bool:
    """Tell whether a module's weight has its output channels along dimension 1."""
    return isinstance(module, nn.Embedding | _ConvTransposeNd) or is_conv1d(module)


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether each channel of a convolution sees itself alone."""
    return (
        isinstance(module, _ConvNd)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def input_channels(module: nn.Module) -> int:
    """Return how many channels a layer with weights reads; 0 for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, _ConvNd):
        return module.in_channels
    own = [p for p in module.parameters(recurse=False) if p.ndim == 1]
    is_norm = isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm)
    return own[0].numel() if is_norm and own else 0


def reason_to_stay_whole(module: Any, out: bool) -> str | None:
    """Return why a module cannot be made smaller exactly; None if it can."""
    if isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
        return f"has {module.groups} groups of channels"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return f"normalizes over the shape {tuple(module.normalized_shape)}"
    if isinstance(module, Steps) and module.projected and out:
        return "projects its hidden state"
    if isinstance(module, nn.MultiheadAttention):
        return "adds keys of its own"
    if isinstance(module, nn.Parameter) and not is_vector(module):
        return f"is a parameter of the shape {tuple(module.shape)}, not a vector"
    return None


def tensors(module: nn.Module, out: bool) -> Iterator[tuple[str, int]]:
    """Yield the names and dimensions of tensors that a channel is an index of.

    Of output channels, else (not `out`) of input channels; not of recurrent modules.
    """
    if isinstance(module, nn.Embedding):
        yield "weight", 1
    elif is_root(module) and not is_depthwise(module):
        yield "weight", int(out == has_columns(module))
        if out and module.bias is not None:
            yield "bias", 0
    else:
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(module, name, None) is not None:
                yield name, 0
