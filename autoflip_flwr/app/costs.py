"""What a model costs: parameters, operations, and measured time and memory.

thop counts multiply-accumulates (one multiplication and one addition are one
operation). Where it has no rule, as for attention, matrix products and convolutions
count alone, so that embeddings count zero.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from autoflip_flwr import units
from autoflip_flwr.app import training
from autoflip_flwr.errors import ModelError, needs_extra
from autoflip_flwr.settings import TrainingSettings
from autoflip_flwr.types import Masks
from autoflip_flwr.units import enforce
from autoflip_flwr.units.measure import Products, kept_for_backward
from autoflip_flwr.units.partial import PartialNorm

with needs_extra("app", "counting operations"), warnings.catch_warnings():
    # thop compares versions with distutils, which is deprecated.
    warnings.filterwarnings("ignore", message="(?s).*distutils")
    import thop
    from thop.profile import register_hooks

#: thop's description of a module: operations, parameters, children by name.
_Info: TypeAlias = tuple[float, float, Mapping[str, Any]]

#: Timed steps, after one that is not.
_STEPS = 3

#: thop's rule for normalization, for what stands in for it.
_RULES = {PartialNorm: thop.vision.basic_hooks.count_normalization}


def parameters(model: nn.Module) -> int:
    """Count the parameters that are trained; shared ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def flops(model: nn.Module, example: torch.Tensor) -> int:
    """Count the multiply-accumulates of one forward pass of one sample, with thop.

    A copy of the model is counted, in evaluation mode, with the first sample of the
    batch `example`. Zeros in the weights do not lower the count: only a smaller model
    costs less.
    """
    (operations, _, _), elsewhere = _profile(model, example)
    return int(operations) + sum(elsewhere.values())


def theoretical_flops(model: nn.Module, example: torch.Tensor, masks: Masks) -> int:
    """Count what would be left if every masked weight saved its operations.

    This is theory: dense kernels multiply zeros too. What a smaller model really saves
    is `flops` of it. Each layer's count is multiplied with the density of its weights
    (of all matrices of an LSTM together) and rounded; masks of biases change nothing,
    as thop does not count the additions of a bias apart. Attention's products of
    activations stay. Parameters without a mask are kept.
    """
    # By id: a shared parameter has one mask and several places in the model.
    kept = {
        id(model.get_parameter(name)): int(np.count_nonzero(keep))
        for name, keep in enforce.resolve(model, masks).items()
    }
    info, elsewhere = _profile(model, example)
    counts = [
        (operations, [model.get_parameter(name)] if name else [])
        for name, operations in elsewhere.items()
    ]
    for path, operations in _layers(info):
        own = model.get_submodule(path).named_parameters("", False)
        counts.append((operations, [p for name, p in own if name.startswith("weight")]))
    total = 0
    for operations, weights in counts:
        size = sum(weight.numel() for weight in weights)
        left = sum(kept.get(id(weight), weight.numel()) for weight in weights)
        total += round(operations * left / size) if size else operations
    return total


class Operations:
    """What one sample costs clients, as the masks of the rounds come and go."""

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        self.dense = flops(model, example)  # of a forward pass, the whole model
        self._model, self._example = model, example
        self._masks: Masks = {}
        self._left = 1.0

    def of(self, masks: Masks) -> int:
        """Count those of the network that clients train under a mask."""
        if masks is not self._masks:
            self._left = units.operations_left(self._model, masks, self._example)
            self._masks = masks
        return round(self._left * self.dense)

    def trained(self, masks: Masks, *, explore: float, train: float) -> int:
        """Count those of training, of samples times epochs.

        A step is three times the forward pass: the backward pass computes gradients
        of the activations and of the weights. Explorers train the whole model.
        """
        return round(3 * (explore * self.dense + train * self.of(masks)))


