"""Small networks of the kinds that users have, for the proving ground."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

Norm = Callable[[int], nn.Module]


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., arXiv:1512.03385)."""

    def __init__(self, inner: int, outer: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = norm(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = norm(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inner != outer:
            convolution = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, norm(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's features."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet(shape: tuple[int, ...], classes: int, norm: Norm) -> nn.Module:
    """Three blocks of 16, 32 and 64 channels: 78 k parameters."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False),
        norm(16),
        nn.ReLU(),
        Block(16, 16, 1, norm),
        Block(16, 32, 2, norm),
        Block(32, 64, 2, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def cnn(
    shape: tuple[int, ...], classes: int, widths: tuple[int, int], *, norm: bool = False
) -> nn.Module:
    """Two 3x3 convolutions and two linear layers, with BatchNorm if asked for."""
    first, second = widths
    features = second * (shape[1] // 4) * (shape[2] // 4)
    layers: list[nn.Module] = []
    for inner, outer in ((shape[0], first), (first, second)):
        layers.append(nn.Conv2d(inner, outer, 3, padding=1))
        layers += [nn.BatchNorm2d(outer)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, classes)]
    return nn.Sequential(*layers)


def mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two hidden layers of 128 and 64 neurons."""
    size = int(torch.tensor(shape).prod())
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(size, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


class CharLSTM(nn.Module):
    """Predicts the next of 80 letters with two LSTM layers."""

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, 16)
        self.lstm = nn.LSTM(16, width, num_layers=2, batch_first=True)
        self.output = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of the letter that follows."""
        states, _ = self.lstm(self.embedding(x))
        return self.output(states[:, -1])


class Transformer(nn.Module):
    """Two encoder layers over the rows of an image, or over letters or words."""

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        width: int = 48,
        vocabulary: int = 80,
        last: bool = True,
    ) -> None:
        super().__init__()
        text = len(shape) == 1
        length = shape[0] if text else shape[1]
        self.embed: nn.Module = (
            nn.Embedding(vocabulary, width)
            if text
            else nn.Linear(shape[0] * shape[2], width)
        )
        self.text, self.last = text, text and last
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of the last state, or of the mean over all."""
        rows = x if self.text else x.transpose(1, 2).flatten(2)
        states = self.encoder(self.embed(rows) + self.place)
        return self.output(states[:, -1] if self.last else states.mean(1))


def _group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(4, width)


#: Name -> (shape of a sample, classes) -> network.
NETWORKS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "cnn": lambda shape, classes: cnn(shape, classes, (8, 16)),
    "cnn-bn": lambda shape, classes: cnn(shape, classes, (8, 16), norm=True),
    "wide-cnn": lambda shape, classes: cnn(shape, classes, (32, 64)),
    "resnet-gn": lambda shape, classes: resnet(shape, classes, _group_norm),
    "resnet-bn": lambda shape, classes: resnet(shape, classes, nn.BatchNorm2d),
    "mlp": mlp,
    "lstm": lambda _, classes: CharLSTM(classes),
    "transformer": Transformer,
    "word-transformer": lambda shape, classes: Transformer(
        shape, classes, vocabulary=300, last=False
    ),
}


def build(name: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Return a network with its own default initialization."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](shape, classes)
