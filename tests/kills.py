"""Kill a server with SIGKILL at random moments, let it go on, compare the weights.

    python tests/kills.py --kills 50

A real process each time (a fork, so that nothing is imported again): our ServerApp with
clients of its own, warm start, momentum at the server, values of four bits and masks
that clients hold. One kill of three comes in the middle of writing a file, one when the
server has just sampled clients, taken explorers' answers, made a mask or aggregated,
one at a random time. Prints one line of JSON.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.serverapp.strategy import FedAvgM
from inprocess import ROOT, OneByOne, load_script
from safetensors.numpy import load_file

from autoflip_flwr.pruners import store
from autoflip_flwr.server import tree
from autoflip_flwr.server.intake import Intake
from autoflip_flwr.server.rounds import Rounds

server_app = load_script("killed_server_app", ROOT / "server_app.py")
client_app = load_script("killed_client_app", ROOT / "client_app.py")

OVERRIDES = (
    "rounds=6 data.max-samples=240 data.max-test-samples=100 training.epochs=1 "
    "strategy.min-nodes=6 strategy.fraction-train=0.5 model.channels=[4,8] "
    "model.hidden=16 strategy.server=fedavgm strategy.server-momentum=0.9 "
    "exploration.epochs=1 exploration.every=3 wire.values=int4"
)
NODES = range(1, 7)


class SlowGrid(OneByOne):
    """A file tells whose answer has been kept: one that came before the next look."""

    def __init__(self, folder: Path) -> None:
        config = {
            "preset": "quickstart",
            "overrides": OVERRIDES,
            "output-dir": str(folder / "run"),
            "resume": True,
        }
        super().__init__(client_app.app, NODES, run_config=config)
        self._log = (folder / "explored.txt").open("a", buffering=1)
        self._kept = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        for sent in self.up[self._kept :]:
            if sent.phase == "explore":
                rounds = [
                    down.config["server-round"]
                    for down in self.down
                    if (down.phase, down.node_id) == ("explore", sent.node_id)
                ]
                print(rounds[-1], sent.node_id, file=self._log)
        self._kept = len(self.up)
        return super().pull_messages(message_ids)


def serve(folder: Path) -> None:
    grid = SlowGrid(folder)
    server_app.app(grid, Context(1, 1, {}, RecordDict(), grid.run_config))


def forked(work: Callable[[], None], log: Path) -> int:
    """Let a process of its own do the work; return its id."""
    process = os.fork()
    if process:
        return process
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            work()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def ended(process: int) -> int:
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def die_in_write(number: int) -> None:
    """Be killed with half of the `number`-th file written, or before its name."""
    count = [0]

    def due() -> bool:
        count[0] += 1
        return count[0] == number

    def cut(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    save_file, sync, write = tree.save_file, tree._sync, store.write

    def half_saved(arrays, path, metadata):
        save_file(arrays, path, metadata)
        if due():
            cut(Path(path))

    def not_synced(path):
        if due():
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    def half_written(path, data, **options):
        if due():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_bytes(data)
            cut(partial)
        write(path, data, **options)

    tree.save_file, tree._sync = half_saved, not_synced
    store.write = half_written


def die_in_step(number: int) -> None:
    """Be killed when the `number`-th of these is done, and nobody knows of it yet."""
    count = [0]

    def deadly(kind: type, name: str) -> None:
        done = getattr(kind, name)

        def step(*arguments: Any, **options: Any) -> Any:
            found = done(*arguments, **options)
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(kind, name, step)

    deadly(FedAvgM, "configure_train")
    deadly(Intake, "_take")
    deadly(Rounds, "begin")
    deadly(FedAvgM, "aggregate_train")


#: What a run imports late: once here, not once a process.
_LATE = (
    *("datasets", "flwr.superlink.grid", "flwr_datasets", "thop", "torch._dynamo"),
    "torch_pruning",
)


def main(kills: int, seed: int) -> dict[str, int]:
    for name in _LATE:
        importlib.import_module(name)
    rng = random.Random(seed)
    root = Path(tempfile.mkdtemp("-kills"))
    found: Counter[str] = Counter()
    try:
        (root / "one").mkdir()
        began = time.monotonic()
        if ended(forked(lambda: serve(root / "one"), root / "log.txt")):
            raise RuntimeError((root / "log.txt").read_text())
        duration = time.monotonic() - began
        expected = load_file(root / "one" / "run" / "model.safetensors")
        number = 0
        while found["killed"] < kills:
            number += 1
            folder = root / f"{number}"
            folder.mkdir()
            kind = ("in a write", "in a step", "at a time")[number % 3]

            def work(folder: Path = folder, kind: str = kind) -> None:
                if kind == "in a write":
                    die_in_write(rng.randrange(1, 60))
                if kind == "in a step":
                    die_in_step(rng.randrange(1, 28))
                serve(folder)

            rng.random()  # the process has a copy of the generator
            process = forked(work, root / "log.txt")
            if kind == "at a time":
                time.sleep(rng.uniform(0, duration))
                os.kill(process, signal.SIGKILL)
            code = ended(process)
            if code == 0:
                continue  # it had come to its end
            if code != -signal.SIGKILL:
                raise RuntimeError((root / "log.txt").read_text()[-4000:])
            found["killed"] += 1
            found[kind] += 1
            if not (folder / "run" / "summary.json").exists():
                if ended(forked(lambda f=folder: serve(f), root / "log.txt")):
                    raise RuntimeError((root / "log.txt").read_text()[-4000:])
                found["resumed"] += 1
            weights = load_file(folder / "run" / "model.safetensors")
            same = all(np.array_equal(weights[n], v) for n, v in expected.items())
            found["equal"] += same and weights.keys() == expected.keys()
            asked = Counter((folder / "explored.txt").read_text().splitlines())
            found["explored twice"] += sum(n > 1 for n in asked.values())
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return {"kills": kills, "seed": seed, **found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(json.dumps(main(given.kills, given.seed)))
