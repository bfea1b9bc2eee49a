"""Differential privacy for local guidance: clip it and add noise on the client."""

import math
import secrets
from dataclasses import dataclass

import numpy as np

from autoflip_flwr.errors import SettingsError
from autoflip_flwr.types import Float32, Guidance


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidancePrivacy:
    """The Gaussian mechanism on the client: the server sees only noisy guidance.

    A client's whole guidance is scaled down to the L2 norm `clip` at most.

    Parameters
    ----------
    clip : float
        Largest L2 norm of a client's squared movements (Eq. 2), over 0.
    noise : float
        Standard deviation of the noise on each entry, as a multiple of `clip`, over 0.

    Raises
    ------
    SettingsError
        If one is not a positive number.
    """

    clip: float
    noise: float

    def __post_init__(self) -> None:
        for name in ("clip", "noise"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise SettingsError(f"privacy: expected {name} > 0, got {value}")

    def protect(
        self, guidance: Guidance, rng: np.random.Generator | None = None
    ) -> dict[str, Float32]:
        """Return guidance that may leave the client; its negative entries become zero.

        By default the seed of `rng` is secret: a server that knows it can subtract the
        noise.
        """
        rng = rng or np.random.default_rng(secrets.randbits(128))
        squares = sum(
            float(np.square(value, dtype=np.float64).sum())
            for value in guidance.values()
        )
        scale = min(1.0, self.clip / math.sqrt(squares)) if squares > 0 else 1.0
        deviation = self.noise * self.clip
        return {
            name: np.maximum(
                scale * value + rng.normal(0, deviation, np.shape(value)), 0
            ).astype(np.float32)
            for name, value in guidance.items()
        }

    def epsilon(
        self, delta: float, *, releases: int = 1, replace: bool = True
    ) -> float:
        """Return the epsilon of the mechanism for a `delta` in (0, 1).

        Exact for the Gaussian mechanism: Balle and Wang, Improving the Gaussian
        Mechanism for Differential Privacy (arXiv:1805.06530, Theorem 8).

        `releases` are the explorations of the client. With `replace` a neighbouring
        data set replaces the client's data: the guidance is not negative, so it changes
        by at most sqrt(2) times `clip`. Otherwise the neighbour leaves the client out,
        a change of at most `clip`.
        """
        if not 0 < delta < 1:
            raise SettingsError(f"privacy: expected delta in (0, 1), got {delta}")
        distance = math.sqrt(2 * releases) if replace else math.sqrt(releases)
        ratio = distance / self.noise
        if _delta(0.0, ratio) <= delta:
            return 0.0
        low, high = 0.0, 1.0
        while _delta(high, ratio) > delta:
            low, high = high, 2 * high
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if _delta(middle, ratio) > delta else (low, middle)
            )
        return high


def _delta(epsilon: float, ratio: float) -> float:
    """Return the least delta, with `ratio` = sensitivity / deviation."""
    first = _normal(ratio / 2 - epsilon / ratio)
    tail = _normal(-ratio / 2 - epsilon / ratio)
    return first - (math.exp(epsilon + math.log(tail)) if tail > 0 else 0.0)


def _normal(value: float) -> float:
    """Return the distribution function of the standard normal distribution."""
    return math.erfc(-value / math.sqrt(2)) / 2
