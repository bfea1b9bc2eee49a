"""Accuracy and bytes of a preset and of dense FedAvg, over seeds, by `autoflip run`.

    python benchmarks/accuracy.py mnist --clients 20 --data-dir PATH --seeds 3
    python benchmarks/accuracy.py mnist --clients 20 --data-dir PATH --seeds 5
        "saliency-90=pruning.threshold=0.9 pruning.units=0.8 pruning.score=saliency"

A variant is a name and overrides. Without variants, the script runs those of the
README's table. Every run is its own simulation. Results stay in --output, and finished
runs are not repeated. Accuracy is top-1 of the global model on held-out data after the
last round.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from common import report

from autoflip_flwr.app.folder import is_finished
from autoflip_flwr.compare.results import Arm, Run, cost_row, read_run

VARIANTS = (
    "fedavg=strategy.name=fedavg",
    "single-60=pruning.threshold=0.6 pruning.units=0",
    "single-80=pruning.threshold=0.8 pruning.units=0",
    "half-80=pruning.threshold=0.8 pruning.units=0.5",
    "hybrid-80=pruning.threshold=0.8 pruning.units=0.8",
    "single-90=pruning.threshold=0.9 pruning.units=0",
    "hybrid-90=pruning.threshold=0.9 pruning.units=0.8",
    "saliency-90=pruning.threshold=0.9 pruning.units=0.8 pruning.score=saliency",
)


def run(output: Path, preset: str, overrides: str) -> Run:
    """Do a run unless it is finished; read it."""
    if not is_finished(output):
        words = [preset, *shlex.split(overrides), "--output", str(output)]
        subprocess.run(["autoflip", "run", *words], stdout=sys.stderr, check=True)
    return read_run(output)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("variants", nargs="*", metavar="NAME=OVERRIDES")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--overrides", default="")
    parser.add_argument("--output", type=Path, default=Path("runs/accuracy"))
    arguments = parser.parse_intermixed_args()
    common = f"strategy.min-nodes={arguments.clients} {arguments.overrides}"
    if arguments.data_dir:
        common += f" data.dir={shlex.quote(str(Path(arguments.data_dir).resolve()))}"
    variants = dict(variant.split("=", 1) for variant in arguments.variants or VARIANTS)
    table = {}
    for name, override in variants.items():
        folder = (arguments.output / arguments.preset).resolve()
        runs = [
            run(
                folder / f"{name}-{seed}",
                arguments.preset,
                f"{common} {override} seed={seed}",
            )
            for seed in range(arguments.seeds)
        ]
        row = cost_row(Arm(name, tuple(runs)), None)
        accuracies = [f"{run.summary.accuracy:.4f}" for run in runs]
        table[name] = {
            "accuracy": row.accuracy.mean,
            "standard_error": row.accuracy.error,
            "accuracies": ", ".join(accuracies),
            "density": row.density,
            "flops_of_dense": row.flops / row.flops_dense,
            "bytes_of_dense": row.bytes_total.mean / row.bytes_dense,
            "megabytes": row.bytes_total.mean / 1e6,
            "seconds": row.seconds.mean,
        }
    report(table)


if __name__ == "__main__":
    main()
