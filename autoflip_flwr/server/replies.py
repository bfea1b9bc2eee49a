"""Checks of the clients' replies and of the aggregate, for both of Flower's APIs."""

import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from flwr.app import ArrayRecord

from autoflip_flwr.errors import AutoFlipError, ReplyError, WireError, one_line
from autoflip_flwr.method.outliers import (
    capped,
    far_off,
    root_mean_square,
    update_sizes,
)
from autoflip_flwr.server.rounds import Rounds
from autoflip_flwr.settings import WireSettings
from autoflip_flwr.types import Params
from autoflip_flwr.wire import records

_log = logging.getLogger("flwr")

#: The metric that most apps weight their replies by.
EXAMPLES = "num-examples"

#: In the reasons of replies that more rounds would not make better.
_MISFITS = (records.RAW, "AutoFlipMod", "errors.MaskError", "expected the arrays")

#: Strategies of both APIs with an optimizer that moves all arrays of the model.
_OPTIMIZERS = {"FedAvgM", "FedOpt"}

#: How the names of strategies with differential privacy at the server begin.
PRIVATE = ("DifferentialPrivacy", "DPFedAvg")

#: A metric of the client mod that goes with Flower's adaptive clipping.
_NORM_BIT = "norm_bit"

#: The largest metric; as many of them as there can be clients have a finite sum.
_LARGEST = float(np.finfo(np.float32).max)

T = TypeVar("T")
M = TypeVar("M")


@dataclass(slots=True)
class Reply(Generic[T]):
    """One client's reply."""

    node_id: int
    origin: T  # the reply as the API passes it
    record: ArrayRecord  # the arrays as sent by the client; empty for an evaluation
    examples: float  # behind the reply: its weight
    #: Names of its records and metrics. Flower's strategies refuse the whole round if
    #: one reply has another form.
    form: str = ""
    numbers: dict[str, float] = field(default_factory=dict)  # the size of each metric
    #: What else is in the reply, and how to remove it from `origin`.
    extras: dict[str, Callable[[], object]] = field(default_factory=dict)
    arrays: Params = field(default_factory=dict)  # dense; pruned entries: the server's


