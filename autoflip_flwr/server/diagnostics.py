"""What a round shows: how far clients differ, and whether the guidance stays valid."""

import math

import numpy as np
from numpy.typing import NDArray

#: Examples that one client counts for at most: their sum stays finite in float32.
_MOST = 1e30


class Diagnostics:
    """Diagnostics of the current round."""

    def __init__(self, *, signs: bool) -> None:
        self.mask_change = 0.0  # share of the mask's entries that the round changed
        self._with_signs = signs
        self.begin()

    def begin(self) -> None:
        """Forget the updates of the previous round."""
        # Variance of the clients' updates, averaged over the kept parameters.
        self.update_variance: float | None = None
        # Cosine between the guidance and the clients' mean squared updates, over the
        # kept parameters. A low one says that the guidance no longer fits.
        self.guidance_cosine: float | None = None
        self._count, self._weight = 0, 0.0

    def observe(self, update: NDArray[np.float32], examples: float) -> None:
        """Add one client's update of the kept values, flat; it is overwritten."""
        if not self._count:
            self._sum, self._squares, self._signs = (
                np.zeros_like(update) for _ in range(3)
            )
        with np.errstate(over="ignore", invalid="ignore"):  # a client may send anything
            self._sum += update
            if self._with_signs:
                examples = min(examples, _MOST)
                self._signs += np.float32(examples) * np.sign(update)
                self._weight += examples
            np.square(update, out=update)
            self._squares += update
        self._count += 1

    def finish(
        self, kept_guidance: NDArray[np.float32] | None
    ) -> NDArray[np.float32] | None:
        """Compute the diagnostics; return the agreement of the clients if wanted.

        Returns
        -------
        float32 array or None
            ``|sum_k w_k sign(update_k)|`` of the kept entries, flat, in [0, 1].
        """
        if not self._count:
            return None
        self.update_variance = self._variance()
        self.guidance_cosine = _cosine(kept_guidance, self._squares)
        return np.abs(self._signs / np.float32(self._weight)) if self._weight else None

    def _variance(self) -> float | None:
        size = self._sum.size
        if size == 0:
            return 0.0
        if not np.isfinite(self._squares).all():
            return None
        of_mean = float(np.dot(self._sum, self._sum)) / self._count
        total = float(self._squares.sum(dtype=np.float64))
        return max(0.0, (total - of_mean) / (self._count * size))


def _cosine(
    one: NDArray[np.float32] | None, other: NDArray[np.float32]
) -> float | None:
    if one is None or one.size == 0:
        return None
    size = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.dot(one, other)) / size if 0 < size < math.inf else None
