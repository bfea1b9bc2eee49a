"""From guidance to a score per parameter."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from autoflip_flwr.method.outliers import root_mean_square
from autoflip_flwr.method.parallel import parallel_map
from autoflip_flwr.types import Array, Float32, Mask, Params, ScoreName, Scores

#: What a weight's size counts in `size_or_growth`, beside its growth.
STARTING_SHARE = 0.01

#: From how many times ``1 / sqrt(fan)`` on a matrix began large.
LARGE = 2.0

#: Columns of a matrix from which on its rows tell whether gradients moved them, and the
#: relative spread of movement over weight up to which weight decay alone did.
COLUMNS, SPREAD = 8, 0.25

#: Share of rows that nobody moved from which on a matrix is a table of which clients
#: use a part, such as word embeddings.
TABLE = 0.5

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


def size_or_growth(weights: Array, initial: Array) -> Float32:
    """Return how large each weight is or, in a matrix that began large, has grown.

    ``|W|``, float32; in a matrix whose first values are larger than layers have them,
    such as PyTorch's embeddings from N(0, 1),
    ``max(|W| - |W0|, 0) + 0.01 |W|``: by size the largest of these random values would
    stay. The first term is *magnitude increase* in Zhou et al., arXiv:1905.01067.
    """
    size = np.abs(weights, dtype=np.float32)
    if began_large(initial):
        growth = size - np.abs(initial, dtype=np.float32)
        np.maximum(growth, 0, out=growth)
        size *= np.float32(STARTING_SHARE)
        size += growth
    return size


def began_large(initial: Array) -> bool:
    """Tell whether a matrix has a root mean square of more than 2 / sqrt(fan).

    Of fan-in and fan-out the smaller: He's initialization has sqrt(2 / fan) with one of
    them, Glorot's less, PyTorch's layers 0.6 / sqrt(fan-in).
    """
    if initial.ndim < 2 or not initial.size:
        return False
    fan = initial.size / max(initial.shape[:2])
    return root_mean_square([initial]) * math.sqrt(fan) > LARGE


def still_rows(scores: Scores, initial: Params) -> dict[str, Mask]:
    """Mark the rows of matrices that no gradient moved, where there are any.

    They are those of words, or of other entries of a table, that no client has. They
    did not move, or in proportion to their weights, as weight decay moves them. The
    scores are saliencies.
    """

    def one(name: str) -> Mask:
        shape = scores[name].shape
        if math.prod(shape[1:]) < COLUMNS:
            return np.zeros(shape[:1], np.bool_)
        ratio = scores[name] / np.square(weight_size(initial[name]))
        rows = ratio.reshape(len(ratio), -1)
        spread, mean = rows.std(axis=1), rows.mean(axis=1)
        return np.asarray(spread <= SPREAD * mean)

    still = dict(zip(scores, parallel_map(one, scores), strict=True))
    return {name: rows for name, rows in still.items() if rows.any() and not rows.all()}


def without_rows(rows: Mask, scores: Float32, initial: Array) -> Float32:
    """Let saliencies be 0 in some rows of a matrix; return the factor of sizes.

    In a table it is how far each weight moved, with a mean of 1 in the other rows: the
    size of a pretrained weight does not tell how often clients have its word.
    """
    scores[rows] = 0
    if rows.mean() < TABLE:
        return np.float32(~rows).reshape(-1, *[1] * (scores.ndim - 1))
    moved = scores / weight_size(initial)
    return np.asarray(moved / moved[~rows].mean(), np.float32)


#: Name of a score -> function of (guidance, initial weights) of one tensor; that of
#: ``staged`` for the first mask.
SCORES: Mapping[ScoreName, Callable[[Float32, Array], Float32]] = {
    "guidance": guidance_score,
    "saliency": saliency_score,
    "staged": saliency_score,
}
