"""What a dataset is, before it is divided among clients.

Samples are kept as they are stored (mostly ``uint8``) and become normalised
``float32`` only for the rows that somebody asks for, so that a whole training
set is never held as floats, let alone once for each client.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Samples ready for ``torch.from_numpy``.

    Images are float32 (N, C, H, W), in [0, 1] and then normalised per channel with the
    dataset's fixed mean and standard deviation (see `SPECS`). Text is int64 (N, 80),
    indices of letters.
    """

    x: NDArray[Any]
    y: NDArray[np.int64]  # (N,), in 0 .. num_classes - 1

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.y)


@dataclass(frozen=True, slots=True)
class Spec:
    """What is fixed about a dataset, wherever its files come from."""

    name: str
    num_classes: int  # labels are 0 .. num_classes - 1
    input_shape: tuple[int, ...]  # of one sample: (C, H, W) for images, (80,) for text
    mean: tuple[float, ...] = ()  # per channel, of pixels in [0, 1]
    std: tuple[float, ...] = ()  # empty as `mean`: not normalised
    white: int = 255  # the largest pixel of a uint8 image, mapped to 1.0
    source: str = ""  # where its files come from

    @property
    def is_text(self) -> bool:
        """Whether a sample is a row of letters and not an image."""
        return len(self.input_shape) == 1


_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_CIFAR100_MEAN, _CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_LEAF = "LEAF's scripts (https://github.com/TalwalkarLab/leaf)"

#: Every known dataset. The means and deviations are the ones in common use;
#: FEMNIST follows LEAF, where 1.0 is the paper and 0.0 the ink.
SPECS = {
    spec.name: spec
    for spec in (
        Spec("digits", 10, (1, 8, 8), white=16),
        Spec("mnist", 10, (1, 28, 28), (0.1307,), (0.3081,), source=_MNIST),
        Spec("cifar10", 10, (3, 32, 32), _CIFAR10_MEAN, _CIFAR10_STD, source=_CIFAR),
        Spec(
            "cifar100", 100, (3, 32, 32), _CIFAR100_MEAN, _CIFAR100_STD, source=_CIFAR
        ),
        Spec("femnist", 62, (1, 28, 28), (0.9637,), (0.1597,), source=_LEAF),
        Spec("shakespeare", 80, (80,), source=_LEAF),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Split(Samples):
    """Samples as they are stored.

    `x` is (N, *input_shape): uint8 pixels ``0 .. white``, float32 pixels in [0, 1], or
    uint8 indices of letters. `users` says which user (writer, role) each sample belongs
    to, (N,); None where the dataset does not say.
    """

    users: NDArray[np.int64] | None = None

    def take(self, rows: NDArray[np.int64], spec: Spec) -> Samples:
        """Return the samples at `rows`, converted and normalised (a copy)."""
        x = self.x[rows]
        if spec.is_text:
            return Samples(x=x.astype(np.int64), y=self.y[rows])
        x = x.astype(np.float32)  # a copy: changed in place from here on
        if self.x.dtype == np.uint8:
            x /= np.float32(spec.white)
        if spec.mean:
            x -= np.asarray(spec.mean, dtype=np.float32)[:, np.newaxis, np.newaxis]
            x /= np.asarray(spec.std, dtype=np.float32)[:, np.newaxis, np.newaxis]
        return Samples(x=x, y=self.y[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A whole dataset; nothing of `test` is ever handed to a client."""

    spec: Spec
    train: Split
    test: Split


def checked_split(
    x: NDArray[Any],
    y: NDArray[Any],
    *,
    spec: Spec,
    where: str,
    users: NDArray[np.int64] | None = None,
) -> Split:
    """Return a `Split` of what was read, or raise a `DataError` that names `where`.

    There must be samples, as many `x` as `y`, and shapes, types, pixels and labels
    must be what `spec` says.
    """
    if y.ndim != 1 or y.dtype.kind not in "iu":
        got = f"{y.dtype} of shape {y.shape}"
        raise DataError(f"{where}: expected one integer label per sample, got {got}")
    if len(x) != len(y):
        got = f"{len(x)} and {len(y)}"
        raise DataError(f"{where}: expected as many samples as labels, got {got}")
    if len(y) == 0:
        raise DataError(f"{where}: expected samples, got none")
    if x.shape[1:] != spec.input_shape:
        expected = f"a sample of {spec.name} has shape {spec.input_shape}"
        raise DataError(f"{where}: {expected}, got {x.shape[1:]}")
    if y.min() < 0 or y.max() >= spec.num_classes:
        expected = f"labels of {spec.name} are 0..{spec.num_classes - 1}"
        raise DataError(f"{where}: {expected}, got {y.min()}..{y.max()}")
    if not spec.is_text:
        x = _checked_pixels(x, spec, where)
    return Split(x=x, y=y.astype(np.int64), users=users)


def _checked_pixels(x: NDArray[Any], spec: Spec, where: str) -> NDArray[Any]:
    if x.dtype == np.uint8:
        if x.max() > spec.white:
            expected = f"uint8 pixels of {spec.name} are 0..{spec.white}"
            raise DataError(f"{where}: {expected}, got {x.max()}")
        return x
    if x.dtype.kind != "f":
        raise DataError(f"{where}: pixels must be uint8 or floating, got {x.dtype}")
    if bad := int((~np.isfinite(x)).sum()):
        raise DataError(f"{where}: pixels must be finite, got {bad} NaN or infinite")
    if x.min() < 0 or x.max() > 1:
        expected = "floating pixels must lie in [0, 1] (not yet normalised)"
        raise DataError(f"{where}: {expected}, got {x.min():g}..{x.max():g}")
    return x.astype(np.float32, copy=False)
