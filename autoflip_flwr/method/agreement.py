"""The agreement of clients, mixed into the score.

The definition is ours: the paper's later version names "client agreement" without one.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from autoflip_flwr.method import mask as masking
from autoflip_flwr.types import Float32, Guidance, Masks, Mode, Scores

#: Weight of the earlier rounds in the exponential average.
MEMORY = 0.8


class Votes:
    """The share of explorers whose guidance alone would keep a parameter."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.forget()

    def forget(self) -> None:
        """Drop all votes, because a node's guidance has changed."""
        self._sums = {n: np.zeros(s, np.float32) for n, s in self._shapes.items()}
        self._voted: set[int] = set()

    def of(
        self,
        explorers: Iterable[int],
        guidance: Callable[[int], Guidance],
        *,
        threshold: float,
        mode: Mode,
    ) -> dict[str, Float32]:
        """Add the votes of new explorers and return the shares, in [0, 1].

        `guidance` returns the dense guidance of an explorer, which is overwritten.
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
    """How much the clients' updates agree in sign.

    ``|sum_k w_k sign(update_k)|`` of a round, as an exponential average over the rounds
    that kept the entry. An entry that no round has kept gets the mean of all others.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._average = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
        self._seen = {n: np.zeros(s, np.bool_) for n, s in shapes.items()}

    def state(self) -> dict[str, Any]:
        """Return the averages, and where there is one."""
        return {"average": self._average, "seen": self._seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self._average, self._seen = state["average"], state["seen"]

    def learn(self, agreement: Float32, masks: Masks) -> None:
        """Add a round: the kept entries, flat, in the mask's order."""
        start = 0
        for name, keep in masks.items():
            stop = start + int(np.count_nonzero(keep))
            new, seen = agreement[start:stop], self._seen[name][keep]
            old = self._average[name][keep]
            mixed = np.float32(MEMORY) * old + np.float32(1 - MEMORY) * new
            self._average[name][keep] = np.where(seen, mixed, new)
            self._seen[name][keep] = True
            start = stop

    def of(self) -> dict[str, Float32] | None:
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
    scores: Scores, agreement: Mapping[str, Float32], *, weight: float
) -> dict[str, Float32]:
    """Mix scores with an agreement in [0, 1].

    ``(1 - weight) * s / (s + m) + weight * agreement`` with the scores' mean `m`. The
    first term maps scores of any scale to [0, 1).
    """
    size = sum(score.size for score in scores.values())
    total = sum(float(score.sum(dtype=np.float64)) for score in scores.values())
    middle = np.float32(max(total / max(1, size), 1e-30))
    return {
        name: np.float32(1 - weight) * (score / (score + middle))
        + np.float32(weight) * agreement[name]
        for name, score in scores.items()
    }
