"""Masks from scores (Eq. 4 of AutoFLIP, arXiv:2405.10271), and their use.

A mask is bool, True = keep.
"""

import math
from collections.abc import Collection, Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import MaskError, SettingsError
from autoflip_flwr.method.parallel import parallel_map
from autoflip_flwr.types import (
    Array,
    Balance,
    Float32,
    Mask,
    Masks,
    Mode,
    Params,
    Scores,
)

MODES: tuple[Mode, ...] = get_args(Mode)

_SAMPLE = 1 << 16  # entries in the sample that brackets the cut
_BLOCK = 1 << 18  # entries of a tensor that are counted at a time


def from_scores(
    scores: Scores,
    *,
    threshold: float,
    mode: Mode = "quantile",
    floor: float = 0.0,
    whole: Collection[str] = (),
    balance: Balance = "global",
    units: Masks | None = None,
    held: Masks | None = None,
    overwrite: bool = False,
) -> dict[str, Mask]:
    """Keep the parameters with the largest scores (Eq. 4).

    Parameters
    ----------
    scores : mapping of name -> array
        No NaN. Compared as float32 across all tensors (``value``: in their own dtype).
    threshold : float
        ``quantile``: the share to prune, in [0, 1]; exactly ``round(threshold * n)``
        of the `n` entries are pruned. ``value``: keep where ``score >= threshold``
        (Eq. 4 as written). ``compression``: the ratio all/kept, >= 1; exactly
        ``round(n / threshold)`` entries are kept.
    mode : {"quantile", "value", "compression"}
    floor : float
        In [0, 1]. Each tensor keeps at least its best ``ceil(floor * size)`` entries.
        Except for ``value`` the other tensors keep fewer in return.
    whole : collection of str
        Names of tensors that keep all entries, as with a floor of 1.
    balance : {"global", "lamp"}
        ``global`` compares all scores. ``lamp`` compares each squared score with the
        sum of its tensor's squared scores that are not smaller (Lee et al.,
        arXiv:2010.07611, Eq. 3), so that a tensor of small scores is not emptied. The
        numbers of kept entries are those of scores cut to 8 significant bits. Scores
        must be >= 0. ``value`` has no number to share out, so it ignores it.
    units : mapping of name -> bool array, optional
        A mask of whole units (`structured.Units`). Its entries are pruned first, then
        single weights, up to the same number as without it. The floor of a tensor is
        at most what `units` keeps of it.
    held : mapping of name -> bool array, optional
        Entries that are kept whatever their score, if so many may be kept. Of those
        that `units` keeps.
    overwrite : bool
        Whether the scores of entries that `units` prunes, and of those in `held`, may
        be overwritten. This saves a copy of all scores.

    Returns
    -------
    dict of name -> bool array
        In the order and of the shapes of `scores`.

    Raises
    ------
    SettingsError
        If mode, threshold or floor is invalid.
    MaskError
        If a score is NaN, the floor leaves too few entries to prune, or ``value``
        empties a tensor.

    Notes
    -----
    Ties at the cut are broken by position. If `p` of `t` equal entries must be pruned,
    the `p` are spread evenly over the `t` (tensors in order, C order within each), so
    that the position of a tensor in the model does not matter.
    """
    _check(threshold, mode, floor)
    if not scores:
        return {}
    flats = [np.asarray(score).reshape(-1) for score in scores.values()]
    for name, flat in zip(scores, flats, strict=True):
        if flat.size and np.isnan(flat.min()):
            raise MaskError(f"{name}: expected scores without NaN, got some")
    sizes = [flat.size for flat in flats]
    floors = [1.0 if name in whole else floor for name in scores]
    check_floor(sizes, threshold=threshold, mode=mode, floors=floors)
    least = [math.ceil(f * size) for f, size in zip(floors, sizes, strict=True)]
    if mode == "value":
        keeps = [flat >= threshold for flat in flats]
        _raise_if_emptied(list(scores), keeps, threshold, least)
        for index, flat in enumerate(flats):
            if int(keeps[index].sum()) < least[index]:
                keeps[index] = ~_lowest([flat], flat.size - least[index])[0]
        kept = sum(int(np.count_nonzero(keep)) for keep in keeps)
    else:
        kept = _kept(sum(sizes), threshold, mode)
    if units is not None:
        flats, most = flats if overwrite else [flat.copy() for flat in flats], 0
        for index, name in enumerate(scores):
            alive = units[name].reshape(-1)
            np.copyto(flats[index], -np.inf, where=~alive)
            left = int(np.count_nonzero(alive))
            least[index] = min(least[index], left)
            most += left
        kept = min(kept, most)  # what `whole` and floors would keep of pruned units
    above: list[Mask] = []
    if held is not None:
        above = [held[name].reshape(-1) for name in scores]
        more = [max(n, int(k.sum())) for n, k in zip(least, above, strict=True)]
        least, above = (more, above) if sum(more) <= kept else (least, [])
    if units is not None or mode != "value":
        lamp = balance == "lamp" and mode != "value"
        keeps = (_keep_lamp if lamp else _keep_highest)(flats, kept, least, above)
    return {
        name: keep.reshape(np.shape(score))
        for (name, score), keep in zip(scores.items(), keeps, strict=True)
    }


