"""What becomes of clients' replies, on either of Flower's APIs."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from flwr.app import ArrayRecord

from autoflip_flwr.errors import AutoFlipError, WireError
from autoflip_flwr.method.outliers import far_off, update_sizes
from autoflip_flwr.server.rounds import Rounds
from autoflip_flwr.settings import WireSettings
from autoflip_flwr.types import Params
from autoflip_flwr.wire import records

#: What most apps weight their replies by.
EXAMPLES = "num-examples"

T = TypeVar("T")
M = TypeVar("M")


@dataclass(slots=True)
class Reply(Generic[T]):
    """One client's reply.

    Attributes
    ----------
    node_id : int
    origin : object
        As the API hands it over.
    record : ArrayRecord
        The arrays as they travelled; empty for an evaluation.
    examples : float
        How many it stands for.
    form : str
        Flower's strategies refuse a whole round over one reply of another form.
    arrays : mapping of name -> array
        What `record` holds, dense: pruned entries have not moved.
    """

    node_id: int
    origin: T
    record: ArrayRecord
    examples: float
    form: str = ""
    arrays: Params = field(default_factory=dict)


class Replies:
    """Drops and names replies that cannot be used; ends the round with the others.

    Parameters
    ----------
    rounds : Rounds
    settings : WireSettings
    """

    def __init__(self, rounds: Rounds, settings: WireSettings) -> None:
        self._rounds = rounds
        self._settings = settings

    def readable(
        self,
        server_round: int,
        received: Iterable[tuple[int, T]],
        read: Callable[[int, T], Reply[T]],
    ) -> list[Reply[T]]:
        """Read replies, in their order; without those that are broken or odd in form.

        Parameters
        ----------
        server_round : int
        received : iterable of (node id, object)
            In the order of asking, which makes sums of floats repeatable.
        read : callable
            May raise what a hostile reply provokes.
        """
        replies = []
        for node_id, origin in received:
            try:
                replies.append(read(node_id, origin))
            except (AutoFlipError, ValueError, TypeError, KeyError) as error:
                self._rounds.drop(server_round, node_id, str(error))
        forms = Counter(reply.form for reply in replies)
        usual = forms.most_common(1)[0][0] if forms else ""
        for reply in replies:
            if reply.form != usual:
                self._rounds.drop(
                    server_round,
                    reply.node_id,
                    f"expected the form of most replies, {usual}, got {reply.form}",
                )
        return [reply for reply in replies if reply.form == usual]

    def trained(
        self,
        server_round: int,
        received: Iterable[tuple[int, T]],
        read: Callable[[int, T], Reply[T]],
        *,
        sent: bytes,
    ) -> list[Reply[T]]:
        """Return the replies that a round goes on with, dense; none ends it.

        `sent` are the values that the clients were given.
        """
        rounds, plan = self._rounds, self._rounds.plan

        def dense(node_id: int, origin: T) -> Reply[T]:
            reply = read(node_id, origin)
            assert plan is not None, "nobody answers what was not sent"
            reply.record = records.named(reply.record, plan)
            reply.arrays = plan.unpack(reply.record, fill=rounds.arrays)
            return reply

        replies = self.readable(server_round, received, dense)
        odd = self._outliers(replies)
        for index, reason in odd.items():
            rounds.drop(server_round, replies[index].node_id, reason)
        replies = [reply for i, reply in enumerate(replies) if i not in odd]
        for reply in replies:
            frame = reply.record[records.VALUES].data
            rounds.diagnostics.observe(sent, frame, rounds.values, reply.examples)
        least = self._settings.min_replies
        if len(replies) < least:
            reason = f"{len(replies)} valid replies, expected {least} or more"
        elif not any(reply.examples for reply in replies):
            reason = "no valid reply trained on any example"
        else:
            return replies
        rounds.abandon(server_round, reason)
        return []

    def aggregated(
        self,
        server_round: int,
        inner: object,
        aggregate: Callable[[], tuple[Any, M]],
        arrays: Callable[[Any], Params],
    ) -> tuple[Any, M]:
        """Let the inner strategy aggregate, and take what it made as the global model.

        Where that is not finite the inner strategy is put back to where it was.
        """
        before = [(one, dict(vars(one))) for one in chain(inner)]
        made, metrics = aggregate()
        if made is None:
            reason = "the inner strategy aggregated nothing"
            self._rounds.abandon(server_round, reason)
            return None, metrics
        found = arrays(made)
        if not all(np.isfinite(value).all() for value in found.values()):
            for one, state in before:  # what it would go on with is not finite either
                vars(one).clear()
                vars(one).update(state)
            self._rounds.abandon(server_round, "the aggregate is not finite")
            return None, metrics
        self._rounds.finish(found)
        return made, metrics

    def _outliers(self, replies: list[Reply[T]]) -> dict[int, str]:
        """Return the reasons to drop replies far from the others, by their index.

        The prunable weights are compared together, every other array alone, so that
        none hides behind them.
        """
        limit = self._settings.outlier
        entries = {e.name: e for e in self._rounds.manifest.entries}
        floating = [name for name, entry in entries.items() if entry.dtype[1] == "f"]
        sizes: dict[str, dict[int, float]] = {}
        for index, reply in enumerate(replies):
            own = update_sizes(
                reply.arrays,
                self._rounds.arrays,
                lambda name: "" if entries[name].masked else f" {name}",
                floating,
            )
            for group, size in own.items():
                sizes.setdefault(group, {})[index] = size
        reasons: dict[int, str] = {}
        for group, of_replies in sizes.items():
            reasons |= far_off(f"moved{group}", of_replies, limit=limit)
        examples = {index: reply.examples for index, reply in enumerate(replies)}
        return reasons | far_off("has examples", examples, limit=limit)


def chain(strategy: object) -> Iterator[object]:
    """Yield a strategy, the one inside it, and so on."""
    inner: Any = strategy
    while hasattr(inner, "aggregate_train") or hasattr(inner, "aggregate_fit"):
        yield inner
        inner = vars(inner).get("strategy")


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Refuse metrics that would poison an average.

    Raises
    ------
    WireError
        If one is not finite, or examples are not a number >= 0.
    """
    for name, value in metrics.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(math.isfinite(n) for n in numbers if isinstance(n, int | float)):
            raise WireError(f"expected a finite metric {name!r}, got {value}")
        if name == EXAMPLES and (not isinstance(value, int | float) or value < 0):
            raise WireError(f"expected a number {name!r} >= 0, got {value}")
