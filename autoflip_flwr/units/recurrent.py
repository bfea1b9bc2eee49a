"""The rules that Torch-Pruning lacks: hidden units of nn.LSTM, nn.GRU and nn.RNN.

A hidden unit is a row of every gate, the column of the recurrent matrix that reads it,
and the columns of what comes next. At zero weights it stays at zero: an LSTM's cell
gets 0.5 * 0 + 0.5 * tanh(0), a GRU's state 0.5 * tanh(0) + 0.5 * 0.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from autoflip_flwr.method.structured import Numbers


class Steps(nn.Linear):
    """What a recurrent module is to the graph: input channels to hidden ones."""

    def __init__(self, module: nn.RNNBase) -> None:
        directions = 2 if module.bidirectional else 1
        width = directions * (module.proj_size or module.hidden_size)
        # On "meta" it draws no random numbers.
        super().__init__(module.input_size, width, bias=False, device="meta")
        first = next(module.parameters())
        self.weight = nn.Parameter(first.new_ones(width, module.input_size))
        self.directions = directions
        self.projected = module.proj_size > 0


class _StandIn(nn.Module):
    """Returns what a recurrent module returns, in shape, from one traceable step.

    All hidden states are those of the last layer: the proof rejects the channels of an
    app that reads others.
    """

    mode: str
    num_layers: int
    batch_first: bool

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        self.steps = Steps(module)
        # What an app may ask a recurrent module.
        self.__dict__.update({n: getattr(module, n) for n in module.__constants__})

    def flatten_parameters(self) -> None:
        """Do nothing: there is one matrix."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Return outputs and states."""
        del hx
        if isinstance(input, PackedSequence):
            made = self.steps(input.data)
            last = made[: int(input.batch_sizes[0])]
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


def flatten(model: nn.Module) -> None:
    """Lay the weights of each recurrent module side by side, as cuDNN wants them.

    In a copied module they are apart: on a GPU every call then copies them together,
    and warns. On a CPU nothing changes.
    """
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()


def replace(model: nn.Module) -> dict[str, nn.RNNBase]:
    """Put stand-ins for all recurrent modules; return these by path."""
    originals = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.RNNBase)
    }
    for path, module in originals.items():
        model.set_submodule(path, _StandIn(module))
    return originals


def tensors(
    module: nn.RNNBase, out: bool, channels: Numbers
) -> Iterator[tuple[str, int, Numbers, Numbers]]:
    """Yield the tensors and dimensions that channels of a module are indices of.

    With each the rows, and for every row its place in `channels`: an output channel
    is a row per gate, in the matrices of its own direction.
    """
    places = np.arange(len(channels))
    if not out:
        for suffix in _suffixes(module, 0):
            yield f"weight_ih{suffix}", 1, channels, places
        return
    width = module.proj_size or module.hidden_size
    for direction, suffix in enumerate(_suffixes(module, module.num_layers - 1)):
        units = channels - direction * width
        mine = (units >= 0) & (units < width)
        yield from _gates(module, suffix, units[mine], places[mine])


def inner_layers(
    module: nn.RNNBase,
) -> Iterator[tuple[str, list[tuple[str, int, Numbers, Numbers]]]]:
    """Yield the name of each layer that only the next one reads, and its tensors."""
    units = np.arange(module.hidden_size)
    for layer in range(module.num_layers - 1):
        for direction, suffix in enumerate(_suffixes(module, layer)):
            held = list(_gates(module, suffix, units, units))
            columns = units + direction * module.hidden_size
            for after in _suffixes(module, layer + 1):
                held.append((f"weight_ih{after}", 1, columns, units))
            yield f"hidden{suffix}", held


def _suffixes(module: nn.RNNBase, layer: int) -> list[str]:
    return [f"_l{layer}"] + ([f"_l{layer}_reverse"] if module.bidirectional else [])


def _gates(
    module: nn.RNNBase, suffix: str, units: Numbers, places: Numbers
) -> Iterator[tuple[str, int, Numbers, Numbers]]:
    """Yield the rows of every gate, and the column that reads them back."""
    gates = len(next(module.parameters())) // module.hidden_size
    rows = np.concatenate([units + gate * module.hidden_size for gate in range(gates)])
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        if hasattr(module, name + suffix):
            yield name + suffix, 0, rows, np.tile(places, gates)
    yield f"weight_hh{suffix}", 1, units, places
