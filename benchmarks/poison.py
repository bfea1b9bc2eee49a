"""How far one lying explorer moves the mask and the model in a real run.

    python benchmarks/poison.py --data-dir PATH

Preset `short-mnist`, 20 explorers, unstructured pruning, one mask from guidance alone.
Client 0 lies about its guidance. The mask is compared with that of a run in which its
answer is lost. `honest` is the change when the client tells the truth. The accuracy is
meaningful only after many rounds: --rounds 80.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from common import report
from flwr.app import Context, Message, RecordDict

from autoflip_flwr.app import client, server
from autoflip_flwr.compare import simulation
from autoflip_flwr.method import mask
from autoflip_flwr.wire import codec
from autoflip_flwr.wire import records as wire

SETTINGS = (
    "exploration.warm-start=false exploration.epochs=5 pruning.units=0 "
    "pruning.score=guidance pruning.gradual-rounds=0 pruning.balance=global "
    "pruning.vectors=true"
)
COMBINATIONS = ["mean", "clipped-mean", "median", "trimmed-mean"]


def told(guidance: dict[str, Any], lie: str) -> dict[str, Any]:
    """Return the guidance that a lying client sends."""
    if lie == "times 1e6":
        return {n: v * np.float32(1e6) for n, v in guidance.items()}
    if lie == "inverted":
        return {n: v.max() - v for n, v in guidance.items()}
    share = float(lie.split()[1]) / 100  # all its weight on this share of the entries
    largest = max(guidance, key=lambda name: guidance[name].size)
    zeros = {n: np.zeros_like(v) for n, v in guidance.items()}
    count = round(share * sum(value.size for value in guidance.values()))
    zeros[largest].reshape(-1)[:count] = 1.0
    return zeros


def liar(lie: str) -> Callable[[], Any]:
    """Return a factory of the app of every node; client 0 lies."""

    def make() -> Any:
        app = client.client_app()

        def answer(message: Message, context: Context) -> Message:
            reply = app(message, context)
            mine = context.node_config["partition-id"] == 0
            if not mine or message.metadata.message_type != "train":
                return reply
            _, config = wire.only_config(message.content)
            if wire.phase_of(config) != "explore" or lie == "honest":
                return reply
            if lie == "lost":
                raise RuntimeError("lost")
            shapes = wire.Exploration.of(config).manifest.shapes
            key, record = wire.model_record(reply.content)
            frame, _ = wire.guidance_frames(record)
            found = told(codec.dequantize(frame, shapes).dense(), lie)
            reply.content[key] = wire.guidance_record(codec.quantize(found), None)
            return reply

        return answer

    return make


def run(folder: Path, arguments: argparse.Namespace, combination: str, lie: str) -> Any:
    """Do a run; return its mask and its accuracy."""
    output = folder / f"{combination}-{lie}"
    overrides = f"{SETTINGS} rounds={arguments.rounds} seed={arguments.seed} "
    overrides += f"pruning.combination={combination} data.dir={arguments.data_dir!r}"
    config = {"preset": "short-mnist", "overrides": overrides, "resume": False}
    config["output-dir"] = str(output)
    grid = simulation.RayGrid(20, config, client_app=liar(lie))
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config
    )
    server.serve(grid, context)
    with np.load(output / "mask.npz") as found:
        masks = dict(found)
    return masks, json.loads((output / "summary.json").read_text())["accuracy"]


def main() -> None:
    """Do all runs and print the changes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    lies = [
        "honest",
        "times 1e6",
        "inverted",
        "on 0.1 %",
        "on 1 %",
        "on 4 %",
        "on 10 %",
        "on 20 %",
    ]
    parser.add_argument("--lies", nargs="+", default=lies)
    parser.add_argument("--combinations", nargs="+", default=COMBINATIONS)
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for combination in arguments.combinations:
            without, accuracy = run(Path(name), arguments, combination, "lost")
            result[combination] = {"without it": {"accuracy": accuracy}}
            for lie in arguments.lies:
                masks, accuracy = run(Path(name), arguments, combination, lie)
                result[combination][lie] = {
                    "mask_changed": mask.change(without, masks),
                    "accuracy": accuracy,
                }
    ray.shutdown()
    report(result)


if __name__ == "__main__":
    main()
