"""Shared by the benchmark scripts: models, masks, training steps, paired timings."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from autoflip_flwr.app import models, training
from autoflip_flwr.method import mask
from autoflip_flwr.types import Array
from autoflip_flwr.units.enforce import trainable_names

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


class Trainer:
    """A model that takes steps on one batch of ten classes."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], batch: int) -> None:
        self.model = model.to(DEVICE)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)
        self.x = torch.randn(batch, *shape, device=DEVICE)
        self.y = torch.randint(10, (batch,), device=DEVICE)

    def step(self, times: int = 1) -> None:
        """Take training steps."""
        self.model.train()
        for _ in range(times):
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
        wait()

    def infer(self) -> None:
        """Evaluate the batch."""
        self.model.eval()
        with torch.inference_mode():
            self.model(self.x)
        wait()


def wait() -> None:
    """Wait for a GPU to have done its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


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
