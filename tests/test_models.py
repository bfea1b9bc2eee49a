import math

import pytest
import torch
from torch import nn

from autoflip_flwr.app.models import build, names, xavier_normal_
from autoflip_flwr.errors import SettingsError

IMAGES = {
    "cnn_bn": ((3, 32, 32), 10, 277_706),
    "cnn": ((1, 28, 28), 10, 215_370),
    "cnn6": ((3, 32, 32), 10, 7_634_442),
    "mnist_cnn": ((1, 28, 28), 10, 7_628_682),
    "efficientnet_b3": ((3, 32, 32), 10, 10_711_602),
    "resnet50": ((3, 32, 32), 100, 23_712_932),
    "femnist_cnn": ((1, 28, 28), 62, 13_180_734),
}
ALL = {**IMAGES, "char_lstm": ((80,), 80, 5_040_080)}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def sample(shape, n=2):
    if len(shape) == 1:
        return torch.randint(0, 80, (n, *shape))
    return torch.randn(n, *shape)


def digits(seed=0, **settings):
    return build("cnn", num_classes=10, input_shape=(1, 8, 8), seed=seed, **settings)


def same(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def xavier_std(rows, columns, receptive=1):
    return math.sqrt(2 / ((rows + columns) * receptive))


def test_names_are_in_the_documented_order():
    assert list(names()) == [
        "cnn",
        "cnn_bn",
        "cnn6",
        "mnist_cnn",
        "efficientnet_b3",
        "resnet50",
        "femnist_cnn",
        "char_lstm",
    ]
    assert set(names()) == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_model_has_the_documented_size_and_output(name):
    shape, classes, expected = ALL[name]
    model = build(name, num_classes=classes, input_shape=shape, seed=0)
    assert model.training
    assert count(model) == expected
    with torch.no_grad():
        logits = model.eval()(sample(shape))
    assert logits.shape == (2, classes)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("name", "papers", "more"),
    [
        ("mnist_cnn", 7_628_484, 198),
        ("efficientnet_b3", 10_838_784, -127_182),
        ("resnet50", 23_755_900, -42_968),
        ("femnist_cnn", 13_180_734, 0),
        ("char_lstm", 5_040_000, 80),
    ],
)
def test_the_papers_networks_differ_from_its_counts_as_documented(name, papers, more):
    assert ALL[name][2] - papers == more


def test_the_six_layer_cnn_has_six_layers_and_one_maximum():
    model = build("mnist_cnn", num_classes=10, input_shape=(1, 28, 28), seed=0)
    kinds = [type(module).__name__ for module in model]
    assert kinds.count("Conv2d") + kinds.count("Linear") == 6
    assert kinds.index("MaxPool2d") == 4
    assert kinds.count("MaxPool2d") == 1


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 4, 7)])
def test_cnn_takes_digits_mnist_and_cifar(shape):
    model = build("cnn", num_classes=7, input_shape=shape, seed=0)
    assert model(sample(shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "smallest"),
    [("cnn", 4), ("cnn6", 22), ("mnist_cnn", 10), ("femnist_cnn", 10)],
)
def test_the_smallest_accepted_image_runs_and_one_less_is_an_error(name, smallest):
    model = build(name, num_classes=2, input_shape=(1, smallest, smallest), seed=0)
    assert model(torch.zeros(1, 1, smallest, smallest)).shape == (1, 2)
    with pytest.raises(SettingsError, match=f"input_shape.2: .* {smallest}, got"):
        build(name, num_classes=2, input_shape=(1, smallest, smallest - 1))


def test_widths_of_the_cnn_are_settings():
    model = digits(channels=[4, 6], hidden=9)  # a list, as YAML gives it
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim > 1]
    assert shapes == [(4, 1, 5, 5), (6, 4, 5, 5), (9, 24), (10, 9)]


def test_leafs_own_lstm_has_819920_parameters():
    model = build(
        "char_lstm", num_classes=80, input_shape=(80,), embedding=8, hidden=256
    )
    assert count(model) == 819_920


def test_the_lstm_reads_its_last_time_step():
    model = build(
        "char_lstm",
        num_classes=5,
        input_shape=(6,),
        seed=0,
        embedding=3,
        hidden=4,
        vocabulary=5,
    )
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 1]])
    first, second = model(tokens)
    assert not torch.equal(first, second)


