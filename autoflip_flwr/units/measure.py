"""What running a model takes: operations by module, memory for the backward pass."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from autoflip_flwr.errors import ModelError
from autoflip_flwr.units.products import Products
from autoflip_flwr.units.surgery import ExampleInputs, arguments


def operations(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, int]:
    """Count the multiply-accumulates of a forward pass (see `products`).

    Parameters
    ----------
    model : nn.Module
        Left as it is: a copy is run, in evaluation mode.
    example_inputs : torch.Tensor, or tuple of arguments of the model
        All of them are counted: give one sample for the operations of a sample.

    Returns
    -------
    dict of str to int
        By the module's path, what its children do included; ``""`` is the model.
        Attention's products count, element-wise operations and embeddings do not.

    Raises
    ------
    ModelError
        If the model does not run on the inputs.
    """
    copied = copy.deepcopy(model).eval()
    for parameter in copied.parameters():  # or fused kernels, which are not counted
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    paths = {module: path for path, module in copied.named_modules()}
    with Products(copied, paths) as products, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the switch, of a copied LSTM on a GPU
        with torch.backends.mkldnn.flags(enabled=False):  # a fused LSTM, the same
            _run(copied, example_inputs)
    totals = dict.fromkeys(paths.values(), 0)
    for (path, _), count in products.made.items():
        totals[""] += count
        while path:
            totals[path] += count
            path = path.rpartition(".")[0]
    return totals


def backward_bytes(model: nn.Module, example_inputs: ExampleInputs) -> int:
    """Return what the forward pass of these inputs keeps for the backward pass."""
    copied = copy.deepcopy(model).eval()
    with kept_for_backward(copied) as kept:
        _run(copied, example_inputs)
    return sum(kept.values())


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Note what is kept for the backward pass, but parameters: bytes by storage."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _run(model: nn.Module, example_inputs: ExampleInputs) -> None:
    inputs = arguments(example_inputs, like=model)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            model(*inputs)
    except Exception as error:  # whatever the model's own code raises
        shown = [
            f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
            if isinstance(x, torch.Tensor)
            else type(x).__name__
            for x in inputs
        ]
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"{type(model).__name__} does not run on the example inputs {shown}: "
            f"{reason}"
        ) from error
