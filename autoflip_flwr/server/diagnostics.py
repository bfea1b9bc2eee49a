"""What a round shows: how far clients differ, and whether the guidance stays true."""

import math

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.types import ValueType


class Diagnostics:
    """Of the current round.

    Attributes
    ----------
    mask_change : float
        Share of the mask's entries that the round changed.
    update_variance : float or None
        Mean over the kept parameters of the variance of the clients' updates.
    guidance_cosine : float or None
        Cosine between the guidance and the clients' mean squared updates, over the
        kept parameters: whether the one-time map stays true.
    """

    def __init__(self, *, signs: bool) -> None:
        self.mask_change = 0.0
        self.update_variance: float | None = None
        self.guidance_cosine: float | None = None
        self._signs = signs
        self._spread: _Spread | None = None

    def begin(self) -> None:
        """Forget the round before."""
        self.update_variance = self.guidance_cosine = self._spread = None

    def observe(
        self, sent: bytes, received: bytes, values: ValueType, examples: float
    ) -> None:
        """Note one client's update, from the frames that went out and came back."""
        if self._spread is None:
            self._spread = _Spread(sent, values, signs=self._signs)
        self._spread.add(received, examples)

    def finish(
        self, kept_guidance: NDArray[np.float32] | None
    ) -> NDArray[np.float32] | None:
        """Sum up the round's updates; return what the clients agreed on, if asked for.

        ``|sum_k w_k sign(update_k)|`` of the kept entries, flat, in [0, 1].
        """
        if self._spread is None:
            return None
        self.update_variance = self._spread.variance()
        self.guidance_cosine = _cosine(kept_guidance, self._spread.squares)
        return self._spread.agreement()


class _Spread:
    """The clients' updates of a round, summed as they come: flat, kept entries alone.

    Attributes
    ----------
    squares : float32 array
        Sum of the squared updates.
    """

    def __init__(self, sent: bytes, values: ValueType, *, signs: bool) -> None:
        self._type = np.dtype(values).newbyteorder("<")
        self._start = np.frombuffer(sent, self._type).astype(np.float32)
        self._sum: NDArray[np.float32] = np.zeros_like(self._start)
        self.squares: NDArray[np.float32] = np.zeros_like(self._start)
        self._signs = np.zeros_like(self._start) if signs else None
        self._weight = 0.0
        self._count = 0

    def add(self, received: bytes, examples: float) -> None:
        update = np.frombuffer(received, self._type).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # huge values of one of two
            update -= self._start
            self._sum += update
            if self._signs is not None:
                self._signs += np.float32(examples) * np.sign(update)
                self._weight += examples
            np.square(update, out=update)
            self.squares += update
        self._count += 1

    def variance(self) -> float | None:
        size = self._sum.size
        if size == 0:
            return 0.0
        if not np.isfinite(self.squares).all():
            return None
        of_mean = float(np.dot(self._sum, self._sum)) / self._count
        total = float(self.squares.sum(dtype=np.float64))
        return max(0.0, (total - of_mean) / (self._count * size))

    def agreement(self) -> NDArray[np.float32] | None:
        """Return |sum of the signs| over the clients, weighted, in [0, 1]."""
        if self._signs is None or not self._weight:
            return None
        self._signs /= np.float32(self._weight)
        return np.abs(self._signs)


def _cosine(
    one: NDArray[np.float32] | None, other: NDArray[np.float32]
) -> float | None:
    if one is None or one.size == 0:
        return None
    size = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.dot(one, other)) / size if 0 < size < math.inf else None
