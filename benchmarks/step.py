"""A masked training step beside the dense one.

    python benchmarks/step.py

SGD with momentum, batch 32, 80 % pruned; forward, backward and optimizer step.
"""

import torch
from common import paired, random_mask, report
from torch.nn import functional

from autoflip_flwr import models, training

MODELS = {
    "cnn": {"num_classes": 10, "input_shape": (1, 28, 28)},
    "cnn6": {"num_classes": 10, "input_shape": (3, 32, 32)},
    "femnist_cnn": {"num_classes": 62, "input_shape": (1, 28, 28)},
    "resnet50": {"num_classes": 100, "input_shape": (3, 32, 32)},
}
BATCH = 32
STEPS = 10  # of a local epoch: what `masked` sets up is paid once per round


def main() -> None:
    """Print a paired timing per model."""
    result = {}
    for name, settings in MODELS.items():
        model = models.build(name, **settings, seed=0).train()
        arrays = training.state_arrays(model)
        masks = random_mask(arrays, set(training.trainable_names(model)), 0.2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        x = torch.randn(BATCH, *settings["input_shape"])
        y = torch.randint(settings["num_classes"], (BATCH,))

        def steps(model=model, optimizer=optimizer, x=x, y=y) -> None:
            for _ in range(STEPS):
                optimizer.zero_grad()
                functional.cross_entropy(model(x), y).backward()
                optimizer.step()

        def masked(steps=steps, model=model, masks=masks) -> None:
            with training.enforce(model, masks):
                steps()

        result[name] = paired(masked, steps, pairs=9)
    report({"batch": BATCH, "threads": torch.get_num_threads(), **result})


if __name__ == "__main__":
    main()
