"""Names of modules and tensors inside a model."""

from torch import nn


def join(path: str, name: str) -> str:
    """Return the full name of a tensor or module below a path."""
    return f"{path}.{name}" if path and name else path or name


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
