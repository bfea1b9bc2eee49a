"""Which sample goes to which client, as indices.

Whatever the scheme, every sample lands on exactly one client and every client
gets at least one, or the settings are refused.
"""

import math
import warnings
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import SettingsError, needs_extra
from autoflip_flwr.settings import AtLeastOne, Count, DataSettings

Ints: TypeAlias = NDArray[np.int64]


class Division(DataSettings):
    """The data of a run, with the number of clients and the seed."""

    num_partitions: AtLeastOne
    seed: Count = 0
    holdout: None = None  # a node's own affair


def divide(
    labels: Ints, division: Division, *, users: Ints | None = None
) -> list[Ints]:
    """Divide samples among clients; all randomness follows from the seed.

    ``iid``: equal shares of a shuffle. ``pathological``: each client holds
    ``classes_per_client`` classes, and together they hold all. ``dirichlet``: each
    class is divided by shares drawn from Dir(``alpha``); the smaller, the more the
    clients differ. ``natural``: by user; user i of n (in order) goes to client
    ``i mod num_partitions``.

    `labels` and `users` (only for natural) are those of all N samples. Returns for each
    client the indices of its samples: disjoint, none empty, together ``0 .. N - 1``.
    What is impossible for these samples is a `SettingsError`.
    """
    count = division.num_partitions
    if count > len(labels):
        raise SettingsError(
            f"{count} clients cannot each get one of {len(labels)} samples; "
            f"lower the number of clients or raise data.max-samples"
        )
    order = np.random.default_rng(division.seed).permutation(len(labels))
    shuffled = labels[order]
    if division.partition == "iid":
        places = np.array_split(np.arange(len(labels)), count)
    elif division.partition == "pathological":
        places = _pathological(shuffled, division)
    elif division.partition == "dirichlet":
        places = _dirichlet(shuffled, division)
    else:
        places = _natural(None if users is None else users[order], count)
    if empty := [client for client, rows in enumerate(places) if not len(rows)]:
        raise SettingsError(
            f"partition {division.partition!r} leaves the clients {empty} without "
            f"samples ({len(labels)} samples, {count} clients); lower the number of "
            f"clients or raise data.max-samples"
        )
    return [order[rows] for rows in places]


def _flowers(kind: str, labels: Ints, division: Division, **options: Any) -> list[Ints]:
    """Run a partitioner of Flower Datasets on nothing but places and labels."""
    # Imported here, as it takes seconds: a node with its own data does not need it.
    with needs_extra("app", "dividing data among clients"):
        import datasets  # type: ignore[import-untyped]
        from flwr_datasets import partitioner  # type: ignore[import-untyped]

    divider = getattr(partitioner, kind)(
        num_partitions=division.num_partitions,
        partition_by="key",
        seed=division.seed,
        **options,
    )
    places = np.arange(len(labels))
    divider.dataset = datasets.Dataset.from_dict({"place": places, "key": labels})
    return [
        np.asarray(divider.load_partition(client)["place"][:], dtype=np.int64)
        for client in range(division.num_partitions)
    ]


def _pathological(labels: Ints, division: Division) -> list[Ints]:
    clients, per_client = division.num_partitions, division.classes_per_client
    num_classes = len(np.unique(labels))
    if per_client > num_classes:
        raise SettingsError(
            f"classes_per_client must be 1..{num_classes}, the number of classes "
            f"among the samples, got {per_client}"
        )
    if clients * per_client < num_classes:
        raise SettingsError(
            f"{clients} clients x {per_client} classes per client = "
            f"{clients * per_client} < {num_classes} classes: samples would be lost; "
            f"raise classes_per_client to at least "
            f"{math.ceil(num_classes / clients)} or use more clients"
        )
    if clients < num_classes:
        return _pathological_few(labels, division)
    try:
        return _flowers(
            "PathologicalPartitioner",
            labels,
            division,
            num_classes_per_partition=per_client,
            class_assignment_mode="first-deterministic",
        )
    except ValueError as error:
        raise SettingsError(
            f"partition 'pathological' with {clients} clients x {per_client} classes "
            f"per client: among {len(labels)} samples a class has fewer samples than "
            f"clients that hold it; use fewer clients, fewer classes per client or "
            f"more samples"
        ) from error


def _pathological_few(labels: Ints, division: Division) -> list[Ints]:
    """Give client i the next `classes_per_client` classes of a shuffled circle.

    With fewer clients than classes none of PathologicalPartitioner's modes makes
    sure that every class has a client; going round the circle does.
    """
    count, per_client = division.num_partitions, division.classes_per_client
    classes = np.random.default_rng([division.seed, 3]).permutation(np.unique(labels))
    turns = np.arange(count * per_client)
    places: list[list[Ints]] = [[] for _ in range(count)]
    for place, label in enumerate(classes):
        clients = turns[place :: len(classes)] // per_client
        shares = np.array_split(np.flatnonzero(labels == label), len(clients))
        for client, share in zip(clients, shares, strict=True):
            places[client].append(share)
    # sorted: back in the shuffled order, so that classes are mixed
    return [np.sort(np.concatenate(shares)) for shares in places]


def _dirichlet(labels: Ints, division: Division) -> list[Ints]:
    try:
        with warnings.catch_warnings():
            # each of its ten attempts warns; the last one's failure is our error
            warnings.filterwarnings("ignore", message="The specified min_partition")
            return _flowers(
                "DirichletPartitioner",
                labels,
                division,
                alpha=division.alpha,
                min_partition_size=1,
                self_balancing=False,
            )
    except ValueError as error:
        raise SettingsError(
            f"partition 'dirichlet' with alpha={division.alpha} left one of "
            f"{division.num_partitions} clients without samples in every attempt "
            f"({len(labels)} samples); raise alpha, use fewer clients or more samples, "
            f"or try another seed"
        ) from error


def _natural(users: Ints | None, num_partitions: int) -> list[Ints]:
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
    clients = ranks % num_partitions
    by_client = np.argsort(clients, kind="stable")
    return np.split(by_client, np.cumsum(np.bincount(clients))[:-1])
