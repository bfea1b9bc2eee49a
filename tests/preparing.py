"""Pruners as `AutoFLIP` prepares them, and what nodes measured as it hands it over."""

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn import functional

from autoflip_flwr.errors import WireError
from autoflip_flwr.method.structured import Group, Units
from autoflip_flwr.pruners import Problem, Pruner
from autoflip_flwr.pruners.store import Answer, Answers, Measured
from autoflip_flwr.settings import ExplorationSettings, PruningSettings

_numbers = itertools.count(1)
_scratch = tempfile.TemporaryDirectory("-measured")


def prepared(
    pruner: Pruner,
    initial: Mapping[str, np.ndarray],
    pruning: PruningSettings,
    directory: Any = None,
    units: Any = None,
    **more: Any,
) -> Pruner:
    if directory is not None and not isinstance(directory, Path):
        directory, units = None, directory
    pruner.prepare(
        Problem(
            initial=initial,
            pruning=pruning,
            exploration=more.pop("exploration", None) or ExplorationSettings(),
            directory=directory or Path(_scratch.name) / f"{next(_numbers)}",
            units=units,
            **more,
        )
    )
    return pruner


def measured(
    frame: bytes, shapes: Mapping[str, tuple[int, ...]], examples: float = 1.0
) -> Measured:
    """What the server makes of an answer; one that does not fit is a WireError."""
    answers = Answers(Path(_scratch.name), shapes)
    answers.begin(next(_numbers))
    answers.put(1, Answer(frame, None, examples))
    found = answers.get(1)
    if found is None:
        raise WireError(answers.failure(1))
    return found


def added(
    pruner: Pruner,
    node_id: int,
    frame: bytes,
    examples: float,
    start: Mapping[str, np.ndarray],
) -> None:
    pruner.add(node_id, measured(frame, pruner.shapes, examples), start)


def rows(*values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def pruning(threshold: float, **settings: Any) -> PruningSettings:
    return PruningSettings(threshold=threshold, **settings)


#: Four units: A: 3, 3; B: 0, 5; C: 6, 6; D: 5, 5, and what goes out of each.
FOUR = {"w": rows([3, 3], [0, 5], [6, 6], [5, 5]), "out": rows([7, 8, 9, 2])}


def four() -> Units:
    """Four neurons with two weights in and one out, of 12 parameters."""
    own = np.arange(4)
    return Units(
        groups=(Group("w", 0, 4),),
        parameters={"w": {0: own}, "out": {1: own}},
        buffers={},
        shapes={"w": (4, 2), "out": (1, 4)},
    )


PAIR = {
    "w": rows([0.5, -3, 0.1, 2]),
    "v": rows([-0.2, 4, -1, 0.3]),
    "bias": rows(0, 0),
}


def loss_of(model, x, y):
    return functional.cross_entropy(model(x), y)
