"""Which of several clients is far from the others, and by what."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from autoflip_flwr.types import Params

#: Fewer values have no middle to be far from.
FEW = 3


def far_off(
    what: str,
    sizes: Mapping[int, float],
    *,
    limit: float | None,
    others: Sequence[float] = (),
) -> dict[int, str]:
    """Return the reasons against sizes that are far above the median.

    Parameters
    ----------
    what : str
        What a size says of a client: ``moved``.
    sizes : mapping of key -> float
    limit : float or None
        Times the median that is still usual, >= 1; None: all is.
    others : sequence of float
        Earlier sizes that count in the median.
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
    """Return the L2 norms of a client's update, by group of arrays.

    Parameters
    ----------
    arrays, before : mapping of name -> floating array
        What came back, and what it began with.
    group_of : callable
        Name -> group.
    names : iterable of str
        The arrays that count.
    """
    squares: dict[str, float] = {}
    for name in names:
        with np.errstate(over="ignore"):  # infinitely far is far
            update = np.subtract(
                arrays[name], before[name], dtype=np.float32, casting="same_kind"
            ).reshape(-1)
            square = float(np.dot(update, update))
        group = group_of(name)
        squares[group] = squares.get(group, 0.0) + square
    return {group: math.sqrt(square) for group, square in squares.items()}
