"""The server's half of the protocol: a Flower strategy around another."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from autoflip_flwr import wire
from autoflip_flwr.errors import AutoFlipError, ModelError, SettingsError, WireError
from autoflip_flwr.grid import stream
from autoflip_flwr.pruners import NEEDS_UNITS
from autoflip_flwr.rounds import Rounds
from autoflip_flwr.settings import (
    Agreement,
    ExplorationSettings,
    PrunedWeights,
    PruningSettings,
    RivalSettings,
)
from autoflip_flwr.store import Answer
from autoflip_flwr.training import trainable_names
from autoflip_flwr.types import (
    Combination,
    MethodName,
    Mode,
    Normalization,
    ScoreName,
    ValueType,
)
from autoflip_flwr.units import ExampleInputs, Units, trace

_log = logging.getLogger("flwr")

_EXAMPLES = "num-examples"  # what most apps weight their replies by

#: Strategies of either API that do not take the mean of the replies.
_ROBUST = ("Bulyan", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum")


class AutoFLIP(Strategy):
    """Federated pruning from the clients' exploration, around any strategy.

    The inner strategy samples nodes, writes its messages and aggregates dense
    replies as ever; this one lets the nodes explore first, makes the mask of each
    round, and replaces what travels by the kept values
    (Internò et al., arXiv:2405.10271, Alg. 1).

    Parameters
    ----------
    strategy : Strategy, optional
        Any strategy of Flower's Message API; ``FedAvg()`` by default.
    method : str
        What makes the masks: ``autoflip``, or a rival to compare it with (``random``,
        ``magnitude``, ``l1``, ``l2``, ``similarity``, ``bn``, ``eflprune``, ``ssfl``,
        ``prunefl``, ``feddst``; see `autoflip_flwr.pruners`). A rival reads
        `threshold`, `mode`, `floor`, `exclude`, `min_units` and `unit_multiple` of the
        pruning, and nothing of the exploration but its timeout.
    threshold : float
        With the default mode, the share of the parameters to prune, in [0, 1]. At 0
        nothing is pruned and the result is the inner strategy's.
    mode : {"quantile", "value", "compression"}
        What `threshold` means, see `mask.from_scores`.
    score : {"guidance", "saliency"}
        ``guidance`` is the paper's; ``saliency`` is the weight times how far it moved.
    normalization : {"client", "global", "layer"}
        ``global`` is the paper's Eq. 3, see `guidance.combine`.
    population_weight : float
        In [0, 1]: weight of all explorers' guidance beside the sampled ones'. 0 is
        the paper; at 1 the mask is the same in every round.
    floor : float
        In [0, 1]: least share of every tensor that is kept.
    exclude : sequence of str
        Shell patterns of parameter names that are never pruned.
    prunable : sequence of str, optional
        Names of the trainable parameters. By default every floating array but
        those named like BatchNorm's buffers.
    pruned_weights : {"zero", "keep"}
        What the server does with pruned weights: zero (Alg. 1), or remember the
        last value and offer it again when a later mask lets it back.
    combination : {"mean", "median", "trimmed-mean"}
        How explorers' matrices become one. The mean is the paper's; the others bound
        what few explorers that lie can do, see docs/security.md.
    trim : float
        In [0, 0.5): share of the explorers that ``trimmed-mean`` leaves out at either
        end.
    agreement : {"none", "vote", "sign"}
        What clients agree on, mixed into the score: ``vote``, the share of explorers
        whose own guidance alone would keep a parameter; ``sign``, how far the updates
        of the rounds so far have one direction. Ours, not the paper's.
    agreement_weight : float
        In [0, 1]: its share of the score.
    refresh : float
        In [0, 1]: share of a layer's kept weights that is exchanged at first, small
        ones for such with large gradients at the sampled clients, which send them in a
        byte per parameter; the share falls as a cosine. 0: the mask stays. It needs
        the population weight 1.
    refresh_every : int, optional
        Rounds from one exchange to the next; 10 by default.
    refresh_until : int, optional
        The last round that may exchange; by default all may, and the share stays.
    units : float
        In [0, 1]: share of the pruned parameters that falls on whole units (filters,
        neurons, hidden units), so that clients can train a smaller network; the rest
        falls on single weights. Above 0 it needs `model` and `example_inputs`.
    min_units : int
        Least units of every group that are kept.
    unit_multiple : int
        Groups are left whole or at a multiple of this; 8 or 16 suits hardware.
    model : nn.Module, optional
        The model, to find its units; also tells what is trainable (`prunable`).
    example_inputs : torch.Tensor or tuple, optional
        One sample that the model runs on.
    exploration_epochs : int
        How often an explorer's train function is called, at most.
    exploration_fraction : float
        In (0, 1]: share of the nodes that explore. The others take part with the
        guidance of all.
    exploration_patience : int
        An explorer stops after so many epochs without a lower loss.
    exploration_every : int
        Explore again, from the global model, every so many rounds; 0: once.
    exploration_timeout : float
        Seconds to wait for the explorers.
    warm_start : bool
        Begin the training where the explorers on average ended, not at `W0`: they send
        the signs of their updates too, an eighth of a byte per parameter. Buffers and
        excluded parameters stay as in `W0`.
    rivals : RivalSettings, optional
        What only the rivals have: rounds between adjustments and the like.
    values : {"float32", "float16"}
        Type of the kept values on the wire.
    min_replies : int
        With fewer valid replies the round changes nothing.
    outlier : float, optional
        Replies of three or more that moved so many times as far as their median, or
        say they stand for so many times its examples, are dropped; of explorers, too.
        None: none are.
    store : Path, optional
        A folder of this run's own for the local guidance, emptied at the start; a
        temporary one by default.
    seed : int, optional
        Decides who explores where `exploration_fraction` is below 1.

    Attributes
    ----------
    rounds : Rounds
        The state: global arrays, current mask, diagnostics.

    Raises
    ------
    SettingsError
        If a value is impossible.
    """

    def __init__(
        self,
        strategy: Strategy | None = None,
        *,
        method: MethodName = "autoflip",
        threshold: float = 0.8,
        mode: Mode = "quantile",
        score: ScoreName = "guidance",
        normalization: Normalization = "client",
        population_weight: float = 0.8,
        floor: float = 0.01,
        exclude: Sequence[str] = (),
        prunable: Sequence[str] | None = None,
        pruned_weights: PrunedWeights = "zero",
        combination: Combination = "mean",
        trim: float = 0.2,
        agreement: Agreement = "none",
        agreement_weight: float = 0.5,
        refresh: float = 0.0,
        refresh_every: int | None = None,
        refresh_until: int | None = None,
        units: float = 0.0,
        min_units: int = 1,
        unit_multiple: int = 1,
        model: nn.Module | None = None,
        example_inputs: ExampleInputs | None = None,
        exploration_epochs: int = 1,
        exploration_fraction: float = 1.0,
        exploration_patience: int = 5,
        exploration_every: int = 0,
        exploration_timeout: float = 3600.0,
        warm_start: bool = False,
        rivals: RivalSettings | None = None,
        values: ValueType = "float32",
        min_replies: int = 1,
        outlier: float | None = 100.0,
        store: Path | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if min_replies < 1:
            raise SettingsError(f"expected min_replies >= 1, got {min_replies}")
        self.strategy = strategy if strategy is not None else FedAvg()
        self.min_replies = min_replies
        self.method = method
        if warm_start:
            check_warm_start(self.strategy)
        self.rounds = Rounds(
            PruningSettings(
                threshold=threshold,
                mode=mode,
                score=score,
                normalization=normalization,
                population_weight=population_weight,
                floor=floor,
                exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude),
                pruned_weights=pruned_weights,
                combination=combination,
                trim=trim,
                agreement=agreement,
                agreement_weight=agreement_weight,
                refresh=refresh,
                refresh_every=refresh_every,
                refresh_until=refresh_until,
                units=units,
                min_units=min_units,
                unit_multiple=unit_multiple,
            ),
            ExplorationSettings(
                epochs=exploration_epochs,
                fraction=exploration_fraction,
                patience=exploration_patience,
                every=exploration_every,
                timeout=exploration_timeout,
                warm_start=warm_start,
            ),
            method=method,
            rivals=rivals,
            values=values,
            outlier=outlier,
            prunable=prunable_of(prunable, model),
            store=store,
            seed=seed,
            units=units_of(units, model, example_inputs, method=method),
        )
        self._current: ArrayRecord | None = None  # the inner strategy's global model
        self._returned: ArrayRecord | None = None  # what `start` knows of it
        # By id of the inner strategy's record, which is held so that no other gets it.
        self._packed: dict[int, tuple[ArrayRecord, ArrayRecord]] = {}
        self._sent: list[Message] = []
        # By id of a reply: the frames that went out and came back.
        self._received: dict[int, tuple[bytes, bytes]] = {}

    def summary(self) -> None:
        """Log the settings, then the inner strategy's."""
        pruning, exploration = self.rounds.pruning, self.rounds.exploration
        _log.info("\t├──> AutoFLIP settings:")
        _log.info(
            "\t│\t├── Pruning by %s: %s %s",
            self.method,
            pruning.mode,
            pruning.threshold,
        )
        if self.method == "autoflip":
            _log.info(
                "\t│\t├── Score: %s, normalized by %s, population weight %s, %s of it "
                "on whole units",
                pruning.score,
                pruning.normalization,
                pruning.population_weight,
                pruning.units,
            )
            _log.info(
                "\t│\t├── Exploration: %d epochs, fraction %s, patience %d",
                exploration.epochs,
                exploration.fraction,
                exploration.patience,
            )
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let new nodes explore, make the mask, pack the inner strategy's messages."""
        current = self._adopt(arrays)

        def inner_messages() -> list[Message]:
            own = ConfigRecord(dict(config))
            return list(self.strategy.configure_train(server_round, current, own, grid))

        messages = inner_messages()
        if not messages:
            return []
        sampled = [message.metadata.dst_node_id for message in messages]
        if self._explore(server_round, sampled, messages[0], grid):
            # A warm start: FedAvgM holds on to the very record it was given, FedAdam
            # has copied it, so both are told again.
            for name, value in self.rounds.arrays.items():
                current[name] = FlowerArray(value)
            messages = inner_messages()
            sampled = [message.metadata.dst_node_id for message in messages]
        plan = self.rounds.begin(server_round, sampled)
        self._sent, self._packed = messages, {}
        return [self._pack(message, plan, "train") for message in messages]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Unpack the valid replies and let the inner strategy aggregate them."""
        self._received = {}
        valid = self._usual(
            server_round, self._valid(server_round, replies, self._unpack)
        )
        for reply in valid:
            sent, frame = self._received[id(reply)]
            self.rounds.observe(sent, frame, _examples_of(reply))
        if len(valid) < self.min_replies:
            reason = f"{len(valid)} valid replies, expected {self.min_replies} or more"
            self.rounds.abandon(server_round, reason)
            return None, None
        if not any(_examples_of(reply) for reply in valid):
            self.rounds.abandon(server_round, "no valid reply trained on any example")
            return None, None
        before = [(one, dict(vars(one))) for one in chain(self.strategy)]
        aggregated, metrics = self.strategy.aggregate_train(server_round, valid)
        if aggregated is None:
            self.rounds.abandon(server_round, "the inner strategy aggregated nothing")
            return None, metrics
        found = {key: value.numpy() for key, value in aggregated.items()}
        if not all(np.isfinite(value).all() for value in found.values()):
            for one, state in before:  # what it would go on with is not finite either
                vars(one).clear()
                vars(one).update(state)
            self.rounds.abandon(server_round, "the aggregate is not finite")
            return None, metrics
        self.rounds.finish(found)
        # FedAvgM holds on to the very record it returned: settle it in place.
        for name, value in self.rounds.arrays.items():
            aggregated[name] = FlowerArray(value)
        self._current = aggregated
        restores = self.rounds.restores
        self._returned = (
            wire.record_of(self.rounds.masked_arrays()) if restores else aggregated
        )
        return self._returned, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pack the inner strategy's messages with the round's mask."""
        messages = list(
            self.strategy.configure_evaluate(
                server_round, arrays, ConfigRecord(dict(config)), grid
            )
        )
        self._sent, self._packed = messages, {}
        plan = self.rounds.plan
        if plan is None:
            return messages
        return [self._pack(message, plan, "evaluate") for message in messages]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Let the inner strategy aggregate the valid replies."""
        valid = self._valid(server_round, replies)
        return self.strategy.aggregate_evaluate(server_round, valid) if valid else None

    def state(self, arrays: ArrayRecord) -> dict[str, Any]:
        """Return what goes into a checkpoint, besides the global model `arrays`.

        The inner strategy's own state is not in it.
        """
        current = self._adopt(arrays)
        kept = None if current is arrays else current
        return {"current": kept, "rounds": self.rounds.state()}

    def restore(self, state: Mapping[str, Any], arrays: ArrayRecord) -> None:
        """Go on where `state` was taken; `arrays` is what `start` will be given.

        Raises
        ------
        CheckpointError
            If local guidance that it stands on is not there any more.
        """
        kept = state["current"]
        self._current, self._returned = (arrays if kept is None else kept), arrays
        self.rounds.restore(state["rounds"], wire.arrays_of(self._current))

    def _adopt(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return the record the inner strategy works on."""
        if arrays is not self._returned or self._current is None:
            # From outside (the start): never write to the caller's record.
            self._current = ArrayRecord(dict(arrays))
            self._returned = arrays
            self.rounds.adopt(wire.arrays_of(self._current))
        return self._current

    def _explore(
        self, server_round: int, sampled: Sequence[int], like: Message, grid: Grid
    ) -> bool:
        """Let those who are to explore do so; tell whether the weights changed."""
        ask = self.rounds.asks(
            server_round, connected=list(grid.get_node_ids()), sampled=sampled
        )
        if ask is None:
            return False
        config_key, config = wire.only_config(like.content)
        array_key, _ = wire.only_array_record(like.content)
        arrays, entries = self.rounds.exploration_of(ask)
        content = RecordDict(dict(like.content))
        content[array_key] = arrays
        content[config_key] = ConfigRecord({**config, **entries})
        kind = like.metadata.message_type
        timeout = self.rounds.exploration.timeout
        for batch in self.rounds.batches(self.rounds.waiting(ask)):
            _log.info("exploration: %d nodes explore", len(batch))
            messages = [Message(content, node_id, kind) for node_id in batch]
            nodes: dict[str, int] = {}
            for reply in stream(
                grid, messages, timeout=timeout, at_once=self.rounds.answers_at_once()
            ):
                nodes = nodes or wire.nodes_by_message(messages)  # sent by now
                self.rounds.answer(wire.node_of(reply, nodes), _answer_of(reply))
        return self.rounds.explored(ask)

    def _pack(self, message: Message, plan: wire.Plan, phase: wire.Phase) -> Message:
        """Replace a message's arrays by what travels; equal ones are packed once."""
        array_key, record = wire.only_array_record(message.content)
        config_key, config = wire.only_config(message.content)
        if id(record) not in self._packed:
            packed = plan.pack(wire.named_arrays(record, plan.manifest))
            self._packed[id(record)] = (record, packed)
        _, packed = self._packed[id(record)]
        content = RecordDict(dict(message.content))
        content[array_key] = packed
        content[config_key] = ConfigRecord({**config, **plan.entries(phase)})
        message.content = content
        return message

    def _unpack(self, message: Message) -> None:
        """Make a reply's arrays dense: pruned entries have not moved."""
        plan = self.rounds.plan
        assert plan is not None
        key, record = wire.only_array_record(message.content)
        arrays = plan.unpack(record, fill=self.rounds.arrays)
        _, sent = next(iter(self._packed.values()))
        frames = (sent[wire.VALUES].data, record[wire.VALUES].data)
        self._received[id(message)] = frames
        message.content[key] = wire.record_of(arrays)

    def _usual(self, server_round: int, replies: list[Message]) -> list[Message]:
        """Drop and name replies far from the others."""
        reasons = self.rounds.outliers(
            {
                id(reply): (
                    wire.arrays_of(wire.only_array_record(reply.content)[1]),
                    _examples_of(reply),
                )
                for reply in replies
            }
        )
        nodes = wire.nodes_by_message(self._sent)
        for reply in replies:
            if id(reply) in reasons:
                node_id = wire.node_of(reply, nodes)
                self.rounds.drop(server_round, node_id, reasons[id(reply)])
        return [reply for reply in replies if id(reply) not in reasons]

    def _valid(
        self,
        server_round: int,
        replies: Iterable[Message],
        unpack: Callable[[Message], None] | None = None,
    ) -> list[Message]:
        """Drop and name replies that cannot be used; the rest in the order of asking.

        The order makes sums of floats repeatable.
        """
        nodes = wire.nodes_by_message(self._sent)
        valid: list[Message] = []
        for reply in replies:
            node_id = wire.node_of(reply, nodes)
            try:
                if reply.has_error():
                    raise WireError(f"it carries the error: {reply.error.reason}")
                _check_metrics(reply)
                if unpack is not None:
                    unpack(reply)
                valid.append(reply)
            except (AutoFlipError, ValueError, TypeError, KeyError) as error:
                self.rounds.drop(server_round, node_id, str(error))
        usual, odd = _by_form(valid)
        for reply in odd:
            self.rounds.drop(
                server_round,
                reply.metadata.src_node_id,
                f"expected the form of most replies, {_form_of(usual[0])}, "
                f"got {_form_of(reply)}",
            )
        order = {m.metadata.dst_node_id: i for i, m in enumerate(self._sent)}
        return sorted(
            usual, key=lambda r: order.get(wire.node_of(r, nodes), len(order))
        )