def pruned_count(scores: Scores, *, threshold: float, mode: Mode) -> int:
    """Count the entries that a threshold prunes, without a floor."""
    if mode == "value":
        return sum(int((np.asarray(s) < threshold).sum()) for s in scores.values())
    total = sum(np.size(score) for score in scores.values())
    return total - _kept(total, threshold, mode)


def apply(params: Params, masks: Masks) -> dict[str, Array]:
    """Return copies of the arrays in which pruned entries are zero."""
    unknown = sorted(set(masks) - set(params))
    if unknown:
        raise MaskError(f"the mask names unknown parameters {unknown}")
    applied: dict[str, Array] = {}
    for name, values in params.items():
        if name in masks and masks[name].shape != np.shape(values):
            raise MaskError(
                f"{name}: expected a mask of shape {np.shape(values)}, "
                f"got {masks[name].shape}"
            )
        applied[name] = np.array(values)
        if name in masks:
            applied[name][~masks[name]] = 0
    return applied


def density(masks: Masks) -> float:
    """Return the share of kept entries, in [0, 1]; 1.0 for an empty mask."""
    total = sum(keep.size for keep in masks.values())
    if total == 0:
        return 1.0
    return sum(int(np.count_nonzero(keep)) for keep in masks.values()) / total


def change(before: Masks, after: Masks) -> float:
    """Return the share of entries in which two masks differ, in [0, 1]."""
    total = sum(keep.size for keep in after.values())
    if total == 0:
        return 0.0
    differing = sum(
        int(np.count_nonzero(keep != before[name])) for name, keep in after.items()
    )
    return differing / total


def check_layers(masks: Masks) -> None:
    """Raise a MaskError if a mask cuts a layer off.

    A layer is a tensor of two or more dimensions; a bias may lose all its entries.
    """
    for name, keep in masks.items():
        if keep.ndim >= 2 and keep.size and not keep.any():
            share = keep.size / sum(other.size for other in masks.values())
            raise MaskError(
                f"the mask prunes all {keep.size} parameters of {name} "
                f"({share:.2%} of the model) and cuts the layer off; "
                "set a floor above 0 or lower the threshold"
            )


def check_floor(
    sizes: Sequence[int], *, threshold: float, mode: Mode, floors: Sequence[float]
) -> None:
    """Raise a MaskError if the floor leaves too few entries to prune.

    `sizes` and `floors` are the numbers of entries of the tensors and the least share
    of each that is kept; the rest as in `from_scores`.
    """
    if mode == "value":
        return
    total = sum(sizes)
    kept = _kept(total, threshold, mode)
    least = sum(math.ceil(f * size) for f, size in zip(floors, sizes, strict=True))
    if least > kept:
        raise MaskError(
            f"the floor keeps at least {least} of {total} parameters, tensors that "
            f"are kept whole among them, but only {kept} are to be kept; lower the "
            "floor or prune less"
        )


def _kept(total: int, threshold: float, mode: Mode) -> int:
    if mode == "compression":
        return round(total / threshold)
    return total - round(threshold * total)


def _check(threshold: float, mode: str, floor: float) -> None:
    if mode not in MODES:
        raise SettingsError(f"unknown mode {mode!r}; known: {list(MODES)}")
    if not 0 <= floor <= 1:
        raise SettingsError(f"expected a floor in [0, 1], got {floor}")
    if mode == "quantile" and not 0 <= threshold <= 1:
        raise SettingsError(
            f"quantile: expected the share to prune in [0, 1], got {threshold}"
        )
    if mode == "compression" and not 1 <= threshold < math.inf:
        raise SettingsError(
            f"compression: expected a ratio all/kept >= 1, got {threshold}"
        )
    if mode == "value" and math.isnan(threshold):
        raise SettingsError("value: expected a threshold, got NaN")


