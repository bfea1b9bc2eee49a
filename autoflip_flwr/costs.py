"""What a model costs: parameters and floating point operations.

thop counts multiply-accumulates (one multiplication and one addition are one
operation). Layers it has no rule for, embeddings among them, count zero.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autoflip_flwr.errors import MaskError, ModelError

with warnings.catch_warnings():
    # thop compares versions with distutils, which is deprecated.
    warnings.filterwarnings("ignore", message="(?s).*distutils")
    import thop

#: thop's description of a module: operations, parameters, children by name.
_Info: TypeAlias = tuple[float, float, Mapping[str, Any]]


def parameters(model: nn.Module) -> int:
    """Count the parameters that are trained; shared ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def flops(model: nn.Module, example: torch.Tensor) -> int:
    """Count the multiply-accumulates of one forward pass of one sample.

    Parameters
    ----------
    model : nn.Module
        It is left as it was: a copy is counted, in evaluation mode.
    example : torch.Tensor
        A batch, with the batch dimension first; only its first sample is used.

    Returns
    -------
    int
        thop's count. Zeros in the weights do not lower it, nor does a mask: only a
        smaller model costs less.
    """
    operations, _, _ = _profile(model, example)
    return int(operations)


def theoretical_flops(
    model: nn.Module, example: torch.Tensor, masks: Mapping[str, NDArray[np.bool_]]
) -> int:
    """Count what would be left if every masked weight saved its operations.

    This is theory, not a saving on real hardware: dense kernels multiply zeros as
    slowly as anything else. What a smaller model really saves is `flops` of it.

    Each layer's count is multiplied with the density of its weights: kept / all over
    the layer's weight parameters together, so over all matrices of an LSTM. A weight
    without a mask is all kept; masks of biases change nothing, as thop does not count
    the additions of a bias apart. Each layer is rounded to whole operations.

    Parameters
    ----------
    model, example
        As in `flops`.
    masks : mapping of str to bool array
        Parameter name -> True = keep. All True, or empty: the same as `flops`.

    Returns
    -------
    int
        At most `flops` of the same model.

    Raises
    ------
    MaskError
        A mask is not boolean, has another shape than its parameter, or its name is
        that of no parameter.
    """
    kept = _kept(model, masks)
    total = 0
    for path, operations in _layers(_profile(model, example)):
        layer = model.get_submodule(path)
        weights = [
            parameter
            for name, parameter in layer.named_parameters(recurse=False)
            if name.startswith("weight")
        ]
        size = sum(weight.numel() for weight in weights)
        if size:
            left = sum(kept.get(id(weight), weight.numel()) for weight in weights)
            operations = round(operations * left / size)
        total += operations
    return total


def _profile(model: nn.Module, example: torch.Tensor) -> _Info:
    if example.ndim == 0 or len(example) == 0:
        raise ModelError(
            "counting needs a batch of one sample or more, "
            f"got an example of shape {tuple(example.shape)}"
        )
    # thop leaves buffers behind in the modules it has no rule for: count a copy.
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # a copy's weights lie scattered on a GPU
    info: _Info = thop.profile(
        copied, inputs=(example[:1],), verbose=False, ret_layer_info=True
    )
    return info


def _layers(info: _Info, path: str = "") -> Iterator[tuple[str, int]]:
    operations, _, children = info
    if not children:
        yield path, int(operations)
    for name, child in children.items():
        yield from _layers(child, f"{path}.{name}" if path else name)


def _kept(model: nn.Module, masks: Mapping[str, NDArray[np.bool_]]) -> dict[int, int]:
    """Map the id of each masked parameter to the number of its kept entries.

    By id, as a shared parameter has one mask and several places in the model.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    if unknown := sorted(set(masks) - set(known)):
        raise MaskError(f"masks of unknown parameters {unknown}; known: {list(known)}")
    kept = {}
    for name, mask in masks.items():
        shape = tuple(known[name].shape)
        if mask.dtype != np.bool_ or mask.shape != shape:
            raise MaskError(
                f"mask of {name!r}: expected bool of shape {shape}, "
                f"got {mask.dtype} of shape {mask.shape}"
            )
        kept[id(known[name])] = int(np.count_nonzero(mask))
    return kept


def summary(
    model: nn.Module, example: NDArray[Any], masks: Mapping[str, NDArray[np.bool_]]
) -> dict[str, int]:
    """Return the counts of one forward pass that a run reports.

    ``dense``: the whole model. ``pruned``: the network that clients really train;
    zeros in dense layers do not make it smaller. ``unstructured_in_theory``: what a
    machine that skips every zero would do.
    """
    model = copy.deepcopy(model).cpu()
    sample = torch.from_numpy(example)
    dense = flops(model, sample)
    return {
        "dense": dense,
        "pruned": dense,
        "unstructured_in_theory": theoretical_flops(model, sample, masks),
    }
