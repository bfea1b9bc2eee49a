"""The proving ground's samples: of real datasets, and drawn from a seed."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import make_classification

from autoflip_flwr import data
from autoflip_flwr.app.data.partitions import Division, divide

CLIENTS, TRAINING, VALIDATION, TEST = 10, 2000, 500, 1000

#: x, y, and whose each sample is.
Drawn: TypeAlias = tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]

_FOLDERS = {
    "mnist": "",
    "mnist-turned": "",
    "cifar10": "",
    "femnist": "femnist",
    "shakespeare": "shakespeare",
}
_SPLITS: dict[str, dict[str, Any]] = {
    "iid": {"partition": "iid"},
    "two-classes": {"partition": "pathological", "classes_per_client": 2},
    "dirichlet": {"partition": "dirichlet", "alpha": 0.3},
    "natural": {"partition": "natural"},
}


@functools.lru_cache(maxsize=4)
def load(name: str, split: str, folder: str, seed: int) -> tuple[Any, ...]:
    """Return shape, classes, the clients' samples, validation and test samples."""
    if name in DRAWN:
        return _drawn(name, split, seed)
    place = {} if name == "digits" else {"dir": str(Path(folder, _FOLDERS[name]))}
    name, _, turned = name.partition("-")
    clients = data.load(
        name,
        num_partitions=CLIENTS,
        seed=seed,
        max_samples=TRAINING,
        max_test_samples=VALIDATION + TEST,
        **place,
        **_SPLITS[split],
    )
    spec = data.spec(name)
    parts, test = [clients.partition(i) for i in range(CLIENTS)], clients.test
    if turned:
        parts, test = [_turned(part) for part in parts], _turned(test)
    held = min(VALIDATION, len(test) // 3)
    return (
        spec.input_shape,
        spec.num_classes * (4 if turned else 1),
        parts,
        (test.x[:held], test.y[:held]),
        (test.x[held:], test.y[held:]),
    )


def _turned(samples: Any) -> Any:
    """Turn images by quarters, one after another; the turn is part of the class."""
    turns = np.arange(len(samples)) % 4
    turned = [np.rot90(x, k, (1, 2)) for x, k in zip(samples.x, turns, strict=True)]
    return replace(samples, x=np.stack(turned), y=10 * turns + samples.y)


def _drawn(name: str, split: str, seed: int) -> tuple[Any, ...]:
    classes, draw = DRAWN[name]
    x, y, users = draw(np.random.default_rng(seed), TRAINING + VALIDATION + TEST)
    if split == "iid":
        rows = np.split(np.arange(TRAINING), CLIENTS)
    else:
        division = Division(num_partitions=CLIENTS, seed=seed, **_SPLITS[split])
        own = None if users is None else users[:TRAINING]
        rows = divide(y[:TRAINING], division, users=own)
    end = TRAINING + VALIDATION
    return (
        x.shape[1:],
        classes,
        [data.Samples(x=x[own], y=y[own]) for own in rows],
        (x[TRAINING:end], y[TRAINING:end]),
        (x[end:], y[end:]),
    )


def _topics(rng: np.random.Generator, count: int) -> Drawn:
    """Draw texts of 20 words, of which three in ten are those of the text's topic.

    Four topics have 30 of 300 words each.
    """
    topics = np.stack([rng.choice(300, 30, replace=False) for _ in range(4)])
    y = rng.integers(0, 4, count)
    common = rng.integers(0, 300, (count, 20))
    own = topics[y[:, None], rng.integers(0, 30, common.shape)]
    return np.where(rng.random(common.shape) < 0.3, own, common), y, None


def _order(rng: np.random.Generator, count: int) -> Drawn:
    """Draw texts of 15 words with one of three pairs; its order is in the class."""
    y = rng.integers(0, 6, count)
    x = rng.integers(6, 300, (count, 15))
    places = np.sort(rng.random((count, 15)).argsort(axis=1)[:, :2], axis=1)
    pairs = 2 * (y[:, None] // 2) + np.where(y[:, None] % 2, [0, 1], [1, 0])
    np.put_along_axis(x, places, pairs, axis=1)
    return x, y, None


def _waves(rng: np.random.Generator, count: int) -> Drawn:
    """Draw noisy waves of four frequencies, with a second wave or without."""
    y = rng.integers(0, 8, count)
    time, phase = np.arange(64) / 64, 2 * np.pi * rng.random((count, 1))
    pitch = 2 + 1.5 * (y[:, None] % 4)
    x = np.sin(2 * np.pi * pitch * time + phase)
    x += 0.7 * (y[:, None] > 3) * np.sin(4 * np.pi * pitch * time + phase)
    x += rng.normal(0, 0.8, x.shape)
    return x[:, None].astype(np.float32), y, None


def _table(rng: np.random.Generator, count: int) -> Drawn:
    """Draw rows of 40 numbers, of which 12 tell six classes of two clusters each."""
    x, y = make_classification(
        count,
        40,
        n_informative=12,
        n_redundant=8,
        n_classes=6,
        class_sep=1.2,
        random_state=int(rng.integers(1 << 31)),
    )
    return x.astype(np.float32), y.astype(np.int64), None


def _likes(rng: np.random.Generator, count: int) -> Drawn:
    """Draw whether one of 60 users likes one of 80 items, from four hidden traits."""
    users, items = rng.normal(size=(60, 4)), rng.normal(size=(80, 4))
    x = np.stack([rng.integers(0, 60, count), rng.integers(0, 80, count)], axis=1)
    liking = (users[x[:, 0]] * items[x[:, 1]]).sum(axis=1) + users[x[:, 0], 0]
    return x, (liking > 0).astype(np.int64), x[:, 0]


#: Name -> number of classes, and what draws the samples.
DRAWN: dict[str, tuple[int, Callable[[np.random.Generator, int], Drawn]]] = {
    "topics": (4, _topics),
    "order": (6, _order),
    "waves": (8, _waves),
    "table": (6, _table),
    "likes": (2, _likes),
}
