"""The errors of this package.

A message gives the expected value, the actual value and the remedy.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class AutoFlipError(Exception):
    """Base of all errors of this package."""


class SettingsError(AutoFlipError, ValueError):
    """A preset, override or argument is unknown, invalid or of the wrong type."""


class DataError(AutoFlipError, ValueError):
    """A data file is missing, broken or in another format than expected."""


class ModelError(AutoFlipError, ValueError):
    """A model cannot be built, or arrays do not fit the model."""


class GuidanceError(AutoFlipError, ValueError):
    """Local guidance is missing, not finite or of the wrong shape."""


class MaskError(AutoFlipError, ValueError):
    """A mask cannot be made, or does not fit the arrays it is applied to."""


class WireError(AutoFlipError, ValueError):
    """Bytes or records from a peer violate the protocol."""


class CheckpointError(AutoFlipError, RuntimeError):
    """A checkpoint cannot be written, is torn, or belongs to another run."""


class FlowerVersionError(AutoFlipError, ImportError):
    """The installed Flower is too old for this package."""


class MissingExtraError(AutoFlipError, ImportError):
    """A function needs a package of an extra that is not installed."""


class NodesError(AutoFlipError, RuntimeError):
    """Fewer nodes are connected than a run asks for."""


class ReplyError(AutoFlipError, RuntimeError):
    """A round lost all its replies for good, or no round of a run changed the model."""


class ExplorationError(AutoFlipError, RuntimeError):
    """No node completed its exploration, so no mask can be made."""


def one_line(text: str, most: int = 2000) -> str:
    """Return a peer's text so that a log shows it as one line, of bounded length."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:most])
    return shown if len(text) <= most else f"{shown} ... ({len(text)} characters)"


def by_reason(reasons: Mapping[int, str]) -> dict[str, list[int]]:
    """Return reason -> nodes, so that a reason that many share is told once."""
    nodes: dict[str, list[int]] = {}
    for node_id, reason in reasons.items():
        nodes.setdefault(reason, []).append(node_id)
    return nodes


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Replace a failed import in the block by an error that names the extra.

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
