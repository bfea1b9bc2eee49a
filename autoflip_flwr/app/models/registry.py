"""From a preset's ``model.*`` values to a network."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError, validate_call
from torch import nn

from autoflip_flwr.app.models import networks
from autoflip_flwr.app.models.initial import xavier_normal_
from autoflip_flwr.errors import SettingsError
from autoflip_flwr.settings import meant

_MODELS: dict[str, Callable[..., nn.Module]] = {
    make.__name__: make
    for make in (
        networks.cnn,
        networks.cnn_bn,
        networks.cnn6,
        networks.mnist_cnn,
        networks.efficientnet_b3,
        networks.resnet50,
        networks.femnist_cnn,
        networks.char_lstm,
    )
}


def names() -> tuple[str, ...]:
    """Return the names `build` knows."""
    return tuple(_MODELS)


def build(
    name: str,
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    seed: int | None = None,
    **settings: Any,
) -> nn.Module:
    """Build a model with Xavier normal weights and zero biases, on the CPU.

    Parameters
    ----------
    name : str
        One of `names`.
    num_classes : int
        Width of the last layer.
    input_shape : tuple of int
        One sample without its batch dimension: ``(C, H, W)`` pixels or ``(T,)`` tokens.
    seed : int, default None
        At least 0. The same seed gives the same weights, and torch's global random
        state does not move. None draws from that global state.
    **settings
        The model's own: ``channels=(16, 32)`` and ``hidden=128`` of ``cnn``;
        ``embedding=24``, ``hidden=640`` and ``vocabulary=80`` of ``char_lstm``.

    Returns
    -------
    nn.Module
        In training mode.

    Raises
    ------
    SettingsError
        The name or a setting is unknown, or a value is impossible.
    """
    if name not in _MODELS:
        raise SettingsError(
            f"unknown model {name!r}; known: {', '.join(_MODELS)}{meant(name, _MODELS)}"
        )
    make = _MODELS[name]
    try:
        generator = None if seed is None else _generator(seed=seed)
        # The constructors draw weights that are thrown away: not from the caller's
        # random state, if there is a seed.
        fork = torch.random.fork_rng(devices=[], enabled=seed is not None)
        with fork, torch.device("cpu"):
            model = make(num_classes=num_classes, input_shape=input_shape, **settings)
            return xavier_normal_(model, generator=generator)
    except ValidationError as error:
        raise _explained(name, error) from None


@validate_call
def _generator(
    *, seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)]
) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _explained(name: str, error: ValidationError) -> SettingsError:
    texts = [
        f"{'.'.join(map(str, each['loc']))}: {each['msg']}, got {each['input']!r}"
        for each in error.errors()
    ]
    make = inspect.unwrap(_MODELS[name])  # from pydantic's wrapper
    defaults = inspect.getfullargspec(make).kwonlydefaults or {}
    settings = ", ".join(f"{key}={value}" for key, value in defaults.items()) or "none"
    return SettingsError(f"model {name!r}: {'; '.join(texts)}; settings: {settings}")
