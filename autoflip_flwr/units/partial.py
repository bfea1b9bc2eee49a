"""Modules that compute what the whole ones do, without channels that are all zeros."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional


class PartialNorm(nn.Module):
    """LayerNorm or GroupNorm; mean and variance are over the missing channels, too.

    The weights of `whole` are those of the `channels` that are there, its sizes the
    whole's. A `LayerNorm2d`, as torchvision and timm name theirs, has its channels in
    dimension 1.
    """

    def __init__(
        self, whole: nn.LayerNorm | nn.GroupNorm, channels: NDArray[np.int64]
    ) -> None:
        super().__init__()
        if isinstance(whole, nn.GroupNorm):
            self.width, self.groups, self._dim = whole.num_channels, whole.num_groups, 1
        else:
            self.width, self.groups = whole.normalized_shape[0], 0
            self._dim = 1 if type(whole).__name__ == "LayerNorm2d" else -1
        self.eps = whole.eps
        self.weight, self.bias = whole.weight, whole.bias
        self.affine = True
        there = torch.from_numpy(channels).to(self.weight.device)
        self.register_buffer("_there", there, persistent=False)
        self.training = whole.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return an array of the shape of `x`."""
        given, own = x.dtype, self.weight.dtype
        if given != own and not torch.is_autocast_enabled(x.device.type):
            return self.forward(x.to(own)).to(given)  # as the whole one's class does
        if not self.groups:  # the zeros may stand anywhere
            x = x.movedim(self._dim, -1)
            missing = (0, self.width - x.shape[-1])
            weight = functional.pad(self.weight, missing)
            bias = None if self.bias is None else functional.pad(self.bias, missing)
            normal = functional.layer_norm(
                functional.pad(x, missing), [self.width], weight, bias, self.eps
            )
            return normal[..., : x.shape[-1]].movedim(-1, self._dim)
        weight, bias = self._widened(self.weight), self._widened(self.bias)
        x = self._widened(x, 1)
        x = functional.group_norm(x, self.groups, weight, bias, self.eps)
        return x.index_select(1, self.get_buffer("_there"))

    def _widened(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Put zeros where channels are missing."""
        shape = list(x.shape)
        shape[dim] = self.width
        return x.new_zeros(shape).index_copy(dim, self.get_buffer("_there"), x)

    def extra_repr(self) -> str:
        """Show what mean and variance are over."""
        return f"{self.width}, groups={self.groups}, eps={self.eps}"


class PartialAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention with heads that are narrower than its width demands.

    Tensors and `num_heads` of `whole` are those of the heads that are there, its
    `head_dim` and `embed_dim` the whole's. Attention weights are averaged over the
    heads that are there.
    """

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        vars(self).update(vars(whole))
        # Others then leave it alone: torch's fused kernels divide `embed_dim`.
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return outputs and attention weights, as nn.MultiheadAttention does."""
        del is_causal  # a hint about the mask
        inputs, batched = [query, key, value], query.dim() == 3
        if not batched:
            inputs = [x.unsqueeze(0) for x in inputs]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        weights = (
            [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
            if self.in_proj_weight is None
            else self.in_proj_weight.chunk(3)
        )
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = map(functional.linear, inputs, weights, biases)
        q, k, v = (
            x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            for x in projected
        )
        mask = _additive(attn_mask, q)
        if mask is not None and mask.dim() == 3:  # one per sample and head
            mask = mask.reshape(len(q), -1, *mask.shape[1:])
        padding = _additive(key_padding_mask, q)
        if padding is not None:
            padding = padding.view(-1, 1, 1, padding.shape[-1])
            mask = padding if mask is None else mask + padding
        rate = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            shares = (scores if mask is None else scores + mask).softmax(-1)
            shares = functional.dropout(shares, rate)
            made = shares @ v
            shares = shares.mean(1) if average_attn_weights else shares
        else:
            made = functional.scaled_dot_product_attention(q, k, v, mask, rate)
        output = self.out_proj(made.transpose(1, 2).flatten(2))
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        return output, shares if batched else shares.squeeze(0)


class PartialWindowAttention(nn.Module):
    """Torchvision's ShiftedWindowAttention, of which some heads are missing."""

    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int
    window_size: list[int]
    shift_size: list[int]
    dropout: float
    attention_dropout: float
    relative_position_bias_table: torch.Tensor
    relative_position_index: torch.Tensor

    def __init__(self, whole: nn.Module) -> None:
        vars(self).update(vars(whole))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return an array of the shape of `x`, (batch, height, width, channels)."""
        batch, height, width, channels = x.shape
        tall, wide = self.window_size
        x = functional.pad(x, (0, 0, 0, -width % wide, 0, -height % tall))
        sizes = x.shape[1:3]
        shifts = [
            0 if window >= size else shift
            for window, size, shift in zip(
                self.window_size, sizes, self.shift_size, strict=True
            )
        ]
        x = self._windows(x.roll([-shift for shift in shifts], (1, 2)))
        qkv = self.qkv(x).reshape(*x.shape[:3], 3, self.num_heads, -1)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # batch, window, head, place, channel
        bias = self.relative_position_bias_table[self.relative_position_index]
        mask = bias.view(tall * wide, tall * wide, -1).permute(2, 0, 1)
        if any(shifts):  # places that were apart do not see each other
            zones = self._windows(self._zones(sizes, shifts, x))[0].flatten(1)
            apart = zones.unsqueeze(1) != zones.unsqueeze(2)
            mask = mask - 100 * apart.to(mask).unsqueeze(1)
        rate = self.attention_dropout if self.training else 0.0
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + mask
        made = functional.dropout(scores.softmax(-1), rate) @ v
        x = self.proj(made.transpose(2, 3).flatten(3))
        x = functional.dropout(x, self.dropout, self.training)
        x = x.view(batch, -1, sizes[1] // wide, tall, wide, channels).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2).roll(shifts, (1, 2))
        return x[:, :height, :width].contiguous()

    def _windows(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, windows, places of a window, channels)."""
        batch, height, width, channels = x.shape
        tall, wide = self.window_size
        x = x.reshape(batch, height // tall, tall, width // wide, wide, channels)
        return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)

    def _zones(self, sizes: Any, shifts: list[int], like: torch.Tensor) -> torch.Tensor:
        """Return which parts of a shifted image lie together: (1, height, width, 1)."""
        axes = []
        for size, window, shift in zip(sizes, self.window_size, shifts, strict=True):
            place = torch.arange(size, device=like.device)
            later = (place >= size - window).int() + (place >= size - shift).int()
            axes.append(later * bool(shift))
        zones: torch.Tensor = 3 * axes[0].unsqueeze(1) + axes[1]
        return zones[None, ..., None]


def _additive(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """Return a mask to add to scores: minus infinity where a bool one is True."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
