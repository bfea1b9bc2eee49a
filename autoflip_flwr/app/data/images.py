"""Images from files: scikit-learn's digits, MNIST's idx, ``.npz``, CIFAR's pickles.

What is missing or broken is a `DataError` that names the file.
"""

import math
import shutil
import tempfile
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.app.data import archive
from autoflip_flwr.app.data.base import Spec, Split, checked_split
from autoflip_flwr.errors import DataError, needs_extra

SplitName = Literal["train", "test"]

MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_digits(spec: Spec, split: SplitName) -> Split:
    """Return scikit-learn's digits; every fifth sample of a class is held out.

    The file alone is read: on a real node every message starts a process, and an import
    of scikit-learn takes longer than a round's training.
    """
    with needs_extra("app", "the dataset digits"):
        package = find_spec("sklearn")
        if package is None or package.origin is None:
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        table = np.loadtxt(path, np.uint8, delimiter=",")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected scikit-learn's digits: {error}") from error
    labels = table[:, -1].astype(np.int64)
    held = np.zeros(len(labels), np.bool_)
    for label in range(spec.num_classes):
        held[np.flatnonzero(labels == label)[::5]] = True
    rows = held if split == "test" else ~held
    pixels = table[rows, :-1].reshape(-1, *spec.input_shape)
    return checked_split(pixels, labels[rows], spec=spec, where=str(path))


def read_images(spec: Spec, path: Path, split: SplitName) -> Split:
    """Read one split of an image dataset from a file or folder.

    `path` is an ``.npz`` file; a folder with ``<name>.npz`` or ``<name>_subset.npz``;
    or torchvision's layout: for mnist the folder that holds ``MNIST/raw``, ``raw`` or
    the idx files themselves (plain or ``.gz``), for cifar the one that holds
    ``cifar-10-batches-py`` / ``cifar-100-python``, or that folder itself.
    """
    if path.is_file():
        if path.suffix != ".npz":
            raise DataError(f"{path}: expected {_expected(spec)}, got another file")
        return read_npz(spec, path, split)
    if spec.name == "mnist" and (raw := _mnist_folder(path)) is not None:
        return _read_mnist(spec, raw, split)
    if spec.name in _CIFAR and (root := _cifar_root(spec, path)) is not None:
        return _read_cifar(spec, root, split)
    for name in (f"{spec.name}.npz", f"{spec.name}_subset.npz"):
        if (path / name).is_file():
            return read_npz(spec, path / name, split)
    got = "a folder without them" if path.is_dir() else "nothing there"
    raise DataError(f"{path}: expected {_expected(spec)}, got {got}")


def read_npz(spec: Spec, path: Path, split: SplitName) -> Split:
    """Read ``x_<split>`` and ``y_<split>`` from an ``.npz`` file, never a pickle.

    Images are (N, H, W, C), (N, C, H, W) or, with one channel, (N, H, W); uint8,
    or floating in [0, 1]. Labels are integers, (N,).
    """
    keys = (f"x_{split}", f"y_{split}")
    x, y = archive.read_npz(path, keys).values()
    where = f"{path}, {keys[0]} and {keys[1]}"
    return checked_split(_channels_first(x, spec), y, spec=spec, where=where)


def _channels_first(x: NDArray[Any], spec: Spec) -> NDArray[Any]:
    """Turn NHW and NHWC into NCHW; leave any other shape for the check to name."""
    channels, height, width = spec.input_shape
    if x.shape[1:] == (height, width) and channels == 1:
        return x[:, np.newaxis]
    if x.shape[1:] == (height, width, channels):
        return np.ascontiguousarray(np.moveaxis(x, -1, 1))
    return x


