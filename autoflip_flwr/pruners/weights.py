"""Baselines that judge what the server has: its weights, or nothing at all.

All are pruned to the density of the settings. Where a source prunes whole filters, as
much as whole units can prune falls on them, and single weights of layers, by magnitude,
fill up to the density. The criteria see the model after `dense_rounds` rounds without a
mask, since weights that nobody has trained say nothing: by default two, which with five
of twenty clients a round cost about the bytes of an exploration.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import MaskError, SettingsError
from autoflip_flwr.method.structured import Group, Units
from autoflip_flwr.pruners.base import FixedPruner, Problem, limits_of
from autoflip_flwr.settings import BaselineSettings
from autoflip_flwr.types import Array, Masks, Params, Scores


class Random(FixedPruner):
    """One random mask, the same in every round: what any criterion has to beat."""

    def prepare(self, problem: Problem) -> None:
        """Draw the mask."""
        super().prepare(problem)
        self._chosen = self.cut(
            {
                name: self.rng.random(shape, np.float32)
                for name, shape in self.shapes.items()
            }
        )

    def masks(
        self, sampled: Sequence[int], weights: Params, server_round: int
    ) -> Masks:
        """Return the one mask."""
        del sampled, weights, server_round
        assert self._chosen is not None
        return self._chosen


class WeightsPruner(FixedPruner):
    """Judges the server's model: once, after some dense rounds.

    Parameters
    ----------
    dense_rounds : int
        Rounds without a mask, before weights are judged, >= 0.
    """

    every_round = False

    def __init__(self, *, dense_rounds: int = 2) -> None:
        self.dense_rounds = BaselineSettings(dense_rounds=dense_rounds).dense_rounds

    def prepare(self, problem: Problem) -> None:
        """Begin with a mask that keeps all."""
        super().prepare(problem)
        self._whole: Masks = {n: np.ones(s, np.bool_) for n, s in self.shapes.items()}

    def masks(
        self, sampled: Sequence[int], weights: Params, server_round: int
    ) -> Masks:
        """Keep what the criterion says, of the server's weights."""
        del sampled
        if server_round <= self.dense_rounds:
            return self._whole
        if self._chosen is None or self.every_round:
            self._chosen = self._judge(weights)
        return self._chosen

    @abstractmethod
    def _judge(self, weights: Params) -> Masks:
        """Make a mask from the weights."""


class Magnitude(WeightsPruner):
    """The smallest single weights go, over all layers.

    Han et al., Learning both Weights and Connections for Efficient Neural Networks
    (arXiv:1506.02626). Biases and scales of normalization are kept.
    """

    def _judge(self, weights: Params) -> Masks:
        return self.cut(but_vectors(magnitudes(weights)), overwrite=True)


class UnitPruner(WeightsPruner):
    """Whole units go by a criterion, the same share of every layer.

    The criteria that Wu, Song and Zeng, Efficient federated learning on
    resource-constrained edge devices based on model pruning (Complex & Intelligent
    Systems 9, 2023, doi:10.1007/s40747-023-01120-5) prune the server's model by. Their
    rates per layer are not public: units are ranked within their layer, and compete by
    rank, so that every layer loses the same share.
    """

    def _judge(self, weights: Params) -> Masks:
        units = self.known_units()
        scores = magnitudes(weights)
        ranks = np.zeros(units.count)
        for group in units.groups:
            found = self._criterion(units, group, weights)
            order = np.argsort(np.argsort(found, kind="stable"), kind="stable")
            ranks[group.units] = (order + 0.5) / group.size
        most = units.most(scores, limits_of(self.settings))
        budget = min(self.pruned_count(scores), most)
        return self.cut(
            but_vectors(scores), unit_budget=budget, unit_scores=ranks, overwrite=True
        )

    needs_units = True

    def prepare(self, problem: Problem) -> None:
        """Refuse a model that has no units to prune."""
        super().prepare(problem)
        if not self.known_units().only(self.initial).groups:
            raise MaskError(
                "no unit of the model is free to go: every group has parameters that "
                "are excluded or not trained; exclude less"
            )

    def _what_for(self) -> str:
        return f"{type(self).__name__} prunes whole units, which"

    @abstractmethod
    def _criterion(
        self, units: Units, group: Group, weights: Params
    ) -> NDArray[np.float64]:
        """Return a score for every unit of a group; the lowest go first."""


class L1(UnitPruner):
    """Filters by the sum of their absolute weights.

    Li et al., Pruning Filters for Efficient ConvNets (arXiv:1608.08710, section 3.1).
    """

    def _criterion(
        self, units: Units, group: Group, weights: Params
    ) -> NDArray[np.float64]:
        rows = np.abs(filters(units, group, weights))
        return np.asarray(rows.sum(axis=1))


