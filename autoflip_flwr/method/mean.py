"""A running weighted mean of named arrays."""

from typing import Any

import numpy as np

from autoflip_flwr.types import Float32, Params


class WeightedMean:
    """Holds one array per name, for any number of summands."""

    def __init__(self) -> None:
        self.weight = 0.0
        self._mean: dict[str, Float32] = {}

    def add(self, arrays: Params, weight: float) -> None:
        """Add arrays of the same names and shapes; `weight` is > 0 and finite."""
        self.weight += weight
        share = np.float32(weight / self.weight)
        for name, value in arrays.items():
            if name in self._mean:
                # A step towards the new value cannot overflow, a sum can.
                self._mean[name] += share * (value - self._mean[name])
            else:
                self._mean[name] = np.array(value, np.float32)

    def state(self) -> dict[str, Any]:
        """Return the weight and the mean."""
        return {"weight": self.weight, "mean": dict(self._mean)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.weight, self._mean = state["weight"], dict(state["mean"])

    def take(self) -> dict[str, Float32]:
        """Return the mean, empty without summands, and reset."""
        mean, self._mean, self.weight = self._mean, {}, 0.0
        return mean
