"""The exploration before a round: requests to nodes, and their answers."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from flwr.app import ArrayRecord

from autoflip_flwr.errors import WireError, by_reason, one_line
from autoflip_flwr.method.mean import WeightedMean
from autoflip_flwr.method.outliers import capped, far_off, root_mean_square
from autoflip_flwr.pruners import Ask, Pruner
from autoflip_flwr.pruners.store import Answer, Answers, Measured
from autoflip_flwr.server.rounds import Rounds
from autoflip_flwr.settings import WireSettings
from autoflip_flwr.types import Measure, Params
from autoflip_flwr.wire.records import Exploration, Plan

_log = logging.getLogger("flwr")

#: Bytes of answers: at most so many wait at the SuperLink, and in this process.
_BATCH_BYTES, _PULL_BYTES = 1 << 30, 1 << 25
_LEAST_BATCH = 8

#: (arrays, entries of the config, nodes) -> (node, its answer) as they arrive. A text
#: in place of the answer is the reason of a failure.
Send: TypeAlias = Callable[
    [ArrayRecord, dict[str, Any], Sequence[int]], Iterable[tuple[int, Answer | str]]
]


class Intake:
    """Lets nodes explore, or measure gradients, and passes the results to the pruner.

    `settings` say which answers are left out, and how much one counts.
    """

    def __init__(self, rounds: Rounds, settings: WireSettings) -> None:
        self._rounds = rounds
        self._settings = settings
        self._kept: Answers | None = None
        self._warmth = WeightedMean()
        self._warm = False  # whether the weights have been moved
        self._built = True  # whether nodes explore from weights that they can build

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"warm": self._warm, "built": self._built}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._warm = state["warm"]
        self._built = state["built"]

    def explore(
        self,
        server_round: int,
        *,
        connected: Sequence[int],
        sampled: Sequence[int],
        send: Send,
    ) -> bool:
        """Let the pruner's choice of nodes explore; tell whether the weights changed.

        Answers are used in the order of the requests. A resumed run asks only the
        nodes that have not answered. A warm start moves the weights to the mean of the
        explorers' weights, weighted by their examples. It is an ExplorationError if no
        mask can be made.
        """
        rounds, answers = self._rounds, self._answers()
        moved = False
        wanted = rounds.exploration.warm_start and not self._warm
        if wanted and not rounds.pruner.explores:  # for the start alone
            answers.begin(0)
            self._ask(Ask(nodes=connected), answers, send, None)
            moved = self._move()
            self._warm = True  # once: a later answer would not fit the trained weights
            rounds.initial, self._built = dict(rounds.arrays), False
        ask = rounds.pruner.asks(server_round, connected=connected, sampled=sampled)
        answers.begin(server_round)
        if ask is None:
            return moved
        if ask.renew:
            rounds.initial, self._built = dict(rounds.arrays), False
        self._ask(ask, answers, send, rounds.pruner)
        return self._move() or moved

    def _ask(
        self, ask: Ask, answers: Answers, send: Send, pruner: Pruner | None
    ) -> None:
        """Send the request; use the answers in its order.

        Without a pruner they are for a warm start alone, which may have none.
        """
        waiting = [node_id for node_id in ask.nodes if node_id not in answers]
        if self._is_built(ask):
            failed: dict[int, str] = {}
            self._send(self.request(ask), waiting, answers, send, failed.__setitem__)
            for reason, nodes in by_reason(failed).items():
                _log.info("exploration: %d nodes get the start: %s", len(nodes), reason)
            waiting = list(failed)
        if waiting:  # else nobody needs the weights, which take time to pack
            request = self.request(ask, built=False)
            self._send(request, waiting, answers, send, answers.fail)
        for node_id in ask.nodes:
            if node_id not in answers:  # recorded, so a resumed run does not ask again
                answers.fail(node_id, "no reply in time")
        self._take(ask, answers, pruner)

    def _send(
        self,
        request: tuple[ArrayRecord, dict[str, Any]],
        nodes: Sequence[int],
        answers: Answers,
        send: Send,
        fail: Callable[[int, str], None],
    ) -> None:
        """Send a request in batches; keep the answers."""
        size = max(_LEAST_BATCH, _BATCH_BYTES // self._answer_bytes())
        for start in range(0, len(nodes), size):
            batch = nodes[start : start + size]
            _log.info("exploration: %d nodes explore", len(batch))
            for node_id, answer in send(*request, batch):
                if isinstance(answer, str):
                    fail(node_id, answer)
                else:
                    answers.put(node_id, answer)

    def at_once(self) -> int:
        """Return how many answers may be in memory before they are on disk."""
        return max(1, _PULL_BYTES // self._answer_bytes())

    def _answer_bytes(self) -> int:
        return max(1, sum(map(math.prod, self._rounds.manifest.shapes.values())))

    def _answers(self) -> Answers:
        if self._kept is None:
            folder = self._rounds.directory / "answers"
            self._kept = Answers(folder, self._rounds.manifest.shapes)
            if self._rounds.fresh:
                self._kept.clear()
        return self._kept

    def request(
        self, ask: Ask, *, built: bool = True
    ) -> tuple[ArrayRecord, dict[str, Any]]:
        """Return the arrays and the entries of the config that nodes need.

        No arrays, with `built`, if the nodes build them.
        """
        rounds, settings = self._rounds, self._rounds.exploration
        trains = ask.measure == "deviation"
        measure: Measure = "update" if self._warms(ask) else ask.measure
        start = None
        if built and self._is_built(ask):
            start = rounds.manifest.digest(self._start_of(ask))
        plan = rounds.plan if ask.current else None
        if (
            start is None and not ask.current and rounds.values != "float32"
        ):  # dense, of smaller values
            shapes = rounds.manifest.shapes
            ones = {name: np.ones(shape, np.bool_) for name, shape in shapes.items()}
            plan = Plan(rounds.manifest, ones, rounds.values)
        exploration = Exploration(
            manifest=rounds.manifest,
            plan=plan,
            epochs=settings.epochs if trains else 1,
            patience=settings.patience if trains else 1,
            measure=measure,
            start=start,
        )
        return exploration.pack(self._start_of(ask)), exploration.entries()

    def _warms(self, ask: Ask) -> bool:
        """Tell whether training starts from the weights of these explorers."""
        wanted = self._rounds.exploration.warm_start and ask.measure == "deviation"
        return bool(wanted) and not self._warm

    def _is_built(self, ask: Ask) -> bool:
        """Tell whether nodes build the weights that they begin with."""
        wanted = self._rounds.exploration.own_start and not ask.current
        return wanted and self._built

    def _start_of(self, ask: Ask) -> Params:
        return self._rounds.arrays if ask.current else self._rounds.initial

    def _take(self, ask: Ask, answers: Answers, pruner: Pruner | None) -> None:
        """Pass the valid answers to the pruner; log why others are left out."""
        rounds = self._rounds
        start = rounds.weights(self._start_of(ask))
        odd = self._odd(ask, answers)
        reasons: dict[int, str] = {}
        fit = {n: m for n in ask.nodes if n not in odd and (m := answers.get(n))}
        told = capped([m.examples for m in fit.values()], self._settings.weight_cap)
        weights = dict(zip(fit, told, strict=True))
        for node_id in ask.nodes:
            measured = answers.get(node_id)
            try:
                if measured is None:
                    raise WireError(answers.failure(node_id) or "no reply in time")
                if node_id in odd:
                    raise WireError(odd[node_id])
                warm = _movement(measured) if self._warms(ask) else None
                if pruner is not None:
                    pruner.add(node_id, measured, start)
                if warm is not None:
                    self._warmth.add(warm, weights[node_id])
            except ValueError as error:
                reasons[node_id] = one_line(str(error))
        for reason, nodes in by_reason(reasons).items():
            named = f"node {nodes[0]} is" if len(nodes) == 1 else f"nodes {nodes} are"
            _log.warning("exploration: %s left out: %s", named, reason)
        explored = len(ask.nodes) - len(reasons)
        _log.info("exploration: %d of %d nodes explored", explored, len(ask.nodes))
        answers.forget()
        if pruner is not None:
            pruner.check(reasons)

    def _odd(self, ask: Ask, answers: Answers) -> dict[int, str]:
        """Return the reason for each answer that is far from the others."""
        squared = ask.measure in ("deviation", "squared-gradient")
        fit = {n: m for n in ask.nodes if (m := answers.get(n)) is not None}
        means = {node_id: m.statistics.mean for node_id, m in fit.items()}
        moved = {n: math.sqrt(mean) if squared else mean for n, mean in means.items()}
        examples = {node_id: m.examples for node_id, m in fit.items()}
        limit, others, idle = self._settings.outlier, [], math.inf
        if ask.measure == "deviation":
            # Where most explorers do not move: as far as the weights are large.
            start = self._rounds.weights(self._start_of(ask))
            idle = root_mean_square(start.values())
            others = [math.sqrt(mean) for mean in self._rounds.pruner.explored()]
        return {
            **far_off("moved", moved, limit=limit, others=others, idle=idle),
            **far_off("has examples", examples, limit=limit),
        }

    def _move(self) -> bool:
        """Move the weights to the mean of the explorers' if a warm start wants it."""
        rounds, moved = self._rounds, self._warmth.take()
        self._warm = self._warm or bool(moved)
        for name, value in moved.items():
            weights = rounds.arrays[name]
            there = (weights + value).astype(weights.dtype)
            rounds.arrays = rounds.manifest.tied({**rounds.arrays, name: there})
        return bool(moved)


def _movement(measured: Measured) -> Params:
    """Return how far an explorer's weights moved, with signs."""
    rises = measured.signs()
    moved = measured.guidance().dense()
    for name, value in moved.items():
        np.sqrt(value, out=value)
        np.negative(value, out=value, where=~rises[name])
    return moved