class Replies:
    """Drops invalid replies with a log line, and ends the round with the others."""

    def __init__(self, rounds: Rounds, settings: WireSettings) -> None:
        self._rounds = rounds
        self._settings = settings
        self._warned = False  # that training moves pruned weights

    def readable(
        self, received: Iterable[tuple[int, T]], read: Callable[[int, T], Reply[T]]
    ) -> list[Reply[T]]:
        """Read replies in order, without those that are broken or far from the others.

        A reply that lacks what most have, or has another form, is dropped. What most do
        not have is removed from a reply. Examples are capped. `received` is in the
        order of the requests, which makes sums of floats repeatable; `read` may raise
        the errors that a hostile reply causes.
        """
        replies = []
        for node_id, origin in received:
            try:
                replies.append(read(node_id, origin))
                self._rounds.held.answered(node_id)
            except (AutoFlipError, ValueError, TypeError, KeyError) as error:
                self._rounds.drop(node_id, str(error))
        replies = self._without(replies, self._unlike(replies))
        replies = self._without(replies, self._odd_numbers(replies))
        told = capped([reply.examples for reply in replies], self._settings.weight_cap)
        for reply, examples in zip(replies, told, strict=True):
            reply.examples = examples
        return replies

    def _unlike(self, replies: Sequence[Reply[T]]) -> dict[int, str]:
        """Return index -> reason of replies that lack what most have; remove extras."""
        forms = Counter(reply.form for reply in replies)
        usual = forms.most_common(1)[0][0] if forms else ""
        extras = Counter(name for reply in replies for name in reply.extras)
        asked = {name for name, count in extras.items() if 2 * count > len(replies)}
        reasons: dict[int, str] = {}
        for index, reply in enumerate(replies):
            if reply.form != usual:
                reasons[index] = (
                    f"expected the form of most replies, {usual}, got {reply.form}"
                )
            elif missing := sorted(asked.difference(reply.extras)):
                reasons[index] = f"expected {missing}, as most replies have, got none"
            elif unasked := sorted(set(reply.extras) - asked):
                for name in unasked:
                    reply.extras[name]()
                _log.warning(
                    "round %d: from the reply of node %d is removed what most do not "
                    "send: %s",
                    *(self._rounds.number, reply.node_id, one_line(str(unasked))),
                )
        return reasons

    def _without(
        self, replies: list[Reply[T]], reasons: Mapping[int, str]
    ) -> list[Reply[T]]:
        """Drop the replies that there is a reason for, by their index."""
        for index, reason in sorted(reasons.items()):
            self._rounds.drop(replies[index].node_id, reason)
        return [reply for i, reply in enumerate(replies) if i not in reasons]

    def trained(
        self,
        received: Iterable[tuple[int, T]],
        read: Callable[[int, T], Reply[T]],
        *,
        sent: Mapping[int, bytes],
        failures: Iterable[object] = (),
    ) -> list[Reply[T]]:
        """Return the dense replies to aggregate; an empty list ends the round.

        `sent` are the frames of values that the clients received, `failures` are
        errors that came in place of replies.
        """
        rounds, plan = self._rounds, self._rounds.plan
        received, moved = list(received), [0.0]

        def dense(node_id: int, origin: T) -> Reply[T]:
            reply = read(node_id, origin)
            assert plan is not None, "a reply before the first message"
            record = records.named(reply.record, plan, reply=True)
            reply.record, share = records.take_moved(record)
            moved.append(share)
            reply.arrays = plan.unpack_reply(reply.record, rounds.arrays)
            return reply

        replies = self.readable(received, dense)
        self._warn(max(moved))
        if not replies:
            reasons = [rounds.dropped[node_id] for node_id, _ in received]
            self._check_apps([*reasons, *(one_line(str(f)) for f in failures)])
        replies = self._without(replies, self._outliers(replies))
        usual = next(iter(sent.values()), b"")  # that of a late reply is not known
        for reply in replies:
            assert plan is not None
            values = reply.record[records.VALUES].data
            update = plan.update(sent.get(reply.node_id, usual), values)
            rounds.diagnostics.observe(update, reply.examples)
            rounds.pruner.observe(reply.arrays, reply.examples)
        least = self._settings.min_replies
        if len(replies) < least:
            reason = f"{len(replies)} valid replies, expected {least} or more"
        elif not any(reply.examples for reply in replies):
            reason = "no valid reply trained on any example"
        else:
            return replies
        rounds.abandon(reason)
        return []

    def aggregated(
        self,
        inner: object,
        aggregate: Callable[[], tuple[Any, M]],
        arrays: Callable[[Any], Params],
        replies: Sequence[Reply[Any]],
    ) -> tuple[Any, M]:
        """Let the inner strategy aggregate; its result becomes the global model.

        If the result is not finite, the inner strategy gets its earlier state back. An
        optimizer at the server moves the weights alone: buffers are the mean of the
        replies, as momentum would carry a running variance below zero.
        """
        before = [(one, dict(vars(one))) for one in chain(inner)]
        made, metrics = aggregate()
        if made is None:
            self._rounds.abandon("the inner strategy aggregated nothing")
            return None, metrics
        model = arrays(made)
        if not all(np.isfinite(value).all() for value in model.values()):
            for one, state in before:  # its own state is not finite either
                vars(one).clear()
                vars(one).update(state)
            self._rounds.abandon("the aggregate is not finite")
            return None, metrics
        kinds = kinds_of(inner)  # what lacks its noise is not private
        if kinds & _OPTIMIZERS and not any(k.startswith(PRIVATE) for k in kinds):
            model = {**model, **self._buffers(replies)}
        self._rounds.finish(model)
        return made, metrics

    def _buffers(self, replies: Sequence[Reply[Any]]) -> Params:
        """Return the mean of each buffer, by the examples behind the replies."""
        weights = [reply.examples for reply in replies]
        distinct = self._rounds.manifest.distinct.entries
        names = [entry.name for entry in distinct if not entry.trainable]
        return {
            name: np.average([r.arrays[name] for r in replies], axis=0, weights=weights)
            for name in names
        }

    def _warn(self, share: float) -> None:
        """Say once a run that training moves pruned weights, and what helps."""
        if share and not self._warned:
            self._warned = True
            _log.warning(
                "round %d: training moved up to %.3g %% of the pruned weights; they "
                "are zero again, but the training did not know. This line keeps them "
                "at zero: `with masked(model, message): train(...)`, on the older API "
                "`with masked(model, config): ...`; without torch, multiply by "
                "masks_from(message) after each step",
                *(self._rounds.number, 100 * share),
            )

    def _check_apps(self, reasons: Sequence[str]) -> None:
        """End the run before any training if no client's app fits the server.

        All replies were dropped since the app lacks the mod, or refused model or mask:
        more rounds would not help.
        """
        fits = [not any(m in reason for m in _MISFITS) for reason in reasons]
        if reasons and not self._rounds.trained and not any(fits):
            raise ReplyError(f"no client can train: {reasons[0]}")

    def _outliers(self, replies: list[Reply[T]]) -> dict[int, str]:
        """Return index -> reason of the replies that are far from the others.

        The prunable weights are compared together. Every other array is compared on
        its own: among the many weights a huge value in a small array would not show.
        Clients without examples do not tell how far training moves.
        """
        silent = {i for i, reply in enumerate(replies) if not reply.examples}
        limit, before = self._settings.outlier, self._rounds.arrays
        entries = {e.name: e for e in self._rounds.manifest.entries}
        distinct = self._rounds.manifest.distinct.entries
        numbers = [entry.name for entry in distinct if entry.dtype[1] != "b"]

        def group_of(name: str) -> str:
            return "" if entries[name].masked else f" {name}"

        sizes: dict[str, dict[int, float]] = {}
        for index, reply in enumerate(replies):
            own = update_sizes(reply.arrays, before, group_of, numbers)
            for group, size in own.items():
                sizes.setdefault(group, {})[index] = size
        reasons: dict[int, str] = {}
        for group, of_replies in sizes.items():
            idle, told = math.inf, [s for i, s in of_replies.items() if i not in silent]
            if any(of_replies.values()) and told and not statistics.median(told):
                idle = self._size_of([n for n in numbers if group_of(n) == group])
            reasons |= far_off(
                f"moved{group}", of_replies, limit=limit, idle=idle, silent=silent
            )
        return reasons

    def _size_of(self, names: list[str]) -> float:
        """Return the norm of arrays whose entries are as large as the weights.

        Or as large as their own, if those are larger; integers: or as large as one.
        Where most clients leave arrays as they are, nobody may move them farther.
        """
        rounds = self._rounds
        own = [rounds.arrays[name] for name in names]
        entry = max(
            root_mean_square(rounds.weights(rounds.arrays).values()),
            root_mean_square(array.astype(np.float64) for array in own),
            *(1.0 for array in own if array.dtype.kind in "iu"),
        )
        return entry * math.sqrt(sum(array.size for array in own))

    def _odd_numbers(self, replies: list[Reply[T]]) -> dict[int, str]:
        """Return index -> reason of replies whose metrics or examples are far off.

        Metrics differ more than weights do: the limit is squared, and sizes below one
        count as one.
        """
        limit = self._settings.outlier
        reasons: dict[int, str] = {}
        for name in replies[0].numbers if replies else ():
            sizes = {i: max(1.0, r.numbers.get(name, 0)) for i, r in enumerate(replies)}
            square = None if limit is None else limit**2
            reasons |= far_off(f"reports {name}", sizes, limit=square)
        examples = {i: r.examples for i, r in enumerate(replies) if r.examples > 0}
        return reasons | far_off("has examples", examples, limit=limit)


