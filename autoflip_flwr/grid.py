"""The grid our ServerApp hands to a strategy: repeatable, and with a meter."""

import logging
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeAlias

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from autoflip_flwr import wire

_log = logging.getLogger("flwr")

Direction: TypeAlias = Literal["down", "up"]

#: Metric of the reply to a roll call; -1: the node does not say who it is.
CLIENT_ID = "client-id"

_ROLL_CALL_TIMEOUT = 120.0

#: Seconds from one look for replies to the next: first, and at most.
_SOON, _LATER = 0.02, 1.0


def stream(
    grid: Grid, messages: Iterable[Message], *, timeout: float | None = None
) -> Iterator[Message]:
    """Send messages and yield the replies as they come.

    Parameters
    ----------
    grid : Grid
    messages : iterable of Message
    timeout : float, optional
        Seconds after which it waits no longer.
    """
    left = {n for n in grid.push_messages(list(messages)) if n is not None}
    end = math.inf if timeout is None else time.monotonic() + timeout
    pause = _SOON
    while left:
        replies = list(grid.pull_messages(left))
        left -= {reply.metadata.reply_to_message_id for reply in replies}
        yield from replies
        if time.monotonic() >= end:
            return
        if left:
            pause = _SOON if replies else min(_LATER, 1.5 * pause)
            time.sleep(min(pause, max(0.0, end - time.monotonic())))


class RunGrid(Grid):
    """A Grid that knows clients again, counts bytes, and makes a run repeatable.

    Flower gives nodes random ids, a new one to a node that comes back, lists them in no
    order and samples them with Python's unseeded global generator. This grid asks new
    nodes once who they are, lists and addresses them by that, seeds the generator for
    the round right before it hands out the list, and returns replies in the order of
    the messages.

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
    missing : list of int
        Clients that were asked since `begin` and did not answer, or with an error.

    Notes
    -----
    Of two connected nodes that claim to be the same client the one that came first is
    it, until it is gone.
    """

    def __init__(self, grid: Grid, *, seed: int, dense_bytes: int) -> None:
        self._grid = grid
        self._seed = seed
        self._dense_bytes = dense_bytes
        self._stage = "train-1"
        self._claims: dict[int, int] = {}  # node -> who it says it is, as they came
        self._named: set[int] = set()  # clients that said so
        self._nodes: dict[int, int] = {}  # client -> the node that is it now
        self._waiting: dict[str, tuple[int, str]] = {}  # message -> client, phase
        self._silent: set[int] = set()
        self._last = 0.0
        self.sent: Counter[tuple[str, Direction]] = Counter()
        self.dense: Counter[tuple[str, Direction]] = Counter()
        self.samples: defaultdict[str, float] = defaultdict(float)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @property
    def missing(self) -> list[int]:
        """Clients that were asked in this round and did not answer."""
        return sorted(self._silent.union(c for c, _ in self._waiting.values()))

    def begin(self, server_round: int) -> None:
        """Sample for the training of this round from now on."""
        self._stage = f"train-{server_round}"
        self._waiting.clear()
        self._silent.clear()

    def state(self) -> dict[str, Any]:
        """Return what a run that goes on has counted so far."""
        return {
            "sent": dict(self.sent),
            "dense": dict(self.dense),
            "samples": dict(self.samples),
            "seconds": dict(self.seconds),
            "stage": self._stage,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.sent.update(state["sent"])
        self.dense.update(state["dense"])
        self.samples.update(state["samples"])
        self.seconds.update(state["seconds"])
        self._stage = state["stage"]

    def get_node_ids(self) -> list[int]:
        """Return the connected clients in a stable order, the generator seeded."""
        connected = set(self._grid.get_node_ids())
        self._roll_call(sorted(connected.difference(self._claims)))
        self._nodes = {}
        for node_id, client in self._claims.items():
            if node_id in connected:
                first = self._nodes.setdefault(client, node_id)
                if first != node_id:
                    _log.warning(
                        "node %d says that it is client %d, as node %d does; it waits",
                        node_id,
                        client,
                        first,
                    )
        random.seed(f"{self._seed}/{self._stage}")
        named = self._named
        return sorted(self._nodes, key=lambda client: (client not in named, client))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send, wait, count; replies come in the order of the messages."""
        batch = list(messages)
        order = {m.metadata.dst_node_id: place for place, m in enumerate(batch)}
        replies = list(stream(self, batch, timeout=timeout))
        return sorted(replies, key=lambda reply: order[reply.metadata.src_node_id])

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages to the nodes that are their clients now, and count them."""
        batch = list(messages)
        if not batch:
            return []
        real = [self._addressed(message) for message in batch]
        self._last = time.monotonic()
        message_ids = [n for n in self._grid.push_messages(real) if n is not None]
        for message, sent in zip(batch, real, strict=True):
            message_id, phase = sent.metadata.message_id, _phase(message)
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = message.metadata.dst_node_id, phase
            self._count(phase, "down", message)
            if phase == "train":
                self._stage = self._stage.replace("train", "evaluate")
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, from clients, and count them."""
        asked = set(message_ids)
        phases = {self._waiting[n][1] for n in asked if n in self._waiting}
        replies = list(self._grid.pull_messages(asked))
        now = time.monotonic()
        for phase in phases:
            self.seconds[phase] += now - self._last
        self._last = now
        for reply in replies:
            message_id = reply.metadata.reply_to_message_id
            if message_id not in self._waiting:
                continue  # of an earlier round, pulled by somebody's own doing
            client, phase = self._waiting.pop(message_id)
            # Where a node is gone the SuperLink replies in its place.
            reply.metadata.__dict__["_src_node_id"] = client
            if reply.has_content():
                self._count(phase, "up", reply)
                self.samples[phase] += _samples(reply)
            else:
                self._silent.add(client)
        return replies

    def _addressed(self, message: Message) -> Message:
        """Return a message to a client as one to the node that it is now."""
        metadata = message.metadata
        client = metadata.dst_node_id
        return Message(
            message.content,
            self._nodes.get(client, client),
            metadata.message_type,
            ttl=metadata.ttl,
            group_id=metadata.group_id,
        )

    def _count(self, phase: str, direction: Direction, message: Message) -> None:
        size = wire.count_bytes(message.content)
        self.sent[phase, direction] += size
        if phase in ("train", "evaluate"):
            arrays = len(message.content.array_records)
            own = wire.own_bytes(message.content)
            self.dense[phase, direction] += size - own + arrays * self._dense_bytes

    def _roll_call(self, node_ids: list[int]) -> None:
        """Ask nodes who they are."""
        if not node_ids:
            return
        claims = dict.fromkeys(node_ids, -1)
        batch = [Message(RecordDict(), node_id, "query") for node_id in node_ids]
        for reply in stream(self._grid, batch, timeout=_ROLL_CALL_TIMEOUT):
            node_id = wire.node_of(reply, wire.nodes_by_message(batch))
            if reply.has_error():
                _log.warning("roll call: node %d: %s", node_id, reply.error.reason)
                continue
            self.sent["roll-call", "up"] += wire.count_bytes(reply.content)
            for record in reply.content.metric_records.values():
                client = record.get(CLIENT_ID)
                if isinstance(client, int) and client >= 0:
                    claims[node_id] = client
        self._named.update(client for client in claims.values() if client >= 0)
        for node_id, client in claims.items():
            self._claims[node_id] = client if client >= 0 else node_id

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
