"""Which sample goes to which client: Flower Datasets' partitioners, on indices.

Whatever the scheme, every sample lands on exactly one client and every client
gets at least one, or the settings are refused.
"""

import contextlib
import io
import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import SettingsError, needs_extra

PARTITIONS = ("iid", "pathological", "dirichlet", "natural")


def _partitioners() -> Any:
    """Import Flower Datasets when a partition is asked for.

    On a real node every message starts a process, and the import takes seconds that
    a node with data of its own need not spend.
    """
    with needs_extra("app", "dividing data among clients"):
        from flwr_datasets import partitioner  # type: ignore[import-untyped]

    return partitioner


def check_partition(
    *,
    partition: str,
    num_partitions: int,
    alpha: float,
    classes_per_client: int,
    seed: int,
) -> None:
    """Refuse settings that are impossible for any dataset.

    Raises
    ------
    SettingsError
        If `partition` is unknown, a count is below 1, `alpha` is not a finite
        number above 0, or `seed` is negative.
    """
    if partition not in PARTITIONS:
        raise SettingsError(
            f"unknown partition {partition!r}; known: {list(PARTITIONS)}"
        )
    counts = {
        "num_partitions": num_partitions,
        "classes_per_client": classes_per_client,
    }
    for name, count in counts.items():
        if count < 1:
            raise SettingsError(f"{name} must be at least 1, got {count}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise SettingsError(f"alpha must be a finite number above 0, got {alpha}")
    if seed < 0:
        raise SettingsError(f"seed must not be negative, got {seed}")


def divide(
    labels: NDArray[np.int64],
    *,
    num_partitions: int,
    partition: str = "iid",
    alpha: float = 0.5,
    classes_per_client: int = 2,
    seed: int = 0,
    users: NDArray[np.int64] | None = None,
) -> list[NDArray[np.int64]]:
    """Divide samples among clients.

    Parameters
    ----------
    labels : NDArray[np.int64]
        Of all samples, (N,).
    num_partitions : int
        Number of clients, ``1 .. N``.
    partition : {"iid", "pathological", "dirichlet", "natural"}
        ``iid``: equal shares of a shuffle. ``pathological``: each client holds
        `classes_per_client` classes, and together they hold all. ``dirichlet``:
        each class is divided by shares drawn from Dir(`alpha`). ``natural``: by
        user; user i of n (in order) goes to client ``i mod num_partitions``.
    alpha : float
        Above 0; the smaller, the more the clients differ. Only for dirichlet.
    classes_per_client : int
        From 1 to the number of classes. Only for pathological.
    seed : int
        All randomness follows from it.
    users : NDArray[np.int64], optional
        Whose each sample is, (N,). Only for natural.

    Returns
    -------
    list[NDArray[np.int64]]
        For each client the indices of its samples: disjoint, none empty, together
        ``0 .. N - 1``.

    Raises
    ------
    SettingsError
        If the settings are impossible, alone or for these samples.
    """
    check_partition(
        partition=partition,
        num_partitions=num_partitions,
        alpha=alpha,
        classes_per_client=classes_per_client,
        seed=seed,
    )
    if num_partitions > len(labels):
        raise SettingsError(
            f"{num_partitions} clients cannot each get one of {len(labels)} samples; "
            f"lower the number of clients or raise data.max-samples"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels[order]
    if partition == "iid":
        places = _places(
            _partitioners().IidPartitioner(num_partitions), num_partitions, shuffled
        )
    elif partition == "pathological":
        places = _pathological(shuffled, num_partitions, classes_per_client, seed)
    elif partition == "dirichlet":
        places = _dirichlet(shuffled, num_partitions, alpha, seed)
    else:
        places = _natural(None if users is None else users[order], num_partitions)
    if empty := [client for client, rows in enumerate(places) if not len(rows)]:
        raise SettingsError(
            f"partition {partition!r} leaves the clients {empty} without samples "
            f"({len(labels)} samples, {num_partitions} clients); lower the number of "
            f"clients or raise data.max-samples"
        )
    return [order[rows] for rows in places]


def _places(
    partitioner: Any, num_partitions: int, keys: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Run a partitioner on a table that holds nothing but places and keys."""
    import datasets  # type: ignore[import-untyped]

    table = datasets.Dataset.from_dict({"place": np.arange(len(keys)), "key": keys})
    partitioner.dataset = table
    return [
        np.asarray(partitioner.load_partition(client)["place"][:], dtype=np.int64)
        for client in range(num_partitions)
    ]


def _pathological(
    labels: NDArray[np.int64], num_partitions: int, classes_per_client: int, seed: int
) -> list[NDArray[np.int64]]:
    num_classes = len(np.unique(labels))
    if classes_per_client > num_classes:
        raise SettingsError(
            f"classes_per_client must be 1..{num_classes}, the number of classes "
            f"among the samples, got {classes_per_client}"
        )
    if num_partitions * classes_per_client < num_classes:
        raise SettingsError(
            f"{num_partitions} clients x {classes_per_client} classes per client = "
            f"{num_partitions * classes_per_client} < {num_classes} classes: samples "
            f"would be lost; raise classes_per_client to at least "
            f"{math.ceil(num_classes / num_partitions)} or use more clients"
        )
    if num_partitions < num_classes:
        return _pathological_few(labels, num_partitions, classes_per_client, seed)
    partitioner = _partitioners().PathologicalPartitioner(
        num_partitions=num_partitions,
        partition_by="key",
        num_classes_per_partition=classes_per_client,
        class_assignment_mode="first-deterministic",
        seed=seed,
    )
    try:
        return _places(partitioner, num_partitions, labels)
    except ValueError as error:
        raise SettingsError(
            f"partition 'pathological' with {num_partitions} clients x "
            f"{classes_per_client} classes per client: among {len(labels)} samples "
            f"a class has fewer samples than clients that hold it; use fewer clients, "
            f"fewer classes per client or more samples"
        ) from error


def _pathological_few(
    labels: NDArray[np.int64], num_partitions: int, classes_per_client: int, seed: int
) -> list[NDArray[np.int64]]:
    """Give client i the next `classes_per_client` classes of a shuffled circle.

    With fewer clients than classes none of PathologicalPartitioner's modes makes
    sure that every class has a client; going round the circle does.
    """
    classes = np.random.default_rng([seed, 3]).permutation(np.unique(labels))
    holders: dict[int, list[int]] = {int(label): [] for label in classes}
    for turn in range(num_partitions * classes_per_client):
        label = int(classes[turn % len(classes)])
        holders[label].append(turn // classes_per_client)
    places: list[list[NDArray[np.int64]]] = [[] for _ in range(num_partitions)]
    for label, clients in holders.items():
        shares = np.array_split(np.flatnonzero(labels == label), len(clients))
        for client, share in zip(clients, shares, strict=True):
            places[client].append(share)
    # sorted: back in the shuffled order, so that classes are mixed
    return [np.sort(np.concatenate(shares)) for shares in places]


def _dirichlet(
    labels: NDArray[np.int64], num_partitions: int, alpha: float, seed: int
) -> list[NDArray[np.int64]]:
    partitioner = _partitioners().DirichletPartitioner(
        num_partitions=num_partitions,
        partition_by="key",
        alpha=float(alpha),
        min_partition_size=1,
        self_balancing=False,
        seed=seed,
    )
    try:
        with warnings.catch_warnings():
            # each of its ten attempts warns; the last one's failure is our error
            warnings.filterwarnings("ignore", message="The specified min_partition")
            return _places(partitioner, num_partitions, labels)
    except ValueError as error:
        raise SettingsError(
            f"partition 'dirichlet' with alpha={alpha} left one of {num_partitions} "
            f"clients without samples in every attempt ({len(labels)} samples); raise "
            f"alpha, use fewer clients or more samples, or try another seed"
        ) from error


def _natural(
    users: NDArray[Any] | None, num_partitions: int
) -> list[NDArray[np.int64]]:
    if users is None:
        raise SettingsError(
            "partition 'natural' needs a dataset that says whose each sample is "
            "(femnist or shakespeare from LEAF's files or the hub); use 'iid', "
            "'pathological' or 'dirichlet'"
        )
    known, ranks = np.unique(users, return_inverse=True)
    if num_partitions > len(known):
        raise SettingsError(
            f"partition 'natural' has {len(known)} users for {num_partitions} clients; "
            f"use at most {len(known)} clients, or raise data.max-samples"
        )
    clients = ranks.astype(np.int64) % num_partitions
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        return _places(
            _partitioners().NaturalIdPartitioner("key"), num_partitions, clients
        )
