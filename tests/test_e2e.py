"""`flwr run` for real: simulated nodes, and nodes as processes."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flower import ROOT, deployment, simulation
from safetensors.numpy import load_file

from autoflip_flwr import data

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SHORT = (
    "rounds=3 strategy.fraction-train=1.0 strategy.min-nodes=3 "
    "data.classes-per-client=4"
)

HYBRID = (
    "pruning.units=0.8 exploration.warm-start=true "
    "pruning.refresh=0.3 pruning.refresh-every=1 pruning.refresh-until=3"
)


def config(output: Path, overrides: str, preset: str = "quickstart") -> str:
    return f'preset="{preset}" output-dir="{output}" overrides="{overrides}"'


def summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text())


def test_three_real_nodes_end_with_the_weights_of_the_simulation(tmp_path):
    overrides = f"{SHORT} {HYBRID} strategy.fraction-evaluate=1.0 data.holdout=0.2"
    nodes = [f"partition-id={i} num-partitions=3" for i in range(3)]
    with deployment(tmp_path / "real", nodes) as flower:
        out = flower.run(ROOT, config(tmp_path / "r", overrides))
    assert "AutoFLIP run finished" in out, out
    with simulation(tmp_path / "simulated") as flower:
        out = flower.run(
            ROOT, config(tmp_path / "s", overrides), federation="num-supernodes=3"
        )
    assert "AutoFLIP run finished" in out, out
    assert summary(tmp_path / "r")["networks"]["pruned"]["parameters"] < 0.6 * 31050
    real = load_file(tmp_path / "r" / "model.safetensors")
    simulated = load_file(tmp_path / "s" / "model.safetensors")
    assert real.keys() == simulated.keys()
    for name, values in real.items():
        np.testing.assert_allclose(values, simulated[name], rtol=1e-4, atol=1e-5)
    assert summary(tmp_path / "r")["bytes"] == summary(tmp_path / "s")["bytes"]
    assert summary(tmp_path / "r")["density"] == pytest.approx(0.2, abs=1e-3)


def test_nodes_with_data_of_their_own(tmp_path):
    digits = data.load("digits", num_partitions=2, seed=3)
    nodes = []
    for i in range(2):
        part = digits.partition(i)
        pixels = np.rint(part.x[:, 0] * 16).astype(np.uint8)
        path = tmp_path / f"node{i}.npz"
        np.savez(
            path, x_train=pixels, y_train=part.y, x_test=pixels[:5], y_test=part.y[:5]
        )
        nodes.append(f'data-path="{path}"')
    overrides = "rounds=2 strategy.fraction-train=1.0 strategy.min-nodes=2"
    with deployment(tmp_path / "home", nodes) as flower:
        out = flower.run(ROOT, config(tmp_path / "r", overrides))
    assert "AutoFLIP run finished" in out, out
    assert summary(tmp_path / "r")["rounds"] == 2


def test_a_server_killed_with_sigkill_goes_on_where_it_was(tmp_path):
    overrides = f"{SHORT} {HYBRID} rounds=5 strategy.server=fedavgm"
    nodes = [f"partition-id={i} num-partitions=3" for i in range(3)]
    folder = tmp_path / "killed"
    with deployment(tmp_path / "home", nodes) as flower:
        out = flower.run(ROOT, config(tmp_path / "whole", overrides))
        assert "AutoFLIP run finished" in out, out
        with ThreadPoolExecutor() as pool:
            running = pool.submit(flower.run, ROOT, config(folder, overrides))
            metrics = folder / "metrics.jsonl"
            while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
                assert not running.done(), running.result()
                time.sleep(0.1)
            servers = flower.server_apps()
            assert servers
            for process in servers:
                os.kill(process, signal.SIGKILL)
        assert "AutoFLIP run finished" not in running.result()
        again = config(folder, overrides) + " resume=true"
        out = flower.run(ROOT, again)
        assert "AutoFLIP run finished" in out, out
    assert "nodes explore" not in out.partition("is round")[2].partition("ROUND")[0]
    assert summary(folder)["samples"] != {}
    explored = [summary(f)["bytes"]["explore_up"] for f in (folder, tmp_path / "whole")]
    assert explored[0] <= 1.5 * explored[1], "refreshed again, at most, not explored"
    killed, whole = (
        load_file(f / "model.safetensors") for f in (folder, tmp_path / "whole")
    )
    for name, values in whole.items():
        np.testing.assert_array_equal(killed[name], values)


def test_a_third_of_the_nodes_killed_in_each_of_three_rounds(tmp_path):
    """They come back with new ids, as the clients they were."""
    count = 6
    overrides = (
        "rounds=8 strategy.fraction-train=1.0 strategy.min-nodes=4 strategy.timeout=15 "
        "data.partition=iid"
    )

    def node(i: int) -> str:
        return f"partition-id={i} num-partitions={count}"

    def lines(folder: Path) -> list[dict]:
        path = folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    with deployment(tmp_path / "home", []) as flower:
        nodes = {i: flower.supernode(node(i)) for i in range(count)}
        out = flower.run(ROOT, config(tmp_path / "whole", overrides))
        assert "AutoFLIP run finished" in out, out
        folder = tmp_path / "killed"
        with ThreadPoolExecutor() as pool:
            running = pool.submit(flower.run, ROOT, config(folder, overrides))
            for server_round, victims in ((1, (0, 1)), (2, (2, 3)), (3, (4, 5))):
                while len(lines(folder)) < server_round:
                    assert not running.done(), running.result()
                    time.sleep(0.05)
                for i in victims:
                    os.killpg(nodes[i].pid, signal.SIGKILL)
                    nodes[i].wait()
                    nodes[i] = flower.supernode(node(i))
            assert "AutoFLIP run finished" in running.result(), running.result()
    rows = lines(folder)
    assert len(rows) == 8
    assert any(row["missing"] for row in rows)
    undisturbed = lines(tmp_path / "whole")[-1]["accuracy"]
    assert rows[-1]["accuracy"] >= undisturbed - 0.03
    explored = [summary(f)["bytes"]["explore_up"] for f in (folder, tmp_path / "whole")]
    assert explored[0] == explored[1], "nobody explores again"


def test_two_simulations_of_one_seed_are_equal_bit_for_bit(tmp_path):
    overrides = "rounds=3 strategy.min-nodes=6"
    with simulation(tmp_path / "home") as flower:
        for run in ("a", "b"):
            out = flower.run(
                ROOT,
                config(tmp_path / run, overrides),
                federation="num-supernodes=6 client-resources-num-cpus=1",
            )
            assert "AutoFLIP run finished" in out, out
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("a", "b"))
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name])


def test_an_unknown_preset_ends_the_run_and_lists_the_known_ones(tmp_path):
    with simulation(tmp_path / "home") as flower:
        out = flower.run(ROOT, config(tmp_path / "r", "", preset="nope"))
    assert "unknown preset 'nope'" in out
    assert "quickstart" in out
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("api", "states"),
    [
        ("message_api", ("before", "after", "smaller")),
        ("legacy_api", ("before", "after")),
    ],
)
def test_an_existing_app_runs_before_and_after(tmp_path, api, states):
    accuracy = {}
    with simulation(tmp_path / "home") as flower:
        for state in states:
            out = flower.run(
                ROOT / "examples" / api / state,
                "num-server-rounds=5",
                federation="num-supernodes=4 client-resources-num-cpus=1",
            )
            found = [line for line in out.splitlines() if "final accuracy" in line]
            assert found, out
            accuracy[state] = float(found[-1].split()[-1])
            assert ("mask: density 0.2000" in out) == (state != "before")
    assert min(accuracy.values()) > 0.9, accuracy
