"""Mask whole units of a model; make it physically smaller where that pays."""

import logging
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from torch import nn

from autoflip_flwr.errors import MaskError, ModelError, SettingsError
from autoflip_flwr.method.structured import Keep, Limits, Units
from autoflip_flwr.types import Masks, Scores
from autoflip_flwr.units import enforce
from autoflip_flwr.units.graph import trace
from autoflip_flwr.units.inputs import ExampleInputs
from autoflip_flwr.units.surgery import shrink, small_masks

#: Share of the operations, at most, for which a compact model is made. Widths that are
#: no multiples of the hardware's vectors cost some of what fewer operations save.
PAYS = 0.8

_log = logging.getLogger("flwr")


def mask_units(
    model: nn.Module,
    scores: Scores,
    *,
    share: float,
    example_inputs: ExampleInputs,
    floor: float = 0.0,
    min_units: int = 1,
    multiple: int = 1,
) -> dict[str, NDArray[np.bool_]]:
    """Zero whole units, the lowest scores first, until a share is pruned.

    Parameters
    ----------
    model : nn.Module
    scores : mapping of name -> array
        A score per entry of each prunable parameter; a larger one is kept first. A
        unit's score is the mean over all entries that go with it.
    share : float
        Share of the parameters in `scores` to prune, in [0, 1]. Never more is pruned,
        and less by less than one unit.
    example_inputs : torch.Tensor, or tuple of arguments of the model
    floor : float
        In [0, 1]. Least share of every group's units that is kept.
    min_units : int
        Least number of every group's units that is kept, >= 1.
    multiple : int
        A group is left whole or at a multiple of this.

    Returns
    -------
    dict of name -> bool array
        True = keep; names and shapes of `scores`.

    Raises
    ------
    SettingsError
        If a number is impossible.
    MaskError
        If the groups would have to lose all their units, or a score does not fit.
    ModelError
        If the model cannot be traced.
    """
    if not 0 <= share <= 1:
        raise SettingsError(f"expected a share in [0, 1], got {share}")
    limits = Limits(floor=floor, min_units=min_units, multiple=multiple)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, score in scores.items():
        if name not in shapes or np.shape(score) != shapes[name]:
            expected = (
                f"of shape {shapes[name]}"
                if name in shapes
                else f"of a parameter, one of {list(shapes)}"
            )
            raise MaskError(
                f"{name}: expected a score {expected}, got shape {np.shape(score)}"
            )
    units = trace(model, example_inputs)
    budget = int(share * sum(np.size(score) for score in scores.values()))
    units.check_budget(scores, budget=budget, limits=limits)
    return units.masks(units.choose(scores, budget=budget, limits=limits), scores)


def compact(model: nn.Module, masks: Masks, example_inputs: ExampleInputs) -> nn.Module:
    """Return a physically smaller copy of a masked model, without its empty units.

    Outputs, gradients of kept entries and weights after training are those of the
    masked model; not so what depends on the width itself: dropout's random draws, and
    rules that look at a whole tensor or model (clipping the norm of gradients,
    Adafactor). Masked single weights are zero in it; `masked` with `small_masks` keeps
    them so.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    masks : mapping of name -> bool array
        True = keep. A parameter without a mask is kept whole.
    example_inputs : torch.Tensor, or tuple of arguments of the model

    Returns
    -------
    nn.Module
        Of the same class, on the same device.

    Raises
    ------
    MaskError
        If a mask does not fit the model, or empties a group.
    ModelError
        If the model cannot be traced.
    """
    masks = enforce.resolve(model, masks)
    units = trace(model, example_inputs)
    return _shrunk(model, masks, units, units.used(masks))


def _shrunk(model: nn.Module, masks: Masks, units: Units, used: Keep) -> nn.Module:
    small = shrink(model, units, used)
    enforce.zero(small, small_masks(small, masks))
    return small


def compact_if_it_pays(
    model: nn.Module, masks: Masks, example_inputs: ExampleInputs
) -> nn.Module | None:
    """Return `compact`'s model, or None where a client trains the whole one."""
    masks = enforce.resolve(model, masks)
    try:
        pays = _what_pays(model, masks, example_inputs)
    except ModelError as error:
        _log.warning("the model is trained whole: %s", error)
        return None
    return None if pays is None else _shrunk(model, masks, *pays[1:])


def operations_left(
    model: nn.Module, masks: Masks, example_inputs: ExampleInputs
) -> float:
    """Return the share of the operations that a client's network needs, in [0, 1].

    It is 1 where a client trains the whole model: if a smaller one needs more than
    `PAYS`, if the model cannot be traced, or if it has hooks on its parameters, which
    would not see the smaller model's gradients.
    """
    with suppress(ModelError):
        pays = _what_pays(model, enforce.resolve(model, masks), example_inputs)
        return 1.0 if pays is None else pays[0]
    return 1.0


def _what_pays(
    model: nn.Module, masks: Masks, example_inputs: ExampleInputs
) -> tuple[float, Units, Keep] | None:
    """Return the share of the operations that is left, and of which units."""
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    hooked = any(getattr(p, each) for p in model.parameters() for each in hooks)
    if hooked or not loses_units(masks):
        return None
    units = trace(model, example_inputs)
    used = units.used(masks)
    share = units.operations(units.levelled(used)) / max(1, units.operations())
    return (share, units, used) if share <= PAYS else None


def loses_units(masks: Masks) -> bool:
    """Tell whether a mask may have empty units: a row of some matrix is empty."""
    return any(
        keep.ndim >= 2
        and keep.size > 0
        and not keep.reshape(len(keep), -1).any(axis=1).all()
        for keep in masks.values()
    )
