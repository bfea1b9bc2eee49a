"""Find clients that are far from the others."""

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from autoflip_flwr.types import Array, Params

#: With fewer values the median is not used.
FEW = 3


def far_off(
    what: str,
    sizes: Mapping[int, float],
    *,
    limit: float | None,
    others: Sequence[float] = (),
    idle: float = math.inf,
    silent: Collection[int] = (),
) -> dict[int, str]:
    """Return an error text for each size that is more than `limit` times the median.

    Without a limit all are accepted. Earlier sizes, the `others`, count in the median,
    those under the keys `silent` do not; where it is 0, `idle` is the largest accepted
    size. `what` is the verb: ``moved``.
    """
    every = [*(s for key, s in sizes.items() if key not in silent), *others]
    if limit is None or len(every) < FEW:
        return {}
    usual = statistics.median(every)
    most, rule = limit * usual, f"{limit:g} times the median"
    if usual == 0:
        most, rule = idle, f"{idle:.3g}, since most did nothing"
    return {
        key: f"expected at most {rule}: it {what} {size:.3g}, the median is {usual:.3g}"
        for key, size in sizes.items()
        if not size <= most  # NaN, too
    }


def capped(sizes: Sequence[float], cap: float | None) -> list[float]:
    """Return sizes that are at most `cap` times the median of the positive ones."""
    positive = [size for size in sizes if size > 0]
    if cap is None or len(positive) < FEW:
        return list(sizes)
    most = cap * statistics.median(positive)
    return [min(size, most) for size in sizes]


def root_mean_square(arrays: Iterable[Array]) -> float:
    """Return how large entries are; 0 without any."""
    squares, size = 0.0, 0
    for array in arrays:
        # The square of a float16 may be infinite, that of an integer another number.
        values = np.asarray(array, np.result_type(array.dtype, np.float32)).reshape(-1)
        squares += float(np.dot(values, values))
        size += values.size
    return math.sqrt(squares / max(1, size))


def update_sizes(
    arrays: Params, before: Params, group_of: Callable[[str], str], names: Iterable[str]
) -> dict[str, float]:
    """Return the L2 norm of a client's update for each group of the arrays `names`.

    `arrays` and `before` are numbers, from after and before training.
    """
    squares: dict[str, float] = {}
    for name in names:
        kind = np.float32 if before[name].dtype.kind == "f" else np.complex128
        with np.errstate(over="ignore"):  # an infinite norm is far off
            update = np.subtract(
                arrays[name], before[name], dtype=kind, casting="unsafe"
            ).reshape(-1)
            square = float(np.vdot(update, update).real)
        group = group_of(name)
        squares[group] = squares.get(group, 0.0) + square
    return {group: math.sqrt(square) for group, square in squares.items()}
