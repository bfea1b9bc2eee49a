"""Time of a masked training step / time of a dense step.

    python benchmarks/step.py

SGD with momentum, 80 % pruned. Two equal models, one of them masked, take turns at a
forward pass, a backward pass and an optimizer step. The masked step reads and writes
every parameter once more (12 B each), so its share of the time falls with the batch
size. `setup` is the cost of `masked` once per round, in steps.
"""

import time
from functools import partial

import torch
from common import Trainer, paired, random_mask, report

from autoflip_flwr.app import models, training
from autoflip_flwr.units.enforce import enforce, trainable_names

MODELS = {
    "cnn": {"num_classes": 10, "input_shape": (1, 28, 28)},
    "cnn6": {"num_classes": 10, "input_shape": (3, 32, 32)},
    "femnist_cnn": {"num_classes": 62, "input_shape": (1, 28, 28)},
    "resnet50": {"num_classes": 100, "input_shape": (3, 32, 32)},
}
BATCHES = (32, 128)
STEPS = 5  # timed together


def measure(name: str, batch: int) -> dict[str, float]:
    """Return the paired timing of one model."""
    shape = MODELS[name]["input_shape"]
    dense, pruned = (
        Trainer(models.build(name, **MODELS[name], seed=0), shape, batch)
        for _ in range(2)
    )
    arrays = training.state_arrays(pruned.model)
    masks = random_mask(arrays, set(trainable_names(pruned.model)), 0.2)
    start = time.perf_counter()
    with enforce(pruned.model, masks):
        pass
    setup = time.perf_counter() - start
    with enforce(pruned.model, masks):
        steps = partial(pruned.step, STEPS), partial(dense.step, STEPS)
        result = paired(*steps, pairs=15)
    return {**result, "setup": setup * 1e3 / (result["baseline_ms"] / STEPS)}


def main() -> None:
    """Print a paired timing per model and batch."""
    report(
        {"threads": torch.get_num_threads()}
        | {
            f"{name}, batch {batch}": measure(name, batch)
            for name in MODELS
            for batch in BATCHES
        }
    )


if __name__ == "__main__":
    main()
