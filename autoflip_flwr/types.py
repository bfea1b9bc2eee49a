"""The shapes of the data that moves between the layers."""

from collections.abc import Mapping
from typing import Any, TypeAlias

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
