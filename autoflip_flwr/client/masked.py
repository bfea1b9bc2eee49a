"""Functions that an app calls to keep the mask of a message while it trains."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray
from torch import nn

from autoflip_flwr import units
from autoflip_flwr.errors import MaskError, SettingsError
from autoflip_flwr.types import Masks
from autoflip_flwr.units import enforce
from autoflip_flwr.units.inputs import ExampleInputs
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
        An array of the parameter's shape for each; empty if there is no mask: in an
        exploration, or without AutoFLIP.

    Raises
    ------
    WireError
        If the message is not one of AutoFLIP's server.
    """
    config = _config_of(message)
    if records.phase_of(config) in (None, "explore"):
        return {}
    return dict(records.Plan.of(config).masks)


@contextmanager
def masked(
    model: nn.Module,
    masks_or_message: Masks | Message | Mapping[str, Any],
    example_inputs: ExampleInputs | None = None,
) -> Iterator[nn.Module]:
    """Keep pruned weights at exactly zero inside the block, with any optimizer.

    They are zero after each step of a `torch.optim` optimizer and at the block's end.

    Parameters
    ----------
    model : nn.Module
        It has the trained weights when the block ends.
    masks_or_message : masks, Message, or config of the older API's ``fit``
        Without a mask (exploration, plain FedAvg) nothing is pruned.
    example_inputs : torch.Tensor, or tuple of arguments of the model, optional
        One sample that the model runs on. With it the block gets a physically smaller
        model if that pays: if it needs at most 0.8 of the operations (`units.PAYS`). At
        its end `model` gets the weights.

    Yields
    ------
    nn.Module
        The model to train or evaluate, and to pass to the optimizer.

    Raises
    ------
    SettingsError
        If an argument is of another type.
    MaskError
        If a mask does not fit the model, at the first message; or if an optimizer has
        the parameters of `model` although the block got a smaller one.

    Examples
    --------
    ::

        with masked(model, message, example_inputs) as net:
            train(net, loader)
    """
    if not isinstance(model, nn.Module):
        raise SettingsError(f"masked: expected an nn.Module first, got {model!r}")
    if not isinstance(masks_or_message, Message | Mapping):
        raise SettingsError(
            "masked: expected the message, its config or masks by name, got "
            f"{masks_or_message!r}: with masked(model, message): ..."
        )
    if isinstance(masks_or_message, Message) or not _is_masks(masks_or_message):
        masks = _masks_for(model, _config_of(masks_or_message))
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
    finally:  # keep what the block learned before an error
        units.expand(small, model)


def exploring(message: Message | Mapping[str, Any]) -> bool:
    """Tell whether a call of the app is one epoch of an exploration."""
    return records.phase_of(_config_of(message)) == "explore"


def _masks_for(model: nn.Module, config: Mapping[str, Any]) -> Masks:
    """Return the masks of a message; an exploration's keep all.

    So a model that they do not fit is an error at the first message.
    """
    if records.phase_of(config) is None:
        return {}
    manifest = records.manifest_of(config)
    numbered = all(e.name == str(i) for i, e in enumerate(manifest.entries))
    own = len(model.state_dict())
    if numbered and own != len(manifest.entries):
        raise MaskError(
            f"expected a model of {len(manifest.entries)} arrays, as the message has, "
            f"got {type(model).__name__} with {own}: hand over the module whose "
            "state_dict() the server's arrays are of"
        )
    every = {n: np.broadcast_to(np.True_, s) for n, s in manifest.shapes.items()}
    return {**every, **masks_from(config)}


def _config_of(message: Message | Mapping[str, Any]) -> Mapping[str, Any]:
    return records.config_of(message) if isinstance(message, Message) else message


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
