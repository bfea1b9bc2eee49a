"""A weighted mean of named arrays, as they come."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.types import Params


class WeightedMean:
    """Holds one array per name, whatever the number of summands and their weights."""

    def __init__(self) -> None:
        self.weight = 0.0
        self._mean: dict[str, NDArray[np.float32]] = {}

    def add(self, arrays: Params, weight: float) -> None:
        """Add arrays of always the same names and shapes; `weight` is > 0, finite."""
        self.weight += weight
        share = np.float32(weight / self.weight)
        for name, value in arrays.items():
            if name in self._mean:
                # Step by step towards each summand: no sum that could overflow.
                self._mean[name] += share * (value - self._mean[name])
            else:
                self._mean[name] = np.array(value, np.float32)

    def state(self) -> dict[str, Any]:
        """Return all there is."""
        return {"weight": self.weight, "mean": dict(self._mean)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.weight, self._mean = state["weight"], dict(state["mean"])

    def take(self) -> dict[str, NDArray[np.float32]]:
        """Return the mean, empty of nothing, and begin anew."""
        mean, self._mean, self.weight = self._mean, {}, 0.0
        return mean
