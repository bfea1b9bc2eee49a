"""Memory, disk and time of a server with many clients.

    python benchmarks/scale.py server --clients 10 100 1000
    python benchmarks/scale.py flwr --clients 10 100 1000 --data-dir PATH
    python benchmarks/scale.py compare --clients 10 100 1000 --data-dir PATH
    python benchmarks/scale.py known --clients 100000
    python benchmarks/scale.py figure docs/scaling.svg RESULTS...

A CNN of 1.66 M parameters (arXiv:1602.05629), ten clients per round; all explore.

- `server` is the ServerApp alone. Its nodes answer at once, with their own guidance
  when they explore and with unchanged weights when they train.
- `flwr` and `compare` simulate the preset `thousand` on MNIST, 60 images per client, by
  `flwr run` and by `autoflip compare`. There the server's process also runs the
  simulation.
- `known` is what the server keeps of a client, without any matrix.

Every number of clients has its own process. Peak memory is the kernel's figure (VmHWM),
read twice a second. The script prints one JSON object per line; `figure` draws them.
"""

import argparse
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "AUTOFLIP_SCALE"

KINDS = ["flwr", "compare"]


# --- the server alone -----------------------------------------------------------------


def grid_of(clients: int) -> Any:
    """Return a grid whose nodes answer at once."""
    import numpy as np
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid

    from autoflip_flwr.wire import codec
    from autoflip_flwr.wire import records as wire
    from autoflip_flwr.wire.flower import become_task, set_message_id

    become_task()

    class Answering(Grid):
        """Keeps messages until they are pulled, and answers them then."""

        def __init__(self) -> None:
            self._asked: dict[str, Message] = {}
            self._guidance: tuple[bytes, bytes, bytes] | None = None

        def get_node_ids(self) -> list[int]:
            return list(range(100, 100 + clients))

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            batch = list(messages)
            for message in batch:
                set_message_id(message, str(uuid.uuid4()))
                self._asked[message.metadata.message_id] = message
            return [message.metadata.message_id for message in batch]

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return [
                Message(self._answer(asked), reply_to=asked)
                for asked in (self._asked.pop(n, None) for n in message_ids)
                if asked is not None
            ]

        def _answer(self, asked: Message) -> RecordDict:
            node_id = asked.metadata.dst_node_id
            if asked.metadata.message_type == "query":
                config = ConfigRecord({"client-id": node_id - 100})
                return RecordDict({"config": config})
            _, arrays = wire.model_record(asked.content)
            _, config = wire.only_config(asked.content)
            metrics = MetricRecord({"num-examples": 60, "train-loss": 1.0})
            if wire.phase_of(config) == "explore":
                metrics[wire.EPOCHS] = 1
                arrays = wire.guidance_record(*self._frames(config, node_id))
            return RecordDict({"arrays": ArrayRecord(dict(arrays)), "metrics": metrics})

        def _frames(
            self, config: ConfigRecord, node_id: int
        ) -> tuple[bytes, bytes | None]:
            """Return the node's own guidance, the same codes rotated, and signs."""
            asked = wire.Exploration.of(config)
            if self._guidance is None:
                shapes = asked.manifest.shapes
                rng = np.random.default_rng(0)
                drawn = {n: rng.random(s, np.float32) ** 4 for n, s in shapes.items()}
                frame = codec.quantize(drawn)
                head = codec.HEADER_BYTES * len(shapes)
                rises = {n: rng.random(s) < 0.5 for n, s in shapes.items()}
                self._guidance = frame[:head], frame[head:], codec.pack_mask(rises)
            levels, codes, signs = self._guidance
            start = 37 * node_id
            frame = levels + codes[start:] + codes[:start]
            return frame, signs if asked.measure == "update" else None

        def send_and_receive(self, *args: Any, **kwargs: Any) -> Any: ...

        def create_message(self, *args: Any, **kwargs: Any) -> Any: ...

        def set_run(self, run: Any) -> None: ...

        run: Any = None

    return Answering()


def serve(arguments: argparse.Namespace, clients: int) -> None:
    """Run the ServerApp of one run; print its measurements."""
    from flwr.app import Context, RecordDict

    from autoflip_flwr.app import server

    logging.getLogger("flwr").setLevel(logging.ERROR)
    # The digits are smaller than MNIST's images; a wider layer makes up for it.
    data = "data.name=digits model.hidden=6033"
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        output = Path(folder) / "run"
        config = {
            "preset": "thousand",
            "overrides": f"{overrides(arguments, clients)} {data}",
            "output-dir": str(output),
        }
        context = Context(
            run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config
        )
        with Watch(output, lambda pid: pid == os.getpid()) as watch:
            server.serve(grid_of(clients), context)
        tell("server", arguments, clients, output, watch)


