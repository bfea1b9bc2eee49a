"""Compressed files: a small one cannot fill the memory."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.errors import DataError

#: Bytes that any file may inflate to, and how many times its own size a larger one.
LEAST, RATIO = 1 << 30, 100


def read_npz(path: Path, keys: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """Read arrays of an ``.npz`` file, all of them by default; never a pickle.

    A file that is missing, broken or without some of the `keys` is a `DataError`, and
    so is one that inflates to more than a GiB and 100 times its size.
    """
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: expected an npz archive, got a single array")
            if missing := [key for key in keys if key not in archive]:
                raise DataError(
                    f"{path}: expected the keys {list(keys)}, "
                    f"missing {missing}, got {sorted(archive)}"
                )
            members = archive.zip.infolist() if archive.zip else []
            _check_size(path, sum(int(member.file_size) for member in members))
            return {key: np.asarray(archive[key]) for key in keys or archive}
    except Exception as error:  # zipfile and numpy raise a dozen types between them
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable npz archive: {error}") from error


def read_gzip(path: Path) -> bytes:
    """Inflate a ``.gz`` file; one that is a bomb is a DataError, as above."""
    inflate = zlib.decompressobj(wbits=31)
    most = _most(path)
    data = inflate.decompress(path.read_bytes(), most)
    if not inflate.eof:
        if len(data) < most:
            raise EOFError("the compressed file ends before its end marker")
        _check_size(path, most + 1)
    return data


def _most(path: Path) -> int:
    return max(LEAST, RATIO * path.stat().st_size)


def _check_size(path: Path, inflated: int) -> None:
    if inflated > _most(path):
        raise DataError(
            f"{path}: {path.stat().st_size} B inflate to {inflated} B; expected at "
            f"most {_most(path)} B, else it may be a bomb; store it uncompressed"
        )
