"""Read gradients, and carry optimizers on, in training that is not ours."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from autoflip_flwr.types import Array

#: Threads inside `steps`, with the number of their blocks.
_inside: Counter[int] = Counter()


@contextmanager
def steps(
    *,
    before: Callable[[Optimizer, Any, Any], Any] | None = None,
    after: Callable[[Optimizer, Any, Any], None] | None = None,
) -> Iterator[None]:
    """Call functions before or after every step of a `torch.optim` optimizer.

    torch calls its hooks for the optimizers of all threads. Here the steps of a thread
    that is itself in such a block are left to that one: clients may train beside each
    other in one process. An app's own threads are in none, and their steps count.
    """
    own = threading.get_ident()

    def heard(call: Callable[[Optimizer, Any, Any], Any]) -> Any:
        def hook(*step: Any) -> Any:
            here = threading.get_ident()
            return call(*step) if here == own or not _inside[here] else None

        return hook

    hooks = []
    if before is not None:
        hooks.append(register_optimizer_step_pre_hook(heard(before)))
    if after is not None:
        hooks.append(register_optimizer_step_post_hook(heard(after)))
    _inside[own] += 1
    try:
        yield
    finally:
        _inside[own] -= 1
        if not _inside[own]:
            del _inside[own]
        for hook in hooks:
            hook.remove()


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return all parameters that an optimizer holds."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def after_closure(step: tuple[Any, Any], call: Callable[[], None]) -> Any:
    """Return the arguments of a step, of which a closure then ends with a call.

    `step` has the positional arguments, the optimizer first, and those by name. It is
    None where there is no closure.
    """
    args, kwargs = step
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):  # an optimizer may take something else there
        return None

    def called() -> Any:
        loss = closure()
        call()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": called}
    return (args[0], called, *args[2:]), kwargs


class Gradients:
    """What `gradients_of` saw: a float32 array per parameter, in the model's order."""

    def __init__(self) -> None:
        self.steps = 0  # that an optimizer would have taken
        self._sums: list[torch.Tensor] = []
        self._squares: list[torch.Tensor] = []

    def take(self, optimizer: Optimizer) -> None:
        """Take the gradients of one batch away from an optimizer."""
        parameters = parameters_of(optimizer)
        if not self._sums:
            self._sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
            self._squares = [torch.zeros_like(total) for total in self._sums]
        # GradScaler leaves it to fused optimizers to unscale, and to skip a step.
        scale = getattr(optimizer, "grad_scale", None)
        skipped = bool(getattr(optimizer, "found_inf", False))
        self.steps += not skipped
        for p, total, square in zip(parameters, self._sums, self._squares, strict=True):
            # Complex parameters have no mask.
            if p.grad is not None and not skipped and not p.is_complex():
                gradient = p.grad.detach().to_dense()
                if scale is not None:
                    gradient = gradient.float() / scale
                total.add_(gradient)
                square.addcmul_(gradient, gradient)
            p.grad = None  # an optimizer passes over what has no gradient

    def mean(self) -> list[Array]:
        """Return the mean gradient over the batches."""
        return [(total / self.steps).cpu().numpy() for total in self._sums]

    def mean_square(self) -> list[Array]:
        """Return the mean of the batches' squared gradients."""
        return [(square / self.steps).cpu().numpy() for square in self._squares]


@contextmanager
def gradients_of(shapes: Sequence[tuple[int, ...]]) -> Iterator[Gradients]:
    """Collect the gradients of a model that only its optimizer shows; train nothing.

    Inside the block a step of an optimizer that holds exactly parameters of these
    shapes in this order changes nothing: whatever trains the model passes over the
    data at fixed weights. Any other optimizer is left alone.
    """
    seen = Gradients()

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if _shapes_of(optimizer) != list(shapes):
            return None
        # The gradients are there once the closure has run.
        step = after_closure((args, kwargs), lambda: seen.take(optimizer))
        if step is None:
            seen.take(optimizer)
        return step

    with steps(before=before_step):
        yield seen


class Continued:
    """Lets the optimizers of a call go on with the state of those of the call before.

    An exploration calls an app once an epoch, and the app makes its optimizer anew. The
    paper's explorer has one optimizer for all its epochs (arXiv:2405.10271, Eq. 2), so
    momentum and second moments must not start from zero in each. An optimizer takes the
    state of the one that stepped at the same place in the call before, if both are of
    the same class and their parameters have the same shapes.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Any, list[dict[str, Any]]]] = []

    @contextmanager
    def call(self) -> Iterator[None]:
        """Run one call of the app in the block."""
        seen: list[Optimizer] = []

        def before_step(optimizer: Optimizer, *_: Any) -> None:
            if any(optimizer is one for one in seen):
                return
            place = len(seen)
            seen.append(optimizer)
            kind, states = next(iter(self._before[place : place + 1]), (None, []))
            if kind == _kind(optimizer):
                for parameter, state in zip(
                    parameters_of(optimizer), states, strict=True
                ):
                    optimizer.state[parameter].update(state)

        with steps(before=before_step):
            yield
        # Without the optimizers, which hold the weights of a model.
        self._before = [
            (_kind(one), [dict(one.state[p]) for p in parameters_of(one)])
            for one in seen
        ]


def _kind(optimizer: Optimizer) -> tuple[str, list[tuple[int, ...]]]:
    """Return class and shapes; by name, as an app may make the class anew, too."""
    return type(optimizer).__qualname__, _shapes_of(optimizer)


def _shapes_of(optimizer: Optimizer) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in parameters_of(optimizer)]