def chain(strategy: Strategy) -> Iterator[Strategy]:
    """Yield a strategy, the one inside it, and so on."""
    inner: Any = strategy
    while isinstance(inner, Strategy):
        yield inner
        inner = getattr(inner, "strategy", None)


def check_warm_start(inner: object) -> None:
    """Refuse a warm start that would go around what an inner strategy guards."""
    name = type(inner).__name__
    if name.startswith("DifferentialPrivacy"):
        raise SettingsError(
            "warm_start would move the model by the explorers' updates, unclipped "
            f"and without the noise of {name}; use one or the other"
        )
    if name in _ROBUST:
        raise SettingsError(
            "warm_start would move the model by the mean of all explorers' updates, "
            f"which one of them can ruin before {name} sees a reply; use one or the "
            "other"
        )


def prunable_of(
    prunable: Sequence[str] | None, model: nn.Module | None
) -> Sequence[str] | None:
    """Return what is trainable: as told, or as the model says."""
    if prunable is None and model is not None:
        return trainable_names(model)
    return prunable


def units_of(
    share: float,
    model: nn.Module | None,
    example_inputs: ExampleInputs | None,
    *,
    method: MethodName = "autoflip",
) -> Units | None:
    """Trace a model whose units are to be pruned, or looked at."""
    needed = share > 0 if method == "autoflip" else method in NEEDS_UNITS
    if method == "prunefl":  # without units all weights cost the same
        if model is None or example_inputs is None:
            return None
        try:
            return trace(model, example_inputs)
        except ModelError as error:
            _log.warning("prunefl: all weights count as equally slow: %s", error)
            return None
    if needed and model is None and method != "autoflip":
        raise SettingsError(
            f"{method} looks at the model's units: AutoFLIP(..., model=Net(), "
            "example_inputs=one_sample)"
        )
    if not needed or model is None:
        return None
    if example_inputs is None:
        raise SettingsError(
            "pruning whole units needs example_inputs beside the model: one sample "
            "that it runs on, such as next(iter(loader))[0][:1]"
        )
    return trace(model, example_inputs)


