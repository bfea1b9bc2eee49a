"""What differential privacy of the guidance costs in accuracy and changes in the mask.

    python benchmarks/privacy.py quickstart
    python benchmarks/privacy.py short-mnist --data-dir PATH

Our two apps in one process, unstructured pruning, one mask from the guidance of all
clients; with --own the preset's pruning, whose first mask alone guidance decides.
Prints for each epsilon at delta 1e-5 top-1 after the last round, with its
standard deviation over the seeds, and how many of the parameters that the mask without
privacy (inf) keeps this mask keeps, too. `random` prunes at random.
"""

import argparse
import json
import logging
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import report
from flwr.app import Context, RecordDict

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from inprocess import LocalGrid

from autoflip_flwr import GuidancePrivacy, settings
from autoflip_flwr.app import client, server
from autoflip_flwr.app.runlog import DELTA

#: Private clients tell no signs.
SETTINGS = "exploration.warm-start=false exploration.epochs=5 "
GUIDANCE_ALONE = (
    "pruning.units=0 pruning.score=guidance pruning.gradual-rounds=0 "
    "pruning.balance=global pruning.vectors=true "
)


def noise_of(epsilon: float) -> float:
    """Return the noise with which one exploration has an epsilon."""
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        private = GuidancePrivacy(clip=1.0, noise=middle).epsilon(DELTA) <= epsilon
        low, high = (low, middle) if private else (middle, high)
    return high


def run(folder: Path, preset: str, overrides: str) -> tuple[Any, float]:
    """Do a run; return its mask, flat, and its accuracy."""
    config = {"preset": preset, "overrides": overrides, "resume": False}
    config["output-dir"] = str(folder)
    clients = settings.load(preset, overrides).strategy.min_nodes
    grid = LocalGrid(client.client_app(), range(1, clients + 1), run_config=config)
    server.serve(grid, Context(1, 1, {}, RecordDict(), grid.run_config))
    with np.load(folder / "mask.npz") as masks:
        mask = np.concatenate([keep.reshape(-1) for keep in masks.values()])
    return mask, json.loads((folder / "summary.json").read_text())["accuracy"]


def main() -> None:
    """Do all runs and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--own", action="store_true", help="the preset's own pruning")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8, 4, 2, 1])
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    arms = {"inf": "", "random": "strategy.name=random"} | {
        f"{epsilon:g}": "exploration.privacy-clip=1e-6 "
        f"exploration.privacy-noise={noise_of(epsilon)}"
        for epsilon in arguments.epsilons
    }
    found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(arguments.seeds):
            common = f"{SETTINGS}rounds={arguments.rounds} seed={seed} "
            common += "" if arguments.own else GUIDANCE_ALONE
            common += f"data.dir={arguments.data_dir!r} " if arguments.data_dir else ""
            masks = {}
            for arm, own in arms.items():
                folder = Path(name, f"{arm}-{seed}")
                masks[arm], accuracy = run(folder, arguments.preset, common + own)
                same = (masks[arm] & masks["inf"]).sum() / masks["inf"].sum()
                found[arm].append((accuracy, float(same)))
                print(seed, arm, accuracy, same, file=sys.stderr, flush=True)
    report(
        {
            arm: {
                "accuracy": statistics.mean(accuracy),
                "deviation": statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
                "mask_kept": statistics.mean(same),
            }
            for arm, rows in found.items()
            for accuracy, same in [tuple(zip(*rows, strict=True))]
        }
    )


if __name__ == "__main__":
    main()
