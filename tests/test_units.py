"""The units of PyTorch models: what they are, what stays whole, what is refused."""

import copy
from types import MethodType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from torch import nn

from autoflip_flwr import units
from autoflip_flwr.errors import MaskError, ModelError, SettingsError
from autoflip_flwr.units import graph
from autoflip_flwr.units.compaction import loses_units
from autoflip_flwr.units.enforce import enforce
from autoflip_flwr.units.partial import PartialNorm
from autoflip_flwr.units.signature import signature


def sizes(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    return {group.name: group.size for group in units.trace(model, x).groups}


def random_scores(model: nn.Module, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.random(tuple(p.shape)) for n, p in model.named_parameters()}


def noisy(model: nn.Module) -> nn.Module:
    """Give a model weights that hide nothing, and buffers of its own."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5)
        del name
    return model.double()


def assert_exact(model: nn.Module, x: torch.Tensor, share: float = 0.4) -> nn.Module:
    """Compare the compact model with the masked one: training steps, evaluation."""
    model = noisy(model)
    x = x.double() if x.is_floating_point() else x
    masks = units.mask_units(model, random_scores(model), share=share, example_inputs=x)
    small = units.compact(model, masks, x)
    assert units.kept_indices(small), "no unit was taken out"
    whole = copy.deepcopy(model)
    with enforce(whole, masks), enforce(small, units.small_masks(small, masks)):
        for net in (whole, small):
            optimizer = torch.optim.Adam(net.parameters(), 0.01)
            for _ in range(3):
                optimizer.zero_grad()
                first(net.train()(x)).square().mean().backward()
                optimizer.step()
        torch.testing.assert_close(
            first(small.eval()(x)), first(whole.eval()(x)), rtol=1e-9, atol=1e-9
        )
    back = units.expand(small, copy.deepcopy(model))
    for name, parameter in back.named_parameters():
        torch.testing.assert_close(
            parameter, whole.get_parameter(name), rtol=1e-8, atol=1e-9
        )
    return small


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


class Residual(nn.Module):
    def __init__(self, norm: nn.Module, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = norm
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.head = nn.Linear(width * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + self.depthwise(self.second(x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Tagger(nn.Module):
    """Reads a recurrent layer's outputs, or its last hidden state."""

    def __init__(self, kind, read: str = "output", **settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.recurrent = kind(6, 10, batch_first=True, **settings)
        directions = 2 if settings.get("bidirectional") else 1
        width = settings.get("proj_size", 10)
        self.head = nn.Linear(width * (directions if read == "output" else 1), 4)
        self.read = read

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        output, state = self.recurrent(self.embedding(tokens))
        if self.read == "output":
            return self.head(output[:, -1])
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(hidden[-1])


IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(24).reshape(4, 6) % 20


def test_a_perceptrons_neurons_by_hand():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    traced = units.trace(model, torch.zeros(1, 3))
    assert [(group.name, group.size) for group in traced.groups] == [("0", 4)]
    assert_array_equal(traced.parameters["0.weight"][0], range(4))
    assert_array_equal(traced.parameters["0.bias"][0], range(4))
    assert_array_equal(traced.parameters["2.weight"][1], range(4))
    assert "2.bias" not in traced.parameters
    assert traced.whole == {"2": "its channels are the model's outputs"}
    assert traced.uses == {"0.weight": 1, "2.weight": 1}


def test_filters_go_with_their_norm_and_the_inputs_they_are_flattened_to():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)
    )
    traced = units.trace(model, torch.zeros(1, 1, 4, 4))
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert_array_equal(traced.parameters[name][0], [0, 1])
    assert_array_equal(traced.buffers["1.running_mean"][0], [0, 1])
    assert_array_equal(traced.parameters["3.weight"][1], [0] * 4 + [1] * 4)
    assert traced.uses == {"0.weight": 4, "3.weight": 1}


