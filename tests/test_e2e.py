"""`flwr run` for real: simulated nodes, and nodes as processes."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flower import ROOT, Flower, deployment, simulation, wait_for
from flwr.app import Context, RecordDict
from inprocess import LocalGrid
from safetensors.numpy import load_file
from test_runlog import client_app, server_app

from autoflip_flwr.app import data

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

#: A SuperNode's words for a message that it has got.
RECEIVED = "Received successfully"


def partitions(count: int) -> list[str]:
    """Node configs of nodes that divide a dataset among them."""
    return [f"partition-id={i} num-partitions={count}" for i in range(count)]


def config(output: Path, overrides: str, preset: str = "quickstart") -> str:
    return f'preset="{preset}" output-dir="{output}" overrides="{overrides}"'


def summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text())


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    """A SuperLink with simulated nodes, for all runs that leave it as it is."""
    with simulation(tmp_path_factory.mktemp("simulation") / "home") as flower:
        yield flower


#: Tests that share it: one after the other, in one process.
simulated = pytest.mark.xdist_group("simulation")


def test_three_real_nodes_end_with_the_weights_of_the_simulation(tmp_path):
    """Warm start, and a mask that is another in the second round."""
    overrides = (
        "rounds=2 strategy.fraction-train=1.0 strategy.min-nodes=3 "
        "strategy.fraction-evaluate=1.0 data.holdout=0.2 data.classes-per-client=4 "
        "pruning.units=0.8 exploration.warm-start=true "
        "pruning.refresh=0.3 pruning.refresh-every=1 pruning.refresh-until=2"
    )
    with (
        deployment(tmp_path / "real", partitions(3)) as real_nodes,
        simulation(tmp_path / "simulated") as simulated_nodes,
        ThreadPoolExecutor() as pool,
    ):
        runs = [
            pool.submit(real_nodes.run, ROOT, config(tmp_path / "r", overrides)),
            pool.submit(
                simulated_nodes.run,
                ROOT,
                config(tmp_path / "s", overrides),
                federation="num-supernodes=3",
            ),
        ]
        for run in runs:
            assert "AutoFLIP run finished" in run.result(), run.result()
    assert summary(tmp_path / "r")["networks"]["pruned"]["parameters"] < 0.6 * 31050
    real = load_file(tmp_path / "r" / "model.safetensors")
    simulated = load_file(tmp_path / "s" / "model.safetensors")
    assert real.keys() == simulated.keys()
    for name, values in real.items():
        np.testing.assert_allclose(values, simulated[name], rtol=1e-4, atol=1e-5)
    assert summary(tmp_path / "r")["bytes"] == summary(tmp_path / "s")["bytes"]
    assert summary(tmp_path / "r")["density"] == pytest.approx(0.2, abs=1e-3)


def data_of_their_own(folder: Path) -> list[dict]:
    """Write the samples of two nodes; returns their node configs."""
    digits = data.load("digits", num_partitions=2, seed=3)
    nodes = []
    for i in range(2):
        part = digits.partition(i)
        pixels = np.rint(part.x[:, 0] * 16).astype(np.uint8)
        path = folder / f"node{i}.npz"
        np.savez(
            path, x_train=pixels, y_train=part.y, x_test=pixels[:5], y_test=part.y[:5]
        )
        nodes.append({"data-path": str(path)})
    return nodes


def lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def test_a_server_killed_with_sigkill_goes_on_where_it_was(tmp_path):
    """Its nodes have data of their own."""
    overrides = (
        "rounds=3 strategy.fraction-train=1.0 strategy.min-nodes=2 "
        "strategy.server=fedavgm strategy.server-momentum=0.9"
    )
    folder = tmp_path / "killed"
    nodes = data_of_their_own(tmp_path)
    words = [f'data-path="{node["data-path"]}"' for node in nodes]
    with deployment(tmp_path / "home", words) as flower:
        with ThreadPoolExecutor() as pool:
            running = pool.submit(flower.run, ROOT, config(folder, overrides))
            wait_for(lambda: len(lines(folder)) > 1, running)
            servers = flower.server_apps()
            assert servers
            for process in servers:
                os.kill(process, signal.SIGKILL)
        assert "AutoFLIP run finished" not in running.result()
        out = flower.run(ROOT, config(folder, overrides) + " resume=true")
        assert "AutoFLIP run finished" in out, out
    assert "going on after round" in out
    assert "nodes explore" not in out
    assert summary(folder)["rounds"] == 3
    # The same apps in this process, never killed; its sums are those of other threads.
    whole = tmp_path / "whole"
    settings = {"preset": "quickstart", "overrides": overrides, "resume": False}
    grid = LocalGrid(
        client_app.app,
        range(2),
        run_config={**settings, "output-dir": str(whole)},
        node_configs=dict(enumerate(nodes)),
    )
    server_app.app(grid, Context(1, 1, {}, RecordDict(), grid.run_config))
    expected = load_file(whole / "model.safetensors")
    for name, values in load_file(folder / "model.safetensors").items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-5)
    found = [summary(f)["bytes"]["explore_up"] for f in (folder, whole)]
    assert found[0] == found[1]


def test_a_third_of_the_nodes_killed_in_each_of_three_rounds(tmp_path):
    """With its message in hand; they come back with new ids, as who they were."""
    overrides = (
        "rounds=5 strategy.fraction-train=1.0 strategy.min-nodes=2 strategy.timeout=25 "
        "data.partition=iid"
    )
    configs = partitions(3)
    folder, lost = tmp_path / "killed", []
    with deployment(tmp_path / "home", []) as flower:
        nodes = [flower.supernode(each) for each in configs]
        with ThreadPoolExecutor() as pool:
            running = pool.submit(flower.run, ROOT, config(folder, overrides))
            for i in range(3):
                log = flower.log_of(nodes[i])
                wait_for(lambda i=i: len(lines(folder)) > i, running)
                old = log.read_text().count(RECEIVED)
                wait_for(
                    lambda log=log, old=old: log.read_text().count(RECEIVED) > old,
                    running,
                )
                os.killpg(nodes[i].pid, signal.SIGKILL)
                lost.append(len(lines(folder)))
                nodes[i].wait()
                nodes[i] = flower.supernode(configs[i])
            assert "AutoFLIP run finished" in running.result(), running.result()
    rows = lines(folder)
    assert len(rows) == 5
    assert len(set(lost)) == 3, "each in a round of its own"
    assert all(i in rows[lost[i]]["missing"] for i in range(3))
    whole = tmp_path / "whole"
    settings = {"preset": "quickstart", "overrides": overrides, "resume": False}
    grid = LocalGrid(
        client_app.app, range(3), run_config={**settings, "output-dir": str(whole)}
    )
    server_app.app(grid, Context(1, 1, {}, RecordDict(), grid.run_config))
    assert rows[-1]["accuracy"] >= lines(whole)[-1]["accuracy"] - 0.03
    explored = [summary(f)["samples"]["explore"] for f in (folder, whole)]
    assert explored[0] == explored[1], "nobody explores again"


def test_a_node_that_sleeps_through_its_timeout_is_named_and_comes_back(tmp_path):
    """Its reply arrives when nobody waits for it any more."""
    overrides = (
        "rounds=5 strategy.fraction-train=1.0 strategy.min-nodes=2 strategy.timeout=25 "
        "data.classes-per-client=5"
    )
    folder = tmp_path / "asleep"
    nodes = partitions(2)
    with deployment(tmp_path / "home", nodes) as flower, ThreadPoolExecutor() as pool:
        running = pool.submit(flower.run, ROOT, config(folder, overrides))
        wait_for(lambda: bool(lines(folder)), running)
        asleep = flower.processes[-1].pid
        os.killpg(asleep, signal.SIGSTOP)
        wait_for(lambda: any(row["missing"] for row in lines(folder)), running)
        os.killpg(asleep, signal.SIGCONT)
        assert "AutoFLIP run finished" in running.result(), running.result()
    rows = lines(folder)
    first = next(i for i, row in enumerate(rows) if row["missing"])
    assert rows[first]["missing"] == [1]
    assert first < 4
    assert rows[-1]["missing"] == []
    assert rows[-1]["dropped"] == 0


@simulated
def test_two_simulations_of_one_seed_are_equal_bit_for_bit(superlink, tmp_path):
    overrides = "rounds=3 strategy.min-nodes=6"
    for run in ("a", "b"):
        out = superlink.run(
            ROOT,
            config(tmp_path / run, overrides),
            federation="num-supernodes=6 client-resources-num-cpus=1",
        )
        assert "AutoFLIP run finished" in out, out
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("a", "b"))
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name])


@simulated
def test_an_unknown_preset_ends_the_run_and_lists_the_known_ones(superlink, tmp_path):
    out = superlink.run(ROOT, config(tmp_path / "r", "", preset="nope"))
    assert "unknown preset 'nope'" in out
    assert "quickstart" in out
    assert not (tmp_path / "r").exists()


@simulated
@pytest.mark.parametrize(
    ("api", "states"),
    [
        ("message_api", ("before", "after", "smaller")),
        ("legacy_api", ("before", "after")),
    ],
)
def test_an_existing_app_runs_before_and_after(superlink, api, states):
    accuracy = {}
    for state in states:
        out = superlink.run(
            ROOT / "examples" / api / state,
            "num-server-rounds=5",
            federation="num-supernodes=4",  # two cores each: one process on two cores
        )
        found = [line for line in out.splitlines() if "final accuracy" in line]
        assert found, out
        accuracy[state] = float(found[-1].split()[-1])
        assert ("mask: density 0.2000" in out) == (state != "before")
    assert min(accuracy.values()) > 0.9, accuracy