def read_idx(path: Path, *, ndim: int) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, plain or gzipped (by its ``.gz``)."""
    try:
        zipped = path.suffix == ".gz"
        data = archive.read_gzip(path) if zipped else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable file: {error}") from error
    header = 4 + 4 * ndim
    magic = bytes((0, 0, 8, ndim))  # 8: unsigned bytes
    if data[:4] != magic:
        raise DataError(
            f"{path}: expected the idx magic {magic.hex()}, got {data[:4].hex()}"
        )
    if len(data) < header:
        raise DataError(f"{path}: expected a header of {header} B, got {len(data)} B")
    shape = tuple(np.frombuffer(data[4:header], dtype=">u4").tolist())
    count = math.prod(shape)
    if len(data) != header + count:
        raise DataError(
            f"{path}: expected {header + count} B ({header} header + {count} for shape "
            f"{shape}), got {len(data)} B"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def _idx_file(folder: Path, name: str) -> Path | None:
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if path.is_file()), None)


def _mnist_folder(path: Path) -> Path | None:
    names = (*MNIST_FILES["train"], *MNIST_FILES["test"])
    for folder in (path / "MNIST" / "raw", path / "raw", path):
        if any(_idx_file(folder, name) for name in names):
            return folder
    return None


def _read_mnist(spec: Spec, folder: Path, split: SplitName) -> Split:
    arrays = []
    for name, ndim in zip(MNIST_FILES[split], (3, 1), strict=True):
        if (path := _idx_file(folder, name)) is None:
            raise DataError(f"{folder}: expected {name} or {name}.gz, got neither")
        arrays.append(read_idx(path, ndim=ndim))
    x, y = arrays
    where = f"{folder}, {' and '.join(MNIST_FILES[split])}"
    return checked_split(_channels_first(x, spec), y, spec=spec, where=where)


#: The folders of torchvision's layout.
_CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def _torchvision(spec: Spec) -> Any:
    """Return torchvision's class of a dataset."""
    with needs_extra("app", f"torchvision's layout of {spec.name}"):
        from torchvision import datasets

    return getattr(datasets, spec.name.upper())


def _cifar_root(spec: Spec, path: Path) -> Path | None:
    base = _CIFAR[spec.name]
    if (path / base).is_dir():
        return path
    return path.parent if path.name == base and path.is_dir() else None


def _read_cifar(spec: Spec, root: Path, split: SplitName) -> Split:
    """Read torchvision's layout; it checks every file's md5 before unpickling."""
    kind = _torchvision(spec)
    try:
        data = kind(root=root, train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        files = [name for name, _ in (*kind.train_list, *kind.test_list)]
        raise DataError(
            f"{root / kind.base_folder}: expected the original files {files}, "
            f"with their published md5; torchvision says: {error}"
        ) from error
    x = _channels_first(np.asarray(data.data), spec)
    y = np.asarray(data.targets, dtype=np.int64)
    return checked_split(x, y, spec=spec, where=f"{root / kind.base_folder}, {split}")


def download(spec: Spec) -> Path:
    """Download a dataset once into ``~/.cache/autoflip_flwr`` and return the folder.

    The folder appears under its name only when it is complete, so processes that
    start together cannot read each other's half-written files.
    """
    cache = Path.home() / ".cache" / "autoflip_flwr"
    folder = cache / spec.name
    if folder.is_dir():
        return folder
    kind = _torchvision(spec)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{spec.name}-", dir=cache))
        try:
            kind(root=unfinished, train=True, download=True)
            if not folder.is_dir():
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except (RuntimeError, OSError) as error:
        if folder.is_dir():  # another process was faster
            return folder
        raise DataError(
            f"{spec.name} could not be downloaded ({error}); "
            f"set data.dir to {_expected(spec)}"
        ) from error
    return folder


def _expected(spec: Spec) -> str:
    folders = {name: f"{base}/" for name, base in _CIFAR.items()}
    folders["mnist"] = f"MNIST/raw/{MNIST_FILES['train'][0]}[.gz] and so on"
    inner = folders.get(spec.name)
    return (
        "an .npz file with x_train, y_train, x_test and y_test, or a folder with "
        f"{spec.name}.npz or {spec.name}_subset.npz"
        + (f", or one with {inner}" if inner else "")
        + (f", from {spec.source}" if spec.source else "")
    )
