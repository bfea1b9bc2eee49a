"""From ``(N, C, H, W)`` pixels or ``(N, T)`` tokens to ``(N, num_classes)`` logits.

The annotations say which sizes are possible; pydantic checks them on every call.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import ConfigDict, Field, validate_call
from torch import nn

from autoflip_flwr.errors import needs_extra

Positive: TypeAlias = Annotated[int, Field(strict=True, ge=1)]
_AtLeast4: TypeAlias = Annotated[int, Field(strict=True, ge=4)]
_AtLeast10: TypeAlias = Annotated[int, Field(strict=True, ge=10)]
_AtLeast22: TypeAlias = Annotated[int, Field(strict=True, ge=22)]
_AtLeast32: TypeAlias = Annotated[int, Field(strict=True, ge=32)]

#: Checks a call; its checks are made at the first one, which spares clients a tenth of
#: a second at each message.
checked = validate_call(config=ConfigDict(defer_build=True))


@checked
def cnn(
    num_classes: Positive,
    input_shape: tuple[Positive, _AtLeast4, _AtLeast4],
    *,
    channels: tuple[Positive, Positive] = (16, 32),
    hidden: Positive = 128,
) -> nn.Module:
    """Two 5x5 convolutions and two linear layers, for digits and MNIST.

    215,370 parameters for (1, 28, 28) and ten classes with the default widths.
    """
    return _plain(input_shape, channels, [hidden, num_classes], kernel=5, padding=2)


@checked
def cnn_bn(
    num_classes: Positive,
    input_shape: tuple[Positive, _AtLeast4, _AtLeast4],
    *,
    channels: tuple[Positive, Positive] = (16, 32),
    hidden: Positive = 128,
) -> nn.Module:
    """`cnn` with a BatchNorm behind each convolution."""
    plain = cnn(num_classes, input_shape, channels=channels, hidden=hidden)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in plain.named_children():
        modules[name] = module
        if isinstance(module, nn.Conv2d):
            modules[name.replace("conv", "norm")] = nn.BatchNorm2d(module.out_channels)
    return nn.Sequential(modules)


@checked
def cnn6(
    num_classes: Positive, input_shape: tuple[Positive, _AtLeast22, _AtLeast22]
) -> nn.Module:
    """Six weight layers for CIFAR: three unpadded 3x3 convolutions, three linear.

    Widths 64, 256, 512, then 2048, 1024, with a 2x2 maximum after each convolution.
    7,634,442 parameters for (3, 32, 32) and ten classes.
    """
    return _plain(input_shape, [64, 256, 512], [2048, 1024, num_classes])


@checked
def mnist_cnn(
    num_classes: Positive, input_shape: tuple[Positive, _AtLeast10, _AtLeast10]
) -> nn.Module:
    """Build our reading of the paper's six-layer CNN for MNIST.

    Three unpadded 3x3 convolutions of 32 channels, with a 2x2 maximum after the
    second, and linear layers of 2048 and 512. 7,628,682 parameters for (1, 28, 28) and
    ten classes. The paper counts 7,628,484 (198 fewer) and describes nothing.

    Found by trying stacks of two to five 3x3 or 5x5 convolutions in front of linear
    layers, six layers in all. The widths are powers of two: from 16 to 512 and not
    falling for the convolutions, from 64 to 2048 and not rising for the others. None
    has exactly the paper's number. Only one is nearer, with 186 parameters less, of
    five 5x5 convolutions and one linear layer; it needs many times the operations.
    """
    return _plain(input_shape, [32, 32, 32], [2048, 512, num_classes], pooled=(2,))


@checked
def femnist_cnn(
    num_classes: Positive, input_shape: tuple[Positive, _AtLeast10, _AtLeast10]
) -> nn.Module:
    """Build the paper's FEMNIST network: two wide 5x5 convolutions, two linear layers.

    13,180,734 parameters for (1, 28, 28) and 62 classes, exactly the paper's count.
    The linear layers see 7x7 pixels whatever the size of the image.
    """
    widths = [2048, num_classes]
    return _plain(input_shape, [64, 128], widths, kernel=5, padding=1, resize=7)


def _plain(
    input_shape: tuple[int, ...],
    channels: Sequence[int],
    widths: Sequence[int],
    *,
    kernel: int = 3,
    padding: int = 0,
    pooled: Sequence[int] = (1, 2, 3),
    resize: int | None = None,
) -> nn.Sequential:
    """Stack convolutions of `channels` and linear layers of `widths`, ReLU between.

    Behind the convolutions at the places `pooled`, counted from 1, is a 2x2 maximum.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    inner = input_shape[0]
    for place, outer in enumerate(channels, 1):
        modules[f"conv{place}"] = nn.Conv2d(inner, outer, kernel, padding=padding)
        inner = outer
        modules[f"relu{place}"] = nn.ReLU()
        if place in pooled:
            modules[f"pool{place}"] = nn.MaxPool2d(2)
    if resize is not None:
        modules["resize"] = nn.AdaptiveAvgPool2d(resize)
    modules["flatten"] = nn.Flatten()
    with torch.no_grad():
        width = nn.Sequential(modules)(torch.zeros(1, *input_shape)).numel()
    for place, following in enumerate(widths, 1):
        if place > 1:
            modules[f"relu{len(channels) + place - 1}"] = nn.ReLU()
        modules[f"fc{place}"] = nn.Linear(width, following)
        width = following
    return nn.Sequential(modules)


@checked
def efficientnet_b3(
    num_classes: Positive,
    input_shape: tuple[Literal[3], _AtLeast32, _AtLeast32],  # noqa: ARG001
) -> nn.Module:
    """Torchvision's EfficientNet-B3, untrained.

    10,711,602 parameters with ten classes; the paper says 10,838,784, which is 127,182
    more. BatchNorm's 87,296 averages of mean and variance are not among them.
    """
    return _torchvision("efficientnet_b3", num_classes)


@checked
def resnet50(
    num_classes: Positive,
    input_shape: tuple[Literal[3], _AtLeast32, _AtLeast32],  # noqa: ARG001
) -> nn.Module:
    """Torchvision's ResNet-50, untrained.

    23,712,932 parameters with a hundred classes; the paper says 23,755,900, which is
    42,968 more. BatchNorm's 53,120 averages of mean and variance are not among them.
    """
    return _torchvision("resnet50", num_classes)


def _torchvision(name: str, num_classes: int) -> nn.Module:
    with needs_extra("app", name):
        from torchvision import models  # a second to import

    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    return model


class CharLSTM(nn.Module):
    """Predict the next character from the characters before it.

    An embedding, a two-layer LSTM, and a linear layer on the last time step, for
    sequences of any length. See `char_lstm` for the sizes.
    """

    def __init__(
        self, num_classes: int, *, vocabulary: int, embedding: int, hidden: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of the character that follows each sequence."""
        states, _ = self.lstm(self.embedding(tokens))
        logits: torch.Tensor = self.output(states[:, -1])
        return logits


@checked
def char_lstm(
    num_classes: Positive,
    input_shape: tuple[Positive],  # noqa: ARG001
    *,
    embedding: Positive = 24,
    hidden: Positive = 640,
    vocabulary: Positive = 80,
) -> nn.Module:
    """Build a `CharLSTM` for tokens in ``[0, vocabulary)``.

    5,040,080 parameters with 80 classes (the paper says 5,040,000); LEAF's own
    ``embedding=8, hidden=256`` gives 819,920.
    """
    return CharLSTM(
        num_classes, vocabulary=vocabulary, embedding=embedding, hidden=hidden
    )