def known(clients: int) -> None:
    """Print what a server keeps of clients that explored a model of eight tensors."""
    import tracemalloc

    import numpy as np

    from autoflip_flwr.app.grid import RunGrid
    from autoflip_flwr.pruners import store
    from autoflip_flwr.server import tree
    from autoflip_flwr.wire import codec

    names = [f"layer{number}" for number in range(8)]
    frame = codec.quantize({name: np.ones(1, np.float32) for name in names})
    logging.getLogger("flwr").setLevel(logging.ERROR)
    grid = RunGrid(grid_of(clients), seed=0, dense_bytes=1)
    with tempfile.TemporaryDirectory() as folder:
        shapes = dict.fromkeys(names, (1,))
        answers = store.Answers(Path(folder) / "answers", shapes)
        answers.begin(1)
        answers.put(1, store.Answer(frame))
        measured = answers.get(1)
        kept = store.GuidanceStore(Path(folder), shapes)
        store._link = lambda *_: None  # the table alone
        tracemalloc.start()
        for node_id in range(clients):
            kept.put((1 << 40) + node_id, measured)
        of_store, _ = tracemalloc.get_traced_memory()
        grid.get_node_ids()
        of_both, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        began = time.perf_counter()
        grid.get_node_ids()
        listed = time.perf_counter()
        path = Path(folder) / "table.safetensors"
        tree.write(path, {"store": kept.state()})
        found = {
            "kind": "known",
            "clients": clients,
            "store_bytes_per_client": round(of_store / clients),
            "grid_bytes_per_client": round((of_both - of_store) / clients),
            "checkpoint_bytes_per_client": round(path.stat().st_size / clients),
            "listing_seconds": round(listed - began, 3),
            "checkpoint_seconds": round(time.perf_counter() - listed, 3),
        }
    print(json.dumps(found))


# --- simulations ----------------------------------------------------------------------


