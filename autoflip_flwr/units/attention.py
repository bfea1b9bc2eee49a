"""The heads of attention: where they are in the tensors, and modules with fewer.

A head is its rows of the query, key and value matrices and its columns of the output
matrix. Where several query heads read one head of keys and values, they go together.
At zero weights a head's values are zero, whatever it attends to. nn.MultiheadAttention
is known by its class, others by the names of their matrices: the proof rejects those
that compute something else.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from autoflip_flwr.units import layers
from autoflip_flwr.units.layers import join
from autoflip_flwr.units.partial import PartialAttention, PartialWindowAttention

#: The modules that make queries, keys, values and the output. One that makes several
#: of them stands there several times.
_LAYOUTS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen, ViT
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # BART, OPT, CLIP, Whisper
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT, RoBERTa
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("c_attn", "c_attn", "c_attn", "c_proj"),  # GPT-2
    ("q_attn", "c_attn", "c_attn", "c_proj"),  # and its cross-attention
    ("qkv", "qkv", "qkv", "proj"),  # Swin, timm
)

# What modules call the width of a head, the number of heads, and the width of all.
_WIDTHS = ("head_dim", "attention_head_size")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
_TOTALS = ("all_head_size", "split_size", "attn_dim")

_TABLE = "relative_position_bias_table"  # of Swin: a column per head

#: A tensor and a dimension of it.
_Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one attention module."""

    count: int  # heads of keys and values, each with the query heads that read it
    width: int  # columns of the output matrix that belong to each
    output: str  # name of the output matrix
    #: Tensor, dimension, the head of each index along it.
    owners: tuple[tuple[str, int, NDArray[np.int64]], ...]
    projections: frozenset[str]  # modules between the heads and the other channels
    holder: str  # path of the module that knows the number of heads


def find(model: nn.Module) -> dict[str, Heads]:
    """Return the heads of all attention that we know, by the modules' paths."""
    found = {path: _heads(path, module) for path, module in model.named_modules()}
    return {path: heads for path, heads in found.items() if heads is not None}


def resize(small: nn.Module, path: str, whole: Heads) -> None:
    """Tell an attention module, whose tensors are smaller, how many heads it has."""
    module, holder = small.get_submodule(path), small.get_submodule(whole.holder)
    columns = whole.width * whole.count
    _, dim, _ = whole.owners[-1]
    left = small.get_parameter(whole.output).shape[dim]
    for name in (*_COUNTS, *_TOTALS):
        if isinstance(vars(holder).get(name), int):
            setattr(holder, name, getattr(holder, name) * left // columns)
    if isinstance(module, nn.MultiheadAttention):
        small.set_submodule(path, PartialAttention(module))
        for parent, encoder in small.named_modules():
            if isinstance(encoder, nn.TransformerEncoder) and path.startswith(parent):
                encoder.use_nested_tensor = False  # for torch's own attention alone
    elif type(module).__name__ == "ShiftedWindowAttention":
        small.set_submodule(path, PartialWindowAttention(module))


def _heads(path: str, module: nn.Module) -> Heads | None:
    names = next((n for n in _LAYOUTS if _has(module, n)), ())
    if isinstance(module, nn.MultiheadAttention):
        if module.bias_k is not None or module.add_zero_attn:
            return None
        roles, output, inner = _of_torch(module), ("out_proj.weight", 1), ""
    elif names:
        roles = [
            [
                (join(name, tensor), dim)
                for tensor, dim in layers.tensors(module.get_submodule(name), True)
            ]
            for name in names[:3]
        ]
        ((tensor, dim),) = layers.tensors(module.get_submodule(names[3]), False)
        output, inner = (join(names[3], tensor), dim), names[0].rpartition(".")[0]
    else:
        return None
    parts = Counter(place for role in roles for place in role)

    def size(place: _Place) -> int:
        """Return the indices that make one of queries, keys and values."""
        name, dim = place
        return int(module.get_parameter(name).shape[dim]) // parts[place]

    queries, keys = size(roles[0][0]), size(roles[1][0])
    own = vars(module.get_submodule(inner))
    numbers = {k: n for k, n in own.items() if isinstance(n, int) and n > 0}
    width = next((numbers[name] for name in _WIDTHS if name in numbers), 0)
    heads = next((numbers[name] for name in _COUNTS if name in numbers), 1)
    count = keys // (width or max(1, queries // heads))
    if isinstance(getattr(module, _TABLE, None), nn.Parameter):
        parts[_TABLE, 1] = 1
    parts[output] = 1
    if not count or any(size(place) % count for place in parts):
        return None
    owners = [
        (
            join(path, place[0]),
            place[1],
            np.tile(np.repeat(np.arange(count), size(place) // count), times),
        )
        for place, times in parts.items()
    ]
    return Heads(
        count=count,
        width=size(output) // count,
        output=join(path, output[0]),
        owners=tuple(owners),
        projections=frozenset(join(path, name) for name in names or ("", "out_proj")),
        holder=join(path, inner),
    )


def _has(module: nn.Module, names: tuple[str, ...]) -> bool:
    try:
        return all(layers.is_linear(module.get_submodule(name)) for name in names)
    except AttributeError:
        return False


def _of_torch(module: nn.MultiheadAttention) -> list[list[_Place]]:
    """Return where queries, keys and values are made, by weights and biases."""
    fused = module.in_proj_weight is not None
    return [
        [("in_proj_weight" if fused else f"{role}_proj_weight", 0)]
        + ([("in_proj_bias", 0)] if module.in_proj_bias is not None else [])
        for role in "qkv"
    ]
