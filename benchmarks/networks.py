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


class GRU(nn.Module):
    """A text classifier: one bidirectional GRU layer, the maximum over words."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 32)
        self.gru = nn.GRU(32, 48, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.2)
        self.output = nn.Linear(96, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of a text."""
        states, _ = self.gru(self.embedding(x))
        return self.output(self.dropout(states.amax(1)))


def conv1d(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Three convolutions over a series, with BatchNorm."""
    layers: list[nn.Module] = []
    for inner, outer in ((shape[0], 16), (16, 32), (32, 64)):
        convolution = nn.Conv1d(inner, outer, 5, padding=2)
        layers += [convolution, nn.BatchNorm1d(outer), nn.ReLU(), nn.MaxPool1d(2)]
    pool = nn.AdaptiveAvgPool1d(1)
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(64, classes))


def tabular(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two hidden layers over a table, with BatchNorm and dropout."""
    return nn.Sequential(
        nn.Linear(shape[0], 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


class Recommender(nn.Module):
    """Embeddings of users and items, and a perceptron (He et al., arXiv:1708.05031)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(60, 16), nn.Embedding(80, 16)
        self.layers = nn.Sequential(
            nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of pairs of a user and an item."""
        return self.layers(torch.cat([self.users(x[:, 0]), self.items(x[:, 1])], 1))


class Mixer(nn.Module):
    """Three blocks over patches of 4 x 4 (Tolstikhin et al., arXiv:2105.01601)."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 48) -> None:
        super().__init__()
        patches = (shape[1] // 4) * (shape[2] // 4)
        self.patch = nn.Conv2d(shape[0], width, 4, 4)
        self.places, self.channels = nn.ModuleList(), nn.ModuleList()
        for _ in range(3):
            self.places.append(self._block(width, patches, 64))
            self.channels.append(self._block(width, width, 96))
        self.output = nn.Linear(width, classes)

    @staticmethod
    def _block(width: int, size: int, hidden: int) -> nn.ModuleList:
        layers = nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size)
        return nn.ModuleList([nn.LayerNorm(width), nn.Sequential(*layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of an image."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        for (norm, mix), (norm2, mix2) in zip(self.places, self.channels, strict=True):
            x = x + mix(norm(x).transpose(1, 2)).transpose(1, 2)
            x = x + mix2(norm2(x))
        return self.output(x.mean(1))


class ViT(nn.Module):
    """Three layers over patches of 4 x 4 and a class token (arXiv:2010.11929)."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 64) -> None:
        super().__init__()
        patches = (shape[1] // 4) * (shape[2] // 4)
        self.patch = nn.Conv2d(shape[0], width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, patches + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of an image, from its class token."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.output(self.norm(self.encoder(x))[:, 0])


class ConvNeXt(nn.Module):
    """Three blocks with scales that begin at 1e-6 (Liu et al., arXiv:2201.03545)."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 40) -> None:
        super().__init__()
        self.stem = nn.Conv2d(shape[0], width, 4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 5, padding=2, groups=width),
                nn.GroupNorm(1, width),
                nn.Conv2d(width, 3 * width, 1),
                nn.GELU(),
                nn.Conv2d(3 * width, width, 1),
            )
            for _ in range(3)
        )
        self.scales = nn.ParameterList(
            torch.full((width, 1, 1), 1e-6) for _ in self.blocks
        )
        self.norm = nn.GroupNorm(1, width)
        self.output = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of an image."""
        x = self.stem(x)
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = x + scale * block(x)
        return self.output(self.norm(x).mean((2, 3)))


def mobile(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Convolutions by depth and by point (Howard et al., arXiv:1704.04861)."""

    def convolution(inner: int, outer: int, *sizes: int, groups: int = 1) -> None:
        layers.append(
            nn.Conv2d(inner, outer, *sizes, groups=groups, bias=False),
        )
        layers.extend([nn.BatchNorm2d(outer), nn.ReLU6()])

    layers: list[nn.Module] = []
    convolution(shape[0], 16, 3, 1, 1)
    for inner, outer, stride in ((16, 32, 2), (32, 64, 1), (64, 64, 2), (64, 128, 1)):
        convolution(inner, inner, 3, stride, 1, groups=inner)
        convolution(inner, outer, 1)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(128, classes))


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
    "gru": lambda _, classes: GRU(classes),
    "conv1d": conv1d,
    "tabular": tabular,
    "recommender": lambda _, classes: Recommender(classes),
    "mixer": Mixer,
    "vit": ViT,
    "convnext": ConvNeXt,
    "mobile": mobile,
}


def build(name: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Return a network with its own default initialization."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](shape, classes)
