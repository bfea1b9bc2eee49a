"""The grid our ServerApp hands to a strategy: repeatable, and with a meter."""

import logging
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Literal, TypeAlias

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from autoflip_flwr import wire

_log = logging.getLogger("flwr")

Direction: TypeAlias = Literal["down", "up"]

#: Metric of the reply to a roll call; -1: the node has data of its own.
PARTITION_ID = "partition-id"

_ROLL_CALL_TIMEOUT = 120.0


class RunGrid(Grid):
    """A Grid that counts bytes and makes a run repeatable.

    Flower gives nodes random ids, lists them in no order and samples them with
    Python's unseeded global generator. This grid asks new nodes once for their
    partition id, lists them in that order, seeds the generator for the round right
    before it hands out the list, and returns replies in the order of the messages.

    Parameters
    ----------
    grid : Grid
        Flower's.
    seed : int
        With the number of the round decides who is sampled.
    dense_bytes : int
        What the arrays of the dense model count.

    Attributes
    ----------
    sent : Counter of (phase, direction) -> int
        Bytes of the records that were really sent, as Flower counts them.
    dense : Counter of (phase, direction) -> int
        What plain FedAvg would have sent for the same train and evaluate messages.
    samples : mapping of phase -> float
        Samples that nodes say they have, times the epochs of an exploration.
    seconds : mapping of phase -> float
        Wall time from sending to the last reply.
    """

    def __init__(self, grid: Grid, *, seed: int, dense_bytes: int) -> None:
        self._grid = grid
        self._seed = seed
        self._dense_bytes = dense_bytes
        self._stage = "train-1"
        self._partitions: dict[int, int] = {}
        self._called: set[int] = set()
        self.sent: Counter[tuple[str, Direction]] = Counter()
        self.dense: Counter[tuple[str, Direction]] = Counter()
        self.samples: defaultdict[str, float] = defaultdict(float)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def begin(self, server_round: int) -> None:
        """Sample for the training of this round from now on."""
        self._stage = f"train-{server_round}"

    def get_node_ids(self) -> list[int]:
        """Return the connected nodes in a stable order, the generator seeded."""
        node_ids = list(self._grid.get_node_ids())
        self._roll_call([n for n in node_ids if n not in self._called])
        random.seed(f"{self._seed}/{self._stage}")
        known = self._partitions
        return sorted(node_ids, key=lambda n: (n not in known, known.get(n, 0), n))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send, wait, count; replies come in the order of the messages."""
        batch = list(messages)
        order: dict[int, int] = {}
        for position, message in enumerate(batch):
            order[message.metadata.dst_node_id] = position
            phase = _phase(message)
            self._count(phase, "down", message)
            if phase == "train":
                self._stage = self._stage.replace("train", "evaluate")
        if not batch:
            return []
        phases = {m.metadata.dst_node_id: _phase(m) for m in batch}
        started = time.monotonic()
        replies = list(self._grid.send_and_receive(batch, timeout=timeout))
        self.seconds[_phase(batch[0])] += time.monotonic() - started
        nodes = wire.nodes_by_message(batch)
        for reply in replies:
            if reply.has_content():
                phase = phases[wire.node_of(reply, nodes)]
                self._count(phase, "up", reply)
                self.samples[phase] += _samples(reply)
        return sorted(replies, key=lambda r: order[wire.node_of(r, nodes)])

    def _count(self, phase: str, direction: Direction, message: Message) -> None:
        size = wire.count_bytes(message.content)
        self.sent[phase, direction] += size
        if phase in ("train", "evaluate"):
            arrays = len(message.content.array_records)
            own = wire.own_bytes(message.content)
            self.dense[phase, direction] += size - own + arrays * self._dense_bytes

    def _roll_call(self, node_ids: list[int]) -> None:
        """Ask nodes for their partition ids."""
        if not node_ids:
            return
        self._called.update(node_ids)
        batch = [Message(RecordDict(), node_id, "query") for node_id in node_ids]
        replies = self._grid.send_and_receive(batch, timeout=_ROLL_CALL_TIMEOUT)
        nodes = wire.nodes_by_message(batch)
        for reply in replies:
            node_id = wire.node_of(reply, nodes)
            if reply.has_error():
                _log.warning("roll call: node %d: %s", node_id, reply.error.reason)
                continue
            self.sent["roll-call", "up"] += wire.count_bytes(reply.content)
            for record in reply.content.metric_records.values():
                partition_id = record.get(PARTITION_ID)
                if isinstance(partition_id, int) and partition_id >= 0:
                    self._partitions[node_id] = partition_id

    # --- everything else is Flower's own ---------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run of the inner grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run of the inner grid."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message with the inner grid."""
        return self._grid.create_message(
            content, message_type, dst_node_id, group_id, ttl
        )

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages through the inner grid, uncounted."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull messages through the inner grid, uncounted."""
        return self._grid.pull_messages(message_ids)


def _samples(reply: Message) -> float:
    """Return how many samples an app says it has, times the epochs it explored."""
    for metrics in reply.content.metric_records.values():
        count, epochs = metrics.get("num-examples", 0), metrics.get(wire.EPOCHS, 1)
        if isinstance(count, int | float) and isinstance(epochs, int):
            return count * epochs if math.isfinite(count) else 0
    return 0


def _phase(message: Message) -> str:
    """Return explore, train or evaluate."""
    for config in message.content.config_records.values():
        phase = wire.phase_of(config)
        if phase is not None:
            return phase
    return message.metadata.message_type.partition(".")[0]