def _answer_of(reply: Message) -> Answer | str:
    """Return what an explorer found, or the reason why there is nothing."""
    try:
        if reply.has_error():
            return f"it carries the error: {reply.error.reason}"
        frame, signs = wire.guidance_frames(wire.only_array_record(reply.content)[1])
        _check_metrics(reply)
        return Answer(frame, signs, _examples_of(reply))
    except WireError as error:
        return str(error)


def _metrics_of(reply: Message) -> MetricRecord:
    records = list(reply.content.metric_records.values())
    if len(records) != 1:
        raise WireError(f"expected exactly one MetricRecord, got {len(records)}")
    return records[0]


def _check_metrics(reply: Message) -> None:
    """Refuse metrics that would poison an average."""
    for name, value in _metrics_of(reply).items():
        numbers = value if isinstance(value, list) else [value]
        if not all(math.isfinite(number) for number in numbers):
            raise WireError(f"expected a finite metric {name!r}, got {value}")
        if name == _EXAMPLES and (isinstance(value, list) or value < 0):
            raise WireError(f"expected a number {name!r} >= 0, got {value}")


def _examples_of(reply: Message) -> float:
    """Return how many examples a reply stands for; 1 if it does not say."""
    value = _metrics_of(reply).get(_EXAMPLES, 1)
    return 1 if isinstance(value, list) else value


def _form_of(reply: Message) -> str:
    """Return record keys and metrics, with the length of those that are lists."""
    metrics = {
        name: len(value) if isinstance(value, list) else "number"
        for name, value in sorted(_metrics_of(reply).items())
    }
    arrays = sorted(reply.content.array_records)
    return f"arrays {arrays}, {next(iter(reply.content.metric_records))!r} {metrics}"


def _by_form(replies: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """Tell replies that are formed like most replies from the odd ones.

    Flower's strategies refuse a whole round over one odd reply.
    """
    forms = [_form_of(reply) for reply in replies]
    most = Counter(forms).most_common(1)[0][0] if forms else ""
    usual = [r for r, form in zip(replies, forms, strict=True) if form == most]
    odd = [r for r, form in zip(replies, forms, strict=True) if form != most]
    return usual, odd
