"""`flwr run` for real: simulated nodes, and nodes as processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flower import ROOT, Flower, app, deployment, simulation, wait_for
from flwr.app import Context, RecordDict
from inprocess import LocalGrid
from safetensors.numpy import load_file
from test_runlog import client_app, server_app

from autoflip_flwr.app import data

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

#: A SuperNode's words for a message that it has got.
RECEIVED = "Received successfully"


#: Masks from one-byte guidance. Real nodes sum floats in another order than one
#: process, and a last bit of the trained weights can decide over the default's masks.
FROM_GUIDANCE = "pruning.score=saliency"


def config(output: Path, overrides: str, preset: str = "quickstart") -> str:
    return f'preset="{preset}" output-dir="{output}" overrides="{overrides}"'


def summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text())


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    """A SuperLink with simulated nodes, for all tests that leave it as it is."""
    with simulation(tmp_path_factory.mktemp("simulation") / "home") as flower:
        yield flower


def in_one_process(
    folder: Path, overrides: str, nodes: int | list[dict]
) -> dict[str, np.ndarray]:
    """Run the same apps in this process; returns the weights.

    `nodes` are their configs, or how many nodes divide a dataset among them.
    """
    settings = {"preset": "quickstart", "overrides": overrides, "resume": False}
    count, configs = (nodes, {}) if isinstance(nodes, int) else (len(nodes), nodes)
    grid = LocalGrid(
        client_app.app,
        range(count),
        run_config={**settings, "output-dir": str(folder)},
        node_configs=dict(enumerate(configs)),
    )
    server_app.app(grid, Context(1, 1, {}, RecordDict(), grid.run_config))
    return load_file(folder / "model.safetensors")


def autoflip_run(flower: Flower, *words: str) -> subprocess.Popen[str]:
    code = (
        "import signal, sys; from autoflip_flwr.cli import main; "
        # A shell that starts the tests in the background has it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", *words],
        env=flower.environment,
        cwd=flower.home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_ctrl_c_ends_a_run(superlink):
    # One node: until Flower's processes notice, in seconds, one core learns on in vain.
    with autoflip_run(
        superlink, "smoke", "rounds=500", "strategy.min-nodes=1"
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("  1/500  acc"):
                running.send_signal(signal.SIGINT)
                break
        out = running.stdout.read()
    assert running.returncode == 130, out
    assert "successfully stopped" in out, out
    (folder,) = (superlink.home / "runs").iterdir()
    deadline = time.monotonic() + 120
    while superlink.server_apps():  # Flower's processes notice at a heartbeat
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert len(lines(folder)) < 500


def data_of_their_own(folder: Path, count: int, **split: Any) -> list[dict]:
    """Write the samples of nodes; returns their node configs.

    A process a message then takes half of the time, without scikit-learn.
    """
    digits = data.load("digits", num_partitions=count, seed=3, **split)
    nodes = []
    for i in range(count):
        part = digits.partition(i)
        pixels = np.rint(part.x[:, 0] * 16).astype(np.uint8)
        path = folder / f"node{i}.npz"
        np.savez(
            path, x_train=pixels, y_train=part.y, x_test=pixels[:5], y_test=part.y[:5]
        )
        nodes.append({"data-path": str(path), "client-id": f"node {i}"})
    return nodes


def words(node: dict) -> str:
    """Return a node's config as `flower-supernode` takes it."""
    return " ".join(f'{key}="{value}"' for key, value in node.items())


def lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def test_real_nodes_and_a_killed_server_end_with_the_weights_of_one_process(
    tmp_path,
):
    """Nodes with data of their own; warm start, a second mask, momentum at the server.

    Explorers build the start weights.

    The ServerApp is killed with SIGKILL in the second round, and goes on where it was.
    """
    overrides = (
        "rounds=2 strategy.fraction-train=1.0 strategy.min-nodes=2 "
        "strategy.fraction-evaluate=1.0 pruning.units=0.8 "
        "strategy.server=fedavgm strategy.server-momentum=0.9 "
        f"exploration.own-start=true {FROM_GUIDANCE}"
    )
    real, whole = tmp_path / "real", tmp_path / "whole"
    nodes = data_of_their_own(tmp_path, 2, classes_per_client=6)
    with deployment(tmp_path / "home", [words(node) for node in nodes]) as flower:
        with ThreadPoolExecutor() as pool:
            running = pool.submit(flower.run, app(), config(real, overrides))
            first = real / "checkpoints" / "round-000001.safetensors"
            wait_for(first.exists, running)
            servers = flower.server_apps()
            assert servers
            for process in servers:
                os.kill(process, signal.SIGKILL)
        assert "AutoFLIP run finished" not in running.result()
        out = flower.run(app(), config(real, overrides) + " resume=true")
    assert "AutoFLIP run finished" in out, out
    assert "going on after round" in out
    assert "nodes explore" not in out
    assert summary(real)["rounds"] == 2
    assert summary(real)["networks"]["pruned"]["parameters"] < 0.6 * 31050
    expected = in_one_process(whole, overrides, nodes)
    found = load_file(real / "model.safetensors")
    assert found.keys() == expected.keys()
    # Its sums over nodes have another order, which drifts to 5e-5 in a few rounds. A
    # lost momentum, mask or warm start moves weights by 1e-2 and more.
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-3, atol=1e-4)
    sent = [summary(folder)["bytes"] for folder in (real, whole)]
    # The second round may have begun before the kill, and begins with whole masks.
    once_more = 2 * (4 * 6210 + math.ceil(31050 / 8) + 2048)
    for phase, most in (("explore", 0), ("train", once_more), ("evaluate", once_more)):
        for way in (f"{phase}_down", f"{phase}_up"):
            assert 0 <= sent[0][way] - sent[1][way] <= most, way
    assert sent[0]["explore_down"] < 31050, "a digest, not weights of four bytes"
    assert summary(real)["density"] == pytest.approx(0.2, abs=1e-3)


