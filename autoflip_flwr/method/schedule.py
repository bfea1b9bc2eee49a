"""What changes from round to round: densities, exchanges of weights."""

import math


def density(server_round: int, *, first: float, final: float, rounds: int) -> float:
    """Return ``final + (first - final) * (1 - (server_round - 1) / rounds)^3``.

    Zhu and Gupta, To Prune, or Not to Prune (arXiv:1710.01878, Eq. 1): early rounds, in
    which weights change most, decide over few of them. After the first `rounds`, and
    where `first` is the smaller one, it is `final`.
    """
    if server_round > rounds or first <= final:
        return final
    left = 1 - (server_round - 1) / rounds
    return float(final + (first - final) * left**3)


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
