"""Keep pruned weights at zero in training that is not ours."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from autoflip_flwr.errors import MaskError
from autoflip_flwr.types import Array, Mask, Masks
from autoflip_flwr.units.optimizers import after_closure, parameters_of, steps


def trainable_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that require gradients."""
    every = model.named_parameters(remove_duplicate=False)  # a tied one by each name
    return [name for name, value in every if value.requires_grad]


def ties(model: nn.Module) -> dict[str, str]:
    """Return the second names of tied parameters -> the first, in the model's order."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {n: first[id(p)] for n, p in every if first[id(p)] != n}


@contextmanager
def enforce(model: nn.Module, masks: Masks) -> Iterator[nn.Module]:
    """Keep pruned weights at exactly zero while the model trains.

    Pruned entries are zeroed on entry, after every step of any `torch.optim`
    optimizer that holds them, and on exit: whatever momentum, weight decay or
    second moments an optimizer carries, no step leaves a pruned weight behind.

    Names are those of ``model.named_parameters()``, or see `resolve`. The cost is one
    pass over the parameters per step, and a copy of the mask in the parameters' size.
    Gradients stay those of the dense model: where a norm over all gradients matters
    (clipping), pruned entries still count in it. But a closure that a step evaluates
    ends with zeros there, which is one pass more. Gradients of single samples, which
    Opacus clips, are zero in pruned entries from the second step on.
    """
    pruned = _pruned(model, masks)
    for each in pruned.values():
        each.zero()
    try:
        with _zeroed_by_steps(pruned):
            yield model
    finally:
        for each in pruned.values():
            each.zero()
        _held.get(set()).update(masks)


def zero(model: nn.Module, masks: Masks) -> None:
    """Set the pruned weights of a model to zero, once; masks as in `enforce`."""
    for each in _pruned(model, masks).values():
        each.zero()


def marked(values: Array, keep: Mask) -> Array:
    """Return weights whose pruned entries, and no others, are negative zeros.

    They count as zeros, and are still told from others in whatever module the weights
    have been loaded into: see `enforce_unseen`.
    """
    zero = values.dtype.type(0)
    made: Array = np.where(keep, values + zero, -zero)  # -0.0 + 0.0 is 0.0
    return made


@contextmanager
def enforce_unseen(masks: Masks) -> Iterator[set[str]]:
    """Do what `enforce` does for a model that only its optimizers have shown.

    A parameter whose negative zeros, when an optimizer first steps, are exactly what
    one of these masks prunes has been loaded from `marked` weights. It stays zero
    there. So names, order, groups, wrappers and layers that are frozen or of another
    model do not matter. The yielded set has, after the block, the names of the masks
    that training has kept, here or in an `enforce` inside.
    """
    names: dict[tuple[int, ...], dict[bytes, list[str]]] = {}
    for name, keep in masks.items():
        if not keep.all():
            same = names.setdefault(keep.shape, {})
            same.setdefault(np.packbits(keep).tobytes(), []).append(name)
    known: dict[nn.Parameter, _Pruned | None] = {}

    def look(parameter: nn.Parameter) -> _Pruned | None:
        likely = names.get(tuple(parameter.shape))
        if likely is None or not parameter.is_floating_point():
            return None
        values = parameter.detach()
        keep = ~(values.signbit() & (values == 0)).cpu().numpy()
        fits = likely.get(np.packbits(keep).tobytes())
        return _Pruned(parameter, keep, fits) if fits else None

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        for parameter in parameters_of(optimizer):
            if parameter not in known:
                known[parameter] = look(parameter)

    held: set[str] = set()
    with steps(before=before_step), _zeroed_by_steps(known):
        token = _held.set(held)
        try:
            yield held
        finally:
            _held.reset(token)
    for each in known.values():
        if each and each.is_zero():
            held.update(each.names)


@contextmanager
def _zeroed_by_steps(pruned: Mapping[nn.Parameter, "_Pruned | None"]) -> Iterator[None]:
    """Zero what is pruned after every step of an optimizer that holds it.

    A step with a closure sees no gradients of pruned entries: it may evaluate the
    closure at several points, as LBFGS does, and must not move them in between.
    """

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        def clear_gradients() -> None:
            for parameter in parameters_of(optimizer):
                if each := pruned.get(parameter):
                    each.zero_gradient()

        return after_closure((args, kwargs), clear_gradients)

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        for parameter in parameters_of(optimizer):
            if each := pruned.get(parameter):
                each.zero()
                each.zero_samples_from_now()

    with steps(before=before_step, after=after_step):
        try:
            yield
        finally:
            for each in filter(None, pruned.values()):
                each.leave_samples()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Refuse changes to a model while a smaller one stands in for it (`MaskError`).

    In an optimizer's step, or at the end: what it learned would be lost.
    """
    advice = (
        "whole model, but a smaller one is trained in its place; inside the block, "
        "train the model that masked() hands out, and make the optimizer of its "
        "parameters: with masked(model, message, example_inputs) as net: ..."
    )
    own = list(model.parameters())
    before = [(id(parameter), parameter._version) for parameter in own]

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        if not set(own).isdisjoint(parameters_of(optimizer)):
            raise MaskError(f"the optimizer holds the parameters of the {advice}")

    with steps(before=before_step):
        yield
        if [(id(p), p._version) for p in model.parameters()] != before:
            raise MaskError(f"the block has changed the {advice}")


#: Names of masks that the training inside `enforce_unseen` has kept.
_held: ContextVar[set[str]] = ContextVar("held")


