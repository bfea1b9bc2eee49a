"""AutoFLIP as a strategy of Flower's Message API: messages in, messages out."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from autoflip_flwr.errors import WireError
from autoflip_flwr.server.flow import Received, Request
from autoflip_flwr.server.messages import node_of, nodes_by_message, stream
from autoflip_flwr.server.replies import EXAMPLES, Reply, chain, setting
from autoflip_flwr.server.wrapper import TIMEOUT, Wrapper
from autoflip_flwr.types import Params
from autoflip_flwr.wire import records
from autoflip_flwr.wire.flower import forget_round

_log = logging.getLogger("flwr")


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

    def _begin(self, total: int | None = None) -> None:
        super()._begin(total)
        self._returned: ArrayRecord | None = None  # the model that `start` knows
        self._handed_out: ArrayRecord | None = None  # the one that a run goes on from
        self._sent: list[Message] = []
        self._record: tuple[Params, ArrayRecord] = {}, ArrayRecord()  # see `_current`
        self._key = setting(self.strategy, "arrayrecord_key", str, None)
        self._weight = setting(self.strategy, "weighted_by_key", str, EXAMPLES)

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
        in place of those that `Strategy.start` calls. A second `start` goes on from the
        arrays of the first one's result; with other arrays it begins anew.
        """
        if initial_arrays is not self._handed_out:
            self._reopen()
        self.expect(num_rounds, named.get("timeout", rest[0] if rest else TIMEOUT))
        start, kind = super().start, type(self.strategy)
        if kind.start is not Strategy.start:
            of_a_round = Strategy.__abstractmethods__
            ours = {name: staticmethod(getattr(self, name)) for name in of_a_round}
            starter: Strategy = object.__new__(type(kind.__name__, (kind,), ours))
            starter.__dict__ = vars(self.strategy)  # what it keeps, the inner one keeps
            start = starter.start
        result = start(grid, initial_arrays, num_rounds, *rest, **named)
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
        self._adopt(arrays)
        before = dict(config)
        self._asked = arrays, config, before, grid

        def ask_inner() -> list[Request]:
            _reset(config, before)
            own = ArrayRecord(dict(self._current()))  # it may write to it
            return self._requests(
                self.strategy.configure_train(server_round, own, config, grid)
            )

        def ask(
            requests: Sequence[Request],
        ) -> Iterator[tuple[int, RecordDict | str]]:
            kind = self._sent[0].metadata.message_type
            messages = [
                Message(content, node_id, kind) for node_id, content in requests
            ]
            known: dict[str, int] = {}
            timeout, at_once = self.rounds.exploration.timeout, self._intake.at_once()
            for reply in stream(grid, messages, timeout=timeout, at_once=at_once):
                known = known or nodes_by_message(messages)  # sent by now
                node_id = node_of(reply, known)
                yield node_id, _error_of(reply) or reply.content

        def connected() -> list[int]:
            return list(grid.get_node_ids())

        return self._filled(self._configured(server_round, ask_inner, ask, connected))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Unpack the valid replies and let the inner strategy aggregate them.

        Without any, or with too few, the round begins again.
        """
        received = self._received("train", replies), ()
        valid, _ = self._valid(server_round, received)
        if not valid:
            return None, None
        messages = self._weighed(valid)
        for reply in valid:
            key, _ = records.model_record(reply.origin.content, self._key)
            reply.origin.content[key] = records.record_of(reply.arrays)
        made, metrics = self._replies.aggregated(
            self.strategy,
            lambda: self.strategy.aggregate_train(server_round, messages),
            lambda record: {name: value.numpy() for name, value in record.items()},
            valid,
        )
        self._hold(self.rounds.arrays)
        if made is None:
            return None, metrics
        self._returned = self._current()
        made.update(self._returned)  # if the inner strategy keeps it
        if self.pruner.restores:
            self._returned = records.record_of(self.rounds.masked_arrays())
        self._handed_out = self._returned
        return self._returned, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pack the inner strategy's messages with the round's mask."""
        messages = self.strategy.configure_evaluate(server_round, arrays, config, grid)
        return self._filled(self._packed(self._requests(messages), "evaluate"))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Let the inner strategy aggregate the valid replies."""
        received = self._received("evaluate", replies)
        valid = self._evaluated(received, self._read_evaluation)
        if not valid:
            return None
        return self.strategy.aggregate_evaluate(server_round, self._weighed(valid))

    def state(self, arrays: ArrayRecord) -> dict[str, Any]:
        """Return the state for a checkpoint, without the global model `arrays`.

        It does not include the state of the inner strategy.
        """
        self._adopt(arrays)
        return {
            "current": None if arrays is self._current() else self._current(),
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
        self._reopen(self.rounds.total)
        current = arrays if state["current"] is None else state["current"]
        self._returned = self._handed_out = arrays
        self.rounds.restore(state["rounds"], records.arrays_of(current))
        self._intake.restore(state["intake"])
        if self.traffic is not None and state.get("traffic"):
            self.traffic.restore(state["traffic"])

    # --- between messages and records ------------------------------------------------

    def _adopt(self, arrays: ArrayRecord) -> None:
        """Take a model from outside, if it is not the one that was returned last."""
        if arrays is not self._returned:
            self._returned = arrays
            self.rounds.adopt(records.arrays_of(arrays))

    def _current(self) -> ArrayRecord:
        """Return the global model as a record, which is made once for each."""
        made_of, record = self._record
        if made_of is not self.rounds.arrays:
            record = records.record_of(self.rounds.arrays)
            self._record = self.rounds.arrays, record
        return record

    def _hold(self, arrays: Params) -> None:
        # All of Flower's keep it as `current_arrays`, a record or a dict of arrays.
        for one in chain(self.strategy):
            held = vars(one).get("current_arrays")
            if isinstance(held, ArrayRecord):
                vars(one)["current_arrays"] = records.record_of(arrays)
            elif isinstance(held, dict):
                vars(one)["current_arrays"] = dict(arrays)

    def _requests(self, messages: Iterable[Message]) -> list[Request]:
        self._sent = list(messages)
        return [(m.metadata.dst_node_id, m.content) for m in self._sent]

    def _filled(self, contents: list[RecordDict]) -> list[Message]:
        """Return the inner strategy's messages with other records."""
        for message, content in zip(self._sent, contents, strict=True):
            message.content = content
        return self._sent

    def _again(self, server_round: int) -> Received:
        arrays, config, before, grid = self._asked
        _reset(config, before)
        for one in chain(self.strategy):
            forget_round(one, server_round)
        messages = self.configure_train(server_round, arrays, config, grid)
        replies = grid.send_and_receive(messages, timeout=self.timeout)
        return self._received("train", replies), ()

    def _received(
        self, phase: records.Phase, replies: Iterable[Message]
    ) -> list[tuple[int, Message]]:
        """Count replies; return one to each message that has one, in their order.

        A grid may return replies twice, or of an earlier round.
        """
        nodes = nodes_by_message(self._sent)
        order = {m.metadata.dst_node_id: i for i, m in enumerate(self._sent)}
        found: dict[int, Message] = {}
        for reply in replies:
            if reply.has_content():
                self._count(phase, "up", reply.content)
            node_id, answers = node_of(reply, nodes), reply.metadata.reply_to_message_id
            # A grid that sends copies does not tell which messages were sent.
            told = nodes or not self._sent
            if node_id in found or (told and answers not in nodes):
                reason = "it answers no message of the round, or one again"
                self.rounds.drop(node_id, reason)
            else:
                found[node_id] = reply
        return sorted(found.items(), key=lambda pair: order.get(pair[0], len(order)))

    def _read(self, node_id: int, origin: Message) -> Reply[Message]:
        reply = self._read_all_but_the_model(node_id, origin, "aggregate_train")
        _, reply.record = records.model_record(origin.content, self._key)
        return reply

    def _read_evaluation(self, node_id: int, origin: Message) -> Reply[Message]:
        """Read an evaluation; a model that it sends back is unpacked."""
        reply = self._read_all_but_the_model(node_id, origin, "aggregate_evaluate")
        plan, own = self.rounds.plan, self.rounds.masked_arrays()
        for key, record in origin.content.array_records.items():
            if plan is not None and records.VALUES in record:
                record, _ = records.take_moved(record)
                arrays = plan.unpack_reply(record, own)
                origin.content[key] = records.record_of(arrays)
        return reply

    def _read_all_but_the_model(
        self, node_id: int, origin: Message, purpose: str
    ) -> Reply[Message]:
        """Read metrics and form; refuse what the inner strategy would fail on.

        Flower's own strategies end the run if a reply has not one MetricRecord and, of
        a training, one ArrayRecord. A user's may take what it likes.
        """
        if error := _error_of(origin):
            raise WireError(error)
        content = origin.content
        reply = self._reply(node_id, origin, content)
        found = {"MetricRecord": len(content.metric_records)}
        if purpose == "aggregate_train":
            found["ArrayRecord"] = len(content.array_records)
        codes = [getattr(one, purpose) for one in chain(self.strategy)]
        flowers = all(code.__module__.startswith("flwr.") for code in codes)
        for kind, count in found.items():
            if flowers and count != 1:
                raise WireError(f"expected exactly one {kind}, got {count}")
        reply.form = _form_of(content)
        reply.extras = {n: partial(content.pop, n) for n in content.config_records}
        return reply

    def _weighed(self, replies: list[Reply[Message]]) -> list[Message]:
        """Return messages in which examples, where told, are what they count for."""
        for reply in replies:
            for metrics in reply.origin.content.metric_records.values():
                if self._weight in metrics:
                    metrics[self._weight] = reply.examples
        return [reply.origin for reply in replies]


def _reset(config: ConfigRecord, before: dict[str, Any]) -> None:
    """Undo what a strategy writes into the config, which it does once a round."""
    config.clear()
    config.update(before)


def _error_of(reply: Message) -> str:
    if not reply.has_error():
        return ""
    reason = f"it carries the error: {reply.error.reason}"
    # An app without the mod fails on what it cannot unpack; or it has the class alone.
    signs = records.RAW, "AutoFlipMod.__init__()"
    return f"{records.NO_MOD}: {reason}" if any(s in reason for s in signs) else reason


def _form_of(content: RecordDict) -> str:
    """Return keys of records and names of metrics, with the lengths of lists."""
    metrics = {
        key: {
            name: len(value) if isinstance(value, list) else "number"
            for name, value in sorted(record.items())
        }
        for key, record in sorted(content.metric_records.items())
    }
    return f"arrays {sorted(content.array_records)}, metrics {metrics}"