def _profile(
    model: nn.Module, example: torch.Tensor
) -> tuple[_Info, dict[str | None, int]]:
    """Return thop's count, and that of products elsewhere by their parameter."""
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
    rules = {*register_hooks, *_RULES}
    leaves = (m for m in copied.modules() if not any(m.children()))
    ruled = {module: "" for module in leaves if type(module) in rules}
    with torch.no_grad(), Products(copied, ruled) as products:
        copied.eval()(example[:1])
    info: _Info = thop.profile(
        copied,
        inputs=(example[:1],),
        custom_ops=_RULES,
        verbose=False,
        ret_layer_info=True,
    )
    made = products.made.items()
    return info, {name: count for (place, name), count in made if place is None}


def _layers(info: _Info, path: str = "") -> Iterator[tuple[str, int]]:
    operations, _, children = info
    if not children:
        yield path, int(operations)
    for name, child in children.items():
        yield from _layers(child, f"{path}.{name}" if path else name)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What training and inference of a network take, measured on this machine."""

    parameters: int
    bytes: int  # of its parameters and buffers
    peak_bytes: int  # of tensors while one batch is trained, see `footprint`
    step_seconds: float  # forward, backward and optimizer step of a batch; median
    inference_seconds: float  # forward pass of a batch in evaluation mode; median


def footprint(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    settings: TrainingSettings,
    masks: Masks | None = None,
) -> Footprint:
    """Train and evaluate a copy of a model on a batch for a few steps, and measure it.

    The masks are kept in every step, as clients do.

    On a GPU `peak_bytes` is the allocator's peak. On the CPU it is the sum of
    parameters, buffers, gradients, the optimizer's state, the masks in the parameters'
    size, and what the forward pass keeps for the backward pass, without the workspaces
    of kernels.
    """
    device = training.device_of(settings.device)
    net = copy.deepcopy(model).to(device).train()
    x, y = x.to(device), y.to(device)
    optimizer = training.optimizer_of(net, settings)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0

    def step() -> None:
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    own = dict(net.named_parameters())
    held = _size([*own.values(), *net.buffers()])
    masks = masks or {}
    with enforce.enforce(net, masks):
        with kept_for_backward(net) as saved:
            step()
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(device) - before + held
        else:
            gradients = [p.grad for p in own.values() if p.grad is not None]
            masked = [own[name] for name, keep in masks.items() if not keep.all()]
            state = [
                value
                for values in optimizer.state.values()
                for value in values.values()
                if isinstance(value, torch.Tensor)
            ]
            peak = held + sum(saved.values()) + _size([*gradients, *masked, *state])
        step_seconds = _median_seconds(step, device)
    net.eval()
    with torch.inference_mode():
        net(x)
        inference_seconds = _median_seconds(lambda: net(x), device)
    return Footprint(
        parameters=parameters(net),
        bytes=held,
        peak_bytes=peak,
        step_seconds=step_seconds,
        inference_seconds=inference_seconds,
    )


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _median_seconds(function: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def summary(
    model: nn.Module,
    x: NDArray[Any],
    y: NDArray[np.int64],
    masks: Masks,
    settings: TrainingSettings,
) -> dict[str, dict[str, Any]]:
    """Return the costs that a run reports, of the dense model and of the clients'.

    ``flops`` of ``dense``, the whole model, and ``pruned``, the network that clients
    really train, smaller by the empty units of the mask; ``unstructured_in_theory`` is
    `theoretical_flops`. ``networks`` are the `Footprint` of both, on a batch of the
    samples; the pruned ``peak_bytes`` include the whole model's parameters, which a
    client that trains a smaller network holds beside it.
    """
    model = copy.deepcopy(model).cpu()
    inputs = torch.from_numpy(x[: settings.batch_size])
    labels = torch.from_numpy(y[: settings.batch_size])
    dense = asdict(footprint(model, inputs, labels, settings))
    small = units.compact_if_it_pays(model, masks, inputs[:1])
    own = masks if small is None else units.small_masks(small, masks)
    trained = model if small is None else small
    pruned = asdict(footprint(trained, inputs, labels, settings, own))
    if small is not None:
        pruned["peak_bytes"] += dense["bytes"]
    return {
        "flops": {
            "dense": flops(model, inputs),
            "pruned": flops(trained, inputs),
            "unstructured_in_theory": theoretical_flops(model, inputs, masks),
        },
        "networks": {"dense": dense, "pruned": pruned},
    }
