"""Units: which entries of which tensors go together, and which units to prune.

A unit is the smallest part of a network that can be taken out whole: a filter with its
BatchNorm and the next layer's input channel, a neuron with its outgoing weights, a
hidden unit of an LSTM with all its gates, a head of attention with its queries, keys
and values. Units that compete for one layer's width form a group. NumPy alone;
`autoflip_flwr.units` finds the units of a PyTorch model.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
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

#: Units by number.
Numbers: TypeAlias = NDArray[np.int64]

#: Kept indices along each dimension; None: all of them.
Indices: TypeAlias = tuple[NDArray[np.int64] | None, ...]

#: What a unit's operations weigh in its cost, beside its parameters. The first is taken
#: with which the operations are reached before the parameters that may go are gone.
_WEIGHTS = (0.5, 0.75, 1.0)

#: Share of the operations that may be needed which a mask should need.
_NEAR = 0.98

#: Less than any score.
_LEAST = -1e300


@dataclass(frozen=True, slots=True)
class Group:
    """Units that are the width of one layer (and of all that is coupled with it)."""

    name: str  # of the module that makes the channels
    start: int  # number of its first unit
    size: int  # units
    width: int = 1  # channels that each of them has: those of a head, else one

    @property
    def units(self) -> slice:
        """The group's units among all."""
        return slice(self.start, self.start + self.size)

    @property
    def numbers(self) -> range:
        """The numbers of its units."""
        return range(self.start, self.start + self.size)


