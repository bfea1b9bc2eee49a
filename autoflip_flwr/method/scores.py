"""From guidance to a score per parameter."""

from collections.abc import Callable, Mapping

import numpy as np

from autoflip_flwr.types import Array, Float32, ScoreName

#: Added to |W0|, so that parameters with the initial value 0 (biases) can be kept.
SALIENCY_OFFSET = 1e-4


def guidance_score(guidance: Float32, _: Array) -> Float32:
    """Return the guidance itself, the paper's score (arXiv:2405.10271, Eq. 4)."""
    return guidance


def saliency_score(guidance: Float32, initial: Array) -> Float32:
    """Return the first-order saliency: the weight times the distance it moved.

    ``sqrt(G) * (|W0| + 1e-4)``, float32, >= 0. `guidance` and `initial` have the same
    shape; `guidance` is overwritten and returned.
    """
    np.sqrt(guidance, out=guidance)
    return np.multiply(guidance, weight_size(initial), out=guidance)


def weight_size(initial: Array) -> Float32:
    """Return ``|W0| + 1e-4``, the size of a weight in `saliency_score`, float32."""
    size = np.abs(initial, dtype=np.float32)
    size += np.float32(SALIENCY_OFFSET)
    return size


#: Name of a score -> function of (guidance, initial weights) of one tensor; that of
#: ``staged`` for the first mask.
SCORES: Mapping[ScoreName, Callable[[Float32, Array], Float32]] = {
    "guidance": guidance_score,
    "saliency": saliency_score,
    "staged": saliency_score,
}