def test_an_lstms_hidden_units_take_their_gates_and_what_reads_them():
    model = Tagger(nn.LSTM, num_layers=2)
    traced = units.trace(model, TOKENS)
    assert sizes(model, TOKENS) == {
        "embedding": 6,
        "recurrent.steps": 10,
        "recurrent.hidden_l0": 10,
    }
    inner = traced.groups[2].start + np.arange(10)
    assert_array_equal(
        traced.parameters["recurrent.weight_ih_l0"][0], np.tile(inner, 4)
    )
    assert_array_equal(traced.parameters["recurrent.bias_hh_l0"][0], np.tile(inner, 4))
    assert_array_equal(traced.parameters["recurrent.weight_hh_l0"][1], inner)
    assert_array_equal(traced.parameters["recurrent.weight_ih_l1"][1], inner)
    outer = traced.groups[1].start + np.arange(10)
    assert_array_equal(traced.parameters["recurrent.weight_hh_l1"][1], outer)
    assert_array_equal(traced.parameters["head.weight"][1], outer)
    assert_array_equal(traced.parameters["recurrent.weight_ih_l0"][1], np.arange(6))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(12),
        nn.InstanceNorm2d(12, affine=True, track_running_stats=True),
        nn.GroupNorm(3, 12),
        nn.GroupNorm(1, 12),
        nn.PReLU(12),
        nn.PReLU(),
        nn.Identity(),
    ],
    ids=lambda norm: f"{type(norm).__name__}-{getattr(norm, 'num_groups', '')}",
)
def test_residual_and_depthwise_branches_with_any_norm_are_exact(norm):
    assert_exact(Residual(norm), IMAGE)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("read", ["output", "state"])
@pytest.mark.parametrize("layers", [1, 3])
def test_recurrent_layers_are_exact(kind, read, layers):
    small = assert_exact(Tagger(kind, read, num_layers=layers), TOKENS, share=0.7)
    assert small.recurrent.hidden_size < 10


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_both_directions_are_exact(kind):
    model = Tagger(kind, num_layers=2, bidirectional=True)
    assert_exact(model, TOKENS, share=0.75)
    groups = sizes(model, TOKENS)
    assert groups["recurrent.steps"] == 20
    assert groups["recurrent.hidden_l0_reverse"] == 10


def test_a_parameter_without_entries_loses_no_units():
    assert not loses_units({"empty": np.ones((0, 4), np.bool_)})


@pytest.mark.parametrize("both", [False, True])
def test_a_projected_lstm_stays_whole_and_reads_fewer_inputs(both):
    model = Tagger(nn.LSTM, num_layers=2, bidirectional=both, proj_size=4)
    assert sizes(model, TOKENS) == {"embedding": 6}
    whole = units.trace(model, TOKENS).whole
    assert "projects its hidden state" in whole["recurrent.steps"]
    small = assert_exact(model, TOKENS, share=0.1)
    assert small.recurrent.input_size < 6
    assert (small.recurrent.hidden_size, small.recurrent.proj_size) == (10, 4)


def test_a_failure_that_may_pass_is_not_remembered(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    with monkeypatch.context() as patch:
        patch.setattr(graph, "prove", full)
        with pytest.raises(torch.OutOfMemoryError):
            units.trace(model, torch.zeros(1, 5))
    assert len(units.trace(model, torch.zeros(1, 5)).groups) == 1


def test_layer_norm_counts_missing_channels_as_zeros():
    model = nn.Sequential(
        nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 2)
    )
    assert_exact(model, torch.randn(5, 6, generator=torch.Generator().manual_seed(0)))


def test_transposed_convolutions_are_exact():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    )
    assert_exact(model, IMAGE)


def test_a_scale_of_its_own_goes_with_its_channels():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.scale = nn.Parameter(torch.ones(8, 1, 1))
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head((self.conv(x) * self.scale).mean((2, 3)))

    traced = units.trace(Scaled(), IMAGE)
    assert_array_equal(traced.parameters["scale"][0], range(8))
    assert_exact(Scaled(), IMAGE)


