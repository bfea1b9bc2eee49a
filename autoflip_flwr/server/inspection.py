"""`autoflip inspect`: a preview of somebody's model, named on the command line."""

import difflib
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoflip_flwr import settings
from autoflip_flwr.errors import ModelError, SettingsError
from autoflip_flwr.server.preview import Preview
from autoflip_flwr.server.strategy import AutoFLIP


def inspect(
    name: str, inputs: Sequence[str], overrides: str = "", **federation: int | None
) -> Preview:
    """Preview a run of AutoFLIP around FedAvg.

    `name` is ``package.module:Net``: a class, a function without arguments, or a model.
    `inputs` have for each argument of the model the shape and, if it is not float32,
    the type: ``1,3,32,32``, ``1,80:int64``. `overrides` are settings, as
    `settings.load` takes them; `federation` is what `AutoFLIP.preview` takes. It is a
    ModelError if there is no such model, or it does not run on the inputs, and a
    SettingsError if an input or a setting is not understood.
    """
    chosen = settings.defaults(overrides)
    read = ("pruning.", "exploration.", "wire.", "rounds", "seed")
    given = dict(settings.parse_overrides(overrides))
    if unread := [key for key in given if not key.startswith(read)]:
        raise SettingsError(
            f"--overrides: a preview of AutoFLIP around FedAvg does not read {unread}, "
            f"only {list(read)}"
        )
    strategy = AutoFLIP(
        model=_model(name),
        example_inputs=tuple(_input(text) for text in inputs),
        pruning=chosen.pruning,
        exploration=chosen.exploration,
        wire=chosen.wire,
        seed=chosen.seed,
    )
    return strategy.preview(**federation)  # type: ignore[arg-type]


def _input(text: str) -> torch.Tensor:
    """Return zeros of a shape, which are token ids, too."""
    shape, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    sizes = shape.split(",")
    if not isinstance(dtype, torch.dtype) or not all(s.isdecimal() for s in sizes):
        raise SettingsError(
            "--input: expected the shape of one sample and, for token ids, its type: "
            f"1,3,32,32 or 1,80:int64; got {text!r}"
        )
    return torch.zeros([int(size) for size in sizes], dtype=dtype)


def _model(name: str) -> nn.Module:
    """Import and make a model."""
    place, _, path = name.partition(":")
    if not place or not path:
        raise ModelError(f"expected package.module:Net, got {name!r}")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        found: Any = import_module(place)
    except ModuleNotFoundError as error:
        if not f"{place}.".startswith(f"{error.name}."):
            raise ModelError(f"{place} cannot be imported: {error}") from error
        package, _, last = str(error.name).rpartition(".")
        parts = import_module(package).__path__ if package else None
        known = [module.name for module in pkgutil.iter_modules(parts)]
        raise ModelError(
            f"there is no module {error.name!r}{_meant(last, known, package)}; "
            f"looked in {Path.cwd()} and the installed packages"
        ) from error
    except Exception as error:  # whatever the module's own code raises
        raise ModelError(
            f"{place} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ModelError(f"{place} has no {part!r}{_meant(part, dir(found))}")
        found = getattr(found, part)
    makes = callable(found) and not isinstance(found, nn.Module)
    try:
        model = found() if makes else found
    except Exception as error:  # whatever the model's own code raises
        raise ModelError(
            f"{path}() fails: {error}; name a function without arguments that makes "
            "the model"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name}: expected an nn.Module, or what makes one, got "
            f"{type(model).__name__}"
        )
    return model


def _meant(word: str, known: Iterable[str], package: str = "") -> str:
    close = difflib.get_close_matches(word, known, n=1)
    dotted = f"{package}." if package else ""
    return f"; did you mean {dotted}{close[0]}?" if close else ""