#: Groups that lose units together, and the rows of units that lose equally many.
Cluster: TypeAlias = tuple[list[Group], list[Numbers]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What every group keeps."""

    floor: float = 0.0  # least share of its units, in [0, 1]
    min_units: int = 1  # least number of them, >= 1
    multiple: int = 1  # channels: it is left whole or at a multiple; 8 suits hardware

    def __post_init__(self) -> None:
        if not (0 <= self.floor <= 1 and self.min_units >= 1 and self.multiple >= 1):
            raise SettingsError(
                "expected a floor in [0, 1], min_units >= 1 and multiple >= 1, got "
                f"{self.floor}, {self.min_units} and {self.multiple}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The units of a model, numbered through all groups in their order.

    Groups that are left whole keep their numbers. An entry of a weight belongs to at
    most two units: its row's and its column's.
    """

    groups: tuple[Group, ...]  # that may lose units
    parameters: Owners
    buffers: Owners  # which have no mask
    shapes: Mapping[str, tuple[int, ...]]  # of all tensors in the model's state
    #: How often a weight is used for the example inputs: the pixels a convolution
    #: makes, the steps of a recurrent layer.
    uses: Mapping[str, float] = field(default_factory=dict)
    #: Rows of units that must stay equally long: the layers of one `nn.LSTM`.
    level: tuple[tuple[Numbers, ...], ...] = ()
    whole: Mapping[str, str] = field(default_factory=dict)  # module left whole -> why
    #: Weights whose own channels lie along dimension 1, not 0: of embeddings and
    #: transposed convolutions.
    columns: frozenset[str] = frozenset()

    @property
    def count(self) -> int:
        """How many units are numbered, those that are left whole among them."""
        owners = [o for owners in self.parameters.values() for o in owners.values()]
        return 1 + max((int(owner.max(initial=-1)) for owner in owners), default=-1)

    def only(self, prunable: Iterable[str]) -> "Units":
        """Leave out the groups that a parameter outside `prunable` belongs to."""
        names = set(prunable)
        free = np.ones(self.count + 1, np.bool_)  # the last one stands for -1
        for name, dimensions in self.parameters.items():
            for owner in dimensions.values() if name not in names else ():
                free[owner] = False
        left = tuple(group for group in self.groups if free[group.units].all())
        return replace(self, groups=left)

    def without(self, reasons: Mapping[str, str]) -> "Units":
        """Leave the named groups whole, and note why."""
        left = tuple(group for group in self.groups if group.name not in reasons)
        return replace(self, groups=left, whole={**self.whole, **reasons})

    def clusters(self) -> list[Cluster]:
        """Return the groups, together those whose rows must stay equally long.

        Most groups are alone, with one row. A cluster has no rows where one of them
        has a unit that is left whole, or two overlap: then none of its units may go.
        """
        joined: list[tuple[set[Group], set[tuple[int, ...]]]] = []
        for level in self.level:
            rows = {tuple(row.tolist()) for row in level}
            units = {unit for row in rows for unit in row}
            groups = {g for g in self.groups if not units.isdisjoint(g.numbers)}
            for other in [each for each in joined if each[0] & groups]:
                joined.remove(other)
                groups |= other[0]
                rows |= other[1]
            if groups:
                joined.append((groups, rows))
        together = set().union(*(groups for groups, _ in joined))
        clusters = [
            ([group], [np.array(group.numbers)])
            for group in self.groups
            if group not in together
        ]
        for groups, rows in joined:
            free = {unit for group in groups for unit in group.numbers}
            numbers = [unit for row in rows for unit in row]
            able = len(set(numbers)) == len(numbers) and free.issuperset(numbers)
            members = [group for group in self.groups if group in groups]
            clusters.append((members, [np.array(r) for r in sorted(rows) if able]))
        return clusters

    def means(self, scores: Scores) -> NDArray[np.float64]:
        """Return each unit's score: the mean over all entries that go with it.

        The arithmetic mean, since that is the score lost per parameter saved: taking
        units by it loses the least of the scores' sum for a number of parameters. A
        weight between two units counts for both.
        """
        places = [
            (name, dim, owner + 1)  # 0 stands for no unit
            for name, dimensions in self.parameters.items()
            if name in scores
            for dim, owner in dimensions.items()
        ]
        count = self.count

        def sums(place: tuple[str, int, Numbers]) -> NDArray[np.float64]:
            name, dim, owner = place
            score = np.asarray(scores[name])
            # Two sums over neighbours in memory: a sum over all other dimensions at
            # once takes four times as long for the columns of a 3 x 3 convolution.
            rows = score.reshape(math.prod(score.shape[:dim]), -1)
            row = rows.sum(axis=0, dtype=np.float64) if len(rows) > 1 else rows
            along = row.reshape(owner.size, -1).sum(axis=1, dtype=np.float64)
            return np.asarray(np.bincount(owner, along, count + 1)[1:], float)

        total = sum(parallel_map(sums, places), start=np.zeros(count))
        size = self._totals({n: 1 for n in self.parameters if n in scores})
        return np.asarray(total / np.maximum(size, 1))

    def per_cost(
        self,
        means: NDArray[np.float64],
        prunable: Iterable[str],
        *,
        weight: float = 0.5,
    ) -> NDArray[np.float64]:
        """Return each unit's score, relative to its group's, over what it costs.

        The score is that of `means` over the mean of its group's units, so that groups
        of small scores are not emptied. The cost is the unit's share of the model's
        multiply-accumulates, with the `weight`, and its share of the prunable
        parameters.
        """
        relative = means.copy()
        for group in self.groups:
            own = relative[group.units]
            own /= max(float(own.mean()), 1e-30)
        sizes = {n: math.prod(self.shapes[n]) for n in prunable if n in self.parameters}
        share = self._totals(dict.fromkeys(sizes, 1)) / max(1, sum(sizes.values()))
        cost = weight * self._totals(self.uses) / max(1, self.operations())
        cost += (1 - weight) * share
        return np.asarray(relative / np.maximum(cost, 1e-30))

    def _totals(self, per_entry: Mapping[str, float]) -> NDArray[np.float64]:
        """Sum a value per entry of a parameter over the entries that go with a unit."""
        count = self.count + 1  # the first stands for no unit
        total = np.zeros(count)
        for name, value in per_entry.items():
            entries = math.prod(self.shapes[name])
            for owner in self.parameters.get(name, {}).values():
                each = value * entries / max(1, owner.size)
                total += each * np.bincount(owner + 1, minlength=count)
        return total[1:]

    def pruned(self, keep: Keep, prunable: Iterable[str] | None = None) -> int:
        """Count the parameters that go when the other units do."""
        names = self.parameters if prunable is None else prunable
        left = self._left(keep)
        return sum(
            math.prod(self.shapes[name]) - left(name)
            for name in names
            if name in self.parameters
        )

    def _left(self, keep: Keep) -> Callable[[str], int]:
        """Return what counts the entries that are left of a parameter."""
        kept, counts = np.append(keep, True), dict[int, int]()

        def count(owner: Numbers) -> int:
            if id(owner) not in counts:  # a layer's parameters share their units
                counts[id(owner)] = int(np.count_nonzero(kept[owner]))
            return counts[id(owner)]

        def left(name: str) -> int:
            owners = self.parameters.get(name, {})
            sizes = enumerate(self.shapes[name])
            return math.prod(count(owners[d]) if d in owners else n for d, n in sizes)

        return left

    def operations(self, keep: Keep | None = None) -> int:
        """Count multiply-accumulates of the example inputs; None: of the whole model.

        Of the weights in `uses` alone: convolutions, linear and recurrent layers, and
        attention.
        """
        if keep is None:
            keep = np.ones(self.count, np.bool_)
        left = self._left(keep)
        return round(sum(left(name) * uses for name, uses in self.uses.items()))

    def choose(
        self,
        scores: Scores,
        *,
        budget: int,
        limits: Limits = Limits(),
        means: NDArray[np.float64] | None = None,
    ) -> Keep:
        """Choose the units to keep, so that at most `budget` parameters are pruned.

        Units go in the order of their scores (`means`, by default those of `scores`),
        the lowest first, until the next one would prune too much. Parameters without a
        score keep their groups whole.
        """
        if means is None:
            means = self.means(scores)
        goes, steps = self._going(scores, means, limits)
        return goes >= self._affordable(goes, steps, scores, budget)

    def within(
        self,
        scores: Scores,
        *,
        operations: float,
        budget: int,
        limits: Limits = Limits(),
        stay: Keep | None = None,
    ) -> Keep:
        """Choose the units to keep, so that the model needs at most `operations`.

        Units go by their score per cost, the lowest first. One that would prune more
        than `budget` parameters, or save far more than is left to save, stays with all
        that are left of its group, and other groups go on. If the budget ends first,
        operations weigh more in the cost, and in the end are all that counts. So the
        model needs little less than `operations`, or more where the budget allows no
        better. Units without a score go first, whatever they save; those in `stay`, a
        bool per unit, do not go.
        """
        means, tried = self.means(scores), []
        costs = (self.per_cost(means, scores, weight=weight) for weight in _WEIGHTS)
        for order in chain(costs, self._by_operations(scores)):
            first = np.where(means > 0, order, _LEAST)
            goes, steps = self._going(scores, first, limits)
            dead = int(goes[means > 0].min(initial=steps))
            dead = self._affordable(goes, dead, scores, budget)
            if stay is not None:
                goes[stay] = steps + 1
            left = range(dead, steps + 1)
            tried.append(self._nearest(scores, goes, left, operations, budget))
            if self.operations(tried[-1]) <= operations:
                return tried[-1]
        return min(tried, key=self.operations)

    def _nearest(
        self,
        prunable: Iterable[str],
        goes: Numbers,
        steps: range,
        operations: float,
        budget: int,
    ) -> Keep:
        """Take as many steps, of those allowed, as reach the operations closely."""

        def fits(keep: Keep) -> bool:
            return self.pruned(keep, prunable) <= budget

        def ends(n: int) -> bool:
            return not fits(goes >= n) or self.operations(goes >= n) <= operations

        best, most = None, -1
        while True:
            n = steps[0] + bisect_left(steps, True, key=ends)
            keep = goes >= n
            needs = self.operations(keep)
            if most < needs <= operations and fits(keep):
                best, most = keep, needs
            if most >= _NEAR * operations or n == steps[0] or n not in steps:
                return keep if best is None else best
            together = self._together(int(np.flatnonzero(goes == n - 1)[0]))
            goes[together[goes[together] >= n - 1]] = steps[-1] + 1

    def _affordable(
        self, goes: Numbers, steps: int, prunable: Iterable[str], budget: int
    ) -> int:
        """Count the first steps that prune at most `budget` parameters."""
        return bisect_right(
            range(steps), budget, key=lambda n: self.pruned(goes > n, prunable)
        )

    def _going(
        self, prunable: Iterable[str], means: NDArray[np.float64], limits: Limits
    ) -> tuple[Numbers, int]:
        """Return the step in which each unit goes, and the number of steps.

        A unit that stays has a step beyond all.
        """
        order, sizes = self.only(prunable)._steps(means, limits)
        goes = np.full(self.count, len(sizes) + 1)
        goes[order] = np.repeat(np.arange(len(sizes)), sizes)
        return goes, len(sizes)

    def _together(self, unit: int) -> Numbers:
        """Return all units of the cluster that a unit is of."""
        return next(
            np.concatenate(rows)
            for groups, rows in self.clusters()
            if any(unit in group.numbers for group in groups)
        )

    def most(self, prunable: Iterable[str], limits: Limits = Limits()) -> int:
        """Count the parameters that whole units can prune, at most."""
        names = list(prunable)
        keep = np.ones(self.count, np.bool_)
        keep[self.only(names)._steps(np.zeros(self.count), limits)[0]] = False
        return self.pruned(keep, names)

    def _steps(
        self, means: NDArray[np.float64], limits: Limits
    ) -> tuple[Numbers, NDArray[np.int64]]:
        """Return all units that may go, the lowest first, and how many go at once.

        Those that go at once are of one group, so that it stays at a multiple, or of
        rows that stay equally long; among all they go by their mean. Ties go by group.
        """
        orders, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for groups, rows in self.clusters():
            size = len(rows[0]) if rows else 0
            least = max(limits.min_units, math.ceil(limits.floor * size))
            multiple = limits.multiple // math.gcd(limits.multiple, groups[0].width)
            first = size % multiple or multiple
            ends = np.arange(first, size - least + 1, multiple)
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
        rank = np.argsort(by_mean)
        going = order[np.argsort(np.repeat(rank, size_of), kind="stable")]
        return going, size_of[by_mean]

    def check_budget(
        self, prunable: Iterable[str], *, budget: int, limits: Limits = Limits()
    ) -> None:
        """Refuse a budget for which groups would lose all their units (`MaskError`)."""
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

    def check_operations(
        self,
        prunable: Iterable[str],
        *,
        share: float,
        budget: int,
        limits: Limits = Limits(),
    ) -> None:
        """Refuse a share of the dense operations out of reach (`MaskError`).

        Units go by their operations, or by those per parameter, whichever saves more.
        """
        names = list(prunable)
        dense, needs = self.operations(), []
        for order in self._by_operations(names):
            goes, steps = self._going(names, order, limits)
            keep = self._nearest(names, goes, range(steps + 1), 0, budget)
            needs.append(self.operations(keep))
        least = min(needs) / max(1, dense)
        if least > share:
            raise MaskError(
                f"operations: expected a share of the dense {dense} "
                f"multiply-accumulates of at least {least:.3f}, got {share}. At most "
                f"{budget} parameters are pruned, groups keep their least ({limits}), "
                f"and left whole are {dict(self.whole)}. Prune more parameters, lower "
                "the limits, or allow more operations"
            )

    def _by_operations(self, prunable: Iterable[str]) -> list[NDArray[np.float64]]:
        """Return two orders: what saves most operations, and most per parameter."""
        used, size = self._totals(self.uses), self._totals(dict.fromkeys(prunable, 1))
        return [-used, -used / np.maximum(size, 1)]

    def masks(self, keep: Keep, names: Iterable[str]) -> dict[str, NDArray[np.bool_]]:
        """Return the mask that prunes the other units, of the named parameters."""
        masks = {name: np.ones(self.shapes[name], np.bool_) for name in names}
        for name, mask in masks.items():
            for dim, owner in self.parameters.get(name, {}).items():
                shape = [-1 if d == dim else 1 for d in range(mask.ndim)]
                mask &= _kept(owner, keep).reshape(shape)
        return masks

    def largest(self, scores: Scores, keep: Keep) -> dict[str, NDArray[np.bool_]]:
        """Mark the largest entry that each kept unit has in each of its matrices.

        Entries that go with pruned units do not count.
        """
        marks = {
            n: np.zeros(s, np.bool_) for n, s in self.shapes.items() if n in scores
        }
        for name, alive in self.masks(keep, marks).items():
            for dim, owner in self.parameters.get(name, {}).items():
                if alive.ndim < 2:
                    continue
                rows = np.moveaxis(np.where(alive, scores[name], -np.inf), dim, 0)
                flat = rows.reshape(owner.size, -1)
                place = flat.argmax(axis=1)
                order = np.lexsort((flat[np.arange(owner.size), place], owner))
                ends = np.append(np.diff(owner[order]) > 0, True)
                best = order[ends & (owner[order] >= 0) & _kept(owner[order], keep)]
                inside = np.unravel_index(place[best], rows.shape[1:])
                np.moveaxis(marks[name], dim, 0)[(best, *inside)] = True
        return marks

    def used(self, masks: Masks) -> Keep:
        """Tell which units a mask leaves anything of, one or more of each group."""
        used = np.ones(self.count, np.bool_)
        for group in self.groups:
            used[group.units] = False
        for name, dimensions in self.parameters.items():
            shape = self.shapes[name]
            mask = masks[name] if name in masks else np.ones(shape, np.bool_)
            if mask.shape != shape:
                raise MaskError(
                    f"{name}: expected a mask of shape {shape}, got {mask.shape}"
                )
            for dim, owner in dimensions.items():
                others = tuple(d for d in range(mask.ndim) if d != dim)
                used[owner[(owner >= 0) & mask.any(axis=others)]] = True
        for group in self.groups:
            if not used[group.units].any():
                raise MaskError(
                    f"the mask prunes all {group.size} units of {group.name}; keep one "
                    "or more of every group, with a floor or min_units"
                )
        return used

    def indices(self, keep: Keep) -> dict[str, Indices]:
        """Return the kept indices of each parameter and buffer that loses some.

        One array per dimension; None for a dimension that loses nothing.
        """
        indices = {}
        for name, dimensions in {**self.parameters, **self.buffers}.items():
            along: list[Numbers | None] = [None] * len(self.shapes[name])
            for dim, owner in dimensions.items():
                kept = _kept(owner, keep)
                if not kept.all():
                    along[dim] = np.flatnonzero(kept)
                    indices[name] = along
        return {name: tuple(along) for name, along in indices.items()}

    def levelled(self, keep: Keep) -> Keep:
        """Take back units until rows that must be equally long are so."""
        before, keep = np.zeros_like(keep), keep.copy()
        while (before != keep).any():
            before = keep.copy()
            for rows in self.level:
                widest = max(int(np.count_nonzero(_kept(row, keep))) for row in rows)
                for row in rows:
                    lost = row[~_kept(row, keep)]
                    keep[lost[: max(0, widest - row.size + lost.size)]] = True
        return keep


def _kept(owner: Numbers, keep: Keep) -> Keep:
    return np.append(keep, True)[owner]  # -1, of no unit, is kept
