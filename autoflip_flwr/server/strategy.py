"""AutoFLIP as a strategy of Flower's Message API: messages in, messages out."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from autoflip_flwr.errors import SettingsError, WireError
from autoflip_flwr.pruners.store import Answer
from autoflip_flwr.server.messages import node_of, nodes_by_message, stream
from autoflip_flwr.server.replies import (
    EXAMPLES,
    Reply,
    chain,
    check_metrics,
    check_size,
    setting,
)
from autoflip_flwr.server.savings import Direction
from autoflip_flwr.server.wrapper import TIMEOUT, Wrapper
from autoflip_flwr.types import Params
from autoflip_flwr.wire import records

_log = logging.getLogger("flwr")

_OF_A_ROUND = (
    "configure_train",
    "aggregate_train",
    "configure_evaluate",
    "aggregate_evaluate",
    "summary",
)


class AutoFLIP(Wrapper[Strategy], Strategy):  # noqa: D101 - Wrapper's
    __doc__ = Wrapper.__doc__

    _api = Strategy
    _default = FedAvg
    _other_api = (
        "strategies of flwr.server.strategy go into autoflip_flwr.legacy.AutoFLIP"
    )
    _sampling = (
        ("fraction_train", "min_train_nodes"),
        ("fraction_evaluate", "min_evaluate_nodes"),
    )

    def _begin(self) -> None:
        self._current: ArrayRecord | None = None  # the inner strategy's global model
        self._returned: ArrayRecord | None = None  # what `start` knows of it
        self._sent: list[Message] = []
        # What the round was configured with; the config as it was before.
        self._asked: tuple[ArrayRecord, ConfigRecord, dict[str, Any], Grid]
        self._values = b""  # the frame of kept values that was sent
        self._key = setting(self.strategy, "arrayrecord_key")
        self._weight = setting(self.strategy, "weighted_by_key") or EXAMPLES

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        *rest: Any,
        **named: Any,
    ) -> Result:
        """Run all rounds; parameters and result are `Strategy.start`'s.

        If the inner strategy has a `start` of its own, it runs, with AutoFLIP's methods
        in place of those that `Strategy.start` calls.
        """
        timeout = named.get("timeout", rest[0] if rest else TIMEOUT)
        self.expect(num_rounds, timeout)
        inner, kind = self.strategy, type(self.strategy)
        if kind.start is Strategy.start:
            result = super().start(grid, initial_arrays, num_rounds, *rest, **named)
            self.finish(result)
            return result
        ours = {name: staticmethod(getattr(self, name)) for name in _OF_A_ROUND}
        starter: Strategy = object.__new__(type(kind.__name__, (kind,), ours))
        starter.__dict__ = vars(inner)  # what it keeps, the inner strategy keeps
        result = starter.start(grid, initial_arrays, num_rounds, *rest, **named)
        self.finish(result)
        return result

    def summary(self) -> None:
        """Log the settings, then the inner strategy's."""
        _log.info("\t├──> %s", repr(self))  # a log record must not keep the strategy
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let new nodes explore, make the mask, pack the inner strategy's messages."""
        current, before = self._adopt(arrays), dict(config)
        self._asked = arrays, config, before, grid

        def inner_messages() -> tuple[list[Message], list[int]]:
            config.clear()  # a strategy that changes it does so once a round
            config.update(before)
            messages = self.strategy.configure_train(
                server_round, current, config, grid
            )
            messages = list(messages)
            return messages, [message.metadata.dst_node_id for message in messages]

        messages, sampled = inner_messages()
        if not messages:
            self._sent = []
            return []
        if self._explore(server_round, sampled, messages[0], grid):
            # A warm start. FedAvgM keeps the record it got and FedAdam a copy of it,
            # so the record is changed in place and the messages are made again.
            _settle(current, self.rounds.arrays)
            messages, sampled = inner_messages()
        plan = self.rounds.begin(server_round, sampled)
        self._hold(self.rounds.arrays)
        return self._pack(messages, plan, "train")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Unpack the valid replies and let the inner strategy aggregate them.

        Without any, or with too few, the round begins again.
        """
        valid = self._trained(server_round, replies)
        while not valid and self._sent:
            self._try_again(server_round)
            arrays, config, before, grid = self._asked
            config.clear()
            config.update(before)
            again = self.configure_train(server_round, arrays, config, grid)
            replies = grid.send_and_receive(again, timeout=self.timeout)
            valid = self._trained(server_round, replies)
        if not valid:
            self._hold(self.rounds.arrays)
            return None, None
        self._weigh(valid)
        for reply in valid:
            key, _ = records.model_record(reply.origin.content, self._key)
            reply.origin.content[key] = records.record_of(reply.arrays)
        messages = [reply.origin for reply in valid]
        aggregated, metrics = self._replies.aggregated(
            server_round,
            self.strategy,
            lambda: self.strategy.aggregate_train(server_round, messages),
            lambda record: {name: value.numpy() for name, value in record.items()},
        )
        if aggregated is None:
            self._hold(self.rounds.arrays)
            return None, metrics
        _settle(aggregated, self.rounds.arrays)  # in place, since FedAvgM keeps it
        self._current = self._returned = aggregated
        if self.pruner.restores:
            self._returned = records.record_of(self.rounds.masked_arrays())
        return self._returned, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pack the inner strategy's messages with the round's mask."""
        messages = self.strategy.configure_evaluate(server_round, arrays, config, grid)
        return self._pack(list(messages), self.rounds.plan, "evaluate")

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Let the inner strategy aggregate the valid replies."""
        received = self._received("evaluate", server_round, replies)
        valid = self._replies.readable(server_round, received, self._read_evaluation)
        if not valid:
            return None
        self._weigh(valid)
        messages = [reply.origin for reply in valid]
        return self.strategy.aggregate_evaluate(server_round, messages)

    def state(self, arrays: ArrayRecord) -> dict[str, Any]:
        """Return the state for a checkpoint, without the global model `arrays`.

        It does not include the state of the inner strategy.
        """
        current = self._adopt(arrays)
        return {
            "current": None if current is arrays else current,
            "rounds": self.rounds.state(),
            "intake": self._intake.state(),
            "traffic": self.traffic and self.traffic.state(),
        }

    def restore(self, state: Mapping[str, Any], arrays: ArrayRecord) -> None:
        """Go on from `state`; `arrays` is the record that `start` will get.

        Raises
        ------
        CheckpointError
            If local guidance that the state needs is missing.
        """
        kept = state["current"]
        self._current, self._returned = (arrays if kept is None else kept), arrays
        self.rounds.restore(state["rounds"], records.arrays_of(self._current))
        self._intake.restore(state["intake"])
        if self.traffic is not None and state.get("traffic"):
            self.traffic.restore(state["traffic"])

    def _adopt(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return the record that the inner strategy works on."""
        if arrays is not self._returned or self._current is None:
            # The record is the caller's: work on a copy.
            self._current = ArrayRecord(dict(arrays))
            self._returned = arrays
            self.rounds.adopt(records.arrays_of(self._current))
        return self._current

    def _hold(self, arrays: Params) -> None:
        """Replace the model that inner strategies keep for their server optimizers.

        All of Flower's keep it as `current_arrays`, a record or a dict of arrays.
        """
        for one in chain(self.strategy):
            held = vars(one).get("current_arrays")
            if isinstance(held, ArrayRecord):
                vars(one)["current_arrays"] = records.record_of(arrays)
            elif isinstance(held, dict):
                vars(one)["current_arrays"] = dict(arrays)

    def _explore(
        self, server_round: int, sampled: Sequence[int], like: Message, grid: Grid
    ) -> bool:
        config_key, config = records.only_config(like.content)
        array_key, several = self._model_of(like)

        def send(
            arrays: ArrayRecord, entries: Mapping[str, Any], nodes: Sequence[int]
        ) -> Iterator[tuple[int, Answer | str]]:
            content = RecordDict(dict(like.content))
            content[array_key] = arrays
            content[config_key] = ConfigRecord({**config, **entries, **several})
            kind = like.metadata.message_type
            messages = [Message(content, node_id, kind) for node_id in nodes]
            self._count_all("explore", "down", messages)
            known: dict[str, int] = {}
            for reply in stream(
                grid,
                messages,
                timeout=self.rounds.exploration.timeout,
                at_once=self._intake.at_once(),
            ):
                known = known or nodes_by_message(messages)  # sent by now
                self._count_all("explore", "up", [reply])
                yield node_of(reply, known), self._answer_of(reply)

        connected = list(grid.get_node_ids())
        return self._intake.explore(
            server_round, connected=connected, sampled=sampled, send=send
        )

    def _pack(
        self, messages: list[Message], plan: records.Plan | None, phase: records.Phase
    ) -> list[Message]:
        """Replace the messages' arrays by packed ones; a shared record is packed once.

        Without a plan the messages stay as they are.
        """
        self._sent, self._values = messages, b""
        if plan is None:
            self._count_all(phase, "down", messages)
            return messages
        # By id of the record, which is held: so its id stays unique.
        packed: dict[int, tuple[ArrayRecord, ArrayRecord]] = {}
        for message in messages:
            array_key, several = self._model_of(message)
            record = message.content.array_records[array_key]
            config_key, config = records.only_config(message.content)
            if id(record) not in packed:
                arrays = records.named_arrays(record, plan.manifest)
                self._check_sent(arrays, plan)
                packed[id(record)] = record, plan.pack(arrays)
            _, sent = packed[id(record)]
            self._values = self._values or sent[records.VALUES].data
            content = RecordDict(dict(message.content))
            content[array_key] = sent
            node_id = message.metadata.dst_node_id
            entries = self.rounds.held.entries(node_id, plan, phase)
            content[config_key] = ConfigRecord({**config, **entries, **several})
            message.content = content
        self._count_all(phase, "down", messages)
        return messages

    def _model_of(self, message: Message) -> tuple[str, dict[str, str]]:
        """Return the key of the model, and what tells it to the mod if it must know."""
        key, _ = records.model_record(message.content, self._key)
        several = len(message.content.array_records) > 1
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

    def _count_all(
        self, phase: records.Phase, direction: Direction, messages: Iterable[Message]
    ) -> None:
        for message in messages:
            if message.has_content():
                self._count(phase, direction, message.content)

    def _trained(
        self, server_round: int, replies: Iterable[Message]
    ) -> list[Reply[Message]]:
        received = self._received("train", server_round, replies)
        return self._replies.trained(
            server_round, received, self._read, sent=self._values
        )

    def _received(
        self, phase: records.Phase, server_round: int, replies: Iterable[Message]
    ) -> list[tuple[int, Message]]:
        """Count replies; return one to each message that has one, in their order.

        A grid may return replies twice, or of an earlier round.
        """
        replies = list(replies)
        self._count_all(phase, "up", replies)
        nodes = nodes_by_message(self._sent)
        order = {m.metadata.dst_node_id: i for i, m in enumerate(self._sent)}
        found: dict[int, Message] = {}
        for reply in replies:
            node_id, answers = node_of(reply, nodes), reply.metadata.reply_to_message_id
            # A grid that sends copies does not tell which messages were sent.
            told = nodes or not self._sent
            if node_id in found or (told and answers not in nodes):
                reason = "it answers no message of the round, or one again"
                self.rounds.drop(server_round, node_id, reason)
            else:
                found[node_id] = reply
        return sorted(found.items(), key=lambda pair: order.get(pair[0], len(order)))

    def _read(self, node_id: int, message: Message) -> Reply[Message]:
        reply = self._read_metrics(node_id, message, "aggregate_train")
        _, reply.record = records.model_record(message.content, self._key)
        return reply

    def _read_evaluation(self, node_id: int, message: Message) -> Reply[Message]:
        """Read an evaluation; a model that it sends back is unpacked."""
        reply = self._read_metrics(node_id, message, "aggregate_evaluate")
        plan, own = self.rounds.plan, self.rounds.masked_arrays()
        for key, record in message.content.array_records.items():
            if plan is not None and records.VALUES in record:
                record, _ = records.take_moved(record)
                arrays = plan.unpack_reply(record, own)
                message.content[key] = records.record_of(arrays)
        return reply

    def _read_metrics(
        self, node_id: int, message: Message, purpose: str
    ) -> Reply[Message]:
        """Read all but the model; refuse what the inner strategy would fail on.

        Flower's own strategies end the run if a reply has not one MetricRecord and, of
        a training, one ArrayRecord. A user's may take what it likes.
        """
        self._check(message)
        found = {"MetricRecord": len(message.content.metric_records)}
        if purpose == "aggregate_train":
            found["ArrayRecord"] = len(message.content.array_records)
        codes = [getattr(one, purpose) for one in chain(self.strategy)]
        flowers = all(code.__module__.startswith("flwr.") for code in codes)
        for kind, count in found.items():
            if flowers and count != 1:
                raise WireError(f"expected exactly one {kind}, got {count}")
        examples, numbers = self._examples_of(message)
        content = message.content
        return Reply(
            node_id,
            message,
            ArrayRecord(),
            examples,
            form=_form_of(message),
            numbers=numbers,
            extras={n: partial(content.pop, n) for n in content.config_records},
        )

    def _check(self, reply: Message) -> None:
        """Refuse an error, and what is too large to read."""
        if reply.has_error():
            raise WireError(f"it carries the error: {reply.error.reason}")
        largest = self.rounds.manifest.largest_message
        check_size(records.count_bytes(reply.content), largest)

    def _answer_of(self, reply: Message) -> Answer | str:
        """Return the answer of an explorer, or the reason of its failure."""
        try:
            self._check(reply)
            _, record = records.model_record(reply.content, self._key)
            frame, signs = records.guidance_frames(record)
            examples, _ = self._examples_of(reply)
            return Answer(frame, signs, examples)
        except WireError as error:
            return str(error)

    def _examples_of(self, reply: Message) -> tuple[float, dict[str, float]]:
        """Return the weight of a reply, 1 if it tells none, and its metrics' sizes."""
        metrics: dict[str, Any] = {}
        for record in reply.content.metric_records.values():
            metrics |= record
        sizes = check_metrics(metrics, self.strategy, self._weight)
        return float(metrics.get(self._weight, 1)), sizes

    def _weigh(self, replies: list[Reply[Message]]) -> None:
        """Write what examples count for into replies, where they say them."""
        for reply in replies:
            for metrics in reply.origin.content.metric_records.values():
                if self._weight in metrics:
                    metrics[self._weight] = reply.examples


def _settle(record: ArrayRecord, arrays: Params) -> None:
    """Set the arrays of a record in place."""
    for name, value in arrays.items():
        record[name] = FlowerArray(value)


def _form_of(reply: Message) -> str:
    """Return keys of records and names of metrics, with the lengths of lists."""
    metrics = {
        key: {
            name: len(value) if isinstance(value, list) else "number"
            for name, value in sorted(record.items())
        }
        for key, record in sorted(reply.content.metric_records.items())
    }
    return f"arrays {sorted(reply.content.array_records)}, metrics {metrics}"
