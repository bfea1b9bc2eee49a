"""A run's folder: its name, whether a run may use it, and the masks in it."""

from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.app.data.archive import read_npz
from autoflip_flwr.errors import DataError, SettingsError
from autoflip_flwr.settings import Settings


def run_directory(name: str, settings: Settings) -> Path:
    """Return a run's folder; without a name `runs/<preset>-<strategy>-<time>`."""
    if not name:
        now = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S-%f")
        name = f"runs/{settings.preset}-{settings.strategy.name}-{now}"
    return Path(name).resolve()


def is_finished(directory: Path) -> bool:
    """Tell whether a run in this folder has ended well."""
    return (directory / "summary.json").exists()


def check_usable(directory: Path, *, resume: bool) -> None:
    """Refuse a folder that holds a finished run, and without `resume` any run."""
    if resume and is_finished(directory):
        raise SettingsError(
            f"the run in {directory} is finished; to run it again name a new folder"
        )
    if not resume and (directory / "settings.yaml").exists():
        raise SettingsError(
            f"output-dir {directory} holds another run; name a new folder, or go "
            "on with it: --resume, or resume=true with flwr run"
        )


def masks_of(directory: Path) -> dict[str, NDArray[np.bool_]]:
    """Return the last masks of a run by parameter; none if its strategy is dense."""
    path = directory / "mask.npz"
    if not path.exists():
        return {}
    try:
        masks = read_npz(path)
        return {name: keep.astype(np.bool_) for name, keep in masks.items()}
    except ValueError as error:
        raise DataError(
            f"{path}: expected the masks of a run, got {error}; run it again, or "
            "delete the file"
        ) from error