def test_dropout_is_exact_in_evaluation():
    """In training it draws for each channel, so its draws depend on the width."""
    model = noisy(
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))
    )
    x = torch.randn(5, 6, dtype=torch.float64)
    masks = units.mask_units(model, random_scores(model), share=0.5, example_inputs=x)
    small = units.compact(model, masks, x)
    with enforce(model, masks):
        torch.testing.assert_close(small.eval()(x), model.eval()(x))
    assert small[2].p == 0.5


def test_frozen_parameters_stay_frozen_and_a_model_stays_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).train()
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    masks = units.mask_units(
        model, random_scores(model), share=0.3, example_inputs=torch.zeros(1, 3)
    )
    small = units.compact(model, masks, torch.zeros(1, 3))
    assert not small[0].bias.requires_grad
    assert small[0].weight.requires_grad
    assert model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_groups_of_channels_stay_whole_and_say_so():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 6, 1),
        nn.ReLU(), nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    traced = units.trace(model, IMAGE)
    assert [group.name for group in traced.groups] == ["2"]
    assert "has 2 groups of channels" in traced.whole["0"]
    assert_exact(model, IMAGE, share=0.1)


def test_tied_weights_stay_whole():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 6)
            self.inner = nn.Linear(6, 6)
            self.out = nn.Linear(6, 20, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, tokens):
            return self.out(self.inner(self.embedding(tokens)).relu()).mean(1)

    traced = units.trace(Tied(), TOKENS)
    assert "shared between modules" in traced.whole["embedding"]


def test_a_module_without_a_rule_is_named():
    model = nn.Sequential(nn.Linear(4, 6), nn.Bilinear(6, 6, 2))
    with pytest.raises(ModelError, match=r"units of 1 .*Bilinear.*units=0"):
        units.trace(model, torch.zeros(1, 4))


def test_a_model_that_does_not_run_on_the_inputs_says_what_they_were():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    with pytest.raises(
        ModelError, match=r"could not be traced with .*float32 of shape \(1, 5"
    ):
        units.trace(model, torch.zeros(1, 5))


def test_a_group_that_the_graph_misreads_stays_whole_and_the_rest_works(caplog):
    class Gated(nn.Module):
        """Multiplies one half of its channels with the other."""

        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(4, 12)
            self.inner = nn.Linear(6, 9)
            self.head = nn.Linear(9, 2)

        def forward(self, x):
            value, gate = self.both(x).tensor_split(2, dim=1)
            return self.head(self.inner(value * gate.flip(1)).relu())

    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    traced = units.trace(Gated(), x)
    assert [group.name for group in traced.groups] == ["inner"]
    assert "the graph cannot follow its channels" in traced.whole["both"]
    assert "left whole: {'both'" in caplog.text
    assert_exact(Gated(), x, share=0.2)


def test_a_compact_model_that_is_not_of_this_one_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(MaskError, match=r"what compact\(\) returned, got a Sequential"):
        units.expand(copy.deepcopy(model), model)
    masks = units.mask_units(
        model, random_scores(model), share=0.3, example_inputs=torch.zeros(1, 3)
    )
    small = units.compact(model, masks, torch.zeros(1, 3))
    other = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 7))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(MaskError, match="was not made of this one"):
        units.expand(small, other)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_masks_and_scores_that_do_not_fit_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.zeros(1, 3)
    with pytest.raises(MaskError, match=r"names 'no', which is no parameter"):
        units.compact(model, {"no": np.ones(3, bool)}, x)
    with pytest.raises(MaskError, match=r"0.weight: expected a mask of shape \(4, 3\)"):
        units.compact(model, {"0.weight": np.ones((3, 4), bool)}, x)
    with pytest.raises(MaskError, match=r"0.weight: expected a score of shape"):
        units.mask_units(model, {"0.weight": np.ones(3)}, share=0.1, example_inputs=x)
    with pytest.raises(MaskError, match=r"no: expected .* one of \['0.weight', "):
        units.mask_units(model, {"no": np.ones(3)}, share=0.1, example_inputs=x)
    masks = {n: np.zeros(tuple(p.shape), bool) for n, p in model.named_parameters()}
    with pytest.raises(MaskError, match="all 4 units of 0"):
        units.compact(model, masks, x)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_an_impossible_share_is_refused(share):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(SettingsError, match="share"):
        units.mask_units(
            model, random_scores(model), share=share, example_inputs=torch.zeros(1, 3)
        )


