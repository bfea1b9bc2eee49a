"""A dataset by name, divided among clients."""

from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.app.data.base import SPECS, Dataset, Samples, Spec, Split
from autoflip_flwr.app.data.images import SplitName, download, read_digits, read_images
from autoflip_flwr.app.data.leaf import HUB, read_hub, read_leaf
from autoflip_flwr.app.data.partitions import check_partition, divide
from autoflip_flwr.errors import SettingsError

_TRAIN, _TEST = 1, 2  # streams of randomness that subsets are drawn from


class Federated:
    """A dataset divided among clients, as `load` returns it.

    Attributes
    ----------
    name : str
    num_classes : int
    input_shape : tuple[int, ...]
        Of one sample: (C, H, W) for images, (80,) for text.
    num_partitions : int
        Number of clients.
    sizes : tuple[int, ...]
        Each client's number of training samples, all at least 1.
    """

    def __init__(
        self,
        dataset: Dataset,
        partitions: list[NDArray[np.int64]],
        test_rows: NDArray[np.int64],
    ) -> None:
        self._dataset = dataset
        self._partitions = partitions
        self._test_rows = test_rows
        self.name = dataset.spec.name
        self.num_classes = dataset.spec.num_classes
        self.input_shape = dataset.spec.input_shape
        self.num_partitions = len(partitions)
        self.sizes = tuple(len(rows) for rows in partitions)

    @cached_property
    def test(self) -> Samples:
        """Held-out samples for the global model, never part of a partition.

        They are converted on the first use and shared by all callers afterwards.
        """
        return self._dataset.test.take(self._test_rows, self._dataset.spec)

    def partition(self, partition_id: int) -> Samples:
        """Return one client's training samples, converted anew on every call.

        Parameters
        ----------
        partition_id : int
            ``0 .. num_partitions - 1``.

        Raises
        ------
        SettingsError
            If there is no such client.
        """
        if not 0 <= partition_id < self.num_partitions:
            raise SettingsError(
                f"partition_id must be 0..{self.num_partitions - 1}, got {partition_id}"
            )
        rows = self._partitions[partition_id]
        return self._dataset.train.take(rows, self._dataset.spec)


def spec(name: str) -> Spec:
    """Return what is fixed about a dataset: classes, shape of a sample.

    Raises
    ------
    SettingsError
        If the name is unknown; lists the known ones.
    """
    if name not in SPECS:
        raise SettingsError(f"unknown dataset {name!r}; known: {list(SPECS)}")
    return SPECS[name]


def names() -> tuple[str, ...]:
    """Return the names that `load` knows."""
    return tuple(SPECS)


def load(
    name: str,
    *,
    num_partitions: int,
    dir: str | Path | None = None,
    partition: str = "iid",
    alpha: float = 0.5,
    classes_per_client: int = 2,
    max_samples: int | None = None,
    max_test_samples: int | None = None,
    seed: int = 0,
    hub: str | None = None,
) -> Federated:
    """Load a dataset and divide its training samples among clients.

    Images are normalised with a fixed mean and deviation per dataset, and only
    those that are asked for, when they are asked for. Calls with the same
    arguments in one process return the same object; files are read once.

    Parameters
    ----------
    name : str
        One of `names`.
    num_partitions : int
        Number of clients, at least 1.
    dir : str or Path, optional
        Where the files are. mnist, cifar10, cifar100: torchvision's layout or an
        ``.npz``; femnist, shakespeare: a folder with LEAF's ``train/*.json`` and
        ``test/*.json``; digits comes with scikit-learn. None or empty: download
        (mnist, cifar), or Flower Datasets (femnist, shakespeare).
    partition : {"iid", "pathological", "dirichlet", "natural"}
        How samples are divided, see `partitions.divide`.
    alpha : float
        Above 0; for dirichlet.
    classes_per_client : int
        At least 1; for pathological.
    max_samples, max_test_samples : int, optional
        Use so many of a seeded shuffle of the training (test) samples, at least 1;
        None: all.
    seed : int
        Not negative; decides the subsets and the partitions.
    hub : str, optional
        For femnist and shakespeare without `dir`: another dataset of the hub, or
        a local folder that ``datasets.load_dataset`` reads.

    Raises
    ------
    SettingsError
        If a name is unknown or a value impossible.
    DataError
        If files are missing or broken; the message names them.
    """
    known = spec(name)
    check_partition(
        partition=partition,
        num_partitions=num_partitions,
        alpha=alpha,
        classes_per_client=classes_per_client,
        seed=seed,
    )
    for key, limit in (
        ("max_samples", max_samples),
        ("max_test_samples", max_test_samples),
    ):
        _check_limit(key, limit)
    folder = _resolved(dir)
    if hub and (known.name not in HUB or folder is not None):
        raise SettingsError(
            f"hub is for {sorted(HUB)} without dir, got it for {name!r}"
            + (f" with dir {str(dir)!r}" if folder is not None else "")
        )
    return _load(
        name,
        folder,
        hub or None,
        num_partitions,
        partition,
        float(alpha),
        classes_per_client,
        max_samples,
        max_test_samples,
        seed,
    )


