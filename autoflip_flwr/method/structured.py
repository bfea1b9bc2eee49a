"""Units: which entries of which tensors go together, and which units to prune.

A unit is the smallest part of a network that can be taken out whole: a filter with its
BatchNorm and the next layer's input channel, a neuron with its outgoing weights, a
hidden unit of an LSTM with all its gates. Units that compete for one layer's width
form a group. NumPy alone; `autoflip_flwr.units` finds the units of a PyTorch model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import MaskError, SettingsError
from autoflip_flwr.method.parallel import parallel_map
from autoflip_flwr.types import Masks, Scores

#: Tensor name -> dimension -> the unit of each index along it, int64; -1: of none.
Owners: TypeAlias = Mapping[str, Mapping[int, NDArray[np.int64]]]

#: One bool per unit; True = keep.
Keep: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Group:
    """Units that are the width of one layer (and of all that is coupled with it)."""

    name: str  # of the module that makes the channels
    start: int  # number of its first unit
    size: int  # units

    @property
    def stop(self) -> int:
        """Number behind its last unit."""
        return self.start + self.size

    @property
    def units(self) -> slice:
        """The group's units among all."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What every group keeps."""

    floor: float = 0.0  # least share of its units, in [0, 1]
    min_units: int = 1  # least number of them, >= 1
    multiple: int = 1  # it is left whole or at a multiple of this; 8 suits hardware

    def __post_init__(self) -> None:
        if not (0 <= self.floor <= 1 and self.min_units >= 1 and self.multiple >= 1):
            raise SettingsError(
                "expected a floor in [0, 1], min_units >= 1 and multiple >= 1, got "
                f"{self.floor}, {self.min_units} and {self.multiple}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The units of a model.

    Attributes
    ----------
    groups : tuple of Group
        Units are numbered through all groups in their order.
    parameters : Owners
        Which unit an index along a parameter's dimension belongs to. An entry of a
        weight belongs to at most two units: its row's and its column's.
    buffers : Owners
        The same for buffers, which have no mask.
    shapes : mapping of name -> shape
        Of all tensors in the model's state.
    uses : mapping of name -> int
        How often a weight is used for the example inputs: the pixels a convolution
        makes, the steps of a recurrent layer.
    level : tuple of tuples of int arrays
        Sets of rows of units that must stay equally many: the layers of one
        `nn.LSTM` share one hidden size.
    whole : mapping of module name -> reason
        What is left whole.
    columns : frozenset of str
        Weights whose own channels lie along dimension 1, not 0: embeddings and
        transposed convolutions.
    """

    groups: tuple[Group, ...]
    parameters: Owners
    buffers: Owners
    shapes: Mapping[str, tuple[int, ...]]
    uses: Mapping[str, int] = field(default_factory=dict)
    level: tuple[tuple[NDArray[np.int64], ...], ...] = ()
    whole: Mapping[str, str] = field(default_factory=dict)
    columns: frozenset[str] = frozenset()

    @property
    def count(self) -> int:
        """How many units there are."""
        return sum(group.size for group in self.groups)

    def only(self, prunable: Iterable[str]) -> "Units":
        """Leave out the groups that a parameter outside `prunable` belongs to."""
        names = set(prunable)
        fixed = {
            unit
            for name, dimensions in self.parameters.items()
            if name not in names
            for owner in dimensions.values()
            for unit in np.unique(owner[owner >= 0]).tolist()
        }
        if not fixed:
            return self
        left = [g for g in self.groups if fixed.isdisjoint(range(g.start, g.stop))]
        return self._with(left)

    def without(self, reasons: Mapping[str, str]) -> "Units":
        """Leave the named groups whole, and note why."""
        left = [group for group in self.groups if group.name not in reasons]
        return replace(self._with(left), whole={**self.whole, **reasons})

    def clusters(self) -> list[list[Group]]:
        """Return the groups, together those that share rows of equal length."""
        unit_of = {u: g for g in self.groups for u in range(g.start, g.stop)}
        together: list[set[Group]] = []
        for rows in self.level:
            found = {unit_of[u] for row in rows for u in row.tolist() if u >= 0}
            for other in [each for each in together if each & found]:
                together.remove(other)
                found |= other
            together.append(found)
        alone = set(self.groups).difference(*together)
        return [
            *([group] for group in self.groups if group in alone),
            *([g for g in self.groups if g in found] for found in together if found),
        ]

    def _with(self, groups: Sequence[Group]) -> "Units":
        """Return the units of some groups, numbered anew."""
        number = np.full(self.count + 1, -1, np.int64)  # the last one stands for -1
        renamed, start = [], 0
        for group in groups:
            number[group.units] = np.arange(start, start + group.size)
            renamed.append(replace(group, start=start))
            start += group.size

        def renumbered(owners: Owners) -> Owners:
            return {
                name: {dim: number[owner] for dim, owner in dimensions.items()}
                for name, dimensions in owners.items()
            }

        return replace(
            self,
            groups=tuple(renamed),
            parameters=renumbered(self.parameters),
            buffers=renumbered(self.buffers),
            level=tuple(tuple(number[row] for row in rows) for rows in self.level),
        )

    def means(self, scores: Scores) -> NDArray[np.float64]:
        """Return each unit's score: the mean over all entries that go with it.

        The arithmetic mean, since that is the score lost per parameter saved: taking
        units by it loses the least of the scores' sum for a number of parameters. A
        weight between two units counts for both.
        """
        total, size = np.zeros(self.count), np.zeros(self.count)
        places = [
            (name, dim, owner)
            for name, dimensions in self.parameters.items()
            if name in scores
            for dim, owner in dimensions.items()
        ]

        def sums(place: tuple[str, int, NDArray[np.int64]]) -> NDArray[np.float64]:
            name, dim, _ = place
            score = np.asarray(scores[name])
            others = tuple(d for d in range(score.ndim) if d != dim)
            return np.asarray(score.sum(axis=others, dtype=np.float64))

        summed = parallel_map(sums, places)
        for (name, _, owner), along in zip(places, summed, strict=True):
            owned = owner >= 0
            each = np.size(scores[name]) // max(1, owner.size)
            total += np.bincount(owner[owned], along[owned], self.count)
            size += each * np.bincount(owner[owned], minlength=self.count)
        return total / np.maximum(size, 1)

    def pruned(self, keep: Keep, prunable: Iterable[str] | None = None) -> int:
        """Count the parameters that go when the other units do."""
        names = self.parameters if prunable is None else prunable
        count = 0
        for name in names:
            if name not in self.parameters:
                continue
            count += math.prod(self.shapes[name]) - self._left(name, keep)
        return count

    def _left(self, name: str, keep: Keep) -> int:
        """Count what is left of a parameter."""
        shape = list(self.shapes[name])
        for dim, owner in self.parameters.get(name, {}).items():
            shape[dim] = int(np.count_nonzero(_kept(owner, keep)))
        return math.prod(shape)

    def operations(self, keep: Keep | None = None) -> int:
        """Count multiply-accumulates of the example inputs; None: of the whole model.

        Of the weights in `uses` alone: convolutions, linear and recurrent layers.
        """
        if keep is None:
            keep = np.ones(self.count, np.bool_)
        return sum(self._left(name, keep) * uses for name, uses in self.uses.items())

    def choose(
        self,
        scores: Scores,
        *,
        budget: int,
        limits: Limits = Limits(),
        means: NDArray[np.float64] | None = None,
    ) -> Keep:
        """Choose the units to keep, so that at most `budget` parameters are pruned.

        Units go in the order of their scores, the lowest first, until the next one
        would prune too much.

        Parameters
        ----------
        scores : mapping of name -> array
            Parameters without a score keep their groups whole.
        budget : int
            Parameters to prune, at most.
        limits : Limits
        means : float64 array, optional
            A score per unit; by default the mean over the entries that go with it.
        """
        units = self.only(scores)
        if means is None:
            means = units.means(scores)
        elif units is not self:
            means = means[self._numbers(units)]
        going, sizes = units._steps(means, limits)
        ends = np.concatenate([[0], np.cumsum(sizes)])

        def without(count: int) -> Keep:
            keep = np.ones(units.count, np.bool_)
            keep[going[: ends[count]]] = False
            return keep

        low, high = 0, len(sizes)
        while low < high:  # the most steps that stay within the budget
            middle = (low + high + 1) // 2
            if units.pruned(without(middle), scores) <= budget:
                low = middle
            else:
                high = middle - 1
        return self._of(units, without(low))

    def prune(
        self,
        scores: Scores,
        *,
        budget: int,
        limits: Limits = Limits(),
        means: NDArray[np.float64] | None = None,
    ) -> dict[str, NDArray[np.bool_]]:
        """Return the mask that prunes what `choose` does not keep."""
        keep = self.choose(scores, budget=budget, limits=limits, means=means)
        return self.masks(keep, scores)

    def most(self, prunable: Iterable[str], limits: Limits = Limits()) -> int:
        """Count the parameters that whole units can prune, at most."""
        names = list(prunable)
        units = self.only(names)
        going, _ = units._steps(np.zeros(units.count), limits)
        keep = np.ones(units.count, np.bool_)
        keep[going] = False
        return units.pruned(keep, names)

    def _rows(self) -> list[list[NDArray[np.int64]]]:
        """Return the rows of units that compete, together those of equal length.

        Of rows that must stay equally long the lowest units of all go at once; where
        one of them is not free to go, or they overlap, none of them goes.
        """
        levelled: list[list[NDArray[np.int64]]] = []
        taken = np.zeros(self.count, np.bool_)
        for cluster in self.clusters():
            units = {u for group in cluster for u in range(group.start, group.stop)}
            rows = {
                tuple(row.tolist())
                for each in self.level
                for row in each
                if not units.isdisjoint(row.tolist())
            }
            if not rows:
                continue
            taken[list(units)] = True
            numbers = [unit for row in rows for unit in row]
            bound = any(
                (row < 0).any()
                for each in self.level
                if any(tuple(r.tolist()) in rows for r in each)
                for row in each
            )
            if not bound and len(set(numbers)) == len(numbers):
                levelled.append([np.array(row) for row in sorted(rows)])
        free = [g for g in self.groups if not taken[g.units].any()]
        return [[np.arange(g.start, g.stop)] for g in free] + levelled

    def _steps(
        self, means: NDArray[np.float64], limits: Limits
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return all units that may go, the lowest first, and how many go at once.

        Those that go at once are of one group, so that it stays at a multiple, or of
        rows that stay equally long; among all they go by their mean. Ties go by group.
        """
        orders, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for rows in self._rows():
            size = len(rows[0])
            least = max(limits.min_units, math.ceil(limits.floor * size))
            first = size % limits.multiple or limits.multiple
            ends = np.arange(first, size - least + 1, limits.multiple)
            if ends.size:
                lowest = [row[np.argsort(means[row], kind="stable")] for row in rows]
                orders.append(np.stack(lowest, axis=1)[: ends[-1]].reshape(-1))
                sizes.append(np.diff(ends, prepend=0) * len(rows))
        order, size_of = np.concatenate(orders), np.concatenate(sizes)
        if not order.size:
            return order, size_of
        starts = np.cumsum(size_of) - size_of
        by_mean = np.argsort(
            np.add.reduceat(means[order], starts) / size_of, kind="stable"
        )
        rank = np.empty(size_of.size, np.int64)
        rank[by_mean] = np.arange(size_of.size)
        going = order[np.argsort(np.repeat(rank, size_of), kind="stable")]
        return going, size_of[by_mean]

    def check_budget(
        self,
        prunable: Iterable[str],
        *,
        budget: int,
        limits: Limits = Limits(),
    ) -> None:
        """Refuse a budget for which groups would have to lose all their units.

        Raises
        ------
        MaskError
            With the most that whole units can prune, and what limits it.
        """
        names = list(prunable)
        most = self.most(names, limits)
        if budget > most:
            total = sum(math.prod(self.shapes[name]) for name in names)
            able = [group.name for group in self.only(names).groups]
            excluded = [g.name for g in self.groups if g.name not in able]
            raise MaskError(
                f"whole units can prune at most {most} of {total} parameters "
                f"({most / max(1, total):.1%}), asked for {budget}: beyond that groups "
                f"would lose all their units, or their least ({limits}). Groups that "
                f"can be pruned: {able}; that have parameters which are excluded or "
                f"not trained: {excluded}; left whole: {dict(self.whole)}. Prune fewer "
                "whole units, or lower the limits, or exclude less"
            )

    def _of(self, units: "Units", keep: Keep) -> Keep:
        """Translate a choice among some of the groups to all of them."""
        if units is self:
            return keep
        whole = np.ones(self.count, np.bool_)
        whole[self._numbers(units)] = keep
        return whole

    def _numbers(self, units: "Units") -> NDArray[np.int64]:
        """Return the numbers here of the units of some of the groups."""
        here = {group.name: np.arange(group.start, group.stop) for group in self.groups}
        found = [here[group.name] for group in units.groups]
        return np.concatenate([np.empty(0, np.int64), *found])

    def masks(self, keep: Keep, names: Iterable[str]) -> dict[str, NDArray[np.bool_]]:
        """Return the mask that prunes the other units, of the named parameters."""
        return {name: self._mask(name, keep) for name in names}

    def _mask(self, name: str, keep: Keep) -> NDArray[np.bool_]:
        mask = np.ones(self.shapes[name], np.bool_)
        for dim, owner in self.parameters.get(name, {}).items():
            along = _kept(owner, keep)
            mask &= along.reshape([-1 if d == dim else 1 for d in range(mask.ndim)])
        return mask

    def used(self, masks: Masks) -> Keep:
        """Tell which units a mask leaves anything of.

        Raises
        ------
        MaskError
            If a shape is not the parameter's, or a group has lost all its units.
        """
        used = np.zeros(self.count, np.bool_)
        for name, dimensions in self.parameters.items():
            mask = masks.get(name)
            if mask is not None and mask.shape != self.shapes[name]:
                raise MaskError(
                    f"{name}: expected a mask of shape {self.shapes[name]}, "
                    f"got {mask.shape}"
                )
            for dim, owner in dimensions.items():
                owned = owner >= 0
                if mask is not None:
                    others = tuple(d for d in range(mask.ndim) if d != dim)
                    owned &= mask.any(axis=others)
                used[owner[owned]] = True
        for group in self.groups:
            if not used[group.units].any():
                raise MaskError(
                    f"the mask prunes all {group.size} units of {group.name}; keep one "
                    "or more of every group, with a floor or min_units"
                )
        return used

    def indices(
        self, name: str, keep: Keep
    ) -> tuple[NDArray[np.int64] | None, ...] | None:
        """Return the kept indices along each dimension of a parameter or buffer.

        None for a dimension, or for the whole tensor, that loses nothing.
        """
        owners = self.parameters.get(name) or self.buffers.get(name) or {}
        found: list[NDArray[np.int64] | None] = [None] * len(self.shapes.get(name, ()))
        for dim, owner in owners.items():
            kept = _kept(owner, keep)
            if not kept.all():
                found[dim] = np.flatnonzero(kept)
        return tuple(found) if any(index is not None for index in found) else None

    def levelled(self, keep: Keep) -> Keep:
        """Take back units until rows that must be equally long are so."""
        keep = keep.copy()
        changed = True
        while changed:
            changed = False
            for rows in self.level:
                widest = max(int(np.count_nonzero(_kept(row, keep))) for row in rows)
                for row in rows:
                    missing = widest - int(np.count_nonzero(_kept(row, keep)))
                    if missing:
                        keep[row[~_kept(row, keep)][:missing]] = True
                        changed = True
        return keep


def _kept(owner: NDArray[np.int64], keep: Keep) -> Keep:
    kept = np.ones(owner.size, np.bool_)
    owned = owner >= 0
    kept[owned] = keep[owner[owned]]
    return kept
