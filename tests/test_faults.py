"""What happens to nodes in the field: the run goes on and says who was missing."""

import numpy as np
import pytest
from inprocess import only_in
from test_runlog import go, lines_of

from autoflip_flwr.app import data


@pytest.fixture(scope="module")
def wards(tmp_path_factory):
    """Nodes with data of their own: two of usual size, one empty, one of one sample."""
    folder = tmp_path_factory.mktemp("wards")
    digits = data.load("digits", num_partitions=4, seed=0)
    configs = {}
    for number, count in enumerate([None, None, 0, 1]):
        part = digits.partition(number)
        pixels = np.rint(part.x[:count, 0] * 16).astype(np.uint8)
        path = folder / f"{number}.npz"
        np.savez(path, x_train=pixels, y_train=part.y[:count])
        configs[number] = {"data-path": str(path), "client-id": f"ward {number}"}
    return {100 + number: config for number, config in configs.items()}


@pytest.mark.parametrize("strategy", ["autoflip", "fedavg", "ssfl"])
def test_an_empty_node_is_missing_and_one_sample_is_enough(wards, strategy, tmp_path):
    grid = go(
        tmp_path / "run",
        f"strategy.name={strategy}",
        nodes=wards,
        node_configs=wards,
    )
    assert [row["missing"] for row in lines_of(tmp_path / "run")] == [["ward 2"]] * 2
    answered = {s.node_id for s in grid.up if s.phase == "train"}
    assert answered == {100, 101, 103}


def test_a_node_that_never_answers_costs_its_timeout_and_is_named(
    wards, tmp_path, clock
):
    tamper = only_in("train", [101], lambda reply: "lost")
    nodes = {n: c for n, c in wards.items() if n != 102}
    overrides = "strategy.timeout=30 exploration.timeout=20 strategy.min-nodes=3"
    go(tmp_path / "run", overrides, nodes=nodes, node_configs=nodes, tamper=tamper)
    assert [row["missing"] for row in lines_of(tmp_path / "run")] == [["ward 1"]] * 2
    assert clock.slept == pytest.approx(60, abs=4)


def test_a_node_that_is_lost_while_it_explores_takes_part_all_the_same(wards, tmp_path):
    tamper = only_in("explore", [101], lambda reply: "lost")
    nodes = {n: c for n, c in wards.items() if n != 102}
    grid = go(
        tmp_path / "run",
        "strategy.min-nodes=3",
        nodes=nodes,
        node_configs=nodes,
        tamper=tamper,
    )
    assert sorted(grid.nodes("explore")) == [100, 101, 103]
    assert grid.nodes("train").count(101) == 2
    assert [row["missing"] for row in lines_of(tmp_path / "run")] == [["ward 1"], []]


def test_a_round_without_any_reply_begins_again(wards, tmp_path):
    first = []

    def tamper(message, reply):
        lost = only_in("train", list(wards), lambda reply: "lost")
        if len(first) < 3 and message.metadata.message_type == "train":
            phase = message.content.config_records
            if any(c.get("autoflip.phase") == "train" for c in phase.values()):
                first.append(message)
                return lost(message, reply)
        return reply

    nodes = {n: c for n, c in wards.items() if n != 102}
    go(
        tmp_path / "run",
        "strategy.min-nodes=3 rounds=3",
        nodes=nodes,
        node_configs=nodes,
        tamper=tamper,
    )
    rows = lines_of(tmp_path / "run")
    assert len(rows) == 3
    assert [row["missing"] for row in rows] == [[], [], []]
    assert len({row["loss"] for row in rows}) == 3
