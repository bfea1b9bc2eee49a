"""Time of a round's mask for 23.7 M parameters / time of FedAvg's aggregation.

    python benchmarks/masking.py --explorers 5 --explorers 500
    python benchmarks/masking.py --explorers 5 --units 0.8

The masks are those of rounds in which the density falls, at the default settings.
FedAvg runs `FedAvg.aggregate_train` on 5 dense replies. Memory is the peak of what
Python and NumPy allocate while the first mask is made, which reads the guidance, minus
the allocation before the first explorer, in float32 models. 500 explorers need 12 GB of
disk.
"""

import argparse
import itertools
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from common import RESNET50, arrays_of, paired, report
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from autoflip_flwr import units
from autoflip_flwr.app import models
from autoflip_flwr.pruners import AutoFlipPruner, Problem
from autoflip_flwr.pruners.store import Answer, Answers
from autoflip_flwr.settings import PruningSettings
from autoflip_flwr.wire import codec
from autoflip_flwr.wire.flower import become_task

SAMPLED = 5


def replies(arrays: dict[str, np.ndarray]) -> list[Message]:
    """Return dense replies as FedAvg aggregates them."""
    become_task()
    messages = []
    for node_id in range(SAMPLED):
        content = RecordDict(
            {
                "arrays": ArrayRecord(list(arrays.values())),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        messages.append(Message(content, node_id, "train"))
    return messages


def main() -> None:
    """Print time and memory for each number of explorers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--explorers", type=int, action="append")
    parser.add_argument("--units", type=float, default=0.0)
    arguments = parser.parse_args()
    # The density falls in every call, so that every call makes a mask.
    chosen = PruningSettings(units=arguments.units, gradual_rounds=10_000)
    model = models.build(**RESNET50, seed=0)
    found = units.trace(model, torch.zeros(1, *RESNET50["input_shape"]))
    arrays, names = arrays_of()
    weights = {name: value for name, value in arrays.items() if name in names}
    size = sum(value.size for value in weights.values())
    messages = replies(weights)
    fedavg = FedAvg()
    rng = np.random.default_rng(0)
    frames = [
        codec.quantize(
            {
                name: np.square(1e-3 * rng.standard_normal(value.shape, np.float32))
                for name, value in weights.items()
            }
        )
        for _ in range(SAMPLED)
    ]
    result = {"parameters": size, "sampled": SAMPLED}
    for explorers in arguments.explorers or [5, 500]:
        with tempfile.TemporaryDirectory() as folder:
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            pruner = AutoFlipPruner()
            pruner.prepare(
                Problem(
                    initial=weights,
                    pruning=chosen,
                    directory=Path(folder),
                    units=found,
                )
            )
            answers = Answers(Path(folder) / "answers", pruner.shapes)
            answers.begin(1)
            for node_id in range(explorers):
                answers.put(node_id, Answer(frames[node_id % SAMPLED]))
                pruner.add(node_id, answers.get(node_id), weights)
            answers.forget()
            tracemalloc.reset_peak()
            pruner.learn(None, pruner.masks(range(SAMPLED), weights, 1))
            peak = tracemalloc.get_traced_memory()[1] - before
            tracemalloc.stop()
            rounds = itertools.count(2)
            result[f"explorers_{explorers}"] = {
                **paired(
                    lambda pruner=pruner, rounds=rounds: pruner.masks(
                        range(SAMPLED), weights, next(rounds)
                    ),
                    lambda: fedavg.aggregate_train(1, messages),
                    pairs=15,
                ),
                "peak_models": peak / (4 * size),
            }
    report(result)


if __name__ == "__main__":
    main()