class L2(UnitPruner):
    """Filters by their Euclidean norm.

    He et al., Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks
    (arXiv:1808.06866, Eq. 1 with p = 2).
    """

    def _criterion(
        self, units: Units, group: Group, weights: Params
    ) -> NDArray[np.float64]:
        return np.asarray(np.linalg.norm(filters(units, group, weights), axis=1))


class Similarity(UnitPruner):
    """Filters that the others of the layer can stand in for go first.

    The sum of a filter's distances to all others, which is least near their geometric
    median: He et al., Filter Pruning via Geometric Median (arXiv:1811.00250, Eq. 5).
    """

    def _criterion(
        self, units: Units, group: Group, weights: Params
    ) -> NDArray[np.float64]:
        rows = filters(units, group, weights)
        return np.array([np.linalg.norm(rows - row, axis=1).sum() for row in rows])


class BatchNormScale(UnitPruner):
    """Channels by the absolute scale of their BatchNorm.

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming
    (arXiv:1708.06519), without the penalty on the scales in training. Layers without a
    BatchNorm keep all their units.

    Raises
    ------
    SettingsError
        If the model has no BatchNorm.
    """

    def prepare(self, problem: Problem) -> None:
        """Leave groups without a BatchNorm whole."""
        super().prepare(problem)
        every = self.known_units()
        with_scale = {g.name for g in every.groups if _scales(every, g, self.initial)}
        if not with_scale:
            raise SettingsError(
                "the criterion bn prunes by the scales of BatchNorm, but no unit of "
                "this model has one; choose another criterion, or a model with "
                "BatchNorm"
            )
        self.units = every.without(
            {g.name: "no BatchNorm" for g in every.groups if g.name not in with_scale}
        )

    def _criterion(
        self, units: Units, group: Group, weights: Params
    ) -> NDArray[np.float64]:
        found = [
            _by_unit(weights[name], owner, group)
            for name, owner in _scales(units, group, weights).items()
        ]
        return np.asarray(np.abs(np.concatenate(found, axis=1)).mean(axis=1))


class EFLPrune(L1):
    """The server prunes before each release, and restores the whole model after.

    Wu, Song and Zeng (Complex & Intelligent Systems 9, 2023), called EFLPrune in
    arXiv:2405.10271: clients train and upload the pruned part, the server writes it
    into the full model and chooses again. The criterion is not public; this is L1.
    """

    restores = True
    every_round = True


def magnitudes(weights: Params) -> dict[str, NDArray[np.float32]]:
    """Return absolute values, float32."""
    return {name: np.abs(value, dtype=np.float32) for name, value in weights.items()}


def but_vectors(scores: Scores) -> dict[str, NDArray[np.float32]]:
    """Keep biases and scales of normalization out of the contest of single weights.

    The sources of the baselines prune the weights of layers alone. Those of a unit go
    with it all the same.
    """
    return {
        name: score if score.ndim > 1 else np.full(score.shape, np.inf, np.float32)
        for name, score in scores.items()
    }


def filters(units: Units, group: Group, weights: Params) -> NDArray[np.float64]:
    """Return one row per unit: the weights that make it, of all its matrices."""
    found = []
    for name, dimensions in units.parameters.items():
        own = 1 if name in units.columns else 0
        if name not in weights or weights[name].ndim < 2 or own not in dimensions:
            continue
        owner = dimensions[own]
        if np.isin(owner, np.arange(group.start, group.stop)).any():
            rows = np.moveaxis(np.asarray(weights[name]), own, 0)
            found.append(_by_unit(rows, owner, group))
    if not found:
        raise MaskError(
            f"no prunable weights make the units of {group.name}, so there is nothing "
            "to judge them by; choose a criterion of single weights (magnitude)"
        )
    return np.concatenate(found, axis=1)


def _by_unit(
    values: Array, owner: NDArray[np.int64], group: Group
) -> NDArray[np.float64]:
    """Return the rows of a tensor that go with each unit, side by side."""
    mine = (owner >= group.start) & (owner < group.stop)
    rows = np.asarray(values, np.float64).reshape(len(owner), -1)[mine]
    order = np.argsort(owner[mine], kind="stable")
    return rows[order].reshape(group.size, -1)


def _scales(
    units: Units, group: Group, weights: Params
) -> Mapping[str, NDArray[np.int64]]:
    """Return BatchNorm's scales of a group: name -> unit of each entry."""
    found = {}
    for name, dimensions in units.parameters.items():
        stem, _, last = name.rpartition(".")
        mean = f"{stem}.running_mean" if stem else "running_mean"
        owner = dimensions.get(0)
        if (
            name in weights
            and last == "weight"
            and mean in units.shapes
            and owner is not None
        ):
            inside = (owner >= group.start) & (owner < group.stop)
            if inside.any():
                found[name] = owner
    return found
