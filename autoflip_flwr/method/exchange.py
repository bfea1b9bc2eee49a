"""Exchange some of a mask's weights: drop by magnitude, grow by gradient.

As in Federated Dynamic Sparse Training (Bibikar et al., arXiv:2112.09824).
"""

import math

import numpy as np

from autoflip_flwr.types import Float32, Mask

#: Default number of rounds from one exchange to the next.
EVERY = 10


def due(server_round: int, every: int) -> bool:
    """Tell whether this round is the first of another `every` rounds."""
    return server_round > 1 and (server_round - 1) % every == 0


def cosine_share(first: float, server_round: int, *, until: int | None) -> float:
    """Return the share to exchange: a cosine from `first` in round 1 to 0.

    After round `until` it is 0. Without `until` it is always `first`.
    """
    if until is None:
        return first
    if server_round > until:
        return 0.0
    past = (server_round - 1) / max(1, until)
    return first / 2 * (1 + math.cos(math.pi * past))


def adjusted(keep: Mask, size: Float32, gradient: Float32, share: float) -> Mask:
    """Drop the smallest kept weights of a tensor and grow as many others.

    A weight that was dropped may grow again at once.

    Parameters
    ----------
    keep : bool array
        The tensor's mask.
    size, gradient : float32 array
        Magnitudes of weights and gradients, of the same shape.
    share : float
        Share of the kept weights to drop, in [0, 1].
    """
    kept = int(np.count_nonzero(keep))
    count = int(share * kept)
    if count == 0:
        return keep
    stay = top(np.where(keep, size, -np.inf).astype(np.float32), kept - count)
    grown = top(np.where(stay, -np.inf, gradient).astype(np.float32), count)
    return stay | grown


def top(scores: Float32, count: int) -> Mask:
    """Keep the `count` largest entries; among equal entries the first win."""
    keep = np.zeros(scores.size, np.bool_)
    order = np.argsort(-scores.reshape(-1), kind="stable")
    keep[order[:count]] = True
    return keep.reshape(scores.shape)
