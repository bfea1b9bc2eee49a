"""Time of a masked training step / time of a dense step.

    python benchmarks/step.py

SGD with momentum, 80 % pruned. Two equal models, one of them masked, take turns at a
forward pass, a backward pass and an optimizer step. The masked step reads and writes
every parameter once more (12 B each), so its share of the time falls with the batch
size. `setup` is the cost of `masked` once per round, in steps.
"""

import time

import torch
from common import paired, random_mask, report
from torch import nn
from torch.nn import functional

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


class Trainer:
    """A model that takes steps on one batch."""

    def __init__(self, name: str, batch: int) -> None:
        settings = MODELS[name]
        self.model: nn.Module = models.build(name, **settings, seed=0).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)
        self.x = torch.randn(batch, *settings["input_shape"])
        self.y = torch.randint(settings["num_classes"], (batch,))

    def steps(self) -> None:
        """Take the steps that are timed."""
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()


def measure(name: str, batch: int) -> dict[str, float]:
    """Return the paired timing of one model."""
    dense, pruned = Trainer(name, batch), Trainer(name, batch)
    arrays = training.state_arrays(pruned.model)
    masks = random_mask(arrays, set(trainable_names(pruned.model)), 0.2)
    start = time.perf_counter()
    with enforce(pruned.model, masks):
        pass
    setup = time.perf_counter() - start
    with enforce(pruned.model, masks):
        result = paired(pruned.steps, dense.steps, pairs=15)
    steps = setup * 1e3 / (result["baseline_ms"] / STEPS)
    return {**result, "setup": steps}


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
