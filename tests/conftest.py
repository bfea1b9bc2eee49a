"""What all tests share, and in which order they run beside each other."""

import os
import time

import pytest

from autoflip_flwr.app import grid
from autoflip_flwr.server import messages


class Clock:
    """Time that goes on by itself, and at once by what somebody sleeps."""

    def __init__(self) -> None:
        self.slept = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


#: Seconds that the longest tests and groups of tests took alone on two cores. Others
#: take less than ten.
SECONDS = {
    "test_both_images_build_and_get_healthy": 140,
    "test_a_third_of_the_nodes_killed_in_each_of_three_rounds": 140,
    "simulation": 130,
    "test_a_node_that_sleeps_through_its_timeout_is_named_and_comes_back": 110,
    "test_three_real_nodes_end_with_the_weights_of_the_simulation": 100,
    "test_a_server_killed_with_sigkill_goes_on_where_it_was": 90,
    "server": 90,
    "test_nodes_their_keys_and_a_run_outlive_a_crash_of_the_superlink": 80,
    "cluster": 80,
    "test_an_interrupted_comparison_goes_on_where_it_was": 60,
    "test_a_node_that_fails_dies_or_is_late_ends_no_run": 55,
    "test_compact.py": 55,
    "test_one_machine": 50,
    "test_a_hundred_thousand_mutated_frames": 50,
    "test_the_servers_memory_does_not_grow_with_the_explorers": 45,
    "test_core.py": 45,
    "test_checkpoint.py": 37,
    "test_a_run_that_fails_is_named_and_the_others_are_finished": 35,
    "test_hostile.py": 35,
    "test_export.py": 35,
    "test_replies.py": 35,
    "compared": 30,
    "test_killed_at_random_moments_a_run_ends_with_the_weights_of_one_never_killed": 30,
    "test_apps.py": 20,
    "test_report.py": 20,
    "test_strategy.py": 20,
    "test_baselines.py": 15,
}


def pytest_xdist_auto_num_workers(config):
    """One process more than cores: many tests wait. None for a file that is named."""
    if all("::" in word or word.endswith(".py") for word in config.args):
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes inherit it
    return min(len(os.sched_getaffinity(0)), 4) + 1


def pytest_collection_modifyitems(config, items):
    """Keep a file in one process, but for long tests; begin with what takes longest."""
    if not hasattr(config, "workerinput"):
        return
    seconds = {}
    for item in items:
        mark, name = item.get_closest_marker("xdist_group"), item.originalname
        if mark is None and name not in SECONDS:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
            mark = item.get_closest_marker("xdist_group")
        seconds[item] = SECONDS.get(mark.args[0] if mark else name, 0)
    items.sort(key=lambda item: -seconds[item])


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Let nobody wait for a reply that a node of this process will never send."""
    clock = Clock()
    monkeypatch.setattr(messages, "time", clock)
    monkeypatch.setattr(grid, "time", clock)
    return clock
