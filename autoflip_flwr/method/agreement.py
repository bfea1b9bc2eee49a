"""What clients agree on, mixed into the score.

Ours: the paper's later version names "client agreement" without a definition.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.method import mask as masking
from autoflip_flwr.types import Guidance, Masks, Mode, Scores

#: How much of the earlier evidence a round leaves.
MEMORY = 0.8

_Arrays = dict[str, NDArray[np.float32]]


class Votes:
    """The share of explorers whose own guidance alone would keep a parameter."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.forget()

    def forget(self) -> None:
        """Begin without a vote: somebody has changed theirs, or all have."""
        self._sums = {n: np.zeros(s, np.float32) for n, s in self._shapes.items()}
        self._voted: set[int] = set()

    def of(
        self,
        explorers: Iterable[int],
        guidance: Callable[[int], Guidance],
        *,
        threshold: float,
        mode: Mode,
    ) -> _Arrays:
        """Return the shares, in [0, 1]; who has not voted yet does so now.

        Parameters
        ----------
        explorers : iterable of int
        guidance : callable
            Returns an explorer's dense guidance, which may be written over.
        threshold, mode
            See `mask.from_scores`.
        """
        for node_id in explorers:
            if node_id in self._voted:
                continue
            own = masking.from_scores(
                guidance(node_id), threshold=threshold, mode=mode, overwrite=True
            )
            for name, keep in own.items():
                self._sums[name] += keep
            self._voted.add(node_id)
        count = np.float32(max(1, len(self._voted)))
        return {name: total / count for name, total in self._sums.items()}


class Signs:
    """How far the updates of the rounds so far had one direction.

    ``|sum_k w_k sign(update_k)|`` of a round, as an exponential average over the rounds
    that kept the entry. Where no round has, the mean of all others: no opinion.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._average = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
        self._seen = {n: np.zeros(s, np.bool_) for n, s in shapes.items()}

    def state(self) -> dict[str, Any]:
        """Return the averages, and where they are of anything."""
        return {"average": self._average, "seen": self._seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._average, self._seen = state["average"], state["seen"]

    def learn(self, agreement: NDArray[np.float32], masks: Masks) -> None:
        """Take a round's, flat, of the kept entries in the mask's order."""
        start = 0
        for name, keep in masks.items():
            stop = start + int(np.count_nonzero(keep))
            new, seen = agreement[start:stop], self._seen[name][keep]
            old = self._average[name][keep]
            mixed = np.float32(MEMORY) * old + np.float32(1 - MEMORY) * new
            self._average[name][keep] = np.where(seen, mixed, new)
            self._seen[name][keep] = True
            start = stop

    def of(self) -> _Arrays | None:
        """Return the averages, in [0, 1]; None before the first round."""
        count = sum(int(np.count_nonzero(seen)) for seen in self._seen.values())
        if not count:
            return None
        total = sum(float(a.sum(dtype=np.float64)) for a in self._average.values())
        neutral = np.float32(total / count)
        return {
            name: np.where(self._seen[name], average, neutral)
            for name, average in self._average.items()
        }


def mixed(
    scores: Scores, agreement: Mapping[str, NDArray[np.float32]], *, weight: float
) -> _Arrays:
    """Mix scores with an agreement in [0, 1].

    ``(1 - weight) * s / (s + m) + weight * agreement`` with the scores' mean `m`: the
    first part, too, is in [0, 1) then, whatever the scale and tail of the scores.
    """
    size = sum(score.size for score in scores.values())
    total = sum(float(score.sum(dtype=np.float64)) for score in scores.values())
    middle = np.float32(max(total / max(1, size), 1e-30))
    return {
        name: np.float32(1 - weight) * (score / (score + middle))
        + np.float32(weight) * agreement[name]
        for name, score in scores.items()
    }
