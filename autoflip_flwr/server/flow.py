"""A round from its first message to its end, the same on both of Flower's APIs.

`configured` lets new nodes explore, makes the mask and packs the inner strategy's
messages. `valid` reads what the nodes reply; without replies the round begins again.
`strategy` and `legacy` turn their API's messages into records, and back.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from autoflip_flwr.errors import ReplyError, SettingsError, WireError, by_reason
from autoflip_flwr.pruners.store import Answer
from autoflip_flwr.server.intake import Intake
from autoflip_flwr.server.replies import (
    EXAMPLES,
    Replies,
    Reply,
    check_metrics,
    check_size,
)
from autoflip_flwr.server.rounds import Rounds
from autoflip_flwr.server.savings import Direction, Traffic
from autoflip_flwr.types import Params
from autoflip_flwr.wire import records

_log = logging.getLogger("flwr")

#: How often a round that loses its replies is tried, before the run ends.
TRIES = 3

S = TypeVar("S")  # the inner strategy's class, of one API
T = TypeVar("T")

#: A message to a node: its id, and the records.
Request: TypeAlias = tuple[int, RecordDict]

#: Messages -> (node, what it replies or why it does not), as they arrive.
Ask: TypeAlias = Callable[[Sequence[Request]], Iterable[tuple[int, RecordDict | str]]]

#: Replies by node in the order of the messages, and errors that came in their place.
Received: TypeAlias = tuple[Sequence[tuple[int, Any]], Sequence[Any]]


class Flow(ABC, Generic[S]):
    """The steps of a round around the inner strategy."""

    strategy: S
    rounds: Rounds
    traffic: Traffic | None
    _intake: Intake
    _replies: Replies
    _key: str | None = None  # of the model's record, if the inner strategy names it
    _weight = EXAMPLES  # the metric that replies are weighted by
    _open = False  # whether the round has messages
    _values: Mapping[int, bytes] = {}  # node -> the kept values that it got to train

    @abstractmethod
    def _read(self, node_id: int, origin: Any) -> Reply[Any]:
        """Read a client's reply to a training."""

    @abstractmethod
    def _hold(self, arrays: Params) -> None:
        """Replace the model that inner strategies keep for their server optimizers."""

    @abstractmethod
    def _again(self, server_round: int) -> Received:
        """Send the messages of the round anew; return what is received."""

    # --- the steps -------------------------------------------------------------------

    def _configured(
        self,
        server_round: int,
        ask_inner: Callable[[], list[Request]],
        ask: Ask,
        connected: Callable[[], Sequence[int]],
    ) -> list[RecordDict]:
        """Let new nodes explore, make the mask, pack the inner strategy's messages."""
        self.rounds.number = server_round
        requests = ask_inner()
        self._open = bool(requests)
        if not requests:
            return []
        self._measure(requests)
        # An inner strategy may have waited for nodes: now they are connected.
        if self._explored(server_round, requests, ask, connected()):
            requests = ask_inner()  # with the weights of the warm start
        self.rounds.begin(server_round, [node_id for node_id, _ in requests])
        self._hold(self.rounds.arrays)
        return self._packed(requests, "train")

    def _explored(
        self,
        server_round: int,
        requests: Sequence[Request],
        ask: Ask,
        connected: Sequence[int],
    ) -> bool:
        """Let new nodes explore; tell whether a warm start moved the weights.

        A node gets what the inner strategy tells it; one that it has not sampled gets
        what it tells the first.
        """
        sampled, (like, *_) = zip(*requests, strict=True)
        own = dict(reversed(requests))

        def send(
            arrays: ArrayRecord, entries: Mapping[str, Any], nodes: Sequence[int]
        ) -> Iterator[tuple[int, Answer | str]]:
            contents = [RecordDict(dict(own.get(node_id, like))) for node_id in nodes]
            for content in contents:
                array_key, several = self._model_of(content)
                config_key, config = records.only_config(content)
                content[array_key] = arrays
                content[config_key] = ConfigRecord({**config, **entries, **several})
                self._count("explore", "down", content)
            for node_id, reply in ask(list(zip(nodes, contents, strict=True))):
                if isinstance(reply, str):
                    yield node_id, reply
                else:
                    self._count("explore", "up", reply)
                    yield node_id, self._answer_of(node_id, reply)

        return self._intake.explore(
            server_round, connected=connected, sampled=sampled, send=send
        )

    def _packed(
        self, requests: Iterable[Request], phase: records.Phase
    ) -> list[RecordDict]:
        """Return the records of messages; a model that several share is packed once.

        Before the first mask they stay as they are.
        """
        requests = list(requests)
        self._measure(requests)
        plan = self.rounds.plan
        # By the ids of its frames, which are held: so they stay unique.
        packed: dict[tuple[int, ...], tuple[ArrayRecord, ArrayRecord]] = {}
        made, values = [], {}
        for node_id, given in requests:
            content = RecordDict(dict(given))
            if plan is not None:
                array_key, several = self._model_of(content)
                record = content.array_records[array_key]
                frames = tuple(id(array.data) for array in record.values())
                if frames not in packed:
                    arrays = records.named_arrays(record, plan.manifest, exact=False)
                    self._check_sent(arrays, plan)
                    packed[frames] = record, plan.pack(arrays)
                config_key, config = records.only_config(content)
                entries = self.rounds.held.entries(node_id, plan, phase)
                _, content[array_key] = packed[frames]
                values[node_id] = packed[frames][1][records.VALUES].data
                content[config_key] = ConfigRecord({**config, **entries, **several})
            self._count(phase, "down", content)
            made.append(content)
        if phase == "train":
            self._values = values
        return made

    def _valid(
        self, server_round: int, received: Received
    ) -> tuple[list[Reply[Any]], list[Any]]:
        """Return the replies to aggregate, and what is left out.

        Without any to aggregate, or with too few, the round begins again.
        """
        if not self._open:  # the inner strategy asked nobody
            return [], list(received[1])
        for tries in range(1, TRIES + 1):
            replies, failures = received
            valid = self._replies.trained(
                replies, self._read, sent=self._values, failures=failures
            )
            if valid:
                break
            if tries == TRIES:
                self.check_trained()
                raise ReplyError(
                    f"round {server_round} was lost {TRIES} times; the last time: "
                    f"{self.rounds.reason}; dropped replies by node: "
                    f"{self.rounds.dropped}; a run with checkpoints goes on after the "
                    "round before"
                )
            _log.warning("round %d begins again", server_round)
            received = self._again(server_round)
        if not valid:
            self._hold(self.rounds.arrays)
        taken = {reply.node_id for reply in valid}
        left_out = [origin for node_id, origin in replies if node_id not in taken]
        return valid, [*failures, *left_out]

    def _evaluated(
        self,
        received: Iterable[tuple[int, T]],
        read: Callable[[int, T], Reply[T]],
    ) -> list[Reply[T]]:
        """Return the evaluations to average; none if they saw no example at all."""
        valid = self._replies.readable(received, read)
        if valid and not any(reply.examples for reply in valid):
            _log.warning("round %d: nobody evaluated any example", self.rounds.number)
            return []
        return valid

    def check_trained(self) -> None:
        """Raise a ReplyError if no round of a run changed the model."""
        rounds = self.rounds
        if rounds.fresh and rounds.trained is False:
            raise ReplyError(
                f"the model is untrained: none of {rounds.total} rounds changed it; "
                f"the last one: {rounds.reason or 'no reply came in time'}; reasons of "
                f"dropped replies, with their nodes: {by_reason(rounds.dropped)}"
            )

    # --- their parts -----------------------------------------------------------------

    def _model_of(self, content: RecordDict) -> tuple[str, dict[str, str]]:
        """Return the key of the model, and what tells it to the mod if it must know."""
        key, _ = records.model_record(content, self._key)
        several = len(content.array_records) > 1
        return key, {records.ARRAYS: key} if several else {}

    def _check_sent(self, arrays: Params, plan: records.Plan) -> None:
        """Refuse relative replies to other weights than the global."""
        own = self.rounds.arrays
        if plan.relative and not all(
            np.array_equal(arrays[n][keep], own[n][keep])
            for n, keep in plan.masks.items()
        ):
            raise SettingsError(
                f"values {plan.values}: {type(self.strategy).__name__} sends other "
                "weights than the global model, to which replies are relative; use "
                "float16"
            )

    def _reply(self, node_id: int, origin: T, content: RecordDict) -> Reply[T]:
        """Read size and metrics of a reply; refuse what would ruin the model."""
        largest = self.rounds.manifest.largest_message
        check_size(records.count_bytes(content), largest)
        metrics: dict[str, Any] = {}
        for record in content.metric_records.values():
            metrics |= record
        numbers = check_metrics(metrics, self.strategy, self._weight)
        examples = float(metrics.get(self._weight, 1))
        return Reply(node_id, origin, ArrayRecord(), examples, numbers=numbers)

    def _answer_of(self, node_id: int, content: RecordDict) -> Answer | str:
        """Return the answer of an explorer, or the reason of its failure."""
        try:
            reply = self._reply(node_id, content, content)
            _, record = records.model_record(content, self._key)
            frame, signs = records.guidance_frames(record)
        except WireError as error:
            return str(error)
        return Answer(frame, signs, reply.examples)

    def _measure(self, requests: Sequence[Request]) -> None:
        """Note the size of the dense model, of which a message is a copy."""
        if self.traffic is not None and requests and not self.traffic.dense_bytes:
            key, dense = records.model_record(requests[0][1], self._key)
            self.traffic.dense_bytes, self.traffic.key = dense.count_bytes(), key

    def _count(
        self, phase: records.Phase, direction: Direction, content: RecordDict
    ) -> None:
        if self.traffic is not None:
            self.traffic.count(phase, direction, content)
