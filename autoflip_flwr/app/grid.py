"""The grid our ServerApp hands to a strategy: repeatable, and with a meter."""

import hashlib
import json
import logging
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from autoflip_flwr.errors import SettingsError, one_line
from autoflip_flwr.pruners.store import write
from autoflip_flwr.server.messages import node_of, nodes_by_message, stream
from autoflip_flwr.server.savings import Traffic
from autoflip_flwr.wire import records
from autoflip_flwr.wire.flower import (
    NodeInfo,
    Run,
    error_about,
    set_message_id,
    set_source,
)

_log = logging.getLogger("flwr")

_ROLL_CALL_TIMEOUT = 120.0

#: More samples or epochs than anybody has: a client that says so is not believed.
_MOST = 1 << 40

#: Characters of a client's name; a node that gives a longer one has none.
_LONGEST_NAME = 200


class RunGrid(Grid):
    """A Grid that knows clients again, counts bytes, and makes a run repeatable.

    Flower gives nodes random ids, a new one to a node that comes back, lists them in no
    order and samples them with Python's unseeded global generator. This grid asks new
    nodes once who they are, lists and addresses them by that, seeds the generator for
    the round right before it hands out the list, and returns replies in the order of
    the messages.

    Of two connected nodes that claim to be the same client the one that came first is
    it, until it is gone; also in a run that goes on. Without `names`, and without keys
    of the nodes, a name is not protected: whoever comes first has it.

    The seed decides with the number of the round who is sampled. `dense_bytes` are
    those of the dense model's arrays. The file `names` binds each client's name to the
    key of the node that gave it first, for all runs that name the file: another node
    never gets the name, and takes no part. What is counted is kept in the file `meter`,
    so that a run that goes on has not forgotten the bytes of the round in which its
    server was killed. With a `straggler_factor`, who has not answered after so many
    times as long as the faster half of a batch took is an error of that round.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        seed: int,
        dense_bytes: int,
        names: Path | None = None,
        meter: Path | None = None,
        straggler_factor: float | None = None,
    ) -> None:
        self._grid = grid
        self._factor = straggler_factor
        self._seed = seed
        self._meter = meter
        self._register = names
        self._stage = "train-1"
        self._claims: dict[int, int] = {}  # node -> who it says it is, as they came
        self._names: dict[int, int | str] = {}  # of clients, as they said them
        self._listing = 0
        self._again: dict[int, int] = {}  # who did not answer the roll -> next listing
        self._nodes: dict[int, int] = {}  # client -> the node that is it now
        self._doubles: set[int] = set()  # whose claim was another's, and has been told
        self._refused: set[int] = set()  # whose name belongs to another key
        self._waiting: dict[str, tuple[int, str]] = {}  # message -> client, phase
        self._silent: set[tuple[int, str]] = set()  # client, phase
        self._last = self._began = 0.0
        self._left = 0  # replies of the last batch before the faster half is there
        self._end = math.inf  # when the others of it are given up
        self._needed = 0
        self._few = False
        # What was really sent, and what FedAvg would have sent, by phase and direction.
        self.traffic = Traffic(dense_bytes)
        self.sent, self.dense = self.traffic.sent, self.traffic.dense
        self.explored: Counter[str] = Counter()  # how often clients were asked to
        # By phase: samples that nodes say they have, times the epochs of an
        # exploration; wall time from sending to the last reply.
        self.samples: defaultdict[str, float] = defaultdict(float)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._recall()

    @property
    def missing(self) -> list[int | str]:
        """Clients asked since `begin` that did not answer, or with an error."""
        silent = {client for client, _ in self._silent.union(self._waiting.values())}
        return sorted((self._names.get(c, c) for c in silent), key=str)

    def begin(self, server_round: int) -> None:
        """Sample for the training of this round from now on."""
        self._stage = f"train-{server_round}"
        self._waiting.clear()
        self._silent.clear()

    def state(self) -> dict[str, Any]:
        """Return what the sampling of the next round depends on, and who is who."""
        claims = [[str(n), c, self._names.get(c)] for n, c in self._claims.items()]
        return {"stage": self._stage, "claims": claims}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the next round."""
        self._stage = state["stage"]
        claims = state.get("claims", [])  # version 0.1 had none
        self._claims = {int(node): client for node, client, _ in claims}
        self._names = {c: name for _, c, name in claims if name is not None}

    def _note(self) -> None:
        """Write down what has been counted."""
        if self._meter is not None:
            counted = {
                **self.traffic.state(),
                "explored": self.explored,
                "samples": self.samples,
                "seconds": self.seconds,
            }
            write(self._meter, json.dumps(counted).encode())

    def _recall(self) -> None:
        """Go on with what an earlier process of the run has counted."""
        if self._meter is None or not self._meter.exists():
            return
        try:
            counted = json.loads(self._meter.read_text())
            self.traffic.restore(counted)
            self.explored.update(counted.get("explored", {}))
            self.samples.update(counted["samples"])
            self.seconds.update(counted["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            _log.error("%s is torn, bytes are counted anew: %s", self._meter, error)

    def seconds_left(self) -> float:
        """Return how long to wait for the replies of the last batch."""
        return max(0.0, self._end - time.monotonic())

    def wait_for(self, needed: int, *, seconds: float) -> int:
        """Wait until so many nodes are connected, or the time is over.

        Returns how many are. From now on a line of the log says when they are fewer.
        """
        self._needed = needed
        until = time.monotonic() + seconds
        while len(online := self._online()) < needed and time.monotonic() < until:
            time.sleep(1)
        return len(online)

    def _online(self) -> set[int]:
        """Return the connected nodes; say it once when they become too few."""
        online = set(self._grid.get_node_ids())
        few = len(online) < self._needed
        if few and not self._few:
            _log.warning(
                f"waiting for nodes: {len(online)} are connected, {self._needed} are "
                "needed (strategy.min-nodes)"
            )
        self._few = few
        return online

    def get_node_ids(self) -> list[int]:
        """Return the connected clients in a stable order, the generator seeded."""
        self._listing += 1
        new = sorted(self._online().difference(self._claims))
        self._roll_call([n for n in new if self._listing >= self._again.get(n, 0)])
        connected = self._online()  # who has gone meanwhile is not waited for
        strangers = {n: n for n in new if n not in self._claims.keys() | self._refused}
        self._nodes = {}
        for node_id, client in {**self._claims, **strangers}.items():
            if node_id not in connected:
                continue
            first = self._nodes.setdefault(client, node_id)
            if first != node_id and node_id not in self._doubles:
                self._doubles.add(node_id)
                name = self._names.get(client, client)
                _log.warning(
                    f"node {node_id} says that it is client {name!r}, as node {first} "
                    "does; it waits"
                )
        random.seed(f"{self._seed}/{self._stage}")
        named = self._names
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
        asked = {(m.metadata.dst_node_id, _phase(m)) for m in batch}
        self._waiting = {n: w for n, w in self._waiting.items() if w not in asked}
        self._silent -= asked  # a round that begins again
        self._last = self._began = time.monotonic()
        self._left, self._end = len(batch) - len(batch) // 2, math.inf
        message_ids = [n for n in self._grid.push_messages(real) if n is not None]
        for message, sent in zip(batch, real, strict=True):
            message_id, phase = sent.metadata.message_id, _phase(message)
            set_message_id(message, message_id)
            self._waiting[message_id] = message.metadata.dst_node_id, phase
            self.traffic.count(phase, "down", message.content)
            if phase == "explore":
                self.explored[str(message.metadata.dst_node_id)] += 1
            if phase == "train":
                self._stage = self._stage.replace("train", "evaluate")
        self._note()
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, from clients, and count them."""
        asked = set(message_ids)
        phases = {self._waiting[n][1] for n in asked if n in self._waiting}
        replies = list(self._grid.pull_messages(asked))
        now = time.monotonic()
        if now > self._end:
            replies += self._stragglers(asked, replies)
        for phase in phases:
            self.seconds[phase] += now - self._last
        self._last = now
        for reply in replies:
            message_id = reply.metadata.reply_to_message_id
            if message_id not in self._waiting:
                continue  # of an earlier round, pulled by somebody's own doing
            client, phase = self._waiting.pop(message_id)
            # Where a node is gone the SuperLink replies in its place.
            set_source(reply, client)
            if reply.has_content():
                self.traffic.count(phase, "up", reply.content)
                self.samples[phase] += _samples(reply)
            else:
                self._silent.add((client, phase))
            self._left -= 1
        if self._factor is not None and self._left <= 0 and self._end == math.inf:
            self._end = self._began + self._factor * (now - self._began)
        if replies:
            self._note()
        return replies

    def _stragglers(self, asked: set[str], replies: list[Message]) -> list[Message]:
        """Return an error for each message that has no reply yet."""
        there = {reply.metadata.reply_to_message_id for reply in replies}
        error = TimeoutError(
            f"it took more than {self._factor} times as long as the faster half "
            "(strategy.straggler-factor)"
        )
        late = sorted(asked.intersection(self._waiting).difference(there))
        return [error_about(message_id, error) for message_id in late]

    def _addressed(self, message: Message) -> Message:
        """Return a message to a client as one to the node that it is now."""
        meta = message.metadata
        node_id = self._nodes.get(meta.dst_node_id, meta.dst_node_id)
        kept: Any = {"ttl": meta.ttl, "group_id": meta.group_id}
        return Message(message.content, node_id, meta.message_type, **kept)

    def _roll_call(self, node_ids: list[int]) -> None:
        """Ask nodes who they are."""
        if not node_ids:
            return
        self._end = math.inf  # the time of an earlier batch, which is answered
        for node_id in node_ids:  # asked again if there is no answer, ever more seldom
            self._again[node_id] = 2 * self._listing
        batch = [Message(RecordDict(), node_id, "query") for node_id in node_ids]
        claims: dict[int, int] = {}
        nodes: dict[str, int] = {}
        for reply in stream(self._grid, batch, timeout=_ROLL_CALL_TIMEOUT):
            nodes = nodes or nodes_by_message(batch)  # sent by now
            node_id = node_of(reply, nodes)
            if reply.has_error():
                reason = one_line(str(reply.error.reason))
                _log.warning("roll call: node %d: %s", node_id, reason)
                continue
            self.traffic.count("roll-call", "up", reply.content)
            claims[node_id] = node_id
            for record in reply.content.config_records.values():
                name = record.get(records.CLIENT_ID)
                if isinstance(name, str) and len(name) > _LONGEST_NAME:
                    _log.warning(
                        "roll call: node %d has a name of %d characters, expected at "
                        "most %d: it counts as a node without a name",
                        *(node_id, len(name), _LONGEST_NAME),
                    )
                elif isinstance(name, str) or (isinstance(name, int) and name >= 0):
                    claims[node_id] = client = _client_of(name)
                    self._names.setdefault(client, name)
        # In the order of the nodes, not that of the answers.
        claims = {n: claims[n] for n in node_ids if n in claims}
        self._refuse_foreign(claims)
        self._claims |= {n: c for n, c in claims.items() if n not in self._refused}
        self._note()

    def _refuse_foreign(self, claims: dict[int, int]) -> None:
        """Refuse nodes that claim a name of another key; bind the new names."""
        if self._register is None:
            return
        owners = _read_register(self._register)
        keys = {node.node_id: _key_of(node) for node in self._grid.get_nodes()}
        for node_id, client in list(claims.items()):
            name = self._names.get(client, client)
            if node_id not in keys:  # it is gone, and asked again if it comes back
                del claims[node_id]
                continue
            own = {"name": name, "key": keys[node_id]}
            # By number: a number that a node gives could be that of another's name.
            if owners.setdefault(str(client), own)["key"] != keys[node_id]:
                self._refused.add(node_id)
                _log.warning(
                    f"node {node_id} says that it is client {name!r}, a name that "
                    f"belongs to another node's key in {self._register}; it takes no "
                    "part"
                )
        write(self._register, json.dumps(owners, indent=2).encode())

    # --- everything else is Flower's own ---------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run of the inner grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run of the inner grid."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Create a message with the inner grid."""
        return self._grid.create_message(*args, **kwargs)


def _key_of(node: NodeInfo) -> str:
    """Return what a node cannot change: a digest of its key, or its id without one."""
    if not node.public_key:
        return str(node.node_id)
    return hashlib.sha256(node.public_key).hexdigest()


def _read_register(path: Path) -> dict[str, dict[str, Any]]:
    try:
        owners: Any = json.loads(path.read_text()) if path.exists() else {}
        if not all(own["key"] for own in owners.values()):
            raise ValueError("a client has no key")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise SettingsError(
            f"strategy.names: expected names and keys in {path}: {error!r}; put it "
            "right, or move it away and all names are free"
        ) from error
    return dict(owners)


def _client_of(name: int | str) -> int:
    """Return the number of a client: a partition's, or 62 bits for a name."""
    if isinstance(name, int):
        return name
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def _samples(reply: Message) -> float:
    """Return how many samples an app says it has, times the epochs it explored."""
    for metrics in reply.content.metric_records.values():
        count, epochs = metrics.get("num-examples", 0), metrics.get(records.EPOCHS, 1)
        if isinstance(count, int | float) and isinstance(epochs, int):
            told = count * min(max(epochs, 0), _MOST)
            return told if 0 <= told <= _MOST else 0
    return 0


def _phase(message: Message) -> str:
    """Return explore, train or evaluate."""
    for config in message.content.config_records.values():
        phase = records.phase_of(config)
        if phase is not None:
            return phase
    return message.metadata.message_type.partition(".")[0]
