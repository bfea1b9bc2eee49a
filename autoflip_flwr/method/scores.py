"""From guidance to a score per parameter: what is kept first."""

from collections.abc import Callable
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.types import Array, ScoreName

#: Added to |W0|, so that parameters that start at zero (biases) can be kept.
SALIENCY_OFFSET = 1e-4


def guidance_score(
    guidance: NDArray[np.float32], initial: Array
) -> NDArray[np.float32]:
    """Return the guidance itself, the paper's score (arXiv:2405.10271, Eq. 4)."""
    del initial
    return guidance


def saliency_score(
    guidance: NDArray[np.float32], initial: Array
) -> NDArray[np.float32]:
    """First-order saliency: the weight times how far it moved.

    ``sqrt(G) * (|W0| + 1e-4)``, float32, >= 0. `guidance` and `initial` have one
    shape; `guidance` is written over and returned.
    """
    np.sqrt(guidance, out=guidance)
    return np.multiply(guidance, weight_size(initial), out=guidance)


def weight_size(initial: Array) -> NDArray[np.float32]:
    """Return what `saliency_score` takes for the size of a weight, float32, > 0."""
    size = np.abs(initial, dtype=np.float32)
    size += np.float32(SALIENCY_OFFSET)
    return size


#: Name of a score -> function of (guidance, initial weights) of one tensor.
SCORES: MappingProxyType[
    ScoreName, Callable[[NDArray[np.float32], Array], NDArray[np.float32]]
] = MappingProxyType({"guidance": guidance_score, "saliency": saliency_score})
