"""The initial weights ``W0`` that every client explores and trains from."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}


def xavier_normal_(
    model: nn.Module, *, generator: torch.Generator | None = None
) -> nn.Module:
    """Draw new weights from Xavier's normal distribution, in place.

    Every parameter with two or more dimensions, embeddings and recurrent matrices
    included, gets mean 0 and variance ``2 / (fan_in + fan_out)``; every bias gets
    zeros. An LSTM or GRU stacks the matrices of its gates in one parameter: each gate
    is drawn as a matrix of its own, else its fan would be several times too large.
    Normalization layers, and vectors that are no biases, stay as they are. Without a
    generator torch's global randomness is used.
    """
    for module in model.modules():
        if isinstance(module, _NORMS):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                for gate in parameter.detach().chunk(_gates(module, name)):
                    nn.init.xavier_normal_(gate, generator=generator)
            elif "bias" in name:
                nn.init.zeros_(parameter)
    return model


def _gates(module: nn.Module, name: str) -> int:
    if name.startswith("weight_hr"):  # an LSTM's projection is one matrix
        return 1
    return next((n for kind, n in _GATES.items() if isinstance(module, kind)), 1)
