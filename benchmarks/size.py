"""From which size on a smaller network is a faster one: processor time of one thread.

    python benchmarks/size.py

For the networks of our presets, a training step of 32 images: dense / with 0.3 and 0.6
of the FLOPs left, units removed by random scores. Median of 25 pairs.
"""

import statistics
import time

import torch
from common import Trainer, report
from compact import keep_at

from autoflip_flwr import units
from autoflip_flwr.app import costs, models

#: Preset -> model, input shape, sizes, multiple of its units.
CASES = {
    "quickstart": ("cnn", (1, 8, 8), {}, 1),
    "short-mnist": ("cnn", (1, 28, 28), {"channels": (8, 16)}, 1),
    "mnist": ("cnn", (1, 28, 28), {}, 1),
    "thousand": ("cnn", (1, 28, 28), {"channels": (32, 64), "hidden": 512}, 1),
    "cifar10": ("cnn6", (3, 32, 32), {}, 16),
}


def seconds(trainer: Trainer) -> float:
    begun = time.process_time()
    for _ in range(2):
        trainer.step()
    return time.process_time() - begun


def measure(preset: str, share: float) -> dict[str, float]:
    name, shape, sizes, multiple = CASES[preset]
    model = models.build(name, num_classes=10, input_shape=shape, seed=0, **sizes)
    example = torch.randn(1, *shape)
    found = units.trace(model, example)
    keep = keep_at(found, model, share, multiple, example)
    small = units.shrink(model, found, keep)
    dense, less = Trainer(model, shape, 32), Trainer(small, shape, 32)
    pairs = [(seconds(dense), seconds(less)) for _ in range(28)][3:]
    operations = costs.flops(model, example)
    return {
        "operations": operations,
        "flops": costs.flops(small, example) / operations,
        "faster": statistics.median(before / after for before, after in pairs),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    report({f"{p}, {s}": measure(p, s) for p in CASES for s in (0.3, 0.6)})
