"""What a run saves: the bytes of its messages beside FedAvg's, weights, operations."""

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from flwr.app import RecordDict
from torch import nn

from autoflip_flwr.errors import AutoFlipError
from autoflip_flwr.server.rounds import Rounds
from autoflip_flwr.units import ExampleInputs, operations_left
from autoflip_flwr.units.measure import operations
from autoflip_flwr.wire import records

_log = logging.getLogger("flwr")

Direction: TypeAlias = Literal["down", "up"]


class Traffic:
    """Counts the bytes of messages, and what plain FedAvg would have sent for them."""

    def __init__(self, dense_bytes: int = 0) -> None:
        self.dense_bytes = dense_bytes  # of the arrays of the dense model
        self.key: str | None = None  # of its record, where a message has several
        self.sent: Counter[tuple[str, Direction]] = Counter()  # by phase
        # With dense arrays instead; no exploration, which FedAvg does not have.
        self.dense: Counter[tuple[str, Direction]] = Counter()

    def count(self, phase: str, direction: Direction, content: RecordDict) -> None:
        """Count a message."""
        size = records.count_bytes(content)
        self.sent[phase, direction] += size
        if phase in ("train", "evaluate"):
            found = list(content.array_records)
            key = self.key if len(found) > 1 else next(iter(found), None)
            dense = self.dense_bytes if key in found else 0  # FedAvg's model
            self.dense[phase, direction] += (
                size - records.own_bytes(content, key) + dense
            )

    def state(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        return {
            "sent": [[*key, count] for key, count in self.sent.items()],
            "dense": [[*key, count] for key, count in self.dense.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        for name, counts in (("sent", self.sent), ("dense", self.dense)):
            counts.clear()  # a Counter adds what it is updated with
            counts.update({(p, d): n for p, d, n in state[name]})


@dataclass(frozen=True, slots=True, kw_only=True)
class Savings:
    """What a run took, beside FedAvg in the same rounds."""

    parameters: int  # trainable ones
    kept: int  # those that the last mask keeps
    sent: int  # bytes of all messages, both ways, exploration included
    explored: int  # bytes of the exploration alone
    dense: int  # bytes that FedAvg would have sent
    # Multiply-accumulates of a sample through the network that clients train, and
    # through the whole model; None: the model or a sample of its input is not known.
    operations: int | None = None
    dense_operations: int | None = None

    def rows(self) -> dict[str, str]:
        """Return what a log says, by label."""
        rows = {
            "kept": f"{self.kept} of {self.parameters} parameters: "
            f"{_share(self.kept, self.parameters)} of them",
            "bytes sent": f"{megabytes(self.sent)} (exploration "
            f"{megabytes(self.explored)}); FedAvg would have sent "
            f"{megabytes(self.dense)}: {_share(self.sent, self.dense)} of it",
        }
        left, dense = self.operations, self.dense_operations
        if left is not None and dense is not None:
            smaller = " where `masked` gets a sample" if left < dense else ""
            rows["operations"] = (
                f"{amount(left)} of {amount(dense)} multiply-accumulates a sample: "
                f"{_share(left, dense)} of them{smaller}"
            )
        return rows


def savings_of(
    rounds: Rounds,
    traffic: Traffic | None,
    model: nn.Module | None,
    example_inputs: ExampleInputs | None,
) -> Savings | None:
    """Return what a run has saved so far; None before its first round, or uncounted."""
    if rounds.plan is None or traffic is None:
        return None
    trainable = [entry for entry in rounds.manifest.entries if entry.trainable]
    parameters = sum(entry.size for entry in trainable)
    left = dense = None
    if model is not None and example_inputs is not None:
        with suppress(AutoFlipError):  # it is but a report
            share = operations_left(model, rounds.plan.masks, example_inputs)
            dense = operations(model, example_inputs)[""]
            left = round(share * dense)
    return Savings(
        parameters=parameters,
        kept=parameters - rounds.pruned,
        sent=sum(traffic.sent.values()),
        explored=traffic.sent["explore", "down"] + traffic.sent["explore", "up"],
        dense=sum(traffic.dense.values()),
        operations=left,
        dense_operations=dense,
    )


def log_savings(savings: Savings | None) -> None:
    """Log up to three lines, if there is anything to tell."""
    for label, text in savings.rows().items() if savings else ():
        _log.info("AutoFLIP: %-10s %s", label, text)


def megabytes(count: int) -> str:
    """Write a number of bytes."""
    return f"{count / 1e6:.2f} MB"


def amount(count: float, unit: str = "") -> str:
    """Write a number with three digits and a letter from 10,000 on: 1.28 M."""
    if count < 10_000:
        return f"{count:.0f} {unit}".rstrip()
    steps = next((n for n in (1, 2, 3) if count < 999.5 * 1000**n), 4)
    digits = f"{count / 1000**steps:#.3g}".rstrip(".")
    return f"{digits} {'kMGT'[steps - 1]}{unit}"


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.3f}"