def test_more_than_all_units_is_refused_with_the_groups():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(MaskError, match=r"at most .*lose all their units.*'0'"):
        units.mask_units(
            model, random_scores(model), share=1.0, example_inputs=torch.zeros(1, 3)
        )


def test_equal_models_are_traced_once(monkeypatch):
    from autoflip_flwr.units import graph

    model = nn.Sequential(nn.Linear(3, 41), nn.ReLU(), nn.Linear(41, 2))
    x = torch.zeros(1, 3)
    traced = units.trace(model, x)
    monkeypatch.setattr(graph, "_Tracer", None)  # would fail if it were called
    assert units.trace(copy.deepcopy(model), torch.ones(1, 3)) is traced


def test_models_that_a_flag_tells_apart_are_traced_apart():
    class Flagged(nn.Module):
        def __init__(self, skip: bool) -> None:
            super().__init__()
            self.skip = skip
            self.first = nn.Linear(3, 7)
            self.second = nn.Linear(7, 7)
            self.head = nn.Linear(7, 2)

        def forward(self, x):
            x = self.first(x)
            inner = self.second(x.relu())
            return self.head(x + inner if self.skip else inner)

    x = torch.zeros(1, 3)
    assert set(sizes(Flagged(True), x)) == {"first"}  # one stream
    assert set(sizes(Flagged(False), x)) == {"first", "second"}


def test_a_smaller_model_is_made_only_where_it_pays():
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 2))
    x = torch.zeros(1, 30)
    scores = random_scores(model)

    def smaller(share: float) -> nn.Module | None:
        masks = units.mask_units(model, scores, share=share, example_inputs=x)
        return units.compact_if_it_pays(model, masks, x)

    assert smaller(1 - units.PAYS - 0.05) is None
    traced = smaller(1 - units.PAYS + 0.05)
    assert traced is not None
    assert traced[0].out_features < 40


def test_a_model_that_cannot_be_traced_is_trained_whole_with_a_warning(caplog):
    model = nn.Sequential(nn.Linear(4, 6), nn.Bilinear(6, 6, 2))
    masks = {n: np.zeros(tuple(p.shape), bool) for n, p in model.named_parameters()}
    assert units.compact_if_it_pays(model, masks, torch.zeros(1, 4)) is None
    assert "Bilinear" in caplog.text


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 0.7), multiple=st.integers(1, 4))
def test_a_random_mask_of_units_is_exact_and_meets_its_share(seed, share, multiple):
    torch.manual_seed(seed)
    model = Residual(nn.BatchNorm2d(12)).double().eval()
    x = IMAGE.double()
    masks = units.mask_units(
        model,
        random_scores(model, seed),
        share=share,
        example_inputs=x,
        multiple=multiple,
    )
    small = units.compact(model, masks, x)
    left = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.size for mask in masks.values())
    assert left == sum(p.numel() for p in small.parameters())
    assert 1 - left / total <= share
    with enforce(model, masks):
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)


# --- what the graph does not follow stays whole ---------------------------------------


class Flow(nn.Module):
    """Two layers, and any function of the first one's channels between them."""

    def __init__(self, between, *, bias: bool = True, inputs: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1, bias=bias)
        self.second = nn.Conv2d(inputs, 6, 1, bias=bias)
        self.head = nn.Linear(6, 2)
        self.between = between

    def forward(self, x):
        x = self.second(self.between(self.first(x))).relu()
        return self.head(x.mean((2, 3)))


BLANK = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    "flow",
    [
        Flow(lambda x: x.relu().flip(1), bias=False),
        Flow(lambda x: x * x.mean(1, keepdim=True).sigmoid(), bias=False),
        Flow(lambda x: x * x.amax(1, keepdim=True).sigmoid()),
        Flow(lambda x: nn.functional.glu(x, 1), inputs=4),
        Flow(lambda x: nn.functional.pixel_shuffle(x, 2), inputs=2),
        Flow(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
        Flow(lambda x: x.softmax(1)),
    ],
    ids=["flip", "mean", "maximum", "glu", "shuffle", "swapped", "softmax"],
)
def test_with_blank_example_inputs_too_a_misread_group_stays_whole(flow):
    traced = units.trace(flow, BLANK)
    assert [group.name for group in traced.groups] == ["second"]
    assert "first" in traced.whole
    assert_exact(flow, IMAGE, share=0.25)


