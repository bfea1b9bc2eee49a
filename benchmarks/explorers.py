"""How many explorers a mask needs: the mask of some compared with that of all.

    python benchmarks/explorers.py --data-dir PATH

The clients of the preset `thousand` explore one after another, without a server. Some,
in five random draws each, make an unstructured mask at 80 % pruned. The result is the
share of the parameters kept by the mask of all that this mask keeps too.
"""

import argparse
import statistics

import numpy as np
from common import report

from autoflip_flwr import settings
from autoflip_flwr.app import build as experiment
from autoflip_flwr.app import data, training
from autoflip_flwr.method import guidance, mask

DRAWS = 5


def main() -> None:
    """Let all clients explore and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument(
        "--explorers", type=int, nargs="+", default=[1, 3, 10, 30, 100, 300]
    )
    parser.add_argument("--data-dir", default="")
    arguments = parser.parse_args()
    clients = arguments.clients
    chosen = settings.load(
        "thousand", f"strategy.min-nodes={clients} data.dir={arguments.data_dir!r}"
    )
    model = experiment.build_model(chosen)
    start = {n: v.copy() for n, v in training.state_arrays(model).items()}
    parts = data.load(
        "mnist",
        num_partitions=clients,
        dir=arguments.data_dir or None,
        partition=chosen.data.partition,
        classes_per_client=chosen.data.classes_per_client,
        seed=chosen.seed,
    )
    rng = np.random.default_rng(0)
    groups = {
        (count, draw): set(rng.choice(clients, count, replace=False).tolist())
        for count in arguments.explorers
        for draw in range(DRAWS)
    }
    groups[clients, 0] = set(range(clients))
    sums = {group: {n: np.zeros_like(v) for n, v in start.items()} for group in groups}
    for client in range(clients):
        samples = parts.partition(client)
        training.load_arrays(model, start)
        training.train(
            model, samples.x, samples.y, chosen.training, epochs=1, seed=client
        )
        found = guidance.squared_deviation(start, training.state_arrays(model))
        mean = np.float32(guidance.statistics(found).mean)
        for group, members in groups.items():
            if client in members:
                for name, value in found.items():
                    sums[group][name] += value / mean
    masks = {group: mask.from_scores(s, threshold=0.8) for group, s in sums.items()}
    whole = masks[clients, 0]
    kept = sum(int(keep.sum()) for keep in whole.values())
    result = {}
    for count in arguments.explorers:
        shares = [
            sum(int((keep & whole[n]).sum()) for n, keep in masks[count, draw].items())
            / kept
            for draw in range(DRAWS)
        ]
        result[str(count)] = {
            "share_of_the_mask": statistics.mean(shares),
            "least": min(shares),
            "largest": max(shares),
        }
    report({"clients": clients, "explorers": result})


if __name__ == "__main__":
    main()