def test_nodes_that_are_killed_or_sleep_are_named_and_come_back_as_who_they_were(
    tmp_path,
):
    """A third of them in each of three rounds.

    Two are killed with a message in hand and come back with new ids. Then one sleeps
    through its timeout: its reply arrives when nobody waits for it any more.
    """
    overrides = (
        "rounds=5 strategy.fraction-train=1.0 strategy.min-nodes=2 strategy.timeout=45"
    )
    own = data_of_their_own(tmp_path, 3, partition="iid")
    configs = [words(node) for node in own]
    folder, lost = tmp_path / "lost", []
    with (
        deployment(tmp_path / "home", []) as flower,
        ThreadPoolExecutor() as pool,
    ):
        nodes = [flower.supernode(each) for each in configs]
        running = pool.submit(flower.run, app(), config(folder, overrides))
        for i in (0, 2):
            log = flower.log_of(nodes[i])
            wait_for(lambda: len(lines(folder)) > max([0, *lost]), running)
            old = log.read_text().count(RECEIVED)
            wait_for(
                lambda log=log, old=old: log.read_text().count(RECEIVED) > old,
                running,
            )
            os.killpg(nodes[i].pid, signal.SIGKILL)
            lost.append(len(lines(folder)))
            nodes[i].wait()
            nodes[i] = flower.supernode(configs[i])
        wait_for(lambda: len(lines(folder)) > lost[-1], running)
        lost.append(len(lines(folder)))
        os.killpg(nodes[1].pid, signal.SIGSTOP)
        wait_for(lambda: len(lines(folder)) > lost[-1], running)
        os.killpg(nodes[1].pid, signal.SIGCONT)
        assert "AutoFLIP run finished" in running.result(), running.result()
    rows = lines(folder)
    assert len(rows) == 5
    assert len(set(lost)) == 3, "each in a round of its own"
    for i, row in zip([0, 2, 1], lost, strict=True):
        assert f"node {i}" in rows[row]["missing"]
    assert rows[0]["missing"] == rows[-1]["missing"] == []
    assert rows[-1]["dropped"] == 0
    whole = tmp_path / "whole"
    in_one_process(whole, overrides, own)
    assert rows[-1]["accuracy"] >= lines(whole)[-1]["accuracy"] - 0.03
    explored = [summary(f)["samples"]["explore"] for f in (folder, whole)]
    assert explored[0] == explored[1], "nobody explores again"


def test_autoflip_run_prints_few_lines_and_has_the_weights_of_one_process_bit_for_bit(
    superlink, tmp_path
):
    """Two simulations of a seed are equal: ids are drawn, six nodes share two cores."""
    overrides = ["rounds=3", "strategy.min-nodes=6"]
    output = tmp_path / "simulated"
    with autoflip_run(
        superlink, "quickstart", *overrides, "--output", str(output)
    ) as running:
        assert running.stdout is not None
        out = running.stdout.read()
    assert running.returncode == 0, out
    assert "AutoFLIP run finished" in out
    # 3 of 80 lines that the quickstart may print are rounds here, 40 there.
    assert len(out.splitlines()) - 3 + 40 <= 80, out
    expected = in_one_process(tmp_path / "whole", " ".join(overrides), 6)
    found = load_file(output / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name])
    known = [summary(tmp_path / run)["bytes"] for run in ("simulated", "whole")]
    assert known[0] == known[1]


APIS = ("message_api", "legacy_api")


@pytest.fixture(scope="module")
def before() -> dict[str, dict]:
    """What the examples say as they were."""
    command = [sys.executable, Path(__file__).with_name("plugged_in.py"), "5"]
    command += [ROOT / "examples" / api / "before" for api in APIS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(APIS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("api", APIS)
def test_an_existing_app_runs_before_and_after(superlink, before, api):
    """Before in one process, as with smaller models in `test_core.py`."""
    out = superlink.run(
        ROOT / "examples" / api / "after",
        "num-server-rounds=5",
        federation="num-supernodes=4",  # two cores each: one process on two cores
    )
    found = [line for line in out.splitlines() if "final accuracy" in line]
    assert found, out
    assert float(found[-1].split()[-1]) > 0.9
    assert "mask: density 0.2000" in out
    assert before[api]["accuracy"] > 0.9
    assert not before[api]["masked"]
