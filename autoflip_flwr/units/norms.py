"""Normalization over channels of which some are missing, as zeros."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


class PartialLayerNorm(nn.Module):
    """LayerNorm over `width` channels, of which those that are zero are not there.

    Mean and variance are over all of them, so the result for the others is what
    `nn.LayerNorm` computes on the whole.

    Parameters
    ----------
    whole : nn.LayerNorm
        Holds the weights of the channels that are there; its `normalized_shape` is
        still the whole width. A `LayerNorm2d`, as torchvision and timm name theirs,
        has its channels in dimension 1.
    """

    def __init__(self, whole: nn.LayerNorm) -> None:
        super().__init__()
        self.width = whole.normalized_shape[0]
        self.eps = whole.eps
        self.weight = whole.weight
        self.bias = whole.bias
        self.elementwise_affine = whole.elementwise_affine
        self._dim = 1 if type(whole).__name__ == "LayerNorm2d" else -1
        self.training = whole.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return an array of the shape of `x`."""
        given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        there = x.shape[self._dim]
        mean = x.sum(self._dim, keepdim=True) / self.width
        centred = x - mean
        missing = (self.width - there) * mean.square()
        squares = centred.square().sum(self._dim, keepdim=True) + missing
        normal = centred * (squares / self.width + self.eps).rsqrt()
        shape = [1] * x.ndim
        shape[self._dim] = there
        if self.weight is not None:
            normal = normal * self.weight.view(shape)
        if self.bias is not None:
            normal = normal + self.bias.view(shape)
        return normal.to(given)

    def extra_repr(self) -> str:
        """Show the width that mean and variance are over."""
        return f"{self.width}, eps={self.eps}"


class PartialGroupNorm(nn.Module):
    """GroupNorm over channels of which those that are zero are not there.

    Parameters
    ----------
    whole : nn.GroupNorm
        Holds the weights of the channels that are there; its `num_channels` and
        `num_groups` are still the whole's.
    channels : int array
        Which of the whole's channels are there.
    """

    def __init__(self, whole: nn.GroupNorm, channels: NDArray[np.int64]) -> None:
        super().__init__()
        self.num_groups = whole.num_groups
        self.width = whole.num_channels // whole.num_groups
        self.eps = whole.eps
        self.weight = whole.weight
        self.bias = whole.bias
        self.affine = whole.affine
        group = torch.from_numpy(channels // self.width).to(whole.weight.device)
        self.register_buffer("_group", group, persistent=False)
        there = torch.bincount(group, minlength=self.num_groups)
        self.register_buffer("_missing", self.width - there, persistent=False)
        self.training = whole.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return an array of the shape of `x`, channels in dimension 1."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        flat = exact.flatten(2) if x.ndim > 2 else exact.unsqueeze(2)
        group: torch.Tensor = self.get_buffer("_group")
        missing: torch.Tensor = self.get_buffer("_missing")
        count = self.width * flat.shape[2]
        zeros = flat.new_zeros(flat.shape[0], self.num_groups)
        mean = zeros.index_add(1, group, flat.sum(2).to(zeros)) / count
        centred = flat - mean[:, group].unsqueeze(2)
        squares = zeros.index_add(1, group, centred.square().sum(2).to(zeros))
        squares = squares + missing * flat.shape[2] * mean.square()
        scale = (squares / count + self.eps).rsqrt()[:, group]
        normal = centred * (scale * self.weight).unsqueeze(2)
        return (normal + self.bias.unsqueeze(1)).view_as(x).to(x.dtype)

    def extra_repr(self) -> str:
        """Show what mean and variance are over."""
        return f"{self.num_groups} groups of {self.width}, eps={self.eps}"
