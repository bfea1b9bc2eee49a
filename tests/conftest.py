"""What all tests share."""

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


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Let nobody wait for a reply that a node of this process will never send."""
    clock = Clock()
    monkeypatch.setattr(messages, "time", clock)
    monkeypatch.setattr(grid, "time", clock)
    return clock