def test_the_seed_decides_the_weights_and_the_global_state_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = digits(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(first, digits(seed=1))
    assert not same(first, digits(seed=2))


@pytest.mark.parametrize("name", ["efficientnet_b3", "char_lstm"])
def test_large_models_are_deterministic_too(name):
    shape, classes, _ = ALL[name]
    first, second = (
        build(name, num_classes=classes, input_shape=shape, seed=3) for _ in range(2)
    )
    assert same(first, second)


def test_without_a_seed_the_global_state_decides():
    torch.manual_seed(7)
    first, second = digits(seed=None), digits(seed=None)
    torch.manual_seed(7)
    assert same(first, digits(seed=None))
    assert not same(first, second)


@pytest.mark.parametrize("name", IMAGES)
def test_weights_of_linear_and_convolutional_layers_are_xavier_normal(name):
    shape, classes, _ = IMAGES[name]
    model = build(name, num_classes=classes, input_shape=shape, seed=0)
    checked = 0
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.numel() >= 5_000:
            rows, columns, *kernel = parameter.shape
            std = xavier_std(rows, columns, math.prod(kernel))
            assert parameter.std().item() == pytest.approx(std, rel=0.06)
            assert abs(parameter.mean().item()) < 0.06 * std
            checked += 1
    assert checked >= 2


def test_every_gate_of_the_lstm_and_the_embedding_are_xavier_normal():
    model = build("char_lstm", num_classes=80, input_shape=(80,), seed=0)
    assert model.embedding.weight.std().item() == pytest.approx(
        xavier_std(80, 24), rel=0.06
    )
    for name, parameter in model.lstm.named_parameters():
        if name.startswith("weight"):
            for gate in parameter.chunk(4):
                assert gate.std().item() == pytest.approx(
                    xavier_std(*gate.shape), rel=0.06
                )


@pytest.mark.parametrize("name", ALL)
def test_biases_are_zero_and_norm_layers_at_their_defaults(name):
    shape, classes, _ = ALL[name]
    model = build(name, num_classes=classes, input_shape=shape, seed=0)
    for module in model.modules():
        norm = isinstance(module, nn.BatchNorm2d)
        for key, parameter in module.named_parameters(recurse=False):
            if "bias" in key:
                assert not parameter.any()
            elif norm:
                assert torch.equal(parameter, torch.ones_like(parameter))
            else:
                assert parameter.ndim >= 2


def test_xavier_leaves_norm_layers_of_any_shape_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((2, 2)), nn.BatchNorm1d(4))
    with torch.no_grad():
        model[1].bias.fill_(3.0)
    assert xavier_normal_(model) is model
    assert torch.equal(model[1].weight, torch.ones(2, 2))
    assert torch.equal(model[1].bias, torch.full((2, 2), 3.0))


def test_xavier_takes_the_projection_of_an_lstm_as_one_matrix():
    model = nn.LSTM(60, 100, proj_size=80)
    xavier_normal_(model, generator=torch.Generator().manual_seed(0))
    assert model.weight_hr_l0.std().item() == pytest.approx(
        xavier_std(80, 100), rel=0.06
    )
    for gate in model.weight_ih_l0.chunk(4):
        assert gate.std().item() == pytest.approx(xavier_std(100, 60), rel=0.06)


def test_an_unknown_name_lists_the_known_ones():
    message = r"'vgg'; known: cnn, cnn_bn, cnn6, .*char_lstm"
    with pytest.raises(SettingsError, match=message):
        build("vgg", num_classes=10, input_shape=(1, 8, 8))


def test_an_unknown_setting_lists_the_known_ones_and_their_defaults():
    message = r"'cnn': width: Unexpected .*; settings: channels=\(16, 32\), hidden=128$"
    with pytest.raises(SettingsError, match=message):
        digits(width=3)


def test_a_model_without_settings_says_so():
    with pytest.raises(SettingsError, match=r"hidden: Unexpected .*; settings: none$"):
        build("resnet50", num_classes=10, input_shape=(3, 32, 32), hidden=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden": 0},
        {"hidden": -1},
        {"hidden": 1.5},
        {"hidden": True},
        {"hidden": "128"},
        {"hidden": None},
        {"channels": 16},
        {"channels": (16,)},
        {"channels": (16, 0)},
        {"channels": (16, 32, 64)},
        {"channels": "ab"},
        {"channels": (16, 32.0)},
    ],
)
def test_an_impossible_setting_says_what_is_allowed(settings):
    ((key, _),) = settings.items()
    message = rf"'cnn': {key}.*, got .*; settings: channels=\(16, 32\), hidden=128$"
    with pytest.raises(SettingsError, match=message):
        digits(**settings)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cnn", (28, 28), "2: Field required"),
        ("cnn", (80,), "2: Field required"),
        ("cnn", (1, 28, 28, 1), ".* at most 3 items"),
        ("cnn", (0, 28, 28), "0: .* greater than or equal to 1, got 0"),
        ("cnn", (1, 28.0, 28), "1: .* valid integer, got 28.0"),
        ("cnn", 28, ".* valid tuple, got 28"),
        ("cnn6", (3, 8, 8), "1: .* greater than or equal to 22, got 8"),
        ("resnet50", (1, 32, 32), "0: Input should be 3, got 1"),
        ("efficientnet_b3", (3, 8, 8), "1: .* greater than or equal to 32, got 8"),
        ("char_lstm", (1, 28, 28), ".* at most 1 item"),
        ("char_lstm", (0,), "0: .* greater than or equal to 1, got 0"),
        ("char_lstm", (), "0: Field required"),
    ],
)
def test_a_wrong_shape_says_what_is_expected(name, shape, message):
    with pytest.raises(SettingsError, match=rf"'{name}': .*input_shape.?{message}"):
        build(name, num_classes=10, input_shape=shape)


@pytest.mark.parametrize("classes", [0, -1, 2.0, True, "10", None])
def test_impossible_numbers_of_classes_are_errors(classes):
    with pytest.raises(SettingsError, match=r"num_classes: Input should be .* got "):
        build("cnn", num_classes=classes, input_shape=(1, 8, 8))


@pytest.mark.parametrize("seed", [-1, 1.0, True, "1", 2**63])
def test_impossible_seeds_are_errors(seed):
    with pytest.raises(SettingsError, match=r"seed: Input should be .* got "):
        digits(seed=seed)
