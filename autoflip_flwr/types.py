"""The shapes of the data that moves between the layers."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
FloatArray: TypeAlias = NDArray[np.floating[Any]]

#: Parameter name -> values, in the model's own order.
Params: TypeAlias = Mapping[str, Array]

#: Parameter name -> squared deviation from the start, float, >= 0 (Eq. 2).
Guidance: TypeAlias = Mapping[str, FloatArray]

#: Parameter name -> importance, float; a larger score is kept first.
Scores: TypeAlias = Mapping[str, FloatArray]

#: Parameter name -> bool, same shape as the parameter; True = keep.
Masks: TypeAlias = Mapping[str, NDArray[np.bool_]]

#: Type of the kept values on the wire.
ValueType: TypeAlias = Literal["float32", "float16"]

#: How local matrices are made comparable (Eq. 3).
Normalization: TypeAlias = Literal["client", "global", "layer"]

#: How explorers' matrices become one: their mean, or what a few cannot move.
Combination: TypeAlias = Literal["mean", "median", "trimmed-mean"]

#: What makes a parameter worth keeping.
ScoreName: TypeAlias = Literal["guidance", "saliency"]

#: What the pruning threshold means (Eq. 4).
Mode: TypeAlias = Literal["quantile", "value", "compression"]

#: What makes the masks: the method, or one of its rivals.
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
]

#: What a node measures of each parameter: how far training moves it (squared); the
#: same and whether upwards; or from the gradients of one epoch at fixed weights:
#: |weight x mean gradient|, |mean gradient|, mean squared gradient.
Measure: TypeAlias = Literal[
    "deviation", "update", "saliency", "gradient", "squared-gradient"
]