def load_node(
    name: str, path: str | Path, *, max_samples: int | None = None
) -> Samples:
    """Load all training samples found at `path`: a real node with its own data.

    Parameters
    ----------
    name : str
        One of `names`: it fixes shape, classes and normalisation.
    path : str or Path
        An ``.npz`` with ``x_train`` and ``y_train`` (any image dataset), or what
        `load` takes as `dir`; of LEAF's folders only ``train/`` is needed.
    max_samples : int, optional
        Use so many of a fixed shuffle, at least 1; None: all, in their own order.

    Raises
    ------
    SettingsError
        If `name` is unknown, `path` is empty or `max_samples` is below 1.
    DataError
        If files are missing or broken; the message names them.
    """
    known = spec(name)
    _check_limit("max_samples", max_samples)
    folder = _resolved(path)
    if folder is None:
        raise SettingsError("a node with data of its own needs their path, got none")
    train = _read_node(name, folder)
    return train.take(_subset(len(train), max_samples, 0, _TRAIN), known)


@lru_cache(maxsize=16)
def _load(
    name: str,
    folder: Path | None,
    hub: str | None,
    num_partitions: int,
    partition: str,
    alpha: float,
    classes_per_client: int,
    max_samples: int | None,
    max_test_samples: int | None,
    seed: int,
) -> Federated:
    dataset = _read(name, folder, hub)
    train = dataset.train
    rows = _subset(len(train), max_samples, seed, _TRAIN)
    clients = divide(
        train.y[rows],
        num_partitions=num_partitions,
        partition=partition,
        alpha=alpha,
        classes_per_client=classes_per_client,
        seed=seed,
        users=None if train.users is None else train.users[rows],
    )
    return Federated(
        dataset,
        [rows[client] for client in clients],
        _subset(len(dataset.test), max_test_samples, seed, _TEST),
    )


@lru_cache(maxsize=2)
def _read(name: str, folder: Path | None, hub: str | None) -> Dataset:
    spec = SPECS[name]
    if folder is None and name in HUB:
        return read_hub(spec, hub)
    if folder is None and name != "digits":
        folder = download(spec)
    read = _reader(spec, folder)
    return Dataset(spec=spec, train=read("train"), test=read("test"))


@lru_cache(maxsize=2)
def _read_node(name: str, folder: Path) -> Split:
    return _reader(SPECS[name], folder)("train")


def _reader(spec: Spec, path: Path | None) -> Callable[[SplitName], Split]:
    if path is None:
        return lambda split: read_digits(spec, split)
    if spec.name in HUB and (spec.is_text or path.suffix != ".npz"):
        return lambda split: read_leaf(spec, path, split)
    return lambda split: read_images(spec, path, split)


def _check_limit(key: str, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise SettingsError(f"{key} must be at least 1 or None for all, got {limit}")


def _resolved(path: str | Path | None) -> Path | None:
    """Return an absolute path; None for None and for an empty setting."""
    if path is None or path == "":
        return None
    return Path(path).expanduser().resolve()


def _subset(count: int, limit: int | None, seed: int, stream: int) -> NDArray[np.int64]:
    """Return the rows of a seeded shuffle up to `limit`; all of them in order."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.random.default_rng([seed, stream]).permutation(count)[:limit]
