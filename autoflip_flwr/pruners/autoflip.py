"""AutoFLIP (Internò et al., arXiv:2405.10271): local guidance in, masks out.

Data moves one way: exploration replies -> guidance -> scores -> mask.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import ExplorationError, GuidanceError
from autoflip_flwr.method import agreement as agreements
from autoflip_flwr.method.exchange import EVERY, adjusted, cosine_share, due
from autoflip_flwr.method.guidance import (
    LocalMatrix,
    Rescaling,
    Statistics,
    add_normalized,
    middle,
    rescaling,
)
from autoflip_flwr.method.mean import WeightedMean
from autoflip_flwr.method.parallel import parallel_map
from autoflip_flwr.method.scores import SCORES, weight_size
from autoflip_flwr.pruners.base import Ask, Problem, Pruner, limits_of
from autoflip_flwr.pruners.store import GuidanceStore, Measured
from autoflip_flwr.types import Masks, Params, Scores

#: Values of all explorers that are compared at a time.
_ROBUST_BLOCK = 1 << 22


class AutoFlipPruner(Pruner):
    """Keeps the explorers' local guidance and makes the mask of a round.

    Notes
    -----
    Memory does not grow with the number of explorers: their matrices stay on disk,
    and the mean over all of them is kept as one running sum. A round's guidance is
    summed tensor by tensor out of the explorers' one-byte codes.
    """

    def prepare(self, problem: Problem) -> None:
        """Begin without guidance; refuse more units than there are."""
        super().prepare(problem)
        settings = problem.pruning
        self.restores = settings.pruned_weights == "keep"
        self._exploration = problem.exploration
        self._trainable_known = problem.trainable_known
        self._check_units()
        self._asked: set[int] = set()
        self._renewing = False
        self._refreshing = False
        self._gradients = WeightedMean()
        self._store = GuidanceStore(problem.directory, self.shapes)
        self._population: dict[str, NDArray[np.float32]] | None = None
        self._masks: Masks | None = None
        self._refreshed = False  # whether that mask has been refreshed
        voted = settings.agreement == "vote"
        self._votes = agreements.Votes(self.shapes if voted else {})
        signed = settings.agreement == "sign"
        self._signs = agreements.Signs(self.shapes if signed else {})

    def start(self) -> None:
        """Delete the guidance that an earlier run may have left."""
        self._store.clear()

    def state(self) -> dict[str, Any]:
        """Return who explored, and what their guidance on disk does not tell.

        The mean over all explorers and the votes are summed anew, in the same order.
        """
        return {
            **super().state(),
            "asked": np.array([*self._asked], np.uint64),
            "renewing": self._renewing,
            "initial": self.initial,
            "gradients": self._gradients.state(),
            "masks": self._masks,
            "refreshed": self._refreshed,
            "kept_guidance": self.kept_guidance,
            "signs": self._signs.state(),
            "store": self._store.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        super().restore(state)
        self._store.restore(state["store"])
        self._asked = set(state["asked"].tolist())
        self._renewing = state["renewing"]
        self.initial = state["initial"]
        self._gradients.restore(state["gradients"])
        self._masks = state["masks"]
        self._refreshed = state["refreshed"]
        self.kept_guidance = state["kept_guidance"]
        self._signs.restore(state["signs"])

    @property
    def explorers(self) -> int:
        """How many nodes have explored."""
        return len(self._store)

    def asks(
        self, server_round: int, *, connected: Sequence[int], sampled: Sequence[int]
    ) -> Ask | None:
        """Tell who explores: a share of all, later of those sampled for the first time.

        Every `exploration.every` rounds all begin anew, from the global model.
        """
        every, fraction = self._exploration.every, self._exploration.fraction
        if every and server_round > 1 and (server_round - 1) % every == 0:
            self._asked.clear()
            self._renewing = True  # the old guidance stays until there is new
        first = not self._asked
        candidates = connected if first else sampled
        new = [node_id for node_id in candidates if node_id not in self._asked]
        self._asked.update(new)
        if fraction < 1.0 and first and new:
            count = max(1, round(fraction * len(new)))
            chosen = set(self.rng.choice(len(new), size=count, replace=False).tolist())
            new = [node_id for i, node_id in enumerate(new) if i in chosen]
        elif fraction < 1.0:
            new = [node_id for node_id in new if self.rng.random() < fraction]
        if new:
            self._refreshing = False
            return Ask(nodes=new, renew=self._renewing and first)
        wanted = due(server_round, self.settings.refresh_every or EVERY)
        self._refreshing = wanted and self._refresh_share(server_round) > 0
        if not self._refreshing:
            return None
        return Ask(nodes=sampled, measure="gradient", current=True)

    def _refresh_share(self, server_round: int) -> float:
        settings = self.settings
        return cosine_share(
            settings.refresh, server_round, until=settings.refresh_until
        )

    def add(self, node_id: int, measured: Measured, start: Params) -> None:
        """Take a node's local guidance, or its gradients for a refresh.

        In the guidance nodes count alike, whatever the number of their examples.
        """
        if self._refreshing:
            self._gradients.add(measured.guidance().dense(), measured.examples)
            return
        if self._renewing:
            self.initial = dict(start)
            self._forget()
            self._renewing = False
        replaced = node_id in self._store
        self._store.put(node_id, measured)
        if not self._refreshed:  # else a newcomer would undo what was exchanged
            self._masks = None
        if replaced:  # summed anew from disk when next needed
            self._population = None
            self._votes.forget()
        elif self.settings.combination == "mean" and (
            self._population is not None or len(self._store) == 1
        ):
            self._add_to_population(node_id, measured.guidance())

    def explored(self) -> list[float]:
        """Return the means of the guidance in the store."""
        if self._renewing:
            return []  # from other weights
        return self._store.means()

    def check(self, reasons: Mapping[int, str]) -> None:
        """Refuse to go on without guidance, or with parameters nobody trains.

        Raises
        ------
        ExplorationError
            If nobody's guidance came.
        GuidanceError
            If a tensor moved for no explorer and nobody said what is trainable: it
            is frozen or a buffer, and would be the first to be pruned.
        """
        if self.explorers == 0:
            raise ExplorationError(
                f"none of {len(reasons)} nodes completed its exploration, so no "
                f"mask can be made; reasons by node: {dict(reasons)}"
            )
        moved = self._store.overall().high
        still = [name for name in self.shapes if not moved[name]]
        if still and not self._trainable_known:
            raise GuidanceError(
                f"{still} moved for none of {self.explorers} explorers: frozen "
                "parameters or buffers, which pruning would take first; name them in "
                "`exclude`, or the trainable parameters in `prunable`"
            )

    def masks(
        self, sampled: Sequence[int], weights: Params, server_round: int
    ) -> Masks:
        """Make the mask for the sampled nodes (Eq. 3, Eq. 4).

        The guidance is ``(1 - mu) * mean over the sampled + mu * mean over all
        explorers``. A sampled node that never explored counts as the mean of all.

        Raises
        ------
        ExplorationError
            If nobody has explored.
        MaskError
            If the mask would cut a layer off.
        """
        if self.explorers == 0:
            raise ExplorationError("expected local guidance of one node or more, got 0")
        known = [node_id for node_id in sampled if node_id in self._store]
        missing = 1 - len(known) / len(sampled) if sampled else 1.0
        mu = self.settings.population_weight
        share = mu + (1 - mu) * missing
        if share == 1.0 and self._masks is not None:
            if self._gradients.weight:
                self._masks = self._exchanged(self._masks, weights, server_round)
                self._refreshed = True
            return self._masks  # one mask for all rounds until somebody explores
        self._gradients.take()
        scores = self._scores(known, share)
        agreement = self._agreement()
        mixture = scores
        if agreement is not None:
            weight = self.settings.agreement_weight
            mixture = agreements.mixed(scores, agreement, weight=weight)
        # Written over is what whole units prune, and no kept entry.
        budget = int(self.settings.units * self.pruned_count(mixture))
        masks = self.cut(mixture, unit_budget=budget, overwrite=True)
        self.kept_guidance = self._guidance_of(scores, masks)
        fixed = share == 1.0 and self.settings.agreement != "sign"
        self._masks = masks if fixed else None
        return masks

    def _exchanged(self, masks: Masks, weights: Params, server_round: int) -> Masks:
        """Exchange small weights for such with large gradients, in living units."""
        share, gradients = self._refresh_share(server_round), self._gradients.take()
        alive: Masks = {}
        if self.units is not None:
            alive = self.units.masks(self.units.used(masks), masks)
        exchanged = {
            name: adjusted(
                keep,
                np.abs(weights[name], dtype=np.float32),
                gradients[name],
                share,
                free=alive.get(name),
            )
            if keep.ndim > 1
            else keep
            for name, keep in masks.items()
        }
        self.kept_guidance = None  # of the first mask
        return exchanged

    def learn(self, agreement: NDArray[np.float32] | None, masks: Masks) -> None:
        """Take what the clients of a round agreed on."""
        if agreement is not None and self.settings.agreement == "sign":
            self._signs.learn(agreement, masks)

    def _agreement(self) -> Mapping[str, NDArray[np.float32]] | None:
        if self.settings.agreement == "vote":
            return self._votes.of(
                self._store,
                lambda node_id: self._store.get(node_id).dense(),
                threshold=self.settings.threshold,
                mode=self.settings.mode,
            )
        return self._signs.of() if self.settings.agreement == "sign" else None

    def _guidance_of(self, scores: Scores, masks: Masks) -> NDArray[np.float32]:
        """Return the guidance of kept entries, flat."""
        kept = np.concatenate([scores[name][keep] for name, keep in masks.items()])
        if self.settings.score == "saliency":
            kept /= weight_size(
                np.concatenate([self.initial[n][keep] for n, keep in masks.items()])
            )
            np.square(kept, out=kept)
        return kept.astype(np.float32, copy=False)

    def _forget(self) -> None:
        """Start without any guidance."""
        self._store.forget()
        self._population = None
        self._masks = None
        self._refreshed = False
        self._votes.forget()

    def _check_units(self) -> None:
        """Refuse more units than there are, before there are scores."""
        settings = self.settings
        if settings.units == 0:
            return
        units = self.known_units()
        if settings.mode != "value":  # there the scores say how many
            budget = int(settings.units * self.pruned_count(self.initial))
            units.check_budget(self.initial, budget=budget, limits=limits_of(settings))

    def _scores(
        self, sampled: Sequence[int], population_share: float
    ) -> dict[str, NDArray[np.float32]]:
        if self.settings.combination != "mean":
            return self._robust_scores(sampled, population_share)
        score = SCORES[self.settings.score]
        local = [self._store.get(n) for n in sampled] if population_share < 1 else []
        every = [self._store.statistics(n) for n in sampled]
        everyone = self._population_sum() if population_share > 0 else {}
        overall = self._store.overall()

        def one(name: str) -> NDArray[np.float32]:
            total = np.zeros(self._size(name), np.float32)
            if local:
                scale = self._rescaling(every, name)
                add_normalized(total, name, local, scale, weight=1 - population_share)
            if everyone:
                mean = self._population_rescaling(overall, name)
                total += np.float32(population_share * mean.scales[0]) * everyone[name]
                total += np.float32(population_share * mean.offset)
            np.maximum(total, 0, out=total)  # rounding may leave a hair below zero
            initial = self.initial[name].reshape(-1)
            return score(total, initial).reshape(self.shapes[name])

        return dict(zip(self.shapes, parallel_map(one, self.shapes), strict=True))

    def _robust_scores(
        self, sampled: Sequence[int], population_share: float
    ) -> dict[str, NDArray[np.float32]]:
        """Combine matrices by what a few explorers cannot move, read once a mask."""
        score = SCORES[self.settings.score]
        parts = [
            (1 - population_share, list(sampled)),
            (population_share, [*self._store]),
        ]
        parts = [(weight, nodes) for weight, nodes in parts if weight > 0]
        nodes = list(dict.fromkeys(n for _, group in parts for n in group))
        rows = {node_id: row for row, node_id in enumerate(nodes)}

        def one(name: str) -> NDArray[np.float32]:
            total = np.zeros(self._size(name), np.float32)
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
            initial = self.initial[name].reshape(-1)
            return score(total, initial).reshape(self.shapes[name])

        return dict(zip(self.shapes, parallel_map(one, self.shapes), strict=True))

    def _normalized(self, node_ids: Sequence[int], name: str) -> NDArray[np.float32]:
        """Return what nodes' codes stand for, divided by each one's own mean."""
        tables = self._store.tables(node_ids, name)
        for table, node_id in zip(tables, node_ids, strict=True):
            own = [self._store.statistics(node_id)]
            alone = rescaling(own, name, normalization="client")
            table *= np.float32(alone.scales[0])
            table += np.float32(alone.offset)
        return tables

    def _population_sum(self) -> Mapping[str, NDArray[np.float32]]:
        """Sum of all explorers' matrices, for `client` each divided by its mean."""
        if self._population is None:
            for node_id in self._store:
                self._add_to_population(node_id, self._store.get(node_id))
        assert self._population is not None
        return self._population

    def _add_to_population(self, node_id: int, guidance: LocalMatrix) -> None:
        if self._population is None:
            self._population = {
                name: np.zeros(self._size(name), np.float32) for name in self.shapes
            }
        population = self._population
        if self.settings.normalization == "client":
            alone = [self._store.statistics(node_id)]
            scale = rescaling(alone, next(iter(self.shapes)), normalization="client")
        else:
            scale = Rescaling([1.0], 0.0)
        parallel_map(
            lambda name: add_normalized(population[name], name, [guidance], scale),
            self.shapes,
        )

    def _rescaling(self, explorers: Sequence[Statistics], name: str) -> Rescaling:
        return rescaling(explorers, name, normalization=self.settings.normalization)

    def _population_rescaling(self, overall: Statistics, name: str) -> Rescaling:
        """How the running sum becomes the normalized mean over all explorers."""
        if self.settings.normalization == "client":
            return Rescaling([1.0 / len(self._store)], 0.0)
        whole = self._rescaling([overall], name)
        return Rescaling([whole.scales[0] / len(self._store)], whole.offset)

    def _size(self, name: str) -> int:
        return int(np.prod(self.shapes[name], dtype=np.int64))
