"""From a preset's ``model.*`` values to a network."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from autoflip_flwr.app.models import text, vision
from autoflip_flwr.app.models.initial import xavier_normal_
from autoflip_flwr.errors import SettingsError

Value: TypeAlias = int | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    make: Callable[..., nn.Module]
    sequence: bool = False  # (T,) tokens instead of (C, H, W) pixels
    channels: int | None = None  # None = any number
    smallest: int = 1  # least height and width, or length
    defaults: Mapping[str, Value] = field(default_factory=dict)

    def expects(self) -> str:
        if self.sequence:
            return f"(T,) with T >= {self.smallest}"
        channels = "C" if self.channels is None else self.channels
        return f"({channels}, H, W) with H and W >= {self.smallest}"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        if self.sequence:
            return len(shape) == 1 and shape[0] >= self.smallest
        return (
            len(shape) == 3
            and (self.channels is None or shape[0] == self.channels)
            and min(shape[1:]) >= self.smallest
        )


_MODELS: Mapping[str, _Model] = {
    "cnn": _Model(
        make=vision.cnn, smallest=4, defaults={"channels": (16, 32), "hidden": 128}
    ),
    "cnn_bn": _Model(
        make=vision.cnn_bn, smallest=4, defaults={"channels": (16, 32), "hidden": 128}
    ),
    "cnn6": _Model(make=vision.cnn6, smallest=22),
    "efficientnet_b3": _Model(make=vision.efficientnet_b3, channels=3, smallest=32),
    "resnet50": _Model(make=vision.resnet50, channels=3, smallest=32),
    "femnist_cnn": _Model(make=vision.femnist_cnn, smallest=10),
    "char_lstm": _Model(
        make=text.char_lstm,
        sequence=True,
        defaults={"embedding": 24, "hidden": 640, "vocabulary": 80},
    ),
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
        raise SettingsError(f"unknown model {name!r}; known: {', '.join(_MODELS)}")
    model = _MODELS[name]
    values = _checked_settings(name, model.defaults, settings)
    classes = _positive(num_classes)
    if classes is None:
        raise SettingsError(
            f"num_classes must be a whole number > 0, got {num_classes!r}"
        )
    shape = _checked_shape(name, model, input_shape)
    if seed is None:
        with torch.device("cpu"):
            return xavier_normal_(model.make(classes, shape, **values))
    generator = torch.Generator().manual_seed(_checked_seed(seed))
    # The constructors draw weights of their own, which are thrown away.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        module = model.make(classes, shape, **values)
        return xavier_normal_(module, generator=generator)


def _checked_settings(
    name: str, defaults: Mapping[str, Value], settings: Mapping[str, Any]
) -> dict[str, Value]:
    allowed = "; ".join(f"{key}: {_kind(value)}" for key, value in defaults.items())
    hint = f"allowed: {allowed}" if allowed else "it takes none"
    if unknown := sorted(set(settings) - set(defaults)):
        raise SettingsError(f"unknown settings {unknown} of model {name!r}; {hint}")
    values = dict(defaults)
    for key, given in settings.items():
        value = _parsed(given, defaults[key])
        if value is None:
            raise SettingsError(
                f"setting {key!r} of model {name!r} cannot be {given!r}; {hint}"
            )
        values[key] = value
    return values


def _kind(default: Value) -> str:
    if isinstance(default, tuple):
        return f"{len(default)} whole numbers > 0 (default {list(default)})"
    return f"whole number > 0 (default {default})"


def _parsed(given: Any, default: Value) -> Value | None:
    """Return the value in the form of its default, or None where it has no such form.

    YAML has no tuples: a list will do.
    """
    if not isinstance(default, tuple):
        return _positive(given)
    return _positives(given, len(default))


def _positives(given: Any, length: int | None = None) -> tuple[int, ...] | None:
    if not isinstance(given, list | tuple):
        return None
    values = tuple(value for item in given if (value := _positive(item)) is not None)
    return values if len(values) == len(given) == (length or len(given)) else None


def _positive(given: Any) -> int | None:
    number = _whole(given)
    return number if number is not None and number > 0 else None


def _whole(given: Any) -> int | None:
    if isinstance(given, bool):
        return None
    try:
        return operator.index(given)
    except TypeError:
        return None


def _checked_shape(name: str, model: _Model, given: Any) -> tuple[int, ...]:
    shape = _positives(given)
    if shape is None or not model.accepts(shape):
        raise SettingsError(
            f"model {name!r} expects input_shape {model.expects()}, got {given!r}"
        )
    return shape


def _checked_seed(seed: Any) -> int:
    number = _whole(seed)
    if number is None or not 0 <= number < 2**63:
        raise SettingsError(f"seed must be a whole number in [0, 2**63), got {seed!r}")
    return number