class OneSlope(nn.Module):
    """A PReLU of one slope, whose channels are put beside others."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
        self.slope = nn.PReLU()
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        hidden = self.slope(self.a(x))
        return self.out(torch.cat([hidden, self.slope(self.b(hidden))], 1))


def test_a_prelu_of_one_slope_goes_with_any_channels():
    assert sizes(OneSlope(), torch.zeros(1, 6)) == {"a": 8, "b": 8}
    assert_exact(OneSlope(), torch.randn(4, 6))


class EarlyExit(nn.Module):
    """A second head, which the app asks for."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)
        self.early = nn.Linear(8, 3)

    def forward(self, x, early=False):
        hidden = self.a(x).relu()
        return self.early(hidden) if early else self.c(self.b(hidden).relu())


def test_what_a_layer_may_read_that_no_sample_reaches_stays_whole():
    found = units.trace(EarlyExit(), torch.zeros(1, 6))
    assert [group.name for group in found.groups] == ["b"]
    assert found.whole["a"] == "early, which no sample reaches, may read it"
    small = assert_exact(EarlyExit(), torch.randn(4, 6), share=0.2)
    assert small(torch.randn(2, 6).double(), early=True).shape == (2, 3)


def test_a_branch_of_training_alone_is_seen():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)
            self.side = nn.Conv2d(8, 2, 1)
            self.second = nn.Conv2d(8, 6, 1)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(x).relu()
            result = self.head(self.second(x).relu().mean((2, 3)))
            return (result, self.side(x).mean((2, 3))) if self.training else result

    traced = units.trace(Auxiliary(), BLANK)
    assert [group.name for group in traced.groups] == ["second"]
    assert "no sample reaches" not in traced.whole["first"], "training reaches it"
    assert_exact(Auxiliary(), IMAGE, share=0.1)


