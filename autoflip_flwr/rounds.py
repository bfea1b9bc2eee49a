"""The server's state from round to round, without Flower's message types.

The strategy and the adapter for Flower's older API are thin translators around it.
"""

import contextlib
import logging
import math
import shutil
import statistics
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from autoflip_flwr import mask as masking
from autoflip_flwr import pruners
from autoflip_flwr.codec import VALUE_TYPES, dequantize, unpack_mask
from autoflip_flwr.errors import SettingsError, WireError
from autoflip_flwr.groups import Units
from autoflip_flwr.manifest import Manifest
from autoflip_flwr.pruners import METHODS, Ask, Pruner
from autoflip_flwr.pruners.mean import WeightedMean
from autoflip_flwr.settings import ExplorationSettings, PruningSettings, RivalSettings
from autoflip_flwr.store import Answer, Answers, statistics_of
from autoflip_flwr.types import Array, Measure, MethodName, Params, ValueType
from autoflip_flwr.wire import Exploration, Plan

_log = logging.getLogger("flwr")

#: Fewer replies have no middle to be far from.
_FEW = 3

#: Bytes of explorers' answers that may wait at the SuperLink, and in this process.
_BATCH_BYTES, _PULL_BYTES = 1 << 30, 1 << 25
_LEAST_BATCH = 8


