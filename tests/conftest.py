"""What all tests share, and in which order they run beside each other."""

import logging
import os
import time

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from autoflip_flwr.app import grid
from autoflip_flwr.server import messages

_usual = hypothesis.settings.get_profile(hypothesis.settings.get_current_profile_name())
hypothesis.settings.register_profile("untimed", _usual, deadline=None)
hypothesis.settings.load_profile("untimed")


class Clock:
    """Time that goes on by itself, and at once by what somebody sleeps."""

    def __init__(self) -> None:
        self.slept = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


#: Seconds that the longest tests took alone on two cores, and what is left of files
#: without them; others take less than fifteen.
SECONDS = {
    "test_nodes_that_are_killed_or_sleep_are_named_and_come_back_as_who_they_were": 160,
    "test_deployment.py": 120,
    "test_e2e.py": 95,
    "test_scale.py": 80,
    "test_compare.py": 60,
    "test_one_machine": 50,
    "test_the_servers_memory_does_not_grow_with_the_explorers": 45,
    "test_compact.py": 40,
    "test_core.py": 40,
    "test_real_nodes_and_a_killed_server_end_with_the_weights_of_one_process": 40,
    "test_a_node_that_fails_dies_or_is_late_ends_no_run": 35,
    "test_a_run_that_fails_is_named_and_the_others_are_finished": 35,
    "test_resume.py": 35,
    "test_export.py": 30,
    "test_a_hundred_thousand_mutated_frames": 28,
    "test_checkpoint.py": 27,
    "test_paper.py": 25,
    "test_forms_of_others.py": 20,
    "test_replies.py": 20,
    "test_apps.py": 20,
    "test_attention.py": 20,
    "test_report.py": 20,
    "test_strategy.py": 20,
    "test_baselines.py": 15,
    "test_killed_at_random_moments_a_run_ends_with_the_weights_of_one_never_killed": 15,
}


def pytest_unconfigure():
    """Let strategies of the older API, which report at exit, find closed streams."""
    logging.raiseExceptions = False


def pytest_xdist_auto_num_workers(config):
    """More processes than cores: slow tests wait. None for a file that is named."""
    if all("::" in word or word.endswith(".py") for word in config.args):
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited, as are these
    os.environ |= {
        "PYTHONDONTWRITEBYTECODE": "",  # or each would compile the package
        "RAY_worker_niceness": "0",  # not last behind tests that take all processors
    }
    quick = "not slow" in config.option.markexpr
    return min(len(os.sched_getaffinity(0)), 4) + (1 if quick else 2)


def test_or_file(nodeid):
    """Return what is run in one process: a long test, or a file without these."""
    path, *_, name = nodeid.split("::")
    alone = name.partition("[")[0]
    return (nodeid, alone) if alone in SECONDS else (path, path.rpartition("/")[2])


class Together(LoadScopeScheduling):
    """Gives each process a test or a file, in the order of the tests."""

    def _split_scope(self, nodeid):
        return test_or_file(nodeid)[0]


def pytest_xdist_make_scheduler(config, log):
    return Together(config, log)


def pytest_collection_modifyitems(config, items):
    """Begin with what takes longest, where tests run beside each other."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -SECONDS.get(test_or_file(item.nodeid)[1], 0))


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Let nobody wait for a reply that a node of this process will never send."""
    clock = Clock()
    monkeypatch.setattr(messages, "time", clock)
    monkeypatch.setattr(grid, "time", clock)
    return clock