def test_outputs_that_go_missing_are_noticed():
    class Counting(nn.Module):
        """Returns one output more for every four channels."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(x).relu()
            result = self.head(self.second(x).relu())
            return (result,) * (x.shape[1] // 4)

    traced = units.trace(Counting(), torch.zeros(1, 3))
    assert [group.name for group in traced.groups] == ["second"]
    assert "tensors, not 2" in traced.whole["first"]


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)
        self.table = torch.eye(4)  # neither a parameter nor a buffer

    def forward(self, x):
        return self.head(self.first(x.float() @ self.table).relu())


def test_a_model_that_asks_for_float32_is_tried_in_it():
    traced = units.trace(Casting(), torch.zeros(1, 4, dtype=torch.uint8))
    assert [group.name for group in traced.groups] == ["first"]


def test_several_inputs_and_containers_of_them_are_traced():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 8), nn.Linear(5, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, left, more):
            return {"y": self.head(self.left(left) + self.right(more["right"]))}

    example = (torch.zeros(1, 3), {"right": torch.zeros(1, 5)})
    assert sizes(Pair(), example) == {"left": 8}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_hidden_states_that_the_stand_in_cannot_tell_apart_stay_whole(kind):
    class Reader(nn.Module):
        def __init__(self, both: bool) -> None:
            super().__init__()
            self.recurrent = kind(
                6, 10, num_layers=1 if both else 2, batch_first=True, bidirectional=both
            )
            self.inner = nn.Linear(20 if both else 10, 8)
            self.head = nn.Linear(8, 2)
            self.both = both

        def forward(self, x):
            self.recurrent.flatten_parameters()
            _, state = self.recurrent(x, None)
            h = state[0] if isinstance(state, tuple) else state
            read = torch.cat([h[-2], h[-1]], 1) if self.both else h[0]
            return self.head(self.inner(read).relu())

    for both in (True, False):
        traced = units.trace(Reader(both), torch.zeros(1, 5, 6))
        assert "inner" in [group.name for group in traced.groups]
        assert_exact(Reader(both), torch.randn(4, 5, 6), share=0.02)


@pytest.mark.parametrize(
    ("read", "both"),
    [("places", True), ("mean", True), ("places", False), ("state", False)],
)
def test_packed_sequences_have_units(read, both):
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 6, padding_idx=0)
            self.recurrent = nn.GRU(6, 8, 2, batch_first=True, bidirectional=both)
            self.head = nn.Linear(16 if both else 8, 2)

        def forward(self, x):
            lengths = (x != 0).sum(1)
            packed = nn.utils.rnn.pack_padded_sequence(
                self.embed(x), lengths, batch_first=True, enforce_sorted=False
            )
            output, state = self.recurrent(packed)
            if read == "state":
                ends = (state[-2], state[-1]) if both else (state[-1],)
                return self.head(torch.cat(ends, 1))
            padded, _ = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
            return self.head(padded if read == "places" else padded.mean(1))

    x = torch.randint(1, 9, (4, 5))
    x[1, 2:] = x[3, 3:] = 0  # padding
    found = [group.name for group in units.trace(Tagger(), x).groups]
    assert {"embed", "recurrent.steps", "recurrent.hidden_l0"} <= set(found)
    assert_exact(Tagger(), x, share=0.4)


def test_bags_of_embeddings_and_lists_of_parameters_stay_whole_and_others_do_not():
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(9, 6)
            self.matrices = nn.ParameterList([torch.randn(6, 6)])
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x):
            return self.layers(self.bag(x) @ self.matrices[0])

    x = torch.randint(9, (4, 5))
    found = units.trace(Tower(), x)
    assert [group.name for group in found.groups] == ["layers.0"]
    assert_exact(Tower(), x, share=0.2)


def test_statistics_that_make_a_missing_channel_more_than_zero_are_found():
    model = nn.Sequential(
        nn.Linear(3, 8),
        nn.BatchNorm1d(8, affine=False),
        nn.LayerNorm(8),
        nn.Linear(8, 6),
        nn.ReLU(),
        nn.Linear(6, 2),
    )
    assert [group.name for group in units.trace(model, torch.zeros(1, 3)).groups] == [
        "3"
    ]


def test_buffers_that_are_not_saved_come_back_too():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.calls += 1
            return self.head(self.first(x).relu())

    model = Counting()
    masks = units.mask_units(
        model, random_scores(model), share=0.4, example_inputs=torch.zeros(1, 3)
    )
    assert model.calls == 0
    small = units.compact(model, masks, torch.zeros(1, 3))
    small(torch.zeros(2, 3))
    assert units.expand(small, model).calls == 1


# --- the cache ------------------------------------------------------------------------


def test_a_trace_in_inference_mode_is_as_any():
    model = nn.Sequential(nn.Linear(3, 43), nn.ReLU(), nn.Linear(43, 2))
    with torch.inference_mode():
        assert sizes(model, torch.zeros(1, 3)) == {"0": 43}
    assert sizes(model, torch.zeros(1, 3)) == {"0": 43}


def test_tied_and_untied_models_are_traced_apart():
    def build(tied: bool) -> nn.Module:
        model = nn.Sequential(
            nn.Linear(9, 9, bias=False), nn.ReLU(), nn.Linear(9, 9, bias=False)
        )
        if tied:
            model[2].weight = model[0].weight
        return nn.Sequential(model, nn.ReLU(), nn.Linear(9, 2))

    x = torch.zeros(1, 9)
    assert sizes(build(False), x) == {"0.0": 9, "0.2": 9}
    assert sizes(build(True), x) == {}


def test_a_model_with_settings_of_unknown_kind_is_traced_each_time():
    class Config:
        flip = False

    class Configured(Flow):
        def __init__(self, config) -> None:
            super().__init__(None)
            self.config = config

        def forward(self, x):
            self.between = (lambda x: x.flip(1)) if self.config.flip else nn.Identity()
            return super().forward(x)

    config = Config()
    assert "first" in sizes(Configured(config), BLANK)
    config.flip = True
    assert "first" not in sizes(Configured(config), BLANK)


def of_width(width):
    """A forward that uses `width` channels, of one name whatever it is."""

    def forward(self, x):
        return nn.functional.linear(x, self[0].weight[:width])

    return forward


@pytest.mark.parametrize(
    "change",
    [
        lambda model, k: setattr(model, "forward", MethodType(of_width(k), model)),
        lambda model, k: setattr(model, "order", torch.arange(4).roll(k)),
        lambda model, k: model.register_buffer("order", torch.arange(4).roll(k)),
        lambda model, k: setattr(model, "parts", [nn.BatchNorm1d(k)]),
        lambda model, k: model[0].register_forward_hook(of_width(k)),
    ],
)
def test_models_that_may_compute_something_else_have_other_signatures(change):
    def build(k):
        torch.manual_seed(k)  # of parameters the values say nothing
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        change(model, k)
        return signature(model, torch.full((1, 4), k))

    assert build(1) is not None
    assert build(1) != build(2)


def test_equal_models_have_equal_signatures():
    def build(k):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        model.train()(torch.randn(3, 4))  # other statistics
        model.register_buffer("order", torch.arange(4))
        return signature(model, torch.full((1, 4), k))

    assert build(1) == build(2)


@pytest.mark.parametrize("whole", [nn.LayerNorm(4), nn.GroupNorm(2, 4)])
def test_a_norm_takes_what_a_class_that_casts_takes(whole):
    """Inputs of another type than the weights, and returns that type."""
    norm, x = PartialNorm(whole, np.arange(4)), torch.randn(3, 4)
    found = norm(x.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), whole(x))


def test_a_recurrent_layer_alone_is_refused_in_a_sentence():
    with pytest.raises(ModelError, match="LSTM: expected a model that holds it"):
        units.trace(nn.LSTM(4, 8), torch.zeros(1, 3, 4))


class Odd:
    """Cannot be compared."""

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError


def test_a_smaller_model_is_traced_once(monkeypatch):
    """Also one that is not remembered."""
    from autoflip_flwr.units import graph

    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 2))
    model.odd = Odd()
    traced, calls = graph._traced, []
    monkeypatch.setattr(graph, "_traced", lambda *a: calls.append(a) or traced(*a))
    keep = np.arange(40) < 10
    rows = np.repeat(keep[:, None], 4, axis=1)
    columns = np.repeat(keep[None], 2, axis=0)
    masks = {"0.weight": rows, "0.bias": keep, "2.weight": columns}
    small = units.compact_if_it_pays(model, masks, torch.zeros(1, 4))
    assert small[0].weight.shape == (10, 4)
    assert len(calls) == 1


def test_a_failed_trace_is_remembered(monkeypatch):
    from autoflip_flwr.units import graph

    model = nn.Sequential(nn.Linear(4, 6), nn.Bilinear(6, 6, 47))
    with pytest.raises(ModelError, match="Bilinear"):
        units.trace(model, torch.zeros(1, 4))
    monkeypatch.setattr(graph, "_traced", None)  # would fail if it were called
    with pytest.raises(ModelError, match="Bilinear"):
        units.trace(model, torch.zeros(1, 4))


def test_layers_of_one_recurrent_module_lose_equally_many_units():
    """Else the widest decides, and most of what is pruned makes nothing smaller."""
    model = Tagger(nn.LSTM, num_layers=3)
    scores = random_scores(model)
    for name in scores:
        if name.endswith("_l1"):
            scores[name] += 1  # alone, this layer would lose nothing
    masks = units.mask_units(model, scores, share=0.5, example_inputs=TOKENS)
    traced = units.trace(model, TOKENS)
    used = traced.used(masks)
    assert_array_equal(traced.levelled(used), used)
    small = units.compact(model, masks, TOKENS)
    left = sum(int(mask.sum()) for mask in masks.values())
    assert left == sum(p.numel() for p in small.parameters())
