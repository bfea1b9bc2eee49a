"""Time of `autoflip compare` / time of the same runs without it.

    python benchmarks/compare.py quickstart --overrides "rounds=20"

The bare runs go one after another on a running Ray, with clients on all cores. The
comparison starts and ends its own Ray. A ratio below 1 means that the comparison is
faster: while the server of one run works, the clients of another train.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import ray
from common import report

from autoflip_flwr.compare import plan as compare
from autoflip_flwr.compare.simulation import simulate


def main() -> None:
    """Do the runs twice and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("--strategies", default="fedavg,autoflip")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--overrides", default="")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        planned = {
            kind: compare.plan(
                arguments.preset,
                output=Path(folder) / kind,
                strategies=arguments.strategies.split(","),
                seeds=arguments.seeds,
                overrides=arguments.overrides,
            )
            for kind in ("bare", "compared")
        }
        ray.init(
            include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
        bare = 0.0
        for number, run in enumerate([planned["bare"][0], *planned["bare"]]):
            run.partial.mkdir(parents=True, exist_ok=True)
            config = {
                "preset": run.settings.preset,
                "overrides": run.overrides,
                "output-dir": str(run.partial / str(number)),
            }
            nodes = run.settings.strategy.min_nodes
            log = str(run.partial / f"log-{number}.txt")
            start = time.perf_counter()
            ray.get(simulate(nodes, config, log))
            if number:  # the first one warms the workers
                bare += time.perf_counter() - start
        ray.shutdown()
        start = time.perf_counter()
        compare.run(planned["compared"])
        seconds = time.perf_counter() - start
    report(
        {
            "runs": len(planned["bare"]),
            "bare_seconds": bare,
            "compare_seconds": seconds,
            "ratio": seconds / bare,
        }
    )


if __name__ == "__main__":
    main()
