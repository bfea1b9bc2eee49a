"""Local guidance and guidance: Eq. 2 and Eq. 3 of AutoFLIP (arXiv:2405.10271)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import GuidanceError, SettingsError
from autoflip_flwr.types import (
    Combination,
    Float32,
    FloatArray,
    Guidance,
    Normalization,
    Params,
)

NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)

#: A mean or range below this counts as zero: its inverse would overflow float32.
_LEAST = 1e-30

#: `clipped-mean`: an entry counts as at most so many times its explorer's mean, and the
#: entries on average as at most so much of it. Of an honest explorer's, which are a few
#: large and many small ones, less is left.
CLIP, FLAT = 5.0, 0.5

#: The combinations that are one sum.
SUMS: tuple[Combination, ...] = ("mean", "clipped-mean")

#: Entries per block of a sum: they fit the cache, and threads stay busy.
_BLOCK = 1 << 17

#: (entries, buffer of the same length) -> the buffer, with their scaled values.
Values: TypeAlias = Callable[[slice, NDArray[Any]], NDArray[Any]]


def squared_deviation(initial: Params, final: Params) -> dict[str, Float32]:
    """Compute one explorer's local guidance (Eq. 2): ``G_i,m = (W0_m - W_i,m)^2``.

    Parameters
    ----------
    initial, final : mapping of name -> array
        The weights before and after exploration; same names and shapes.

    Returns
    -------
    dict of name -> float32 array
        In the order of `initial`, finite and >= 0.

    Raises
    ------
    GuidanceError
        If names or shapes differ, or a deviation is not finite in float32.
    """
    _check_names(initial, final)
    guidance: dict[str, Float32] = {}
    for name, start in initial.items():
        end = np.asarray(final[name])
        _check_shape(name, np.shape(start), end.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            moved = np.asarray(np.subtract(start, end, dtype=np.float32))
            np.square(moved, out=moved)
        if not np.isfinite(moved).all():
            raise GuidanceError(
                f"{name}: expected finite weights after exploration, got NaN, Inf or a "
                "square that overflows float32; the exploration has diverged (lower "
                "the learning rate)"
            )
        guidance[name] = moved
    return guidance


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean and extremes of one explorer's matrix, for normalization."""

    mean: float  # over all parameters
    low: dict[str, float]  # least value of each tensor
    high: dict[str, float]  # largest value of each tensor


def statistics(matrix: Iterable[tuple[str, FloatArray]]) -> Statistics:
    """Compute mean and extremes of one local matrix, reading one tensor at a time.

    A tensor without entries has the extremes 0.
    """
    total, count = 0.0, 0
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for name, values in matrix:
        total += float(values.sum(dtype=np.float64))
        count += values.size
        low[name] = float(values.min()) if values.size else 0.0
        high[name] = float(values.max()) if values.size else 0.0
    if count == 0:
        raise GuidanceError("expected guidance for at least one parameter, got none")
    return Statistics(mean=total / count, low=low, high=high)


@dataclass(frozen=True, slots=True)
class Rescaling:
    """An affine map, ``sum_k scale_k * G_k + offset``, that normalizes and averages.

    Each ``scale_k * G_k`` counts as at most `most_k`.
    """

    scales: Sequence[float]
    offset: float
    most: Sequence[float] | None = None  # None: no limit


def rescaling(
    explorers: Sequence[Statistics], name: str, *, normalization: Normalization
) -> Rescaling:
    """Return the map that normalizes and averages one tensor of the explorers.

    All three normalizations are affine in the matrices. So a round's guidance is one
    weighted sum per tensor and needs memory for one dense matrix only.

    Where all values are equal, in a tensor (layer) or in all matrices (global), and
    where a matrix is all zeros (client), the result is one, not 0/0.
    """
    count = len(explorers)
    _check_count(count)
    if normalization == "client":
        means = [explorer.mean for explorer in explorers]
        silent = sum(mean <= _LEAST for mean in means)
        return Rescaling(
            [1.0 / (count * mean) if mean > _LEAST else 0.0 for mean in means],
            silent / count,
        )
    if normalization == "layer":
        low = min(explorer.low[name] for explorer in explorers)
        high = max(explorer.high[name] for explorer in explorers)
    elif normalization == "global":
        low = min(min(explorer.low.values()) for explorer in explorers)
        high = max(max(explorer.high.values()) for explorer in explorers)
    else:
        raise SettingsError(
            f"unknown normalization {normalization!r}; known: {list(NORMALIZATIONS)}"
        )
    if high - low <= _LEAST:
        return Rescaling([0.0] * count, 1.0)
    return Rescaling([1.0 / (count * (high - low))] * count, -low / (high - low))


class LocalMatrix(Protocol):
    """One explorer's local guidance."""

    def scaled(self, name: str, factor: float, *, most: float = math.inf) -> Values:
        """Return a reader of one tensor's flat values times `factor`, clipped."""


def add_normalized(
    total: NDArray[Any],
    name: str,
    matrices: Sequence[LocalMatrix],
    rescale: Rescaling,
    *,
    weight: float = 1.0,
) -> None:
    """Add ``weight * (sum_k scale_k * G_k + offset)``, the sum of Eq. 3, to `total`.

    `total` are the flat values of the tensor `name`; the sum has their dtype.
    """
    limits = rescale.most or [math.inf] * len(matrices)
    readers = [
        matrix.scaled(name, scale * weight, most=most * weight)
        for scale, most, matrix in zip(rescale.scales, limits, matrices, strict=True)
    ]
    buffer = np.empty(min(_BLOCK, total.size), total.dtype)
    for start in range(0, total.size, _BLOCK):
        block = total[start : start + _BLOCK]
        block += total.dtype.type(rescale.offset * weight)
        for values in readers:
            block += values(slice(start, start + block.size), buffer[: block.size])


