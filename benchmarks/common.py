"""Shared by the benchmark scripts: a model's arrays, a mask, paired timings."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.app import models, training
from autoflip_flwr.method import mask
from autoflip_flwr.types import Array
from autoflip_flwr.units.enforce import trainable_names

RESNET50 = {"name": "resnet50", "num_classes": 100, "input_shape": (3, 32, 32)}


def arrays_of(model: Mapping[str, Any] = RESNET50) -> tuple[dict[str, Array], set[str]]:
    """Return a model's state arrays and the names of its trainable ones."""
    net = models.build(**model, seed=0)
    return training.state_arrays(net), set(trainable_names(net))


def random_mask(
    arrays: Mapping[str, Array], names: set[str], density: float
) -> dict[str, NDArray[np.bool_]]:
    """Return an unstructured mask of the given density."""
    rng = np.random.default_rng(0)
    scores = {
        name: rng.random(value.shape, np.float32)
        for name, value in arrays.items()
        if name in names
    }
    return mask.from_scores(scores, threshold=1 - density)


def paired(
    first: Callable[[], object], second: Callable[[], object], *, pairs: int
) -> dict[str, float]:
    """Time two functions in turn; medians in milliseconds, and first/second."""
    first()
    second()
    times: list[tuple[float, float]] = []
    for _ in range(pairs):
        times.append((_seconds(first), _seconds(second)))
    ratios = [a / b for a, b in times]
    return {
        "ms": 1e3 * statistics.median(a for a, _ in times),
        "baseline_ms": 1e3 * statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "ratio_of_best": min(a for a, _ in times) / min(b for _, b in times),
        "ratio_least": min(ratios),
        "ratio_largest": max(ratios),
        "pairs": pairs,
    }


def report(result: Mapping[str, Any]) -> None:
    """Print a result as JSON, floats to five digits."""
    print(json.dumps(_rounded(result), indent=2))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result
    return elapsed
