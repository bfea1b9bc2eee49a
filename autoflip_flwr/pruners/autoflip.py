"""AutoFLIP (Internò et al., arXiv:2405.10271): masks from local guidance.

Exploration replies -> guidance -> scores -> mask.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from autoflip_flwr.errors import ExplorationError, GuidanceError, by_reason
from autoflip_flwr.method import agreement as agreements
from autoflip_flwr.method.parallel import parallel_map
from autoflip_flwr.method.schedule import due
from autoflip_flwr.method.scores import (
    SCORES,
    size_or_growth,
    still_rows,
    weight_size,
    without_rows,
)
from autoflip_flwr.method.structured import Keep
from autoflip_flwr.pruners.base import Ask, Problem, Pruner, limits_of
from autoflip_flwr.pruners.explorers import Explorers
from autoflip_flwr.pruners.store import GuidanceStore, Measured
from autoflip_flwr.types import Float32, Masks, Nodes, Params, Scores

_log = logging.getLogger("flwr")


class AutoFlipPruner(Pruner):
    """Makes the mask of each round from the explorers' guidance, later from weights.

    With ``score="staged"`` guidance decides until a masked round has been trained; then
    the weights decide, and no node explores.
    """

    _saved = (
        *("_asked", "_renewing", "initial", "_masks", "_threshold", "_by_weights"),
        *("kept_guidance", "_signs", "_factors"),
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
        store = GuidanceStore(problem.directory, self.shapes)
        self._explorers = Explorers(store, settings)
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
        self._explorers.clear()

    def state(self) -> dict[str, Any]:
        """Return the state that the guidance on disk does not contain.

        A resumed run sums the population and the votes again, in the same order.
        """
        return {
            **super().state(),
            "asked": np.array([*self._asked], np.uint64),
            "store": self._explorers.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        super().restore({**state, "asked": set(state["asked"].tolist())})
        self._explorers.restore(state["store"])

    @property
    def explorers(self) -> int:
        """Number of nodes that have explored."""
        return len(self._explorers)

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
        if node_id in self._explorers:
            self._votes.forget()  # they are counted again
        self._explorers.add(node_id, measured)
        self._masks = None

    def guidance(self) -> dict[str, Float32]:
        """Return Eq. 3 over all explorers, by the settings' normalization."""
        if not self.explorers:
            return {}
        combined = self._explorers.combined((), 1.0)
        return {n: combined(n).reshape(shape) for n, shape in self.shapes.items()}

    def explored(self) -> list[float]:
        """Return the mean guidance of each explorer in the store."""
        # While renewing, the store has guidance from other initial weights.
        return [] if self._renewing else self._explorers.means()

    def check(self, reasons: Mapping[int, str]) -> None:
        """Check that there is guidance, for every trainable tensor.

        If the trainable parameters are unknown, a tensor that no explorer changed is a
        GuidanceError: pruning would remove it first. Vectors that are kept in any case
        may rest, as does the bias before a BatchNorm, which has no gradient.
        """
        if self.explorers == 0:
            raise ExplorationError(
                f"none of {len(reasons)} nodes completed its exploration, so no "
                f"mask can be made; reasons with their nodes: {by_reason(reasons)}"
            )
        if self._renewing:  # nobody's was new: the next node must not replace all
            self._asked.clear()
        moved = self._explorers.overall().high
        judged = [name for name in self.shapes if name not in self.spared]
        still = [name for name in judged if not moved[name]]
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
        known = [node_id for node_id in sampled if node_id in self._explorers]
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
                self._explorers.release()
                self._factors = {
                    name: without_rows(rows, scores[name], self.initial[name])
                    for name, rows in still_rows(scores, self.initial).items()
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
                self._explorers,
                self._explorers.dense,
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
        self._explorers.forget()
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
        combined = self._explorers.combined(sampled, share)

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
