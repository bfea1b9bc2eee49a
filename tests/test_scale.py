"""Many clients: what the server holds of them, and clients on many machines."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, children, cluster
from flower import ROOT, app, simulation
from flwr.app import Context, Message, RecordDict
from inprocess import LocalGrid, net, run, toy_app
from test_runlog import client_app, server_app

from autoflip_flwr import AutoFLIP, cli
from autoflip_flwr.app.grid import stream

BIN = Path(sys.executable).parent

TINY = "rounds=2 exploration.epochs=1"


def test_no_more_answers_are_held_than_asked_for():
    """The others wait at the SuperLink until those are on the disk."""
    inner = LocalGrid(toy_app(), range(7))
    asked_for = []
    pull = inner.pull_messages

    def counted(message_ids):
        asked_for.append(len(list(message_ids)))
        return pull(message_ids)

    inner.pull_messages = counted
    messages = [Message(RecordDict(), node_id, "query") for node_id in range(7)]
    replies = list(stream(inner, messages, at_once=3))
    assert len({reply.metadata.src_node_id for reply in replies}) == len(replies) == 7
    assert asked_for == [3, 3, 1]


def test_answers_leave_the_disk_when_no_checkpoint_needs_them(tmp_path):
    """A run may fall back to the checkpoint before the newest, not further."""
    held = []

    class Looking(AutoFLIP):
        def aggregate_train(self, *args):
            held.append(len(list(tmp_path.rglob("*.answer*"))))
            return super().aggregate_train(*args)

    strategy = Looking(store=tmp_path)
    run(strategy, LocalGrid(toy_app(), range(5)), net(), 4)
    assert held == [5, 5, 0, 0]
    assert len(list(tmp_path.rglob("*.guidance"))) == 5


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("clients", "overrides"),
    [(300, ""), (100, "pruning.combination=median pruning.population-weight=1.0")],
)
def test_the_servers_memory_does_not_grow_with_the_explorers(
    clients, overrides, tmp_path
):
    """A CNN of 1.66 M parameters, answers that all come at once; each its own process.

    300 explorers send 0.5 GB. The 1.2 is that of a thousand, see docs/scaling.md.
    """
    command = [sys.executable, str(ROOT / "benchmarks/scale.py"), "server"]
    command += ["--clients", "10", str(clients), "--rounds", "2"]
    command += ["--scratch", str(tmp_path), f"--overrides={overrides}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    few, many = (json.loads(line) for line in done.stdout.splitlines())
    assert (few["clients"], many["clients"]) == (10, clients)
    assert many["disk_peak_megabytes"] > 1.6 * clients
    assert many["server_peak_megabytes"] <= 1.2 * few["server_peak_megabytes"]


def test_a_cluster_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert cli.main(["compare", "smoke", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1" in said
    assert "RAY_ADDRESS=local" in said


@pytest.fixture(scope="module")
def ray() -> Iterator[Cluster]:
    """Two nodes; the last test kills one."""
    with cluster(2) as found:
        yield found


def alone(folder: Path, overrides: str) -> bytes:
    """Run our apps in this process; returns the weights."""
    config = {"preset": "smoke", "overrides": overrides, "output-dir": str(folder)}
    grid = LocalGrid(client_app.app, range(1, 5), run_config=config)
    server_app.app(grid, Context(1, 1, {}, RecordDict(), config))
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_flwr_run_uses_all_nodes_of_a_cluster(ray, tmp_path, monkeypatch):
    """Bit for bit the weights of one process."""
    config = f'preset="smoke" overrides="{TINY}" output-dir="{tmp_path}/both"'
    federation = "num-supernodes=4 client-resources-num-cpus=1"
    monkeypatch.setenv("RAY_ADDRESS", ray.address)
    with watched(ray, has_torch) as homes, simulation(tmp_path / "home") as flower:
        said = flower.run(app(), config, federation=federation)
    assert "AutoFLIP run finished" in said
    assert homes == set(ray.raylets())
    both = (tmp_path / "both" / "model.safetensors").read_bytes()
    assert both == alone(tmp_path / "alone", TINY)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_a_comparison_on_a_cluster_has_the_weights_of_one_machine(ray, tmp_path):
    """Those of one process: a comparison without a cluster has them, too."""

    def serves(pid):
        with contextlib.suppress(OSError):
            links = [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()]
            ours = [path for path in links if path.is_relative_to(tmp_path)]
            return any(path.name == "log.txt" for path in ours)

    command = [str(BIN / "autoflip"), "compare", "smoke", "--seeds", "1"]
    command += ["--strategies", "autoflip", "--output", str(tmp_path / "cluster")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ray.address}
    with watched(ray, serves) as homes:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    head, _ = ray.raylets()
    assert homes == {head}, "the ServerApp is where the command was given"
    both = tmp_path / "cluster/smoke/autoflip-0/model.safetensors"
    assert both.read_bytes() == alone(tmp_path / "alone", "seed=0")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_clients_are_on_all_nodes_of_a_cluster_and_outlive_one(ray, tmp_path):
    script = tmp_path / "nodes.py"
    script.write_text(CLUSTER)
    raylets = ray.raylets()
    done = subprocess.run(
        [sys.executable, str(script), str(ray.nodes[1].pid)],
        env={**os.environ, "RAY_ADDRESS": ray.address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found["homes"]) == sorted(raylets)
    assert found["answers"] == 20
    assert found["most"] == 4, "two tasks a core: the others are not copied yet"
    assert found["with the node lost"] == 12
    assert 1 <= found["errors"] <= 4
    assert found["later homes"] == raylets[:1]


CLUSTER = """
import json, logging, os, signal, sys, time
import ray
from flwr.app import Message, MetricRecord, RecordDict
from autoflip_flwr.compare import simulation