class Rounds:
    """What the server knows: the global weights, who explored, the round's mask.

    Attributes
    ----------
    arrays : mapping of name -> array
        The global model. Where pruned weights are kept (`pruned_weights="keep"`)
        they are in here, and nowhere else.
    plan : Plan or None
        Manifest and mask of the current round.
    mask_change : float
        Share of the mask's entries that the last round changed.
    update_variance : float or None
        Mean over the kept parameters of the variance of the clients' updates.
    guidance_cosine : float or None
        Cosine between the guidance and the clients' mean squared updates, over the
        kept parameters: whether the one-time map stays true.
    dropped : dict of node id -> reason
        Replies of the current round that were left out.
    """

    def __init__(
        self,
        pruning: PruningSettings,
        exploration: ExplorationSettings,
        *,
        method: MethodName = "autoflip",
        rivals: RivalSettings | None = None,
        values: ValueType = "float32",
        outlier: float | None = 100.0,
        prunable: Sequence[str] | None = None,
        store: Path | None = None,
        seed: int | None = None,
        units: Units | None = None,
    ) -> None:
        self.pruning = pruning
        self.exploration = exploration
        self.arrays: Params = {}
        self.plan: Plan | None = None
        self.mask_change = 0.0
        self.update_variance: float | None = None
        self.guidance_cosine: float | None = None
        self.dropped: dict[int, str] = {}
        if values not in VALUE_TYPES:
            raise SettingsError(
                f"unknown value type {values!r}; known: {list(VALUE_TYPES)}"
            )
        self._values = values
        if outlier is not None and not outlier >= 1:
            raise SettingsError(f"expected outlier >= 1 or None, got {outlier}")
        self._outlier = outlier
        self._prunable = prunable
        self._units = units
        if method not in METHODS:
            raise SettingsError(f"unknown method {method!r}; known: {list(METHODS)}")
        self._method = method
        if rivals is not None and not isinstance(rivals, RivalSettings):
            raise SettingsError(f"expected RivalSettings, got {rivals!r}")
        self._rivals = rivals or RivalSettings()
        self._seed = seed
        if store is None:
            store = Path(tempfile.mkdtemp("-autoflip"))
            weakref.finalize(self, shutil.rmtree, store, ignore_errors=True)
        self._store = store
        self._answers = Answers(store / "answers")
        self._reasons: dict[int, str] = {}
        self._fresh = True  # not a run that goes on
        self._previous: Plan | None = None
        self._manifest: Manifest | None = None
        self._pruner: Pruner | None = None
        self._initial: Params = {}
        self._spread: _Spread | None = None
        self._warmth = WeightedMean()
        self._warm = False  # whether the weights have been moved

    @property
    def manifest(self) -> Manifest:
        """Names, shapes and types of the model's arrays."""
        assert self._manifest is not None, "adopt() first"
        return self._manifest

    @property
    def pruner(self) -> Pruner:
        """What makes the masks."""
        assert self._pruner is not None, "adopt() first"
        return self._pruner

    @property
    def restores(self) -> bool:
        """Whether pruned weights are remembered, to be offered again."""
        return self.pruner.restores

    def adopt(self, arrays: Params) -> None:
        """Take a global model from outside; the first one is `W0`."""
        if self._manifest is None:
            self._check_units(arrays)
            self._manifest = Manifest.of(
                arrays, prunable=self._prunable, exclude=self.pruning.exclude
            )
            self._initial = dict(arrays)
            self._pruner = pruners.build(
                self._method,
                self._weights(arrays),
                pruning=self.pruning,
                exploration=self.exploration,
                rivals=self._rivals,
                directory=self._store,
                units=self._units,
                seed=self._seed,
                trainable_known=self._prunable is not None,
            )
            if self._fresh:
                self._answers.clear()
                self._pruner.start()
        self.arrays = dict(arrays)

    def state(self) -> dict[str, Any]:
        """Return what a process that goes on has to know, besides the arrays.

        Plain values and arrays. It may be asked for between rounds.
        """
        return {
            "initial": self._initial,
            "masks": None if self.plan is None else self.plan.masks,
            "warm": self._warm,
            "pruner": self.pruner.state(),
        }

    def restore(self, state: Mapping[str, Any], arrays: Params) -> None:
        """Go on where `state` was taken, with the global model `arrays`.

        Raises
        ------
        CheckpointError
            If local guidance that it stands on is not there any more.
        """
        self._fresh = False
        self.adopt(state["initial"])
        self.pruner.restore(state["pruner"])
        self.arrays = dict(arrays)
        self._initial = dict(state["initial"])
        self._warm = state["warm"]
        masks = state["masks"]
        self.plan = None if masks is None else Plan(self.manifest, masks, self._values)
        self._previous = self.plan

    def asks(
        self, server_round: int, *, connected: Sequence[int], sampled: Sequence[int]
    ) -> Ask | None:
        """Tell which nodes are to measure what before this round; None: nobody."""
        ask = self.pruner.asks(server_round, connected=connected, sampled=sampled)
        self._answers.begin(server_round)
        if ask is not None:
            self._reasons = {}
            if ask.renew:
                self._initial = dict(self.arrays)
        return ask

    def waiting(self, ask: Ask) -> list[int]:
        """Return the nodes whose answer an interrupted run does not have yet."""
        return [node_id for node_id in ask.nodes if node_id not in self._answers]

    def answer(self, node_id: int, answer: Answer | str) -> None:
        """Keep what a node answered; a text is the reason why it is nothing."""
        if isinstance(answer, str):
            self._answers.fail(node_id, answer)
            return
        try:
            self._answers.put(node_id, answer)
        except (TypeError, ValueError, OverflowError) as error:
            self._answers.fail(node_id, f"expected examples, got {error}")

    def exploration_of(self, ask: Ask) -> tuple[ArrayRecord, dict[str, Any]]:
        """Return what nodes need to measure: arrays, and entries of the config."""
        settings = self.exploration
        trains = ask.measure == "deviation"
        measure: Measure = "update" if self._warms(ask) else ask.measure
        exploration = Exploration(
            manifest=self.manifest,
            plan=self.plan if ask.current else self._dense_plan(),
            epochs=settings.epochs if trains else 1,
            patience=settings.patience if trains else 1,
            measure=measure,
        )
        return exploration.pack(self._start_of(ask)), exploration.entries()

    def _dense_plan(self) -> Plan | None:
        """Return how dense weights are packed; None: as they are."""
        if self._values == "float32":
            return None  # a mask of ones would only add to them
        whole = {n: np.ones(s, np.bool_) for n, s in self.manifest.shapes.items()}
        return Plan(self.manifest, whole, self._values)

    def _warms(self, ask: Ask) -> bool:
        """Tell whether these explorers' weights are to be the start of the training."""
        wanted = self.exploration.warm_start and ask.measure == "deviation"
        return wanted and not self._warm

    def _start_of(self, ask: Ask) -> Params:
        return self.arrays if ask.current else self._initial

    def batches(self, asked: Sequence[int]) -> list[Sequence[int]]:
        """Divide explorers so that a batch's answers fit in about a gigabyte."""
        size = max(_LEAST_BATCH, _BATCH_BYTES // self._answer_bytes())
        return [asked[start : start + size] for start in range(0, len(asked), size)]

    def answers_at_once(self) -> int:
        """Return how many answers to hold before they are on disk."""
        return max(1, _PULL_BYTES // self._answer_bytes())

    def _answer_bytes(self) -> int:
        shapes = self.manifest.shapes.values()
        return max(1, sum(math.prod(shape) for shape in shapes))

    def explored(self, ask: Ask) -> bool:
        """Take the nodes' answers, in the order of asking; tell if the weights changed.

        With a warm start they are then where the explorers on average ended, weighted
        by their examples.

        Raises
        ------
        ExplorationError
            If no mask can be made.
        """
        for node_id in self.waiting(ask):  # so that nobody is asked after a restart
            self._answers.fail(node_id, "no reply in time")
        failed = 0
        start = self._weights(self._start_of(ask))
        odd = self._odd_answers(ask)
        for node_id in ask.nodes:
            try:
                answer = self._answers.get(node_id)
                if answer is None:
                    raise WireError(
                        self._answers.failure(node_id) or "no reply in time"
                    )
                if node_id in odd:
                    raise WireError(odd[node_id])
                if not (answer.examples > 0 and math.isfinite(answer.examples)):
                    raise WireError(f"expected examples, got {answer.examples}")
                warm = self._warmth_of(answer) if self._warms(ask) else None
                self.pruner.add(node_id, answer.frame, answer.examples, start)
                if warm is not None:
                    self._warmth.add(warm, answer.examples)
            except ValueError as error:
                failed += 1
                self._reasons[node_id] = str(error)
                _log.warning("exploration: node %d is left out: %s", node_id, error)
        asked = len(ask.nodes)
        _log.info("exploration: %d of %d nodes explored", asked - failed, asked)
        self.pruner.check(self._reasons)
        moved = self._warmth.take()
        self._warm = self._warm or bool(moved)
        for name, value in moved.items():
            weights = self.arrays[name]
            self.arrays = {**self.arrays, name: (weights + value).astype(weights.dtype)}
        return bool(moved)

    def _odd_answers(self, ask: Ask) -> dict[int, str]:
        """Return the reasons to leave out answers that are far from the others."""
        moved: dict[int, float] = {}
        examples: dict[int, float] = {}
        for node_id in ask.nodes:
            answer = self._answers.get(node_id)
            if answer is None:
                continue
            with contextlib.suppress(WireError):  # told when it is taken
                found = dequantize(answer.frame, self.manifest.shapes)
                size = statistics_of(found).mean
                squared = ask.measure in ("deviation", "squared-gradient")
                moved[node_id] = math.sqrt(size) if squared else size
                examples[node_id] = answer.examples
        earlier = self.pruner.explored() if ask.measure == "deviation" else []
        return {
            **self._far_off("moved", moved, [math.sqrt(mean) for mean in earlier]),
            **self._far_off("has examples", examples),
        }

    def outliers(self, replies: Mapping[int, tuple[Params, float]]) -> dict[int, str]:
        """Return the reasons to drop replies that are far from the others.

        `replies` are all arrays of a reply, by name, and its examples, by any key. The
        prunable weights are compared together, every other array alone, so that none
        hides behind them.
        """
        sizes: dict[str, dict[int, float]] = {}
        for key, (arrays, _) in replies.items():
            squares: dict[str, float] = {}
            for entry in self.manifest.entries:
                if entry.dtype[1] == "f":
                    group = "" if entry.masked else f" {entry.name}"
                    with np.errstate(over="ignore"):  # infinitely far is far
                        update = np.subtract(
                            arrays[entry.name],
                            self.arrays[entry.name],
                            dtype=np.float32,
                            casting="same_kind",
                        ).reshape(-1)
                        square = float(np.dot(update, update))
                    squares[group] = squares.get(group, 0.0) + square
            for group, square in squares.items():
                sizes.setdefault(group, {})[key] = math.sqrt(square)
        reasons: dict[int, str] = {}
        for group, found in sizes.items():
            reasons.update(self._far_off(f"moved{group}", found))
        examples = {key: reply[1] for key, reply in replies.items()}
        return {**reasons, **self._far_off("has examples", examples)}

    def _far_off(
        self, what: str, sizes: Mapping[int, float], others: Sequence[float] = ()
    ) -> dict[int, str]:
        """Compare sizes with the median of them and of earlier ones."""
        every = [*sizes.values(), *others]
        if self._outlier is None or len(every) < _FEW:
            return {}
        usual = statistics.median(every)
        return {
            key: f"expected at most {self._outlier:g} times the median: it {what} "
            f"{size:.3g}, the median is {usual:.3g}"
            for key, size in sizes.items()
            if usual > 0 and size > self._outlier * usual
        }

    def _warmth_of(self, answer: Answer) -> Params:
        """Return how far an explorer's weights moved, with their signs."""
        if answer.signs is None:
            raise WireError("expected signs beside the guidance, got none")
        rises = unpack_mask(answer.signs, self.manifest.shapes)
        moved = dequantize(answer.frame, self.manifest.shapes).dense()
        for name, value in moved.items():
            np.sqrt(value, out=value)
            np.negative(value, out=value, where=~rises[name])
        return moved

    def begin(self, server_round: int, sampled: Sequence[int]) -> Plan:
        """Make the mask of a round for the sampled nodes."""
        masks = self.pruner.masks(sampled, self._weights(self.arrays), server_round)
        if self.plan is not None:
            before = self.plan.masks
            self.mask_change = 0.0 if masks is before else masking.change(before, masks)
        self._previous = self.plan
        self.plan = Plan(self.manifest, masks, self._values)
        self.dropped = {}
        self.update_variance = None
        self.guidance_cosine = None
        self._spread = None
        _log.info("mask: density %.4f, changed %.4f", self.density, self.mask_change)
        return self.plan

    def drop(self, server_round: int, node_id: int, reason: str) -> None:
        """Leave a node's reply out of the round, and say so."""
        self.dropped[node_id] = reason
        _log.warning(
            "round %d: the reply of node %d is dropped: %s",
            server_round,
            node_id,
            reason,
        )

    def observe(self, sent: bytes, received: bytes, examples: float = 1.0) -> None:
        """Note one client's update, from the frames that went out and came back."""
        if self._spread is None:
            assert self.plan is not None
            signs = self.pruning.agreement == "sign"
            self._spread = _Spread(sent, self.plan.values, signs=signs)
        self._spread.add(received, examples)

    def abandon(self, server_round: int, reason: str) -> None:
        """End a round that changed nothing: the model keeps the mask it has."""
        self.plan = self._previous
        _log.warning("round %d: %s: the model stays as it was", server_round, reason)

    def finish(self, aggregated: Params) -> None:
        """Take what the inner strategy made of the replies as the global model.

        Types are restored (Flower averages integers to floats). Entries the round
        pruned have learned nothing: they become zero, or keep the value they had.
        """
        assert self.plan is not None
        keep_values = self.restores
        settled: dict[str, Array] = {}
        for entry in self.manifest.entries:
            value = np.asarray(aggregated[entry.name])
            if entry.dtype[1] in "iu" and value.dtype.kind == "f":
                value = np.rint(value)
            value = np.array(value, dtype=entry.dtype)
            if entry.masked:
                pruned = ~self.plan.masks[entry.name]
                value[pruned] = self.arrays[entry.name][pruned] if keep_values else 0
            settled[entry.name] = value
        self.arrays = settled
        self._previous = self.plan  # from now on the mask this model has
        if self._spread is not None:
            self.update_variance = self._spread.variance()
            self.guidance_cosine = _cosine(
                self.pruner.kept_guidance, self._spread.squares
            )
            self.pruner.learn(self._spread.agreement(), self.plan.masks)

    def masked_arrays(self) -> Params:
        """Return the global model as clients know it: pruned entries zero."""
        if self.plan is None:
            return self.arrays
        return masking.apply(self.arrays, self.plan.masks)

    @property
    def density(self) -> float:
        """Share of the prunable parameters that the current mask keeps."""
        return 1.0 if self.plan is None else masking.density(self.plan.masks)

    @property
    def pruned(self) -> int:
        """Number of parameters that the current mask prunes."""
        masks = {} if self.plan is None else self.plan.masks
        return sum(int(keep.size - np.count_nonzero(keep)) for keep in masks.values())

    def _check_units(self, arrays: Params) -> None:
        """Refuse units of another model than the one that travels."""
        shapes = {name: np.shape(value) for name, value in arrays.items()}
        for name, shape in (self._units.shapes if self._units else {}).items():
            if shapes.get(name) != shape:
                raise SettingsError(
                    f"{name}: expected the shape {shape} of the model that was handed "
                    f"over, got {shapes.get(name, 'no such array')} in the initial "
                    f"arrays; known: {list(shapes)}"
                )

    def _weights(self, arrays: Params) -> Params:
        return {name: arrays[name] for name in self.manifest.shapes}


class _Spread:
    """The clients' updates of a round, summed as they come: flat, kept entries alone.

    Attributes
    ----------
    squares : float32 array
        Sum of the squared updates.
    """

    def __init__(self, sent: bytes, values: ValueType, *, signs: bool) -> None:
        self._type = np.dtype(values).newbyteorder("<")
        self._start = np.frombuffer(sent, self._type).astype(np.float32)
        self._sum: NDArray[np.float32] = np.zeros_like(self._start)
        self.squares: NDArray[np.float32] = np.zeros_like(self._start)
        self._signs = np.zeros_like(self._start) if signs else None
        self._weight = 0.0
        self._count = 0

    def add(self, received: bytes, examples: float) -> None:
        update = np.frombuffer(received, self._type).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # huge values of one of two
            update -= self._start
            self._sum += update
            if self._signs is not None:
                self._signs += np.float32(examples) * np.sign(update)
                self._weight += examples
            np.square(update, out=update)
            self.squares += update
        self._count += 1

    def variance(self) -> float | None:
        size = self._sum.size
        if size == 0:
            return 0.0
        if not np.isfinite(self.squares).all():
            return None
        of_mean = float(np.dot(self._sum, self._sum)) / self._count
        total = float(self.squares.sum(dtype=np.float64))
        return max(0.0, (total - of_mean) / (self._count * size))

    def agreement(self) -> NDArray[np.float32] | None:
        """Return |sum of the signs| over the clients, weighted, in [0, 1]."""
        if self._signs is None or not self._weight:
            return None
        self._signs /= np.float32(self._weight)
        return np.abs(self._signs)


def _cosine(
    one: NDArray[np.float32] | None, other: NDArray[np.float32]
) -> float | None:
    if one is None or one.size == 0:
        return None
    size = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.dot(one, other)) / size if 0 < size < math.inf else None
