"""Accuracy and bytes of a preset and of dense FedAvg, over seeds, by `flwr run`.

    python benchmarks/accuracy.py mnist --clients 20 --data-dir PATH --seeds 3
    python benchmarks/accuracy.py mnist --clients 20 --data-dir PATH --seeds 5
        "saliency-90=pruning.threshold=0.9 pruning.units=0.8 pruning.score=saliency"

A variant is a name and overrides. Without variants, the script runs those of the
README's table. Every run is its own simulation. Results stay in --output, and finished
runs are not repeated. Accuracy is top-1 of the global model on held-out data after the
last round.
"""

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

from common import report

ROOT = Path(__file__).parents[1]

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


def run(output: Path, preset: str, clients: int, overrides: str) -> dict:
    """Run a simulation unless its summary exists; return the summary."""
    path = output / "summary.json"
    if not path.exists():
        config = f'preset="{preset}" overrides="{overrides}" output-dir="{output}"'
        federation = f"num-supernodes={clients} client-resources-num-cpus=1"
        command = ["flwr", "run", str(ROOT), "--stream"]
        command += ["--run-config", config, "--federation-config", federation]
        done = subprocess.run(
            command,
            env={**os.environ, "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if not path.exists():
            raise SystemExit(f"{output}: no summary\n{done.stdout}\n{done.stderr}")
    return json.loads(path.read_text())


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
    common = arguments.overrides
    if arguments.data_dir:
        common += f" data.dir={Path(arguments.data_dir).resolve()}"
    variants = dict(variant.split("=", 1) for variant in arguments.variants or VARIANTS)
    table = {}
    for name, override in variants.items():
        found = [
            run(
                (arguments.output / arguments.preset / f"{name}-{seed}").resolve(),
                arguments.preset,
                arguments.clients,
                f"{common} {override} seed={seed}".strip(),
            )
            for seed in range(arguments.seeds)
        ]
        accuracies = [summary["accuracy"] for summary in found]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        totals = [
            summary["bytes"]["total"] / summary["bytes"]["dense_equivalent"]
            for summary in found
        ]
        table[name] = {
            "accuracy": statistics.mean(accuracies),
            "standard_error": spread / len(accuracies) ** 0.5,
            "accuracies": ", ".join(f"{accuracy:.4f}" for accuracy in accuracies),
            "density": found[0]["density"],
            "flops_of_dense": statistics.mean(
                s["flops"]["pruned"] / s["flops"]["dense"] for s in found
            ),
            "bytes_of_dense": statistics.mean(totals),
            "megabytes": statistics.mean(s["bytes"]["total"] / 1e6 for s in found),
            "seconds": statistics.mean(s["seconds"]["total"] for s in found),
        }
    report(table)


if __name__ == "__main__":
    main()
