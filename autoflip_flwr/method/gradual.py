"""A density that falls from round to round until it is the final one.

Zhu and Gupta, To Prune, or Not to Prune (arXiv:1710.01878, Eq. 1): early rounds, in
which weights change most, decide over few of them.
"""


def density(server_round: int, *, first: float, final: float, rounds: int) -> float:
    """Return ``final + (first - final) * (1 - (server_round - 1) / rounds)^3``.

    Parameters
    ----------
    server_round : int
        From 1.
    first, final : float
        Densities of round 1 and of all rounds after the first `rounds`, in (0, 1].
        Where `first` is the smaller one, all rounds have `final`.
    rounds : int
        Rounds with a larger density, >= 0.
    """
    if server_round > rounds or first <= final:
        return final
    left = 1 - (server_round - 1) / rounds
    return float(final + (first - final) * left**3)
