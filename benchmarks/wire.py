"""Bytes of real train messages / bytes that must be sent at least.

    python benchmarks/wire.py

Per model, one round of AutoFLIP with two clients in this process, 80 % pruned. The
bound is ``1.02 * (kept * itemsize + mask bits / 8 (down only) + buffers) + 4 KiB``.
"""

import sys
from pathlib import Path

import numpy as np
from common import report
from flwr.app import (
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from autoflip_flwr import AutoFLIP, AutoFlipMod
from autoflip_flwr.app import models, training
from autoflip_flwr.method import mask
from autoflip_flwr.settings import PruningSettings, WireSettings
from autoflip_flwr.units.enforce import trainable_names
from autoflip_flwr.wire import records as wire

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from inprocess import LocalGrid

MODELS = {
    "cnn": {"num_classes": 10, "input_shape": (1, 28, 28)},
    "cnn6": {"num_classes": 10, "input_shape": (3, 32, 32)},
    "femnist_cnn": {"num_classes": 62, "input_shape": (1, 28, 28)},
    "char_lstm": {"num_classes": 80, "input_shape": (80,)},
    "efficientnet_b3": {"num_classes": 10, "input_shape": (3, 32, 32)},
    "resnet50": {"num_classes": 100, "input_shape": (3, 32, 32)},
}

app = ClientApp(mods=[AutoFlipMod()])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Replace training: every floating entry moves a little, at random."""
    rng = np.random.default_rng(context.node_id)
    moved = {
        name: value + rng.normal(0, 1e-3, value.shape).astype(value.dtype)
        if value.dtype.kind == "f"
        else value
        for name, value in wire.arrays_of(message.content["arrays"]).items()
    }
    metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
    content = RecordDict({"arrays": wire.record_of(moved), "metrics": metrics})
    return Message(content, reply_to=message)


def measure(name: str, settings: dict, values: str) -> dict[str, float]:
    """Return bytes and bound of the messages of one round."""
    model = models.build(name, **settings, seed=0)
    arrays = training.state_arrays(model)
    names = trainable_names(model)
    strategy = AutoFLIP(
        threshold=0.8,
        pruning=PruningSettings(prunable=tuple(names)),
        wire=WireSettings(values=values),
    )
    grid = LocalGrid(app, [1, 2])
    record = wire.record_of(arrays)
    messages = list(strategy.configure_train(1, record, ConfigRecord(), grid))
    down = wire.count_bytes(messages[0].content)
    replies = grid.send_and_receive(messages)
    up = wire.count_bytes(replies[0].content)
    masks = strategy.rounds.plan.masks
    bits = sum(keep.size for keep in masks.values())
    kept = mask.density(masks) * bits * np.dtype(values).itemsize
    buffers = sum(v.nbytes for n, v in arrays.items() if n not in masks)
    return {
        "down": down,
        "down_of_bound": down / (1.02 * (kept + bits / 8 + buffers) + 4096),
        "up": up,
        "up_of_bound": up / (1.02 * (kept + buffers) + 4096),
        "dense": record.count_bytes(),
    }


def main() -> None:
    """Print each model's figures."""
    report(
        {
            f"{name} {values}": measure(name, settings, values)
            for name, settings in MODELS.items()
            for values in ("float32", "float16")
        }
    )


if __name__ == "__main__":
    main()
