"""Image models: ``(N, C, H, W)`` floats to ``(N, num_classes)`` logits."""

from collections import OrderedDict

from torch import nn

from autoflip_flwr.errors import needs_extra

Shape = tuple[int, ...]


def cnn(
    num_classes: int, shape: Shape, *, channels: tuple[int, int], hidden: int
) -> nn.Module:
    """Two 5x5 convolutions and two linear layers, for digits and MNIST.

    215,370 parameters for (1, 28, 28) and ten classes with the default widths.
    """
    first, second = channels
    features = second * (shape[1] // 4) * (shape[2] // 4)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape[0], first, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(features, hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(hidden, num_classes),
        )
    )


def cnn_bn(
    num_classes: int, shape: Shape, *, channels: tuple[int, int], hidden: int
) -> nn.Module:
    """`cnn` with a BatchNorm behind each convolution."""
    plain = cnn(num_classes, shape, channels=channels, hidden=hidden)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in plain.named_children():
        modules[name] = module
        if isinstance(module, nn.Conv2d):
            modules[name.replace("conv", "norm")] = nn.BatchNorm2d(module.out_channels)
    return nn.Sequential(modules)


def cnn6(num_classes: int, shape: Shape) -> nn.Module:
    """Six weight layers for CIFAR: three unpadded 3x3 convolutions, three linear.

    Widths 64, 256, 512, then 2048, 1024, with a 2x2 maximum after each convolution.
    7,634,442 parameters for (3, 32, 32) and ten classes. The paper's six-layer CNN
    has 7,628,484 (0.08 % fewer) and is not described further; no plain network with
    widths that are powers of two has exactly that many.
    """
    height, width = (_after_cnn6(size) for size in shape[1:])
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape[0], 64, 3),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(64, 256, 3),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(256, 512, 3),
            relu3=nn.ReLU(),
            pool3=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(512 * height * width, 2048),
            relu4=nn.ReLU(),
            fc2=nn.Linear(2048, 1024),
            relu5=nn.ReLU(),
            fc3=nn.Linear(1024, num_classes),
        )
    )


def _after_cnn6(size: int) -> int:
    for _ in range(3):
        size = (size - 2) // 2
    return size


def femnist_cnn(num_classes: int, shape: Shape) -> nn.Module:
    """Build the paper's FEMNIST network: two wide 5x5 convolutions, two linear layers.

    13,180,734 parameters for (1, 28, 28) and 62 classes, exactly the paper's count.
    The linear layers see 7x7 pixels whatever the size of the image.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape[0], 64, 5, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(64, 128, 5, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            resize=nn.AdaptiveAvgPool2d(7),
            flatten=nn.Flatten(),
            fc1=nn.Linear(128 * 7 * 7, 2048),
            relu3=nn.ReLU(),
            fc2=nn.Linear(2048, num_classes),
        )
    )


def efficientnet_b3(num_classes: int, shape: Shape) -> nn.Module:  # noqa: ARG001
    """Torchvision's EfficientNet-B3, untrained.

    10,711,602 parameters with ten classes; the paper says 10,838,784.
    """
    with needs_extra("app", "efficientnet_b3"):
        from torchvision.models import efficientnet_b3 as make  # a second to import

    model: nn.Module = make(weights=None, num_classes=num_classes)
    return model


def resnet50(num_classes: int, shape: Shape) -> nn.Module:  # noqa: ARG001
    """Torchvision's ResNet-50, untrained.

    23,712,932 parameters with a hundred classes; the paper says 23,755,900.
    """
    with needs_extra("app", "resnet50"):
        from torchvision.models import resnet50 as make  # a second to import

    model: nn.Module = make(weights=None, num_classes=num_classes)
    return model
