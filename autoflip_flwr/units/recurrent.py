"""The rules that Torch-Pruning lacks: hidden units of nn.LSTM, nn.GRU and nn.RNN.

A hidden unit is a row of every gate, the column of the recurrent matrix that reads it,
and the columns of what comes next. At zero weights it stays at zero: an LSTM's cell
gets 0.5 * 0 + 0.5 * tanh(0), a GRU's state 0.5 * tanh(0) + 0.5 * 0.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence
from torch_pruning.pruner.function import BasePruningFunc

Rows: TypeAlias = NDArray[np.int64]


class Steps(nn.Module):
    """What a recurrent module is to the graph: input channels to hidden ones."""

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        width = module.proj_size or module.hidden_size
        self.directions = 2 if module.bidirectional else 1
        self.projected = module.proj_size > 0
        first = next(module.parameters())
        self.weight = nn.Parameter(
            first.new_ones(self.directions * width, module.input_size)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(..., directions * hidden)``."""
        return functional.linear(x, self.weight)


class StepsPruner(BasePruningFunc):  # type: ignore[misc]
    """How Torch-Pruning sees `Steps`: which of two functions couples what.

    It never calls them; `surgery` takes units out.
    """

    TARGET_MODULES = Steps

    def prune_out_channels(self, layer: Steps, idxs: Sequence[int]) -> Steps:
        """Stand for output channels."""
        del idxs
        return layer

    def prune_in_channels(self, layer: Steps, idxs: Sequence[int]) -> Steps:
        """Stand for input channels."""
        del idxs
        return layer

    def get_out_channels(self, layer: Steps) -> int:
        """Return the hidden units of all directions."""
        return layer.weight.shape[0]

    def get_in_channels(self, layer: Steps) -> int:
        """Return the width of one step's input."""
        return layer.weight.shape[1]


#: What an app may ask a recurrent module.
_SETTINGS = (
    "mode",
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
)


class _StandIn(nn.Module):
    """Returns what a recurrent module returns, in shape, from one traceable step.

    All hidden states are made of the last layer's: an app that reads those of others
    is found out by the proof.
    """

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        self.steps = Steps(module)
        self._settings = {name: getattr(module, name) for name in _SETTINGS}

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("_settings", {})
        return settings[name] if name in settings else super().__getattr__(name)

    def flatten_parameters(self) -> None:
        """Do nothing: there is one matrix."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Return outputs and states."""
        del hx
        if isinstance(input, PackedSequence):
            made = self.steps(input.data)
            last = made[-1:].expand(int(input.batch_sizes[0]), -1)
            output: Any = PackedSequence(
                made, input.batch_sizes, input.sorted_indices, input.unsorted_indices
            )
        else:
            output = self.steps(input)
            time = 0 if output.ndim == 2 or not self.batch_first else 1
            last = output.select(time, -1)
        width = last.shape[-1] // self.steps.directions
        ends = [
            last if self.steps.directions == 1 else last.narrow(-1, start, width)
            for start in range(0, last.shape[-1], width)
        ] * self.num_layers
        hidden = torch.stack(ends) if len(ends) > 1 else ends[0].unsqueeze(0)
        return output, (hidden, hidden) if self.mode == "LSTM" else hidden


def replace(model: nn.Module) -> dict[str, nn.RNNBase]:
    """Put stand-ins for all recurrent modules; return these by path."""
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.RNNBase)
    }
    for path, module in found.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _StandIn(module))
    return found


def tensors(
    module: nn.RNNBase, out: bool, channels: Rows
) -> Iterator[tuple[str, int, Rows, Rows]]:
    """Yield the tensors and dimensions that channels of a module are indices of.

    With each the rows, and for every row its place in `channels`: an output channel
    is a row per gate, in the matrices of its own direction.
    """
    places = np.arange(len(channels))
    if not out:
        for suffix in _suffixes(module, 0):
            yield f"weight_ih{suffix}", 1, channels, places
        return
    for direction, suffix in enumerate(_suffixes(module, module.num_layers - 1)):
        units = channels - direction * module.hidden_size
        mine = (units >= 0) & (units < module.hidden_size)
        yield from _gates(module, suffix, units[mine], places[mine])


def inner_layers(
    module: nn.RNNBase,
) -> Iterator[tuple[str, list[tuple[str, int, Rows, Rows]]]]:
    """Yield the name of each layer that only the next one reads, and its tensors."""
    units = np.arange(module.hidden_size)
    for layer in range(module.num_layers - 1):
        for direction, suffix in enumerate(_suffixes(module, layer)):
            held = list(_gates(module, suffix, units, units))
            columns = units + direction * module.hidden_size
            for after in _suffixes(module, layer + 1):
                held.append((f"weight_ih{after}", 1, columns, units))
            yield f"hidden{suffix}", held


def hidden_weights(module: nn.RNNBase) -> list[str]:
    """Return the recurrent matrices: their columns are the hidden units."""
    return [
        f"weight_hh{suffix}"
        for layer in range(module.num_layers)
        for suffix in _suffixes(module, layer)
    ]


def weights(module: nn.RNNBase) -> list[str]:
    """Return the names of all matrices."""
    return [
        name for name, parameter in module.named_parameters() if parameter.ndim == 2
    ]


def _suffixes(module: nn.RNNBase, layer: int) -> list[str]:
    return [f"_l{layer}"] + ([f"_l{layer}_reverse"] if module.bidirectional else [])


def _gates(
    module: nn.RNNBase, suffix: str, units: Rows, places: Rows
) -> Iterator[tuple[str, int, Rows, Rows]]:
    """Yield the rows of every gate, and the column that reads them back."""
    gates = len(next(module.parameters())) // module.hidden_size
    rows = np.concatenate([units + gate * module.hidden_size for gate in range(gates)])
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        if hasattr(module, name + suffix):
            yield name + suffix, 0, rows, np.tile(places, gates)
    yield f"weight_hh{suffix}", 1, units, places