class _Pruned:
    """A parameter, and which of its entries stay zero."""

    def __init__(
        self, parameter: nn.Parameter, keep: Mask, names: Sequence[str] = ()
    ) -> None:
        self.parameter = parameter
        self.keep = keep
        self.names = names  # of the masks that it may be of
        self._bits: torch.Tensor | None = None
        self._hook: RemovableHandle | None = None

    def zero(self) -> None:
        """Clear the bits of pruned entries: unlike a product, that clears NaN too."""
        self._clear(self.parameter.data)

    def zero_gradient(self) -> None:
        """Clear the gradient of pruned entries; a sparse one stays."""
        gradient = self.parameter.grad
        if gradient is not None and gradient.layout == torch.strided:
            self._clear(gradient.detach())

    def _clear(self, data: torch.Tensor) -> None:
        kind = _INTEGERS[data.element_size()]
        bits = self._bits
        if bits is None or bits.dtype != kind or bits.device != data.device:
            # Made where the parameter is now: a model may move inside the block.
            bits = torch.from_numpy(np.array(self.keep)).to(data.device, kind).neg_()
            self._bits = bits
        data.view(kind).bitwise_and_(bits)

    def zero_samples_from_now(self) -> None:
        """Zero pruned entries of the gradient of each sample when a backward pass ends.

        Optimizers of differential privacy, such as Opacus's, clip these before the step
        that hooks see: what will not move must not shorten the steps of the rest.
        """
        if self._hook is None and hasattr(self.parameter, "grad_sample"):
            engine = torch.autograd.Variable._execution_engine

            def later(_: torch.Tensor) -> None:  # they may be made after this gradient
                engine.queue_callback(self._zero_samples)

            self._hook = self.parameter.register_hook(later)  # type: ignore[no-untyped-call]

    def leave_samples(self) -> None:
        """Undo `zero_samples_from_now`."""
        if self._hook is not None:
            self._hook.remove()

    def _zero_samples(self) -> None:
        made: Any = getattr(self.parameter, "grad_sample", None)
        for samples in made if isinstance(made, list) else [made]:
            if samples is not None and self._bits is not None:
                samples.masked_fill_(self._bits == 0, 0)

    def is_zero(self) -> bool:
        """Tell whether the pruned entries are zero."""
        moved = (self.parameter.detach() != 0).cpu().numpy() > self.keep
        return not moved.any()


#: Integer types by their size in bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def resolve(model: nn.Module, masks: Masks) -> dict[str, NDArray[np.bool_]]:
    """Return masks under the names of ``model.named_parameters()``.

    Numbers stand for positions in ``model.state_dict()``, as in Flower's older API, and
    a tied weight keeps what all its names keep. Names need not agree in what
    `torch.compile`, DataParallel, DDP and PEFT add to them, nor in one prefix, where
    the masks are those of a part.

    Raises
    ------
    MaskError
        If a name is not a parameter of the model, or a shape or type differs.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = list(model.state_dict())
    aliases = _aliases(list(parameters), list(masks))
    resolved: dict[str, NDArray[np.bool_]] = {}
    for name, keep in masks.items():
        known = name if name in parameters else aliases.get(_plain(name), name)
        if known not in parameters and name.isdecimal() and int(name) < len(names):
            known = names[int(name)]
        if known not in parameters:
            hint = "hand over the module whose state_dict() the server's arrays are of"
            if name.isdecimal() or name in names:
                hint = (
                    "give the strategy model=Net(), so that it can tell buffers from "
                    "parameters"
                )
            raise MaskError(
                f"the mask names {name!r}, which is no parameter of the model; "
                f"known: {list(parameters)}; {hint}"
            )
        if not isinstance(keep, np.ndarray) or keep.dtype != np.bool_:
            raise MaskError(
                f"{name}: expected a NumPy array of bool (True = keep), got "
                f"{type(keep).__name__} of {getattr(keep, 'dtype', 'no type')}"
            )
        shape = tuple(parameters[known].shape)
        if shape != keep.shape:
            raise MaskError(
                f"{name}: expected a mask of shape {shape}, got {keep.shape}"
            )
        known = first[id(parameters[known])]
        resolved[known] = keep & resolved[known] if known in resolved else keep
    return resolved


#: What wrappers of a module put into the names of its parameters.
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|module|base_model\.model|default)\.")


def _plain(name: str) -> str:
    """Return a parameter's name without what wrappers put into it."""
    return _WRAPPERS.sub("", name)


def _aliases(known: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """Return plain name -> parameter, for names that only one parameter can have.

    If all `wanted` names lack the same prefix, so do the plain names.
    """
    plain: dict[str, list[str]] = {}
    for name in known:
        plain.setdefault(_plain(name), []).append(name)
    aliases = {short: names[0] for short, names in plain.items() if len(names) == 1}
    shorts = [_plain(name) for name in wanted]
    ends = [a[: -len(s)] for a in aliases for s in shorts[:1] if a.endswith(f".{s}")]
    fits = [p for p in ends if all(p + short in aliases for short in shorts)]
    if len(fits) == 1:
        return {short: aliases[fits[0] + short] for short in shorts}
    return aliases


def _pruned(model: nn.Module, masks: Masks) -> dict[nn.Parameter, _Pruned]:
    """Return the parameters that have pruned entries."""
    found = [(model.get_parameter(n), k) for n, k in resolve(model, masks).items()]
    return {p: _Pruned(p, keep) for p, keep in found if not keep.all()}