def simulate(kind: str, arguments: argparse.Namespace, clients: int) -> None:
    """Do one run with Flower's simulation or ours; print its measurements."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        mark = str(uuid.uuid4())
        environment = {
            **os.environ,
            MARK: mark,
            "FLWR_HOME": f"{folder}/flwr",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "39871",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
        chosen = overrides(arguments, clients)
        if arguments.data_dir:
            chosen += f" data.dir={Path(arguments.data_dir).resolve()}"
        if kind == "flwr":
            output = Path(folder) / "run"
            run_config = f'preset="thousand" overrides="{chosen}" output-dir="{output}"'
            federation = f"num-supernodes={clients} client-resources-num-cpus=1"
            command = ["flwr", "run", str(ROOT), "--stream"]
            command += ["--run-config", run_config, "--federation-config", federation]
        else:
            command = ["autoflip", "compare", "thousand", "--strategies", "autoflip"]
            command += ["--seeds", "1", "--overrides", chosen, "--output", folder]
            output = Path(folder) / "thousand/autoflip-0"

        def is_server(pid: int) -> bool:
            """Tell our server: Ray sets the titles of its workers, but not always."""
            if kind == "flwr":
                return "flwr-simulation" in command_of(pid, mark)
            ours = [path for path in open_files(pid) if path.is_relative_to(folder)]
            return any(path.name == "log.txt" for path in ours)

        try:
            with Watch(folder, is_server) as watch:
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True
                )
            if not (output / "summary.json").exists():
                raise SystemExit(f"no summary\n{done.stdout}\n{done.stderr}")
            if not watch.peak:
                raise SystemExit("the server's process was not found")
            tell(kind, arguments, clients, output, watch)
        finally:
            for pid in processes():
                if command_of(pid, mark):  # `flwr run` leaves a SuperLink behind
                    os.kill(pid, signal.SIGTERM)
            time.sleep(1)


def overrides(arguments: argparse.Namespace, clients: int) -> str:
    """Return the overrides for a run of this many clients."""
    return (
        f"rounds={arguments.rounds} strategy.min-nodes={clients} "
        f"strategy.fraction-train={arguments.sampled / clients} "
        f"data.max-samples={60 * clients} training.epochs=1 exploration.fraction=1.0 "
        # The default masks; the density falls in all rounds, so each makes one.
        f"pruning.gradual-rounds={arguments.rounds} {arguments.overrides}"
    ).strip()


# --- measuring ------------------------------------------------------------------------


class Watch:
    """Measures memory and disk while a block runs.

    Attributes
    ----------
    peak : int
        Bytes: peak memory of the server's process.
    disk : int
        Bytes: peak size of the run's folder.
    """

    def __init__(self, folder: Path | str, is_server: Callable[[int], bool]) -> None:
        self._folder = folder
        self._is_server = is_server
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.peak = 0
        self.disk = 0

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        last = False
        while not last:
            last = self._end.wait(0.5)
            for pid in filter(self._is_server, processes()):
                self.peak = max(self.peak, peak_of(pid))
            sizes = dict(  # by inode: a file with two hard links is one
                size_of(Path(folder) / name)
                for folder, _, names in os.walk(self._folder)  # folders may vanish
                if "flwr" not in Path(folder).parts
                for name in names
            )
            self.disk = max(self.disk, sum(sizes.values()))


def processes() -> list[int]:
    """Return the ids of all processes."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def command_of(pid: int, mark: str) -> str:
    """Return the command line of a process that we started, else an empty text."""
    try:
        if f"{MARK}={mark}".encode() not in Path(f"/proc/{pid}/environ").read_bytes():
            return ""
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def open_files(pid: int) -> list[Path]:
    """Return the files that a process has open."""
    try:
        return [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []


def peak_of(pid: int) -> int:
    """Return the peak memory of a process so far, in bytes."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if "VmHWM" in line]
    return 1024 * int(found[0]) if found else 0


def size_of(path: Path) -> tuple[int, int]:
    """Return inode and size in bytes of a file; zeros if it no longer exists."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return (status.st_ino, status.st_size) if path.is_file() else (0, 0)


def tell(
    kind: str, arguments: argparse.Namespace, clients: int, output: Path, watch: Watch
) -> None:
    """Print the measurements of a run."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    later = [row["seconds"] for row in rows[1:]]
    found = {
        "kind": kind,
        "clients": clients,
        "sampled": arguments.sampled,
        "first_round_seconds": rows[0]["seconds"],
        "later_round_seconds": statistics.median(later),
        "later_round_seconds_range": [min(later), max(later)],
        "server_peak_megabytes": round(watch.peak / 1e6, 1),
        "disk_peak_megabytes": round(watch.disk / 1e6, 1),
        "sent_megabytes_explore": round(
            (rows[0]["bytes_down"] + rows[0]["bytes_up"]) / 1e6, 1
        ),
        "sent_megabytes_later_round": round(
            (rows[-1]["bytes_down"] + rows[-1]["bytes_up"]) / 1e6, 2
        ),
    }
    print(json.dumps(found), flush=True)


def draw(target: Path, results: Iterable[Path]) -> None:
    """Draw memory and times over the number of clients."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "scale"}
    from matplotlib import pyplot

    found = [json.loads(line) for path in results for line in path.open()]
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
    shown = {
        "server's peak memory, MB": "server_peak_megabytes",
        "seconds of a later round": "later_round_seconds",
        "seconds of the first round": "first_round_seconds",
    }
    for plot, (title, key) in zip(axes, shown.items(), strict=True):
        for kind in dict.fromkeys(one["kind"] for one in found):
            points = [
                (one["clients"], one[key]) for one in found if one["kind"] == kind
            ]
            plot.plot(*zip(*sorted(points), strict=True), "o-", label=kind)
        plot.set(xscale="log", xlabel="clients", title=title, ylim=(0, None))
    axes[0].legend()
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    """Run every number of clients in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["server", *KINDS, "known", "figure"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--sampled", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--overrides", default="")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--scratch", help="a folder for the runs, on a disk")
    arguments = parser.parse_intermixed_args()
    if arguments.kind == "figure":
        draw(arguments.files[0], arguments.files[1:])
    elif arguments.kind == "known":
        for clients in arguments.clients:
            known(clients)
    elif arguments.kind != "server":
        for clients in arguments.clients:
            simulate(arguments.kind, arguments, clients)
    elif len(arguments.clients) == 1:
        serve(arguments, *arguments.clients)
    else:
        words = sys.argv[1:]
        for clients in arguments.clients:
            command = [sys.executable, __file__, *words, "--clients", str(clients)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