def clipped_weight(matrix: LocalMatrix, sizes: Mapping[str, int], mean: float) -> float:
    """Return what an explorer's clipped entries count for: 1, or less if they are flat.

    With all its weight spread over a fifth of the entries, none would be clipped, and
    such an explorer would outweigh the others. `sizes` are the numbers of entries of
    the tensors, `mean` is that of the whole matrix.
    """
    if mean <= _LEAST:
        return 1.0
    alone = Rescaling([1.0 / mean], 0.0, [CLIP])
    total = 0.0
    for name, size in sizes.items():
        values = np.zeros(size, np.float32)
        add_normalized(values, name, [matrix], alone)
        total += float(values.sum(dtype=np.float64))
    share = total / max(1, sum(sizes.values()))
    return min(1.0, FLAT / share) if share else 1.0


def clipped(rescale: Rescaling, weights: Sequence[float]) -> Rescaling:
    """Return the map of `clipped-mean` from that of the mean and `clipped_weight`s."""
    most = CLIP / len(weights)
    return Rescaling(
        [scale * weight for scale, weight in zip(rescale.scales, weights, strict=True)],
        rescale.offset,
        [most * weight for weight in weights],
    )


def middle(
    stack: FloatArray, *, combination: Combination, trim: float = 0.2
) -> Float32:
    """Combine explorers' values per entry so that a few explorers have little effect.

    Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
    (arXiv:1803.01498, Definitions 1 and 2). `stack` has one row per explorer,
    normalized; a trimmed mean leaves out the share `trim` of the rows at each end.
    """
    if combination == "median":
        return np.asarray(np.median(stack, axis=0), np.float32)
    cut = int(trim * len(stack)) if combination == "trimmed-mean" else 0
    if cut:
        kept = [cut, len(stack) - cut - 1]
        stack = np.partition(stack, kept, axis=0)[cut : len(stack) - cut]
    return np.asarray(stack.mean(axis=0, dtype=np.float64), np.float32)


def combine(
    matrices: Iterable[Guidance],
    *,
    normalization: Normalization = "client",
    combination: Combination = "mean",
    trim: float = 0.2,
) -> dict[str, Float32]:
    """Compute the guidance of a round (Eq. 3): the mean of normalized local matrices.

    Parameters
    ----------
    matrices : iterable of mapping of name -> array
        Local guidance, one per explorer; same names and shapes.
    normalization : {"client", "global", "layer"}
        ``global`` is Eq. 3 as written: ``mean_k (G_k - min) / (max - min)`` with min
        and max over all matrices and all parameters. ``layer`` takes them per
        tensor. ``client`` divides each matrix by its own mean, so that all clients
        have the same weight.
    combination : {"mean", "clipped-mean", "median", "trimmed-mean"}
        The paper uses the mean. The others (see `middle`) need ``client``. In
        ``clipped-mean`` no entry counts as more than `CLIP` times its explorer's
        mean, so all of an explorer's weight on a few entries is worth little.
    trim : float
        In [0, 0.5), for ``trimmed-mean``.

    Returns
    -------
    dict of name -> float32 array
        >= 0; in [0, 1] for ``global`` and ``layer``.

    Notes
    -----
    For matrices in memory, in notebooks and as the tests' oracle. A run's explorers are
    on disk: `AutoFlipPruner` sums their codes, with `rescaling` and `add_normalized`.
    """
    if combination != "mean" and normalization != "client":
        raise SettingsError(
            f"{combination} needs the normalization client: with {normalization} one "
            "explorer can set the scale of all"
        )
    explorers = list(matrices)
    _check_count(len(explorers))
    first = explorers[0]
    for matrix in explorers[1:]:
        _check_names(first, matrix)
        for name, values in first.items():
            _check_shape(name, values.shape, matrix[name].shape)
    every = [statistics(matrix.items()) for matrix in explorers]

    def rows(name: str) -> NDArray[np.float64]:
        """Return the normalized values of a tensor, one row per explorer."""
        rows = []
        for one, matrix in zip(every, explorers, strict=True):
            of = [one] if normalization == "client" else every
            scale = rescaling(of, name, normalization=normalization)
            flat = np.asarray(matrix[name], np.float64).reshape(-1)
            rows.append(sum(scale.scales) * flat + scale.offset)
        clipped = combination == "clipped-mean"
        return np.minimum(rows, CLIP if clipped else math.inf)

    weights = np.ones((len(explorers), 1))
    if combination == "clipped-mean":
        shares = np.concatenate([rows(name) for name in first], axis=1).mean(axis=1)
        silent = np.array([one.mean <= _LEAST for one in every])
        weights[:, 0] = np.where(silent, 1, FLAT / np.maximum(shares, FLAT))
    combined: dict[str, Float32] = {}
    for name, values in first.items():
        made = middle(weights * rows(name), combination=combination, trim=trim)
        # Rounding can make the least value slightly negative.
        combined[name] = np.maximum(made, 0).reshape(values.shape)
    return combined


def _check_count(explorers: int) -> None:
    if explorers == 0:
        raise GuidanceError(
            "expected local guidance of at least one explorer, got none"
        )


def _check_names(expected: Params, got: Params) -> None:
    if set(got) != set(expected):
        raise GuidanceError(
            f"expected the parameters {sorted(expected)}, got {sorted(got)}"
        )


def _check_shape(name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    if got != expected:
        raise GuidanceError(f"{name}: expected shape {expected}, got {got}")
