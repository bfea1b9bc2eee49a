"""Types of the data that the layers exchange."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
FloatArray: TypeAlias = NDArray[np.floating[Any]]
Float32: TypeAlias = NDArray[np.float32]

#: Node ids.
Nodes: TypeAlias = Sequence[int]

#: Parameter name -> values, in the model's own order.
Params: TypeAlias = Mapping[str, Array]

#: Parameter name -> squared deviation from the initial weights, float, >= 0 (Eq. 2).
Guidance: TypeAlias = Mapping[str, FloatArray]

#: Parameter name -> importance, float; the largest scores are kept.
Scores: TypeAlias = Mapping[str, FloatArray]

#: Bool array of a parameter's shape; True = keep.
Mask: TypeAlias = NDArray[np.bool_]

#: Parameter name -> mask.
Masks: TypeAlias = Mapping[str, Mask]

#: Type of the kept values on the wire; integers with a scale for each block of them.
ValueType: TypeAlias = Literal["float32", "float16", "int8", "int4"]

#: How explorers' matrices are normalized (Eq. 3).
Normalization: TypeAlias = Literal["client", "global", "layer"]

#: How explorers' matrices are combined: the mean, that of clipped entries, or a robust
#: estimate, which reads all matrices.
Combination: TypeAlias = Literal["mean", "clipped-mean", "median", "trimmed-mean"]

#: The score by which parameters are kept: the paper's, weight x movement, or that in
#: the first mask and the weight, or its growth, in later ones.
ScoreName: TypeAlias = Literal["guidance", "saliency", "staged"]

#: How layers share what is kept: one cut for all scores, or LAMP's (arXiv:2010.07611).
Balance: TypeAlias = Literal["global", "lamp"]

#: The meaning of the pruning threshold (Eq. 4).
Mode: TypeAlias = Literal["quantile", "value", "compression"]

#: The method that makes the masks: AutoFLIP or a baseline.
MethodName: TypeAlias = Literal[
    "autoflip",
    "random",
    "magnitude",
    "l1",
    "l2",
    "similarity",
    "bn",
    "eflprune",
    "ssfl",
    "prunefl",
    "feddst",
    "fedrts",
    "fedtiny",
]

#: What a node measures per parameter. ``deviation``: the squared change in training.
#: ``update``: the same, with the sign of the change. From the gradients of one epoch at
#: fixed weights: ``saliency`` is |weight x mean gradient|, ``gradient`` is |mean
#: gradient|, ``squared-gradient`` is the mean squared gradient.
Measure: TypeAlias = Literal[
    "deviation", "update", "saliency", "gradient", "squared-gradient"
]
