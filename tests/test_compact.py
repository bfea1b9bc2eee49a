"""A compact model computes what the masked one does: forward, gradients, training."""

import copy

import attentive
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from autoflip_flwr import units
from autoflip_flwr.app import models
from autoflip_flwr.method.mask import from_scores
from autoflip_flwr.units import recurrent
from autoflip_flwr.units.enforce import enforce

OURS = {
    "cnn": {"num_classes": 10, "input_shape": (1, 16, 16)},
    "cnn6": {"num_classes": 10, "input_shape": (3, 32, 32)},
    "femnist_cnn": {"num_classes": 62, "input_shape": (1, 28, 28)},
    "efficientnet_b3": {"num_classes": 10, "input_shape": (3, 32, 32)},
    "resnet50": {"num_classes": 10, "input_shape": (3, 32, 32)},
    "char_lstm": {"num_classes": 80, "input_shape": (12,), "hidden": 48},
}
TORCHVISION = (  # beside the two that are ours
    "resnet18",
    "mobilenet_v3_small",
    "vgg11_bn",
    "densenet121",
    "convnext_tiny",
)
LARGE = {"efficientnet_b3", "resnet50", "vgg11_bn", "densenet121", "convnext_tiny"}


def build(name: str, source: str) -> tuple[nn.Module, torch.Tensor, int]:
    """Return a model in float64 without dropout's draws, a batch, and its classes."""
    if source == "attention":
        return *attentive.build(name), 5
    torch.manual_seed(0)
    if source == "ours":
        settings = OURS[name]
        model = models.build(name, **settings, seed=0)
        shape, classes = settings["input_shape"], settings["num_classes"]
    else:
        import torchvision

        model = getattr(torchvision.models, name)(weights=None, num_classes=10)
        if name == "vgg11_bn":  # its own has 120 of 129 M parameters
            model.classifier = nn.Sequential(
                nn.Linear(512 * 7 * 7, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)
            )
        shape, classes = (3, 32, 32), 10
    x = torch.randint(80, (4, *shape)) if len(shape) == 1 else torch.randn(4, *shape)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its draws depend on the width: see below
    for parameter in model.parameters():
        if parameter.numel() == max(parameter.shape) and parameter.std() == 0:
            nn.init.uniform_(parameter, 0.5, 1.5)  # biases and scales hide nothing
    x = x.double() if x.is_floating_point() else x
    return model.double(), x, classes


def hybrid_masks(model: nn.Module, x: torch.Tensor, share: float = 0.45):
    """Return masks of whole units and single weights, by random scores."""
    rng = np.random.default_rng(0)
    scores = {n: rng.random(tuple(p.shape)) for n, p in model.named_parameters()}
    whole = units.mask_units(model, scores, share=share, example_inputs=x[:1])
    return from_scores(scores, threshold=share + 0.2, units=whole, floor=0.01)


def take_steps(
    net: nn.Module, x: torch.Tensor, classes: int, optimizer: str, steps: int
) -> torch.Tensor:
    """Train, and return the loss of each step."""
    torch.manual_seed(1)  # stochastic depth draws per sample, whatever the width
    net.train()
    if optimizer == "sgd":
        chosen = torch.optim.SGD(
            net.parameters(), 0.02, momentum=0.9, weight_decay=1e-3
        )
    else:
        chosen = torch.optim.AdamW(net.parameters(), 1e-3)
    labels = torch.arange(len(x), device=x.device) % classes
    losses = []
    for _ in range(steps):
        chosen.zero_grad()
        loss = functional.cross_entropy(net(x), labels)
        loss.backward()
        chosen.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_close(
    got: torch.Tensor, expected: torch.Tensor, where: str, scale: float = 0.0
) -> None:
    """Compare to 1e-7 of the largest expected value, or of `scale`."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape, where
    scale = max(scale, float(expected.abs().max()), 1e-12)
    assert float((got - expected).abs().max()) < 1e-7 * scale, where


def kept_part(tensor: torch.Tensor, indices) -> torch.Tensor:
    for dim, index in enumerate(indices):
        if index is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
    return tensor


def check(name: str, source: str, optimizer: str, device: str = "cpu") -> None:
    model, x, classes = build(name, source)
    model, x = model.to(device), x.to(device)
    steps = 2 if name in LARGE else 4
    masks = hybrid_masks(model, x)
    small = units.compact(model, masks, x[:1])
    size = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) < 0.7 * size
    whole = copy.deepcopy(model)
    recurrent.flatten(whole)
    kept = units.kept_indices(small)
    with enforce(whole, masks), enforce(small, units.small_masks(small, masks)):
        expected = take_steps(whole, x, classes, optimizer, steps)
        assert_close(take_steps(small, x, classes, optimizer, steps), expected, "loss")
        assert_close(small.eval()(x), whole.eval()(x), "evaluation")
    # Of kept entries: a masked BatchNorm scale makes ties in a maximum, and the
    # gradient of that scale, which nobody uses, depends on how they are broken.
    gradients = {
        key: parameter.grad * torch.from_numpy(masks[key]).to(device)
        for key, parameter in whole.named_parameters()
    }
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    own = units.small_masks(small, masks)
    for key, parameter in small.named_parameters():
        expected = kept_part(gradients[key], kept.get(key, ()))
        gradient = parameter.grad * torch.from_numpy(own[key]).to(device)
        assert_close(gradient, expected, f"gradient of {key}", largest)
    for key, buffer in small.state_dict().items():
        expected = kept_part(whole.state_dict()[key], kept.get(key, ()))
        assert_close(buffer, expected, key, 1.0)
    back = units.expand(small, copy.deepcopy(model))
    for key, parameter in back.named_parameters():
        assert_close(parameter, whole.get_parameter(key), key, 1.0)
        assert not bool(parameter[torch.from_numpy(~masks[key]).to(device)].any())
    start = dict(model.named_buffers())
    for key, buffer in back.named_buffers():  # of missing units as they were
        expected = start[key].clone()
        if key in kept:
            expected[torch.from_numpy(kept[key][0]).to(device)] = small.get_buffer(key)
        else:
            expected = small.get_buffer(key)
        assert_close(buffer, expected, key)


CASES = [
    pytest.param(name, source, id=f"{source}-{name}", marks=marks)
    for source, names in (
        ("ours", OURS),
        ("torchvision", TORCHVISION),
        ("attention", attentive.NETWORKS),
    )
    for name in names
    for marks in ([pytest.mark.slow] if name in LARGE else [],)
]


@pytest.mark.parametrize(("name", "source"), CASES)
def test_compact_training_is_masked_training(name, source):
    check(name, source, "sgd")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cnn", "ours"),
        ("char_lstm", "ours"),
        pytest.param("resnet18", "tv", marks=pytest.mark.slow),
        *((name, "attention") for name in attentive.NETWORKS),
    ],
)
def test_compact_training_is_masked_training_with_adam(name, source):
    check(name, source, "adamw")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("name", "source"), CASES)
def test_compact_training_is_masked_training_on_a_gpu(name, source):
    check(name, source, "sgd", "cuda")
