"""Every error this package raises on purpose.

A message says what was expected, what came, and what to do about it.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class AutoFlipError(Exception):
    """Base of all errors of this package."""


class SettingsError(AutoFlipError, ValueError):
    """A preset, override or argument is unknown, of the wrong type or impossible."""


class DataError(AutoFlipError, ValueError):
    """A data file is missing, broken or not what its name promises."""


class ModelError(AutoFlipError, ValueError):
    """A model cannot be built, or arrays do not fit the model."""


class GuidanceError(AutoFlipError, ValueError):
    """Local guidance is missing, not finite or of the wrong shape."""


class MaskError(AutoFlipError, ValueError):
    """A mask cannot be made as asked, or does not fit what it is applied to."""


class WireError(AutoFlipError, ValueError):
    """Bytes or records from a peer do not have the form the protocol gives them."""


class CheckpointError(AutoFlipError, RuntimeError):
    """A checkpoint cannot be written, is torn, or belongs to another run."""


class FlowerVersionError(AutoFlipError, ImportError):
    """The installed Flower is older than what this package works with."""


class MissingExtraError(AutoFlipError, ImportError):
    """Something was called that an extra of this package installs."""


class ExplorationError(AutoFlipError, RuntimeError):
    """No node completed its exploration, so no mask can be made."""


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Turn a failed import inside the block into the command that cures it.

    Raises
    ------
    MissingExtraError
        If a package that `extra` installs is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, AutoFlipError) or (error.name or "").startswith(
            "autoflip_flwr"
        ):
            raise
        raise MissingExtraError(
            f"{what} needs the package {error.name}: "
            f"pip install 'autoflip-flwr[{extra}]'"
        ) from error
