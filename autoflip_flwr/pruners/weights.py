"""Baselines that need no measurements: random masks, and criteria on the weights.

All prune to the density of the settings. Where the source prunes whole filters, whole
units are pruned first, as far as possible; then single weights of layers are pruned by
magnitude. The criteria see the model after `dense_rounds` rounds without a mask,
because untrained weights carry no information. The default of two rounds, with five of
twenty clients each, costs about as many bytes as an exploration. With `reselect` they
judge again before every round, and pruned weights keep their values at the server.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import MaskError, SettingsError
from autoflip_flwr.method.structured import Group, Units
from autoflip_flwr.pruners.base import FixedPruner, Problem, limits_of
from autoflip_flwr.settings import BaselineSettings
from autoflip_flwr.types import Array, Float32, Mask, Masks, Nodes, Params, Scores

_Floats: TypeAlias = NDArray[np.float64]


class Random(FixedPruner):
    """One random mask for all rounds, or with `reselect` a new one for each.

    Parameters
    ----------
    reselect : bool
        Draw before every round; pruned weights keep their values at the server.
    """

    def __init__(self, *, reselect: bool = False) -> None:
        self.restores = BaselineSettings(reselect=reselect).reselect

    def masks(self, sampled: Nodes, weights: Params, server_round: int) -> Masks:
        """Return the random mask."""
        del sampled, weights, server_round
        if self._chosen is None or self.restores:
            scores = {n: self.rng.random(s, np.float32) for n, s in self.shapes.items()}
            self._chosen = self.cut(scores, overwrite=True)
        return self._chosen


class WeightsPruner(FixedPruner):
    """Prunes by the server's weights after `dense_rounds` without a mask.

    Once; with `reselect` before every round, and pruned weights can return.
    """

    def __init__(self, *, dense_rounds: int = 2, reselect: bool = False) -> None:
        checked = BaselineSettings(dense_rounds=dense_rounds, reselect=reselect)
        self.dense_rounds, self.restores = checked.dense_rounds, checked.reselect

    def prepare(self, problem: Problem) -> None:
        """Start with a mask that keeps everything."""
        super().prepare(problem)
        self._whole: Masks = {n: np.ones(s, np.bool_) for n, s in self.shapes.items()}

    def masks(self, sampled: Nodes, weights: Params, server_round: int) -> Masks:
        """Return the full mask in dense rounds, then that of the criterion."""
        del sampled
        if server_round <= self.dense_rounds:
            return self._whole
        if self._chosen is None or self.restores:
            self._chosen = self._judge(weights)
        return self._chosen

    @abstractmethod
    def _judge(self, weights: Params) -> Masks:
        """Make a mask from the weights."""


class Magnitude(WeightsPruner):
    """Prunes the smallest single weights over all layers.

    Han et al., Learning both Weights and Connections for Efficient Neural Networks
    (arXiv:1506.02626). Biases and scales of normalization are kept.

    Parameters
    ----------
    dense_rounds : int
        Rounds, 0 or more, before the weights are judged.
    reselect : bool
        Choose before every round; pruned weights keep their values at the server.
    """

    def _judge(self, weights: Params) -> Masks:
        return self.cut(but_vectors(magnitudes(weights)), overwrite=True)


class UnitPruner(WeightsPruner):
    """Prunes whole units by a criterion, the same share of every layer.

    The criteria are those of Wu, Song and Zeng, Efficient federated learning on
    resource-constrained edge devices based on model pruning (Complex & Intelligent
    Systems 9, 2023, doi:10.1007/s40747-023-01120-5). Their rates per layer are not
    public. Here units are ranked within their layer and compete by rank, so that every
    layer loses the same share. They select again at each release of the model and
    restore it afterwards: that is `reselect`.
    """

    needs_units = True

    def _judge(self, weights: Params) -> Masks:
        units = self.known_units()
        scores = magnitudes(weights)
        ranks = np.zeros(units.count)
        for group in units.groups:
            scored = self._criterion(units, group, weights)
            order = np.argsort(np.argsort(scored, kind="stable"), kind="stable")
            ranks[group.units] = (order + 0.5) / group.size
        most = units.most(scores, limits_of(self.settings))
        budget = min(self.pruned_count(scores), most)
        return self.cut(
            but_vectors(scores), unit_budget=budget, unit_scores=ranks, overwrite=True
        )

    def prepare(self, problem: Problem) -> None:
        """Check that the model has units to prune."""
        super().prepare(problem)
        if not self.known_units().only(self.initial).groups:
            raise MaskError(
                "no unit of the model is free to prune: every group has parameters "
                "that are excluded or not trained; exclude less"
            )

    @abstractmethod
    def _criterion(self, units: Units, group: Group, weights: Params) -> _Floats:
        """Return one score per unit of a group; the lowest are pruned first."""


class L1(UnitPruner):
    """Prunes the filters with the smallest sum of absolute weights.

    Li et al., Pruning Filters for Efficient ConvNets (arXiv:1608.08710, section 3.1).

    It needs ``AutoFLIP(..., model=Net(), example_inputs=one_sample)``; its parameters
    are those of `Magnitude`.
    """

    def _criterion(self, units: Units, group: Group, weights: Params) -> _Floats:
        return np.asarray(np.abs(filters(units, group, weights)).sum(axis=1))


class L2(UnitPruner):
    """Prunes the filters with the smallest Euclidean norm.

    He et al., Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks
    (arXiv:1808.06866, Eq. 1 with p = 2). Needs and parameters are those of `L1`.
    """

    def _criterion(self, units: Units, group: Group, weights: Params) -> _Floats:
        return np.asarray(np.linalg.norm(filters(units, group, weights), axis=1))


class Similarity(UnitPruner):
    """Prunes the filters with the smallest sum of distances to the layer's others.

    That sum is least near the geometric median of the filters: He et al., Filter
    Pruning via Geometric Median (arXiv:1811.00250, Eq. 5). Needs and parameters are
    those of `L1`.
    """

    def _criterion(self, units: Units, group: Group, weights: Params) -> _Floats:
        rows = filters(units, group, weights)
        return np.array([np.linalg.norm(rows - row, axis=1).sum() for row in rows])


class BatchNormScale(UnitPruner):
    """Prunes the channels with the smallest absolute scale of their BatchNorm.

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming
    (arXiv:1708.06519). Their penalty on the scales belongs to the clients' training: in
    our app `training.scale-penalty`. Layers without BatchNorm keep all units. Needs and
    parameters are those of `L1`.

    Raises
    ------
    SettingsError
        If the model has no BatchNorm.
    """

    def prepare(self, problem: Problem) -> None:
        """Exclude groups without BatchNorm from pruning."""
        super().prepare(problem)
        every = self.known_units()
        with_scale = {g.name for g in every.groups if _scales(every, g, self.initial)}
        if not with_scale:
            raise SettingsError(
                "the criterion bn needs the scales of BatchNorm, but no unit of this "
                "model has one; choose another criterion, or a model with BatchNorm"
            )
        self.units = every.without(
            {g.name: "no BatchNorm" for g in every.groups if g.name not in with_scale}
        )

    def _criterion(self, units: Units, group: Group, weights: Params) -> _Floats:
        scales = _scales(units, group, weights).items()
        rows = [_by_unit(weights[name], owner, group) for name, owner in scales]
        return np.asarray(np.abs(np.concatenate(rows, axis=1)).mean(axis=1))


class EFLPrune(L1):
    """L1 with `reselect`: prunes before each round, restores the full model after it.

    Wu, Song and Zeng (Complex & Intelligent Systems 9, 2023), called EFLPrune in
    arXiv:2405.10271: clients train and upload the kept part, the server writes it into
    the full model and prunes again. Their criterion is not public; L1 replaces it.

    Parameters
    ----------
    dense_rounds : int
        Rounds, 0 or more, before the weights are judged.
    """

    def __init__(self, *, dense_rounds: int = 2) -> None:
        super().__init__(dense_rounds=dense_rounds, reselect=True)


def magnitudes(weights: Params) -> dict[str, Float32]:
    """Return absolute values, float32."""
    return {name: np.abs(value, dtype=np.float32) for name, value in weights.items()}


def but_vectors(scores: Scores) -> dict[str, Float32]:
    """Protect biases and scales of normalization: their scores become infinite.

    The sources of the baselines prune the weights of layers only. A pruned unit still
    takes its bias and scale with it.
    """
    return {
        name: score if score.ndim > 1 else np.full(score.shape, np.inf, np.float32)
        for name, score in scores.items()
    }


def filters(units: Units, group: Group, weights: Params) -> _Floats:
    """Return one row per unit: the weights that compute it, of all its matrices."""
    columns = []
    for name, dimensions in units.parameters.items():
        own = 1 if name in units.columns else 0
        if name not in weights or weights[name].ndim < 2 or own not in dimensions:
            continue
        owner = dimensions[own]
        if _members(owner, group).any():
            rows = np.moveaxis(np.asarray(weights[name]), own, 0)
            columns.append(_by_unit(rows, owner, group))
    if not columns:
        raise MaskError(
            f"no prunable weights make the units of {group.name}, so they have no "
            "score; choose a criterion of single weights (magnitude)"
        )
    return np.concatenate(columns, axis=1)


def _by_unit(values: Array, owner: NDArray[np.int64], group: Group) -> _Floats:
    """Return one row per unit: the tensor's rows that belong to it, joined."""
    mine = _members(owner, group)
    rows = np.asarray(values, np.float64).reshape(len(owner), -1)[mine]
    order = np.argsort(owner[mine], kind="stable")
    return rows[order].reshape(group.size, -1)


def _scales(
    units: Units, group: Group, weights: Params
) -> Mapping[str, NDArray[np.int64]]:
    """Return the BatchNorm scales of a group: name -> unit of each entry."""
    scales = {}
    for name, dimensions in units.parameters.items():
        stem, _, last = name.rpartition(".")
        mean = f"{stem}.running_mean" if stem else "running_mean"
        scale = name in weights and last == "weight" and mean in units.shapes
        owner = dimensions.get(0)
        if scale and owner is not None and _members(owner, group).any():
            scales[name] = owner
    return scales


def _members(owner: NDArray[np.int64], group: Group) -> Mask:
    """Tell which entries belong to the units of a group."""
    return (owner >= group.start) & (owner < group.start + group.size)
