"""Exchange some of a mask's weights: drop by magnitude, grow by gradient.

As in Federated Dynamic Sparse Training (Bibikar et al., arXiv:2112.09824).
"""

import math

import numpy as np
from numpy.typing import NDArray

#: Rounds from one exchange to the next where nobody says.
EVERY = 10


def due(server_round: int, every: int) -> bool:
    """Tell whether weights are exchanged before this round."""
    return server_round > 1 and (server_round - 1) % every == 0


def cosine_share(first: float, server_round: int, *, until: int | None) -> float:
    """Return the share to exchange: from `first` in round 1 as a cosine to 0.

    None: always `first`. After round `until` it is 0.
    """
    if until is None:
        return first
    if server_round > until:
        return 0.0
    past = (server_round - 1) / max(1, until)
    return first / 2 * (1 + math.cos(math.pi * past))


def adjusted(
    keep: NDArray[np.bool_],
    size: NDArray[np.float32],
    gradient: NDArray[np.float32],
    share: float,
    *,
    free: NDArray[np.bool_] | None = None,
    back: bool = False,
) -> NDArray[np.bool_]:
    """Drop the smallest kept weights of a tensor, grow as many others.

    Parameters
    ----------
    keep : bool array
        The tensor's mask.
    size, gradient : float32 array
        Magnitudes of weights and gradients, of the same shape.
    share : float
        Of the kept weights, in [0, 1].
    free : bool array, optional
        What may grow; all by default.
    back : bool
        What is dropped may grow at once, too.
    """
    closed = keep if free is None else keep | ~free
    kept = int(np.count_nonzero(keep))
    count = int(share * kept)
    if not back:
        count = min(count, closed.size - int(np.count_nonzero(closed)))
    if count == 0:
        return keep
    stay = top(np.where(keep, size, -np.inf).astype(np.float32), kept - count)
    if back:
        closed = closed & (stay | ~keep)
    grown = top(np.where(closed, -np.inf, gradient).astype(np.float32), count)
    return stay | grown


def top(scores: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """Keep the `count` largest entries; of equal ones the first."""
    keep = np.zeros(scores.size, np.bool_)
    order = np.argsort(-scores.reshape(-1), kind="stable")
    keep[order[:count]] = True
    return keep.reshape(scores.shape)
