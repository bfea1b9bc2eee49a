"""Example inputs of a model, and the tensors in what goes in and comes out."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

#: One tensor, or the positional arguments of the model.
ExampleInputs: TypeAlias = torch.Tensor | tuple[Any, ...]


def arguments(
    example_inputs: ExampleInputs, like: nn.Module | None = None
) -> tuple[Any, ...]:
    """Return example inputs as arguments; copied to the device of a model."""
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    own = [] if like is None else [*like.parameters(), *like.buffers()]
    if not own:
        return given
    return tuple(mapped(lambda x: x.to(own[0].device).clone(), each) for each in given)


def mapped(function: Callable[[torch.Tensor], object], value: Any) -> Any:
    """Apply a function to all tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(mapped(function, item) for item in value)
    return value


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors a model returns, alone or in containers."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors_of(value)


def described(inputs: tuple[Any, ...]) -> list[str]:
    """Return what an error message says of inputs."""
    return [
        f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
        if isinstance(value, torch.Tensor)
        else type(value).__name__
        for value in inputs
    ]


def first_line(error: Exception) -> str:
    """Return what a message says of an error of the model's own code."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
