"""Time of a checkpoint / time of a round: the six-layer CNN, momentum at the server.

    python benchmarks/checkpoint.py

7.6 M parameters, AutoFLIP around FedAvgM, 20 explorers, 80 % pruned. The round is the
smallest one: one client, one local epoch of 2,000 images in batches of 350, on all
cores. `paper-cifar10` has five clients and five epochs. A checkpoint is written to disk
and synced, so the disk limits it: `write_and_sync` writes the same number of bytes.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import report
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvgM

from autoflip_flwr import AutoFLIP, Checkpointed
from autoflip_flwr.app import models, training
from autoflip_flwr.pruners.store import Answer, Answers
from autoflip_flwr.settings import PruningSettings, load
from autoflip_flwr.wire import codec
from autoflip_flwr.wire import records as wire

CNN6 = {"name": "cnn6", "num_classes": 10, "input_shape": (3, 32, 32)}
EXPLORERS = 20
TIMES = 9


def median(function: Callable[[int], object]) -> float:
    """Return the median time of some calls, in milliseconds."""
    times = []
    for number in range(TIMES + 1):
        began = time.perf_counter()
        function(number)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[1:])


def explored(folder: Path) -> tuple[AutoFLIP, ArrayRecord]:
    """Return a strategy after a first round, and its global model."""
    model = models.build(**CNN6, seed=0)
    arrays = wire.record_of(training.state_arrays(model))
    inner = FedAvgM(server_momentum=0.9)
    inner.current_arrays = arrays
    inner.momentum_vector = arrays.to_numpy_ndarrays()
    strategy = AutoFLIP(
        inner,
        pruning=PruningSettings(population_weight=1.0),
        store=folder / "guidance",
    )
    strategy.state(arrays)  # adopts the arrays as its global model
    rng = np.random.default_rng(0)
    pruner = strategy.rounds.pruner
    start = dict(strategy.rounds.arrays)
    answers = Answers(folder / "answers", pruner.shapes)
    answers.begin(1)
    for node_id in range(EXPLORERS):
        matrix = {
            name: rng.random(value.shape, np.float32) for name, value in start.items()
        }
        answers.put(node_id, Answer(codec.quantize(matrix)))
        pruner.add(node_id, answers.get(node_id), start)
    strategy.rounds.begin(1, [0])
    return strategy, arrays


def epoch() -> float:
    """Return the milliseconds of one client's local epoch."""
    settings = load("paper-cifar10").training
    model = models.build(**CNN6, seed=0)
    x = np.random.default_rng(0).normal(0, 1, (2000, 3, 32, 32)).astype(np.float32)
    y = np.arange(2000) % 10
    return median(lambda _: training.train(model, x, y, settings, epochs=1, seed=0))


def main() -> None:
    """Print the times, and the share of the smallest round."""
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        strategy, arrays = explored(folder)
        run = Checkpointed(strategy, folder)
        saved = median(lambda number: run._save(number, arrays, {}))
        size = max(folder.glob("*.safetensors")).stat().st_size
        data = os.urandom(size)

        def plain(_: int) -> None:
            with (folder / "plain").open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

        limit = median(plain)
    least = epoch()
    report(
        {
            "megabytes": size / 1e6,
            "checkpoint_ms": saved,
            "write_and_sync_ms": limit,
            "round_of_one_client_and_epoch_ms": least,
            "share": saved / least,
        }
    )


if __name__ == "__main__":
    main()