def _raise_if_emptied(
    names: Sequence[str], keeps: Sequence[Mask], threshold: float, least: Sequence[int]
) -> None:
    pruned = sum(int(keep.size - np.count_nonzero(keep)) for keep in keeps)
    total = sum(keep.size for keep in keeps)
    for name, keep, minimum in zip(names, keeps, least, strict=True):
        if keep.size and not keep.any() and minimum == 0:
            raise MaskError(
                f"value threshold {threshold} prunes all {keep.size} parameters of "
                f"{name} ({pruned / total:.1%} of the model is below it); lower the "
                "threshold, set a floor above 0, or use mode 'quantile', where the "
                "threshold is the share to prune"
            )


def _keep_highest(
    flats: Sequence[Array], kept: int, least: Sequence[int], held: Sequence[Mask]
) -> list[Mask]:
    """Keep exactly `kept` entries, and at least ``least[i]`` of tensor `i`.

    Those in `held` count as the highest. A tensor that falls below its minimum at the
    common cut keeps its own best entries. The other tensors share the rest by a new
    common cut.
    """
    _raise(flats, held)
    keeps: dict[int, Mask] = {}
    contest = list(range(len(flats)))
    while True:
        remaining = kept - sum(least[index] for index in keeps)
        entries = [flats[index] for index in contest]
        size = sum(flat.size for flat in entries)
        pruned = _lowest(entries, size - remaining)
        short = [
            index
            for index, lost in zip(contest, pruned, strict=True)
            if lost.size - int(np.count_nonzero(lost)) < least[index]
        ]
        if not short:
            for index, lost in zip(contest, pruned, strict=True):
                keeps[index] = np.logical_not(lost, out=lost)
            return [keeps[index] for index in range(len(flats))]
        for index in short:
            flat = flats[index]
            keeps[index] = ~_lowest([flat], flat.size - least[index])[0]
            contest.remove(index)


def _raise(flats: Sequence[Array], held: Sequence[Mask]) -> None:
    """Give the entries in `held` the highest of all scores."""
    for flat, own in zip(flats, held, strict=False):  # `held` may be empty
        np.copyto(flat, np.inf, where=own)


def _keep_lamp(
    flats: Sequence[Array], kept: int, least: Sequence[int], held: Sequence[Mask]
) -> list[Mask]:
    """Keep exactly `kept` entries, as many of each tensor as LAMP does.

    A squared score over the sum of those not smaller rises with the score, so only the
    number of kept entries of each tensor is needed, and a histogram is enough for it.
    """
    histograms = parallel_map(_histogram, flats)
    counts = _lamp_counts(histograms, kept, least)
    if held:
        _raise(flats, held)
        histograms = parallel_map(_histogram, flats)
    tensors = zip(flats, histograms, counts, strict=True)
    return parallel_map(lambda tensor: _highest(*tensor), tensors)


def _histogram(flat: Array) -> NDArray[np.int64]:
    """Count the scores >= 0 by the upper 16 bits of float32: 8 significant ones."""
    counts = np.zeros(1 << 15, np.int64)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK].astype(np.float32)
        block += np.float32(0)  # -0 is 0
        codes = block.view(np.uint32) >> 16
        counts += np.bincount(codes, minlength=1 << 16)[: 1 << 15]
    return counts


def _highest(flat: Array, histogram: NDArray[np.int64], count: int) -> Mask:
    """Mark the `count` highest entries; a bin of the histogram brackets the cut."""
    lost = flat.size - count
    values = flat.astype(np.float32, copy=False)
    below = flat.size - np.cumsum(histogram[::-1])[::-1]  # entries below each bin
    place = int(np.searchsorted(below, lost)) - 1
    if place < 0:  # nothing, or what is below zero
        return np.full(flat.size, True) if lost == 0 else np.asarray(values >= 0)
    inside: Mask = values >= _EDGES[place]
    if place < _INFINITE:
        inside &= values < _EDGES[place + 1]
    positions = np.flatnonzero(inside)
    within, rank = values[positions], lost - int(below[place])
    cut = _partitioned(within.copy(), rank)
    keep = np.greater_equal(values, cut, out=inside)
    ties = positions[within == cut]
    missing = rank - int(np.count_nonzero(within < cut))
    keep[ties[_spread(0, ties.size, missing, ties.size)]] = False
    return keep


