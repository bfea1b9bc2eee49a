"""What an app calls inside its own training: the mask of a message, kept."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray
from torch import nn

from autoflip_flwr import units
from autoflip_flwr.errors import MaskError
from autoflip_flwr.types import Masks
from autoflip_flwr.units import enforce
from autoflip_flwr.units.surgery import ExampleInputs
from autoflip_flwr.wire import records


def masks_from(
    message: Message | Mapping[str, Any],
) -> dict[str, NDArray[np.bool_]]:
    """Return the mask of a message, name -> bool array (True = keep).

    Parameters
    ----------
    message : Message, or the config of the older API's ``fit(parameters, config)``

    Returns
    -------
    dict
        Empty where there is no mask: while exploring, or without AutoFLIP.
    """
    config = records.config_of(message) if isinstance(message, Message) else message
    if records.phase_of(config) in (None, "explore"):
        return {}
    return dict(records.Plan.of(config).masks)


@contextmanager
def masked(
    model: nn.Module,
    masks_or_message: Masks | Message | Mapping[str, Any],
    example_inputs: ExampleInputs | None = None,
) -> Iterator[nn.Module]:
    """Keep pruned weights at exactly zero inside the block, whatever the optimizer.

    They are zero after each step of a `torch.optim` optimizer and when the block ends.

    Parameters
    ----------
    model : nn.Module
        The model whose weights are wanted when the block ends.
    masks_or_message : masks, Message, or config of the older API's ``fit``
        Where there is no mask in it (exploration, plain FedAvg) nothing is pruned.
    example_inputs : torch.Tensor, or tuple of arguments of the model, optional
        One sample that the model runs on. With it the block gets a physically smaller
        model where that pays (`units.pays`), and `model` gets back what it learned.

    Yields
    ------
    nn.Module
        The model to train or evaluate inside the block, and to give to the optimizer.

    Raises
    ------
    MaskError
        If a mask does not fit the model, or an optimizer steps on the whole model's
        parameters where a smaller one was handed out.

    Examples
    --------
    ::

        with masked(model, message, example_inputs) as net:
            train(net, loader)
    """
    if isinstance(masks_or_message, Message) or not _is_masks(masks_or_message):
        masks = masks_from(masks_or_message)
    else:
        masks = dict(masks_or_message)
    small = None
    if example_inputs is not None:
        masks = enforce.resolve(model, masks)
        small = units.compact_if_it_pays(model, masks, example_inputs)
    if small is None:
        with enforce.enforce(model, masks):
            yield model
        return
    try:
        own = units.small_masks(small, masks)
        with enforce.untouched(model), enforce.enforce(small, own):
            yield small
    finally:  # also what a block learned before it failed
        units.expand(small, model)


def exploring(message: Message | Mapping[str, Any]) -> bool:
    """Tell whether a call of the app is one epoch of an exploration."""
    config = records.config_of(message) if isinstance(message, Message) else message
    return records.phase_of(config) == "explore"


def _is_masks(value: Mapping[str, Any]) -> bool:
    """Tell masks from a config, which holds no arrays."""
    arrays = {name: keep for name, keep in value.items() if hasattr(keep, "shape")}
    for name, keep in arrays.items():
        if not (isinstance(keep, np.ndarray) and keep.dtype == np.bool_):
            raise MaskError(
                f"{name}: expected a NumPy array of bool (True = keep), got "
                f"{type(keep).__name__} of {getattr(keep, 'dtype', 'no type')}"
            )
    return bool(arrays)
