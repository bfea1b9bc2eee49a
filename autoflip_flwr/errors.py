"""Every error this package raises on purpose.

A message says what was expected, what came, and what to do about it.
"""


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


class ExplorationError(AutoFlipError, RuntimeError):
    """No node completed its exploration, so no mask can be made."""
