"""A dataset by name, divided among clients."""

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.app.data.base import SPECS, Dataset, Samples, Spec, Split
from autoflip_flwr.app.data.images import SplitName, download, read_digits, read_images
from autoflip_flwr.app.data.leaf import HUB, read_hub, read_leaf
from autoflip_flwr.app.data.partitions import Division, divide
from autoflip_flwr.errors import SettingsError
from autoflip_flwr.settings import DataSettings, meant

_TRAIN, _TEST = 1, 2  # streams of randomness that subsets are drawn from


class Federated:
    """A dataset divided among clients, as `load` returns it.

    `sizes` are the clients' numbers of training samples, all at least 1.
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
        """Return one client's training samples, converted anew on every call."""
        if not 0 <= partition_id < self.num_partitions:
            raise SettingsError(
                f"partition_id must be 0..{self.num_partitions - 1}, got {partition_id}"
            )
        rows = self._partitions[partition_id]
        return self._dataset.train.take(rows, self._dataset.spec)


def spec(name: str) -> Spec:
    """Return what is fixed about a dataset: classes, shape of a sample."""
    if name not in SPECS:
        raise SettingsError(
            f"unknown dataset {name!r}; known: {list(SPECS)}{meant(name, SPECS)}"
        )
    return SPECS[name]


def names() -> tuple[str, ...]:
    """Return the names that `load` knows."""
    return tuple(SPECS)


def load(
    name: str,
    *,
    num_partitions: int,
    seed: int = 0,
    dir: str | Path | None = None,
    hub: str | None = None,
    **settings: Any,
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
    seed : int
        Not negative; decides the subsets and the partitions.
    dir : str or Path, optional
        Where the files are. mnist, cifar10, cifar100: torchvision's layout or an
        ``.npz``; femnist, shakespeare: a folder with LEAF's ``train/*.json`` and
        ``test/*.json``; digits comes with scikit-learn. None or empty: download
        (mnist, cifar), or Flower Datasets (femnist, shakespeare).
    hub : str, optional
        For femnist and shakespeare without `dir`: another dataset of the hub, or
        a local folder that ``datasets.load_dataset`` reads.
    **settings
        ``partition``, ``alpha``, ``classes_per_client``: see `partitions.divide`.
        ``max_samples``, ``max_test_samples``: use so many of a seeded shuffle of the
        training (test) samples; None: all. Defaults are those of `DataSettings`.

    Raises
    ------
    SettingsError
        If a name is unknown or a value impossible.
    DataError
        If files are missing or broken; the message names them.
    """
    return _load(
        Division(
            name=name,
            num_partitions=num_partitions,
            seed=seed,
            dir=_resolved(dir),
            hub=hub or "",
            **settings,
        )
    )


def divided(settings: DataSettings, num_partitions: int, *, seed: int) -> Federated:
    """Load the data of a run, divided among clients; see `load`."""
    chosen = settings.model_dump(exclude={"holdout", "label_noise"})
    return load(**chosen, num_partitions=num_partitions, seed=seed)


def held_out(settings: DataSettings, *, seed: int) -> Samples:
    """Load the test samples alone, the same as those of `load`."""
    dataset = _dataset(settings)
    rows = _subset(len(dataset.test), settings.max_test_samples, seed, _TEST)
    return dataset.test.take(rows, dataset.spec)


def load_node(name: str, path: str | Path) -> Samples:
    """Load all training samples at `path`: a real node with its own data.

    `name` fixes shape, classes and normalisation. At `path` are an ``.npz`` with
    ``x_train`` and ``y_train`` (any image dataset), or what `load` takes as `dir`; of
    LEAF's folders only ``train/`` is needed.
    """
    known = spec(name)
    if not path:
        raise SettingsError("a node with data of its own needs their path, got none")
    train = _read_node(known, Path(_resolved(path)), "train")
    return train.take(np.arange(len(train)), known)


@lru_cache(maxsize=16)
def _load(division: Division) -> Federated:
    dataset = _dataset(division)
    train, seed = dataset.train, division.seed
    rows = _subset(len(train), division.max_samples, seed, _TRAIN)
    users = None if train.users is None else train.users[rows]
    return Federated(
        dataset,
        [rows[client] for client in divide(train.y[rows], division, users=users)],
        _subset(len(dataset.test), division.max_test_samples, seed, _TEST),
    )


def _dataset(settings: DataSettings) -> Dataset:
    known = spec(settings.name)
    if settings.hub and (known.name not in HUB or settings.dir):
        raise SettingsError(
            f"hub is for {sorted(HUB)} without dir, got it for {known.name!r}"
            + (f" with dir {settings.dir!r}" if settings.dir else "")
        )
    return _read(known, _resolved(settings.dir), settings.hub)


@lru_cache(maxsize=2)
def _read(spec: Spec, folder: str, hub: str) -> Dataset:
    path = Path(folder) if folder else None
    if path is None and spec.name in HUB:
        return read_hub(spec, hub)
    if path is None and spec.name != "digits":
        path = download(spec)
    return Dataset(
        spec=spec,
        train=_read_split(spec, path, "train"),
        test=_read_split(spec, path, "test"),
    )


def _read_split(spec: Spec, path: Path | None, split: SplitName) -> Split:
    if path is None:
        return read_digits(spec, split)
    if spec.name in HUB and (spec.is_text or path.suffix != ".npz"):
        return read_leaf(spec, path, split)
    return read_images(spec, path, split)


_read_node = lru_cache(maxsize=2)(_read_split)


def _resolved(path: str | Path | None) -> str:
    """Return an absolute path; an empty one for None and for an empty setting."""
    return str(Path(path).expanduser().resolve()) if path else ""


def _subset(count: int, limit: int | None, seed: int, stream: int) -> NDArray[np.int64]:
    """Return the rows of a seeded shuffle up to `limit`; all of them in order."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.random.default_rng([seed, stream]).permutation(count)[:limit]