def chain(strategy: object) -> Iterator[object]:
    """Yield a strategy, the one inside it, and so on."""
    inner: Any = strategy
    while hasattr(inner, "aggregate_train") or hasattr(inner, "aggregate_fit"):
        yield inner
        inner = vars(inner).get("strategy")


def kinds_of(strategy: object) -> set[str]:
    """Return the names of the classes of a strategy and of those inside it."""
    return {kind.__name__ for one in chain(strategy) for kind in type(one).__mro__}


def setting(strategy: object, name: str, kind: Any, default: Any) -> Any:
    """Return what a strategy, or one inside it, has under a name."""
    found = (getattr(one, name, None) for one in chain(strategy))
    return next((value for value in found if isinstance(value, kind)), default)


def check_size(size: int, largest: int) -> None:
    """Refuse a whole reply of more bytes than the model can need."""
    if size > largest:
        raise WireError(f"expected a whole reply of at most {largest} B, got {size} B")


def check_metrics(
    metrics: Mapping[str, Any], strategy: object = None, weight: str = EXAMPLES
) -> dict[str, float]:
    """Refuse metrics that would ruin the model or hide in an average.

    Others, such as a loss that is NaN, are passed on as Flower does: they show. Returns
    the size of each finite metric but `weight`. It is a WireError if `weight` is not a
    number >= 0; if a metric that the strategy aggregates with, whose name it therefore
    holds, is not finite; or if one is finite, but not in float32, whose sums are finite
    in float64.
    """
    used = {weight, _NORM_BIT}
    for one in chain(strategy):
        used.update(value for value in vars(one).values() if isinstance(value, str))
    sizes: dict[str, float] = {}
    for name, value in metrics.items():
        numbers = value if isinstance(value, list) else [value]
        told = [abs(number) for number in numbers if isinstance(number, int | float)]
        size, finite = max(told, default=0), all(map(math.isfinite, told))
        if (name in used and not finite) or (finite and size > _LARGEST):
            raise WireError(f"expected a finite metric {name!r}, got {value}")
        if name != weight and finite:
            sizes[name] = size
        if name == weight and (not isinstance(value, int | float) or value < 0):
            raise WireError(f"expected a number {name!r} >= 0, got {value}")
    return sizes
