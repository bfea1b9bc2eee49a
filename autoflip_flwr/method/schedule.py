"""What changes from round to round."""


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