#: Bin of infinity in `_histogram`; those above would be NaN.
_INFINITE = 0x7F80
_EDGES = (np.arange(_INFINITE + 1, dtype=np.uint32) << 16).view(np.float32)

#: The least score of each bin of `_histogram`, squared; Inf counts as 1e40.
_SQUARES = np.square(
    np.append(
        _EDGES[:_INFINITE].astype(np.float64), np.full((1 << 15) - _INFINITE, 1e40)
    )
)


def _lamp_counts(
    histograms: Sequence[NDArray[np.int64]], kept: int, least: Sequence[int]
) -> list[int]:
    """Return how many entries each tensor keeps."""
    rows, counts, scores = [], [], []
    for row, histogram in enumerate(histograms):
        bins = np.flatnonzero(histogram)
        own, squares = histogram[bins], _SQUARES[bins]
        tails = np.cumsum((own * squares)[::-1])[::-1]
        rows.append(np.full(bins.size, row))
        counts.append(own)
        scores.append(
            np.divide(squares, tails, out=np.zeros(bins.size), where=tails > 0)
        )
    row_of, count_of = np.concatenate(rows), np.concatenate(counts)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    fixed: dict[int, int] = {}
    while True:
        free = order[~np.isin(row_of[order], list(fixed))]
        left = kept - sum(fixed.values())
        before = np.cumsum(count_of[free]) - count_of[free]
        taken = np.clip(left - before, 0, count_of[free])
        found = np.bincount(row_of[free], weights=taken, minlength=len(histograms))
        short = [
            row
            for row, minimum in enumerate(least)
            if row not in fixed and found[row] < minimum
        ]
        if not short:
            return [fixed.get(row, int(n)) for row, n in enumerate(found)]
        fixed |= {row: least[row] for row in short}


def _lowest(flats: Sequence[Array], count: int) -> list[Mask]:
    """Mark the `count` lowest entries of all arrays together."""
    if count <= 0:
        return [np.zeros(flat.size, np.bool_) for flat in flats]
    values = [flat.astype(np.float32, copy=False) for flat in flats]
    cut = _smallest(values, count)
    marks = parallel_map(lambda flat: flat < cut, values)
    missing = count - sum(int(np.count_nonzero(mark)) for mark in marks)
    ties = parallel_map(lambda flat: np.flatnonzero(flat == cut), values)
    equal = sum(tie.size for tie in ties)
    position = 0
    for mark, tie in zip(marks, ties, strict=True):
        mark[tie[_spread(position, tie.size, missing, equal)]] = True
        position += tie.size
    return marks


def _spread(first: int, size: int, count: int, total: int) -> Mask:
    """Mark places from `first` on, if `count` of `total` are marked evenly."""
    ranks = np.arange(first, first + size + 1, dtype=np.int64)
    marks: Mask = np.diff(ranks * count // max(1, total)) > 0
    return marks


def _smallest(values: Sequence[Float32], rank: int) -> np.float32:
    """Return the `rank`-th smallest entry (from 1), usually without a copy of all.

    An even sample brackets the entry; only the entries in the bracket are partitioned.
    """
    total = sum(flat.size for flat in values)
    stride = max(1, total // _SAMPLE)
    sample = np.sort(np.concatenate([flat[::stride] for flat in values]))
    place, margin = rank * sample.size // total, 8 * math.isqrt(sample.size)
    if stride > 1 and margin <= place < sample.size - margin:
        low, high = sample[place - margin], sample[place + margin]
        below = sum(
            parallel_map(lambda flat: int(np.count_nonzero(flat < low)), values)
        )
        inside = np.concatenate(
            parallel_map(lambda flat: flat[(flat >= low) & (flat <= high)], values)
        )
        if below < rank <= below + inside.size:
            return _partitioned(inside, rank - below)
    return _partitioned(np.concatenate(values), rank)


def _partitioned(values: Float32, rank: int) -> np.float32:
    values.partition(rank - 1)
    return np.float32(values[rank - 1])
