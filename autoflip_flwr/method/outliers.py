"""Find clients that are far from the others."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from autoflip_flwr.types import Params

#: With fewer values the median is not used.
FEW = 3


def far_off(
    what: str,
    sizes: Mapping[int, float],
    *,
    limit: float | None,
    others: Sequence[float] = (),
) -> dict[int, str]:
    """Return an error text for each size that is far above the median.

    Parameters
    ----------
    what : str
        The verb for a size in the text: ``moved``.
    sizes : mapping of key -> float
    limit : float or None
        Largest accepted multiple of the median, >= 1; None: accept all.
    others : sequence of float
        Earlier sizes, which count in the median.
    """
    every = [*sizes.values(), *others]
    if limit is None or len(every) < FEW:
        return {}
    usual = statistics.median(every)
    return {
        key: f"expected at most {limit:g} times the median: it {what} {size:.3g}, the "
        f"median is {usual:.3g}"
        for key, size in sizes.items()
        if usual > 0 and size > limit * usual
    }


def update_sizes(
    arrays: Params, before: Params, group_of: Callable[[str], str], names: Iterable[str]
) -> dict[str, float]:
    """Return the L2 norm of a client's update for each group of the arrays `names`.

    `arrays` and `before` are floating, from after and before training.
    """
    squares: dict[str, float] = {}
    for name in names:
        with np.errstate(over="ignore"):  # an infinite norm is far off
            update = np.subtract(
                arrays[name], before[name], dtype=np.float32, casting="same_kind"
            ).reshape(-1)
            square = float(np.dot(update, update))
        group = group_of(name)
        squares[group] = squares.get(group, 0.0) + square
    return {group: math.sqrt(square) for group, square in squares.items()}
