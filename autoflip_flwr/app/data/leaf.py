"""FEMNIST and Shakespeare: LEAF's JSON files, or Flower Datasets from the hub.

Both say which user (writer, role) each sample belongs to. Users are numbered in
the order of their sorted names, whatever file they stand in. What is missing or
broken is a `DataError` that names the file, or the hub's dataset.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.app.data.base import Dataset, Spec, Split, checked_split
from autoflip_flwr.app.data.images import SplitName
from autoflip_flwr.errors import DataError, needs_extra

#: LEAF's 80 letters; a letter's index is its label.
LETTERS = (
    "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
)

#: What stands for a character outside `LETTERS`: the space. (LEAF's own code
#: yields -1 there, which is no valid index.)
UNKNOWN = LETTERS.index(" ")

_CODE_TO_INDEX = np.full(128, UNKNOWN, dtype=np.uint8)  # the last entry: all beyond
_CODE_TO_INDEX[list(LETTERS.encode())] = range(len(LETTERS))

#: Where Flower keeps the datasets, and the columns of user, input and label there.
HUB = {
    "femnist": ("flwrlabs/femnist", ("writer_id", "image", "character")),
    "shakespeare": ("flwrlabs/shakespeare", ("character_id", "x", "y")),
}

HELD_OUT = 0.2  # of each user's samples, where the hub has no test split


def encode_letters(texts: Sequence[str], *, length: int) -> NDArray[np.uint8]:
    """Return the index in `LETTERS` of every character, (len(texts), length)."""
    for text in texts:
        if not isinstance(text, str) or len(text) != length:
            raise DataError(f"expected texts of {length} characters, got {text!r}")
    joined = "".join(texts).encode("utf-32-le", "surrogatepass")
    codes = np.minimum(np.frombuffer(joined, dtype="<u4"), len(_CODE_TO_INDEX) - 1)
    indices: NDArray[np.uint8] = _CODE_TO_INDEX[codes]
    return indices.reshape(len(texts), length)


def read_leaf(spec: Spec, folder: Path, split: SplitName) -> Split:
    """Read all of ``<folder>/<split>/*.json``, in LEAF's format.

    A file holds ``user_data[user] = {"x": [...], "y": [...]}`` (and more, unused).
    FEMNIST: ``x`` is 784 floats in [0, 1] with 1.0 for the paper, ``y`` in 0..61.
    Shakespeare: ``x`` is 80 characters, ``y`` the next one.
    """
    files = sorted((folder / split).glob("*.json"))
    if not files:
        raise DataError(
            f"{folder / split}: expected LEAF's JSON files of {spec.name} (*.json), "
            f"got none; data.dir must hold the folders train/ and test/, made with "
            f"{spec.source}"
        )
    parts = [part for file in files for part in _read_users(spec, file)]
    if not parts:
        raise DataError(f"{folder / split}: expected samples, got none")
    parts.sort(key=lambda part: part[0])
    return checked_split(
        np.concatenate([x for _, x, _ in parts]),
        np.concatenate([y for _, _, y in parts]),
        spec=spec,
        where=str(folder / split),
        users=_numbered([name for name, _, y in parts for _ in y]),
    )


def _read_users(
    spec: Spec, file: Path
) -> Iterator[tuple[str, NDArray[Any], NDArray[np.int64]]]:
    """Yield (user, x, y) for every user of one file that has samples."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: not a readable JSON file: {error}") from error
    try:
        data = [(str(u), one["x"], one["y"]) for u, one in content["user_data"].items()]
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: expected LEAF's user_data[user] = {{x, y}}, "
            f"got {type(error).__name__}: {error}"
        ) from error
    convert = _text if spec.is_text else _drawings
    for user, raw_x, raw_y in data:
        where = f"{file}, user {user}"
        if not isinstance(raw_x, list) or not isinstance(raw_y, list):
            raise DataError(f"{where}: expected lists x and y")
        if not raw_x and not raw_y:
            continue
        try:
            x, y = convert(spec, raw_x, raw_y)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{where}: {error}") from error
        checked_split(x, y, spec=spec, where=where)
        yield user, x, y.astype(np.int64)


def _drawings(spec: Spec, x: Any, y: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    pixels = np.asarray(x, dtype=np.float32)
    if pixels.shape != (len(x), 784):
        raise DataError(f"expected 784 floats a sample, got shape {pixels.shape[1:]}")
    return pixels.reshape(-1, *spec.input_shape), np.asarray(y)


def _text(spec: Spec, x: Any, y: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    letters = encode_letters(x, length=spec.input_shape[0])
    return letters, encode_letters(y, length=1)[:, 0].astype(np.int64)


def _numbered(names: Sequence[str]) -> NDArray[np.int64]:
    """Replace each name by its place among the sorted, distinct names."""
    return np.unique(np.array(names, object), return_inverse=True)[1]


def read_hub(spec: Spec, hub: str) -> Dataset:
    """Read a dataset with Flower Datasets and hold out a test set.

    There is only a train split, so 20 % of each user's samples become the test
    set (at least one of a user with two or more): for femnist a fixed random
    choice, for shakespeare the last ones, as the samples follow the text and no
    character to predict may have been seen in training.

    `hub` is the dataset's name on the Hugging Face hub, or a local folder in a form
    that ``datasets.load_dataset`` reads; empty: Flower's own copy.
    """
    default, columns = HUB[spec.name]
    source = hub or default
    # Imported here for the sake of nodes that need neither: it takes seconds.
    with needs_extra("app", f"the hub's {spec.name}"):
        from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
        from flwr_datasets import FederatedDataset  # type: ignore[import-untyped]

    try:
        table = FederatedDataset(
            dataset=source, partitioners={"train": 1}, shuffle=False
        ).load_split("train")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{spec.name} could not be read from the hub dataset {source!r} ({error}); "
            f"set data.dir to a folder with LEAF's train/*.json and test/*.json, made "
            f"with {spec.source}"
        ) from error
    if missing := sorted(set(columns) - set(table.column_names)):
        raise DataError(
            f"hub dataset {source!r}: expected the columns {list(columns)}, "
            f"missing {missing}, got {table.column_names}"
        )
    whole = _read_table(spec, table.select_columns(list(columns)), columns, source)
    assert whole.users is not None
    held_out = _held_out(whole.users, shuffle=not spec.is_text)
    train, test = (
        Split(x=whole.x[rows], y=whole.y[rows], users=whole.users[rows])
        for rows in (~held_out, held_out)
    )
    if not len(test):
        raise DataError(f"hub dataset {source!r}: no user has two samples or more")
    return Dataset(spec=spec, train=train, test=test)


def _read_table(
    spec: Spec, table: Any, columns: tuple[str, str, str], source: str
) -> Split:
    user, x, y = columns
    users: list[str] = []
    xs: list[NDArray[Any]] = []
    ys: list[NDArray[Any]] = []
    for batch in table.iter(batch_size=1000):
        users.extend(str(name) for name in batch[user])
        try:
            if spec.is_text:
                letters, labels = _text(spec, batch[x], batch[y])
            else:
                grey = [np.asarray(image.convert("L")) for image in batch[x]]
                letters, labels = np.stack(grey)[:, np.newaxis], np.asarray(batch[y])
        except (AttributeError, ValueError) as error:
            raise DataError(f"hub dataset {source!r}: {error}") from error
        xs.append(letters)
        ys.append(labels)
    if not users:
        raise DataError(f"hub dataset {source!r}: expected samples, got none")
    return checked_split(
        np.concatenate(xs),
        np.concatenate(ys),
        spec=spec,
        where=f"hub dataset {source!r}",
        users=_numbered(users),
    )


def _held_out(users: NDArray[np.int64], *, shuffle: bool) -> NDArray[np.bool_]:
    """Choose the same `HELD_OUT` share of every user's samples on every call."""
    chosen = np.zeros(len(users), dtype=np.bool_)
    rng = np.random.default_rng(0)
    by_user = np.argsort(users, kind="stable")
    starts = np.flatnonzero(np.diff(users[by_user])) + 1
    for rows in np.split(by_user, starts):
        if shuffle:
            rows = rng.permutation(rows)
        count = max(round(HELD_OUT * len(rows)), int(len(rows) > 1))
        chosen[rows[len(rows) - count :]] = True
    return chosen
