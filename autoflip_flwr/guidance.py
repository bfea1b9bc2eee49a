"""What the exploration found: Eq. 2 and Eq. 3 of AutoFLIP (arXiv:2405.10271)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import GuidanceError, SettingsError
from autoflip_flwr.types import Combination, Guidance, Normalization, Params

NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)

#: A mean or spread this small is none: its inverse would not be a float32.
_LEAST = 1e-30


def squared_deviation(initial: Params, final: Params) -> dict[str, NDArray[np.float32]]:
    """Local guidance of one explorer (Eq. 2): ``G_i,m = (W0_m - W_i,m)^2``.

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
    if set(initial) != set(final):
        raise GuidanceError(
            f"expected the parameters {sorted(initial)}, got {sorted(final)}"
        )
    guidance: dict[str, NDArray[np.float32]] = {}
    for name, start in initial.items():
        end = np.asarray(final[name])
        if np.shape(start) != end.shape:
            raise GuidanceError(
                f"{name}: expected shape {np.shape(start)}, got {end.shape}"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            moved = np.asarray(np.subtract(start, end, dtype=np.float32))
            np.square(moved, out=moved)
        if not np.isfinite(moved).all():
            raise GuidanceError(
                f"{name}: expected finite weights after exploration, got NaN, Inf or a "
                "deviation whose square overflows float32; the exploration has "
                "diverged (lower the learning rate)"
            )
        guidance[name] = moved
    return guidance


@dataclass(frozen=True, slots=True)
class Statistics:
    """What normalization needs to know of one explorer's matrix.

    Attributes
    ----------
    mean : float
        Mean over all parameters.
    low, high : mapping of name -> float
        Least and largest value of each tensor.
    """

    mean: float
    low: dict[str, float]
    high: dict[str, float]


def statistics(matrix: Guidance) -> Statistics:
    """Return mean and extremes of one local matrix."""
    count = sum(values.size for values in matrix.values())
    if count == 0:
        raise GuidanceError("expected guidance for at least one parameter, got none")
    total = sum(float(values.sum(dtype=np.float64)) for values in matrix.values())
    return Statistics(
        mean=total / count,
        low={n: float(v.min()) if v.size else 0.0 for n, v in matrix.items()},
        high={n: float(v.max()) if v.size else 0.0 for n, v in matrix.items()},
    )


@dataclass(frozen=True, slots=True)
class Rescaling:
    """Normalization as one affine map: ``sum_k scale_k * G_k + offset``."""

    scales: Sequence[float]
    offset: float


def rescaling(
    explorers: Sequence[Statistics], name: str, *, normalization: Normalization
) -> Rescaling:
    """How the tensor `name` of the explorers' matrices is normalized and averaged.

    All three normalizations are affine in the matrices, so a round's guidance is
    one weighted sum per tensor and never holds more than one dense matrix.

    A matrix (client), a tensor (layer) or all matrices (global) without any
    spread state no preference: they map to ones, not to 0/0.
    """
    count = len(explorers)
    if count == 0:
        raise GuidanceError(
            "expected local guidance of at least one explorer, got none"
        )
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


def middle(
    stack: NDArray[np.float32], *, combination: Combination, trim: float = 0.2
) -> NDArray[np.float32]:
    """Combine explorers' values entry by entry so that few of them cannot move it far.

    Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
    (arXiv:1803.01498, Definitions 1 and 2).

    Parameters
    ----------
    stack : float32 array
        One row per explorer, normalized.
    combination : {"mean", "median", "trimmed-mean"}
    trim : float
        In [0, 0.5): share of the rows that is left out at either end.
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
) -> dict[str, NDArray[np.float32]]:
    """Guidance of a round (Eq. 3): the mean of the normalized local matrices.

    Parameters
    ----------
    matrices : iterable of mapping of name -> array
        Local guidance, one per explorer; same names and shapes.
    normalization : {"client", "global", "layer"}
        ``global`` is Eq. 3 as written: ``mean_k (G_k - min) / (max - min)`` with min
        and max over all matrices and all parameters. ``layer`` takes them per
        tensor. ``client`` divides each matrix by its own mean, so that no client
        outweighs another.
    combination : {"mean", "median", "trimmed-mean"}
        The paper's is the mean. The others, see `middle`, need ``client``.
    trim : float
        In [0, 0.5), for ``trimmed-mean``.

    Returns
    -------
    dict of name -> float32 array
        >= 0; in [0, 1] for ``global`` and ``layer``.
    """
    if combination != "mean" and normalization != "client":
        raise SettingsError(
            f"{combination} needs the normalization client: with {normalization} one "
            "explorer sets the scale of all"
        )
    explorers = list(matrices)
    found = [statistics(matrix) for matrix in explorers]
    first = explorers[0] if explorers else {}
    for matrix in explorers[1:]:
        if set(matrix) != set(first):
            raise GuidanceError(
                f"expected the parameters {sorted(first)}, got {sorted(matrix)}"
            )
    if not explorers:
        raise GuidanceError(
            "expected local guidance of at least one explorer, got none"
        )
    combined: dict[str, NDArray[np.float32]] = {}
    for name in first:
        for matrix in explorers:
            if matrix[name].shape != first[name].shape:
                raise GuidanceError(
                    f"{name}: expected shape {first[name].shape}, "
                    f"got {matrix[name].shape}"
                )
        if combination != "mean":
            alone = [rescaling([one], name, normalization="client") for one in found]
            rows = [
                r.scales[0] * matrix[name] + r.offset
                for r, matrix in zip(alone, explorers, strict=True)
            ]
            stack = np.asarray(rows, np.float32)
            combined[name] = middle(stack, combination=combination, trim=trim)
            continue
        rescale = rescaling(found, name, normalization=normalization)
        total = np.full(first[name].shape, rescale.offset, np.float64)
        for scale, matrix in zip(rescale.scales, explorers, strict=True):
            total += scale * matrix[name].astype(np.float64)
        # Rounding may leave a least value a hair below zero.
        combined[name] = np.maximum(total, 0.0).astype(np.float32)
    return combined
