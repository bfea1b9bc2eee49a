"""AutoFLIP (Internò et al., arXiv:2405.10271): masks from local guidance.

Exploration replies -> guidance -> scores -> mask.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from autoflip_flwr.errors import ExplorationError, GuidanceError, by_reason
from autoflip_flwr.method import agreement as agreements
from autoflip_flwr.method.guidance import (
    SUMS,
    LocalMatrix,
    Rescaling,
    Statistics,
    add_normalized,
    clipped,
    clipped_weight,
    middle,
    rescaling,
)
from autoflip_flwr.method.parallel import parallel_map
from autoflip_flwr.method.schedule import due
from autoflip_flwr.method.scores import SCORES, size_or_growth, weight_size
from autoflip_flwr.method.structured import Keep
from autoflip_flwr.pruners.base import Ask, Problem, Pruner, limits_of
from autoflip_flwr.pruners.store import GuidanceStore, Measured
from autoflip_flwr.types import Array, Float32, Mask, Masks, Nodes, Params, Scores

_log = logging.getLogger("flwr")

#: Values, over all explorers, that robust combination reads at a time.
_ROBUST_BLOCK = 1 << 22

#: Name of a tensor -> its combined guidance, flat.
_Combined: TypeAlias = Callable[[str], Float32]

#: Columns of a matrix from which on its rows tell whether gradients moved them, and the
#: relative spread of movement over weight up to which weight decay alone did.
_COLUMNS, _SPREAD = 8, 0.25

#: Share of rows that nobody moved from which on a matrix is a table of which clients
#: use a part, such as word embeddings.
_TABLE = 0.5


class AutoFlipPruner(Pruner):
    """Keeps the explorers' local guidance and makes the mask of each round.

    Notes
    -----
    Memory does not grow with the number of explorers. Their matrices stay on disk; the
    sum over all explorers is one running sum. A round sums the one-byte codes of its
    explorers tensor by tensor.
    """

    _saved = (
        *("_asked", "_renewing", "initial", "_masks", "_threshold", "_by_weights"),
        *("kept_guidance", "_signs", "_store", "_factors"),
    )

    explores = True

    def prepare(self, problem: Problem) -> None:
        """Start without guidance; check that the model has enough units to prune."""
        super().prepare(problem)
        settings = problem.pruning
        self.restores = settings.pruned_weights == "keep"
        self._exploration = problem.exploration
        # Noise can make all guidance of a small tensor zero: that tells nothing then.
        noisy = problem.exploration.privacy_noise > 0
        self._trainable_known = problem.trainable_known or noisy
        self._check_units()
        if problem.rounds is None and settings.gradual_rounds is None:
            _log.info(
                "the number of rounds is not known, so the first mask has the final "
                "density; AutoFLIP(strategy).expect(num_rounds) lets it fall"
            )
        self._asked: set[int] = set()
        self._renewing = False
        self._renewed = 0  # this round, if all explore again in it
        self._store = GuidanceStore(problem.directory, self.shapes)
        self._population: dict[str, Float32] | None = None
        self._weights: dict[int, float] = {}  # of nodes, for `clipped-mean`
        self._masks: Masks | None = None
        self._threshold = math.nan  # of `_masks`
        self._by_weights = False  # whether the weights decide over the next mask
        self._factors: dict[str, Float32] = {}  # of sizes, where not all are 1
        voted = settings.agreement == "vote"
        self._votes = agreements.Votes(self.shapes if voted else {})
        signed = settings.agreement == "sign"
        self._signs = agreements.Signs(self.shapes if signed else {})

    def start(self) -> None:
        """Delete the guidance of an earlier run."""
        self._store.clear()

    def state(self) -> dict[str, Any]:
        """Return the state that the guidance on disk does not contain.

        A resumed run sums the population and the votes again, in the same order.
        """
        return {**super().state(), "asked": np.array([*self._asked], np.uint64)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        super().restore({**state, "asked": set(state["asked"].tolist())})

    @property
    def explorers(self) -> int:
        """Number of nodes that have explored."""
        return len(self._store)

    def asks(
        self, server_round: int, *, connected: Nodes, sampled: Nodes
    ) -> Ask | None:
        """Return who explores: a share of all nodes, later of newly sampled nodes.

        Every `exploration.every` rounds all nodes explore again, from the global model.
        """
        every, fraction = self._exploration.every, self._exploration.fraction
        if server_round != self._renewed:
            self._renewed = 0
        if every and due(server_round, every) and not self._renewed:
            self._renewed = server_round  # once, should the round begin again
            self._asked.clear()
            self._renewing = True  # the old guidance stays until the first new answer
        first = not self._asked
        if self._by_weights and not first:
            return None  # guidance has had its say
        candidates = connected if first else sampled
        new = [node_id for node_id in candidates if node_id not in self._asked]
        self._asked.update(new)
        if fraction < 1.0 and first and new:
            count = max(1, round(fraction * len(new)))
            chosen = set(self.rng.choice(len(new), size=count, replace=False).tolist())
            new = [node_id for i, node_id in enumerate(new) if i in chosen]
        elif fraction < 1.0:
            new = [node_id for node_id in new if self.rng.random() < fraction]
        return Ask(nodes=new, renew=self._renewing and first) if new else None

    def add(self, node_id: int, measured: Measured, start: Params) -> None:
        """Take a node's local guidance; all nodes have the same weight in it."""
        if self._renewing:
            self.initial = dict(start)
            self._forget()
            self._renewing = False
        replaced = node_id in self._store
        self._store.put(node_id, measured)
        self._weights.pop(node_id, None)
        self._masks = None
        if replaced:  # the next mask sums all guidance on disk again
            self._population = None
            self._votes.forget()
        elif self.settings.combination in SUMS and (
            self._population is not None or len(self._store) == 1
        ):
            self._add_to_population(node_id, measured.guidance())

    def guidance(self) -> dict[str, Float32]:
        """Return Eq. 3 over all explorers, by the settings' normalization."""
        if not self.explorers:
            return {}
        combined = self._combined((), 1.0)
        return {n: combined(n).reshape(shape) for n, shape in self.shapes.items()}

    def explored(self) -> list[float]:
        """Return the mean guidance of each explorer in the store."""
        # While renewing, the store has guidance from other initial weights.
        return [] if self._renewing else self._store.means()

    def check(self, reasons: Mapping[int, str]) -> None:
        """Check that there is guidance, for every trainable tensor.

        If the trainable parameters are unknown, a tensor that no explorer changed is a
        GuidanceError: pruning would remove it first.
        """
        if self.explorers == 0:
            raise ExplorationError(
                f"none of {len(reasons)} nodes completed its exploration, so no "
                f"mask can be made; reasons with their nodes: {by_reason(reasons)}"
            )
        if self._renewing:  # nobody's was new: the next node must not replace all
            self._asked.clear()
        moved = self._store.overall().high
        still = [name for name in self.shapes if not moved[name]]
        if still and not self._trainable_known:
            raise GuidanceError(
                f"{still} moved for none of {self.explorers} explorers: they are "
                "frozen parameters or buffers, and pruning would remove them first; "
                "give the strategy model=Net(), or name them in `exclude`, or the "
                "trainable parameters in `prunable`"
            )

    def masks(self, sampled: Nodes, weights: Params, server_round: int) -> Masks:
        """Make the mask for the sampled nodes (Eq. 3, Eq. 4).

        The guidance is ``(1 - mu) * mean over the sampled + mu * mean over all
        explorers``. A sampled node without guidance counts as the mean of all. Without
        any guidance the error is an ExplorationError.
        """
        if self.explorers == 0:
            raise ExplorationError("expected local guidance of one node or more, got 0")
        known = [node_id for node_id in sampled if node_id in self._store]
        missing = 1 - len(known) / len(sampled) if sampled else 1.0
        mu = self.settings.population_weight
        share = mu + (1 - mu) * missing
        threshold = self.threshold_of(server_round)
        if self._threshold > threshold:  # a run that goes on counts from 1 again
            threshold = self._threshold
        lasting = share == 1.0 or self._by_weights
        if lasting and self._masks is not None and threshold == self._threshold:
            return self._masks  # until another node explores, or density falls
        if self._by_weights:
            scores = self._sizes(weights)
        else:
            scores = self._scores(known, share)
            if self.settings.score == "staged":  # next time the weights decide
                self._population = None
                self._factors = {
                    name: _without(rows, scores[name], self.initial[name])
                    for name, rows in _still_rows(scores, self.initial).items()
                }
        agreement = self._agreement()
        mixture = scores
        if agreement is not None:
            weight = self.settings.agreement_weight
            mixture = agreements.mixed(scores, agreement, weight=weight)
        # `_guidance_of` needs the scores of what is kept.
        masks = self.cut(
            mixture,
            threshold=threshold,
            balance=self.settings.balance,
            overwrite=self.settings.operations is None,
            **self._unit_target(mixture, threshold),
        )
        self._check_operations(masks, threshold)
        if self._by_weights:
            self.kept_guidance = self._guidance_left(masks)
        else:
            self.kept_guidance = self._guidance_of(scores, masks)
        fixed = share == 1.0 or self.settings.score == "staged"
        fixed = fixed and self.settings.agreement != "sign"
        self._masks, self._threshold = masks if fixed else None, threshold
        return masks

    def _check_operations(self, masks: Masks, threshold: float) -> None:
        """Say so if the final mask misses the target of operations."""
        target = self.settings.operations
        if target is None or threshold != self.settings.threshold:
            return
        units = self.known_units()
        share = units.operations(units.used(masks)) / max(1, units.operations())
        if share > target:
            _log.warning(
                "operations: the clients' network needs %.3f of the dense "
                "multiply-accumulates, asked for %.3f: units save no more with the "
                "parameters that may be pruned. Prune more parameters, or allow more "
                "operations",
                share,
                target,
            )

    def _unit_target(self, scores: Scores, threshold: float) -> dict[str, Any]:
        """Return what `cut` needs to know of units; a target falls with the density.

        Until then only units go that would go in the end, by the scores of the moment:
        others could lead to a network from which the target is missed by far.
        """
        settings, pruned = self.settings, self.pruned_count(scores, threshold)
        if settings.operations is None:
            return {"unit_budget": int(settings.units * pruned)}
        units, share = self.known_units(), settings.operations
        dense, most = units.operations(), self.pruned_count(scores)

        def within(part: float, budget: int, stay: Keep | None = None) -> Keep:
            return units.within(
                scores,
                operations=part * dense,
                budget=budget,
                limits=limits_of(settings),
                stay=stay,
            )

        keep = within(share, most)
        if threshold != settings.threshold:
            keep = within(1 - pruned / max(1, most) * (1 - share), pruned, stay=keep)
        return {"keep": keep}

    def learn(self, agreement: Float32 | None, masks: Masks) -> None:
        """Take the agreement of the clients of a round, which has trained the mask."""
        self._by_weights = self.settings.score == "staged"
        if agreement is not None and self.settings.agreement == "sign":
            self._signs.learn(agreement, masks)

    def _agreement(self) -> Mapping[str, Float32] | None:
        if self.settings.agreement == "vote":
            return self._votes.of(
                self._store,
                lambda node_id: self._store.get(node_id).dense(),
                threshold=self.settings.threshold,
                mode=self.settings.mode,
            )
        return self._signs.of() if self.settings.agreement == "sign" else None

    def _guidance_of(self, scores: Scores, masks: Masks) -> Float32:
        """Return the guidance of the kept entries, flat, computed from their scores."""
        sizes = [int(np.count_nonzero(keep)) for keep in masks.values()]
        guidance = np.empty(sum(sizes), np.float32)
        ends = dict(zip(masks, np.cumsum(sizes).tolist(), strict=True))

        def one(name: str, size: int) -> None:
            kept = guidance[ends[name] - size : ends[name]]
            kept[:] = scores[name][masks[name]]
            if self.settings.score != "guidance":
                kept /= weight_size(self.initial[name][masks[name]])
                np.square(kept, out=kept)

        parallel_map(lambda pair: one(*pair), zip(masks, sizes, strict=True))
        return guidance

    def _guidance_left(self, masks: Masks) -> Float32 | None:
        """Return what a narrower mask leaves of `kept_guidance`; None for a wider."""
        before, guidance = self._masks, self.kept_guidance
        if before is None or guidance is None:
            return None
        if any((keep & ~before[name]).any() for name, keep in masks.items()):
            return None
        left = parallel_map(lambda name: masks[name][before[name]], masks)
        return guidance[np.concatenate(left)]

    def _forget(self) -> None:
        """Drop all guidance."""
        self._store.forget()
        self._weights.clear()
        self._population = None
        self._masks = None
        self._by_weights = False
        self._factors = {}
        self._votes.forget()

    def _check_units(self) -> None:
        """Check the number of units to prune; in mode value the scores decide it."""
        settings, limits = self.settings, limits_of(self.settings)
        share = settings.operations
        if settings.units == 0 and share is None:
            return
        units = self.known_units()
        if settings.mode == "value":
            return
        budget = self.pruned_count(self.initial)
        if share is not None:
            units.check_operations(
                self.initial, share=share, budget=budget, limits=limits
            )
        else:
            budget = int(settings.units * budget)
            units.check_budget(self.initial, budget=budget, limits=limits)

    def _scores(self, sampled: Nodes, share: float) -> dict[str, Float32]:
        """Score the guidance, in which the population has the weight `share`."""
        score = SCORES[self.settings.score]
        combined = self._combined(sampled, share)

        def one(name: str) -> Float32:
            initial = self.initial[name].reshape(-1)
            return score(combined(name), initial).reshape(self.shapes[name])

        return dict(zip(self.shapes, parallel_map(one, self.shapes), strict=True))

    def _sizes(self, weights: Params) -> dict[str, Float32]:
        """Score the weights by what training has made of them."""

        def one(name: str) -> Float32:
            size = size_or_growth(weights[name], self.initial[name])
            if name in self._factors:
                size *= self._factors[name]
            return size

        return dict(zip(self.shapes, parallel_map(one, self.shapes), strict=True))

    def _combined(self, sampled: Nodes, share: float) -> _Combined:
        summed = self.settings.combination in SUMS
        return (self._mean if summed else self._robust)(sampled, share)

    def _mean(self, sampled: Nodes, population_share: float) -> _Combined:
        """Return a function: name -> mean guidance of the tensor."""
        local = [self._store.get(n) for n in sampled] if population_share < 1 else []
        every = [self._store.statistics(n) for n in sampled]
        normalization = self.settings.normalization
        everyone = self._population_sum() if population_share > 0 else {}
        overall = self._store.overall()

        def one(name: str) -> Float32:
            total = np.zeros(self.initial[name].size, np.float32)
            if local:
                scale = rescaling(every, name, normalization=normalization)
                scale = self._clipped(scale, sampled)
                add_normalized(total, name, local, scale, weight=1 - population_share)
            if everyone:
                mean = self._population_rescaling(overall, name)
                total += np.float32(population_share * mean.scales[0]) * everyone[name]
                total += np.float32(population_share * mean.offset)
            return np.maximum(total, 0, out=total)  # rounding can go below zero

        return one

    def _robust(self, sampled: Nodes, population_share: float) -> _Combined:
        """Return a function: name -> median or trimmed mean of the tensor's guidance.

        It reads each explorer's file once per mask.
        """
        parts = [
            (1 - population_share, list(sampled)),
            (population_share, [*self._store]),
        ]
        parts = [(weight, nodes) for weight, nodes in parts if weight > 0]
        nodes = list(dict.fromkeys(n for _, group in parts for n in group))
        rows = {node_id: row for row, node_id in enumerate(nodes)}

        def one(name: str) -> Float32:
            total = np.zeros(self.initial[name].size, np.float32)
            tables = self._normalized(nodes, name)
            block = max(1, _ROBUST_BLOCK // len(nodes))
            for start, codes in self._store.codes(nodes, name, block):
                values = np.take_along_axis(tables, codes, axis=1)
                for weight, group in parts:
                    total[start : start + block] += np.float32(weight) * middle(
                        values[[rows[n] for n in group]],
                        combination=self.settings.combination,
                        trim=self.settings.trim,
                    )
            return total

        return one

    def _normalized(self, node_ids: Nodes, name: str) -> Float32:
        """Return the values of nodes' codes, each divided by its node's mean."""
        tables = self._store.tables(node_ids, name)
        for table, node_id in zip(tables, node_ids, strict=True):
            own = [self._store.statistics(node_id)]
            alone = rescaling(own, name, normalization="client")
            table *= np.float32(alone.scales[0])
            table += np.float32(alone.offset)
        return tables

    def _population_sum(self) -> Mapping[str, Float32]:
        """Return the sum of all matrices; with `client`, each divided by its mean."""
        if self._population is None:
            for node_id in self._store:
                self._add_to_population(node_id, self._store.get(node_id))
        assert self._population is not None
        return self._population

    def _add_to_population(self, node_id: int, guidance: LocalMatrix) -> None:
        if self._population is None:
            self._population = {
                name: np.zeros(self.initial[name].size, np.float32)
                for name in self.shapes
            }
        population = self._population
        if self.settings.normalization == "client":
            alone = [self._store.statistics(node_id)]
            scale = rescaling(alone, next(iter(self.shapes)), normalization="client")
        else:
            scale = Rescaling([1.0], 0.0)
        scale = self._clipped(scale, [node_id])
        parallel_map(
            lambda name: add_normalized(population[name], name, [guidance], scale),
            self.shapes,
        )

    def _clipped(self, rescale: Rescaling, nodes: Nodes) -> Rescaling:
        """Return the map of the combination, for the guidance of some nodes."""
        if self.settings.combination == "mean":
            return rescale
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        for node_id in nodes:
            if node_id not in self._weights:
                self._weights[node_id] = clipped_weight(
                    self._store.get(node_id),
                    sizes,
                    self._store.statistics(node_id).mean,
                )
        return clipped(rescale, [self._weights[node_id] for node_id in nodes])

    def _population_rescaling(self, overall: Statistics, name: str) -> Rescaling:
        """Return the map from the running sum to the normalized mean of all nodes."""
        normalization = self.settings.normalization
        if normalization == "client":
            return Rescaling([1.0 / len(self._store)], 0.0)
        whole = rescaling([overall], name, normalization=normalization)
        return Rescaling([whole.scales[0] / len(self._store)], whole.offset)


def _still_rows(scores: Scores, initial: Params) -> dict[str, Mask]:
    """Mark the rows of matrices that no gradient moved, where there are any.

    They are those of words, or of other entries of a table, that no client has. They
    did not move, or in proportion to their weights, as weight decay moves them. The
    scores are saliencies.
    """

    def one(name: str) -> Mask:
        shape = scores[name].shape
        if math.prod(shape[1:]) < _COLUMNS:
            return np.zeros(shape[:1], np.bool_)
        ratio = scores[name] / np.square(weight_size(initial[name]))
        rows = ratio.reshape(len(ratio), -1)
        spread, mean = rows.std(axis=1), rows.mean(axis=1)
        return np.asarray(spread <= _SPREAD * mean)

    still = dict(zip(scores, parallel_map(one, scores), strict=True))
    return {name: rows for name, rows in still.items() if rows.any() and not rows.all()}


def _without(rows: Mask, scores: Float32, initial: Array) -> Float32:
    """Let saliencies be 0 in some rows of a matrix; return the factor of sizes.

    In a table it is how far each weight moved, with a mean of 1 in the other rows: the
    size of a pretrained weight does not tell how often clients have its word.
    """
    scores[rows] = 0
    if rows.mean() < _TABLE:
        return np.float32(~rows).reshape(-1, *[1] * (scores.ndim - 1))
    moved = scores / weight_size(initial)
    return np.asarray(moved / moved[~rows].mean(), np.float32)