def app():
    def answer(message, context):
        time.sleep(0.5)
        home = MetricRecord({"home": int(os.environ["RAY_RAYLET_PID"])})
        return Message(RecordDict({"metrics": home}), reply_to=message)
    return answer

def homes(replies):
    return sorted({r.content["metrics"]["home"] for r in replies if not r.has_error()})

def asked(count):
    nodes = grid.get_node_ids()[:count]
    return [Message(RecordDict(), node, "query") for node in nodes]

ray.init(log_to_driver=False, logging_level=logging.ERROR)
grid = simulation.RayGrid(20, {}, client_app=app)
most, pull = 0, grid.pull_messages
def counting(ids):
    global most
    most = max(most, len(grid._running))
    return pull(ids)
grid.pull_messages = counting
first = grid.send_and_receive(asked(20), timeout=120)
ids = grid.push_messages(asked(12))
time.sleep(0.7)
os.killpg(int(sys.argv[1]), signal.SIGKILL)
second, end = [], time.monotonic() + 120
while len(second) < 12 and time.monotonic() < end:
    second += grid.pull_messages(ids)
    time.sleep(0.1)
third = grid.send_and_receive(asked(4), timeout=120)
print(json.dumps({
    "homes": homes(first),
    "answers": len(first),
    "most": most,
    "with the node lost": len(second),
    "errors": sum(reply.has_error() for reply in second),
    "later homes": homes(third),
}))
"""


@contextlib.contextmanager
def watched(ray, is_ours):
    """Gather which raylets have a worker that is ours.

    A worker's title does not tell: Ray cannot set it in every environment.
    """
    homes, raylets, ended = set(), ray.raylets(), threading.Event()

    def look():
        while not ended.wait(0.1):
            homes.update(r for r in raylets if any(map(is_ours, children(r))))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield homes
    finally:
        ended.set()
        looking.join()


def has_torch(pid):
    """Tell a worker that has been a client from one that waits."""
    with contextlib.suppress(OSError):
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
