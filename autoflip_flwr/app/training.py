"""Local training and evaluation of our own apps."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from autoflip_flwr.errors import ModelError
from autoflip_flwr.settings import TrainingSettings
from autoflip_flwr.types import Array

_EVALUATION_BATCH = 512
_NONE = torch.tensor(0.0)


def train(
    model: nn.Module,
    x: Array,
    y: Array,
    settings: TrainingSettings,
    *,
    epochs: int,
    seed: int,
    proximal_mu: float = 0.0,
) -> float:
    """Train in place and return the mean loss of the last epoch.

    The seed decides the order of the samples and everything random in the model. A last
    batch of one sample is left out where there are others: BatchNorm cannot train on
    one value. FedProx adds ``proximal_mu / 2 * ||w - w_start||^2`` to the loss
    (arXiv:1812.06127, Eq. 2); 0 is plain training.
    The setting `scale_penalty` adds the penalty of network slimming.
    """
    count = len(y)
    if count == 0:
        raise ModelError("expected one training sample or more, got none")
    device = device_of(settings.device)
    model.to(device).train()
    optimizer = optimizer_of(model, settings)
    start = [p.detach().clone() for p in model.parameters()] if proximal_mu else []
    order = torch.Generator().manual_seed(seed)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    loss_of_epoch = math.nan
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(epochs):
            total, seen = 0.0, 0
            shuffled = torch.randperm(count, generator=order)
            for batch in torch.split(shuffled, settings.batch_size):
                if len(batch) == 1 < settings.batch_size and seen:
                    continue
                optimizer.zero_grad()
                output = model(inputs[batch].to(device))
                loss = functional.cross_entropy(output, labels[batch].to(device))
                if start:
                    pairs = zip(model.parameters(), start, strict=True)
                    distance = sum((now - then).square().sum() for now, then in pairs)
                    loss = loss + proximal_mu / 2 * distance
                if settings.scale_penalty:
                    loss = loss + settings.scale_penalty * scales(model)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.item() * len(batch)
                seen += len(batch)
            loss_of_epoch = total / seen
    return loss_of_epoch


def scales(model: nn.Module) -> torch.Tensor:
    """Return the sum of the absolute scales of all BatchNorms.

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming
    (arXiv:1708.06519), Eq. 1: the penalty that makes channels dispensable.
    """
    norms = (m for m in model.modules() if isinstance(m, _NormBase) and m.affine)
    return torch.stack([norm.weight.abs().sum() for norm in norms] or [_NONE]).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Loss and accuracies on held-out samples; accuracy is top-1."""

    loss: float
    accuracy: float  # share in [0, 1] whose label is the likeliest class
    accuracy_top5: float  # share whose label is among the five likeliest
    samples: int


def evaluate(
    model: nn.Module, x: Array, y: Array, *, device: str = "auto"
) -> Evaluation:
    """Evaluate a model on N >= 1 samples; the modules' modes are restored."""
    count = len(y)
    if count == 0:
        raise ModelError("expected one sample or more to evaluate, got none")
    target = device_of(device)
    modes = {module: module.training for module in model.modules()}
    model.to(target).eval()
    loss, top1, top5 = 0.0, 0, 0
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    with torch.inference_mode():
        for start in range(0, count, _EVALUATION_BATCH):
            batch = slice(start, start + _EVALUATION_BATCH)
            output = model(inputs[batch].to(target))
            label = labels[batch].to(target)
            loss += functional.cross_entropy(output, label, reduction="sum").item()
            best = output.topk(min(5, output.shape[1]), dim=1).indices
            hits = best == label[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.any(dim=1).sum())
    for module, mode in modes.items():
        module.training = mode
    return Evaluation(
        loss=loss / count,
        accuracy=top1 / count,
        accuracy_top5=top5 / count,
        samples=count,
    )


def load_arrays(model: nn.Module, arrays: Mapping[str, Array]) -> None:
    """Copy named arrays into a model's state."""
    state = {name: torch.from_numpy(np.array(v)) for name, v in arrays.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"the arrays do not fit the model: {error}") from error


def state_arrays(model: nn.Module) -> dict[str, Array]:
    """Return a model's parameters and buffers by name, on the CPU."""
    return {
        name: value.detach().cpu().numpy() for name, value in model.state_dict().items()
    }


def optimizer_of(model: nn.Module, settings: TrainingSettings) -> Optimizer:
    """Return a new optimizer over the model's parameters."""
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    kind = kinds.get(settings.optimizer, torch.optim.AdamW)
    own = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {}
    rate, decay = settings.learning_rate, settings.weight_decay
    return _light(kind)(model.parameters(), rate, weight_decay=decay, **own)


def _light(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """Return an optimizer that does the same without an import of torch._dynamo.

    `torch.optim` imports it at the first step, to tell it what not to compile: 1.4 s of
    every process that handles a message, and we compile nothing.
    """
    for method in (Optimizer.add_param_group, Optimizer.zero_grad):
        inspect.unwrap(method).__dynamo_disable = inspect.unwrap(method)
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), {"step": step})


def device_of(name: str) -> torch.device:
    """Return the device a setting names; ``auto`` takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"unknown device {name!r}: {error}") from error
