"""Heads of attention and neurons of feed-forward layers as units."""

import copy

import attentive
import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import LocalGrid, run, seeded, toy_app
from numpy.testing import assert_allclose, assert_array_equal
from test_hybrid import NODES, ONE
from test_units import random_scores
from torch import nn

from autoflip_flwr import AutoFLIP, PruningSettings, units
from autoflip_flwr.app import costs
from autoflip_flwr.method.structured import Limits
from autoflip_flwr.units.enforce import enforce
from autoflip_flwr.units.partial import PartialAttention


def groups(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[int, int]]:
    return {g.name: (g.size, g.width) for g in units.trace(model, x).groups}


def masked_and_small(model, x, share=0.4, seed=0):
    model, x = model.double(), x.double() if x.is_floating_point() else x
    scores = random_scores(model, seed)
    masks = units.mask_units(model, scores, share=share, example_inputs=x)
    small = units.compact(model, masks, x)
    whole = copy.deepcopy(model)
    with enforce(whole, masks):
        return whole, small, masks


class Attending(nn.Module):
    """Reads what it is given with one attention layer."""

    def __init__(self, *args, **settings) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(*args, **settings)

    def forward(self, x, **options):
        return self.attention(x, x, x, need_weights=False, **options)[0]


# --- where the heads are --------------------------------------------------------------


def test_a_head_is_its_queries_keys_values_and_columns_of_the_output():
    traced = units.trace(Attending(4, 2), torch.zeros(3, 1, 4))
    assert [(g.name, g.size, g.width) for g in traced.groups] == [("attention", 2, 2)]
    head = [0, 0, 1, 1]
    assert_array_equal(traced.parameters["attention.in_proj_weight"][0], head * 3)
    assert_array_equal(traced.parameters["attention.in_proj_bias"][0], head * 3)
    assert_array_equal(traced.parameters["attention.out_proj.weight"][1], head)
    assert "attention.out_proj.bias" not in traced.parameters


def test_query_heads_that_share_keys_and_values_go_together():
    model, x = attentive.build("llama")  # four query heads of 4 channels read two
    traced = units.trace(model, x[:1])
    first = "network.model.layers.0.self_attn"
    group = next(g for g in traced.groups if g.name == first)
    assert (group.size, group.width) == (2, 8)
    of = {name: traced.parameters[f"{first}.{name}_proj.weight"] for name in "qkvo"}
    numbers = np.array(group.numbers)
    for name, dim, each in (("q", 0, 8), ("k", 0, 4), ("v", 0, 4), ("o", 1, 8)):
        assert_array_equal(of[name][dim], numbers.repeat(each))


def test_a_head_of_swin_takes_its_column_of_the_position_table():
    model, x = attentive.build("swin")
    traced = units.trace(model, x[:1])
    group = next(g for g in traced.groups if g.name == "features.3.0.attn")
    table = traced.parameters["features.3.0.attn.relative_position_bias_table"]
    assert_array_equal(table[1], list(group.numbers))


HEADS = {
    "encoder": (("encoder.layers.{}.self_attn", 4, 3), ("encoder.layers.{}.linear1",)),
    "vision-transformer": (
        ("encoder.layers.encoder_layer_{}.self_attention", 4, 3),
        ("encoder.layers.encoder_layer_{}.mlp.0",),
    ),
    "timm-vit": (("blocks.{}.attn", 4, 3), ("blocks.{}.mlp.fc1",)),
    "bert": (
        ("network.bert.encoder.layer.{}.attention", 4, 3),
        ("network.bert.encoder.layer.{}.intermediate.dense",),
    ),
    "distilbert": (
        ("network.distilbert.transformer.layer.{}.attention", 4, 3),
        ("network.distilbert.transformer.layer.{}.ffn.lin1",),
    ),
    "vit": (
        ("network.vit.layers.{}.attention", 4, 3),
        ("network.vit.layers.{}.mlp.fc1",),
    ),
    "gpt2": (
        ("network.transformer.h.{}.attn", 4, 3),
        ("network.transformer.h.{}.mlp.c_fc",),
    ),
    "llama": (
        ("network.model.layers.{}.self_attn", 2, 8),
        ("network.model.layers.{}.mlp.gate_proj",),
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_neurons_are_units_and_the_residual_stream_is_not(name):
    model, x = attentive.build(name)
    (attention, heads, width), (neurons,) = HEADS[name]
    expected = {attention.format(i): (heads, width) for i in range(2)}
    expected |= {neurons.format(i): (16, 1) for i in range(2)}
    found = groups(model, x[:1])
    poolers = {"network.bert.pooler.dense", "network.pre_classifier"}
    assert {k: v for k, v in found.items() if k not in poolers} == expected
    traced = units.trace(model, x[:1])
    assert not any("embed" in name for name in traced.parameters)
    assert any("is attention, whose" in reason for reason in traced.whole.values())


def test_a_model_of_transformers_is_traced_once(monkeypatch):
    from autoflip_flwr.units import graph

    model, x = attentive.build("llama")
    traced = units.trace(model, x[:1])
    monkeypatch.setattr(graph, "_Tracer", None)  # would fail if it were called
    assert units.trace(copy.deepcopy(model), x[:1]) is traced


# --- exact ----------------------------------------------------------------------------


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 0.5), multiple=st.integers(1, 3))
def test_a_random_mask_of_heads_and_neurons_is_exact(seed, share, multiple):
    model, x = attentive.build("encoder")
    masks = units.mask_units(
        model.eval(),
        random_scores(model, seed),
        share=share,
        example_inputs=x[:1],
        multiple=multiple,
    )
    small = units.compact(model, masks, x[:1])
    left = sum(int(mask.sum()) for mask in masks.values())
    assert left == sum(p.numel() for p in small.parameters())
    with enforce(model, masks):
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)
        with torch.no_grad():  # where torch takes its fused kernels
            torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)


CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"need_weights": True, "average_attn_weights": False},
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": torch.randn(5, 5).double(), "need_weights": True},
        {"key_padding_mask": PADDED},
        {"key_padding_mask": PADDED, "attn_mask": CAUSAL},
        {"key_padding_mask": torch.zeros(2, 5).double().masked_fill(PADDED, -1e3)},
        {"attn_mask": CAUSAL.expand(4, 5, 5)},  # one per sample and head of two
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("first", [True, False])
def test_fewer_heads_read_masks_as_all_do(options, first):
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(12, 4, batch_first=first).double()
    small = copy.deepcopy(whole)
    kept = torch.arange(12).reshape(4, 3)[[0, 2]].flatten()
    rows = torch.cat([kept, 12 + kept, 24 + kept])
    with torch.no_grad():
        nn.init.normal_(whole.in_proj_bias)
        lost = torch.ones(12, dtype=torch.bool)
        lost[kept] = False
        whole.out_proj.weight[:, lost] = 0
    small.in_proj_weight = nn.Parameter(whole.in_proj_weight[rows])
    small.in_proj_bias = nn.Parameter(whole.in_proj_bias[rows])
    small.out_proj.weight = nn.Parameter(whole.out_proj.weight[:, kept])
    small.num_heads = 2
    small = PartialAttention(small)
    x = torch.randn(2, 5, 12).double()
    x = x if first else x.transpose(0, 1)
    options = {"need_weights": False} | options
    got, weights = small(x, x, x, **options)
    if "attn_mask" in options and options["attn_mask"].ndim == 3:
        options["attn_mask"] = CAUSAL.expand(8, 5, 5)
    expected, others = whole(x, x, x, **options)
    torch.testing.assert_close(got, expected)
    if weights is not None and weights.ndim == 4:
        torch.testing.assert_close(weights, others[:, [0, 2]])
    assert (weights is None) == (others is None)


def test_fewer_heads_read_one_sample_too():
    model = Attending(12, 4)
    x = torch.randn(5, 12).double()
    whole, small, _ = masked_and_small(model, x)
    torch.testing.assert_close(small(x), whole(x))


def test_dropout_of_attention_is_kept_and_exact_in_evaluation():
    """In training it draws for each head, so its draws depend on their number."""
    model, x = attentive.stack(dropout=0.3), attentive.TOKENS
    whole, small, _ = masked_and_small(model, x)
    assert small.encoder.layers[0].self_attn.dropout == 0.3
    assert isinstance(small.encoder.layers[0].self_attn, PartialAttention)
    torch.testing.assert_close(small.eval()(x), whole.eval()(x))


class Padded(nn.Module):
    """Hides padding from attention; its mean is over all places, or without padding."""

    def __init__(self, careful: bool) -> None:
        super().__init__()
        self.inner = attentive.stack(nested=True)
        self.careful = careful

    def forward(self, x):
        hidden = x == 0
        states = self.inner.encoder(
            self.inner.embedding(x), src_key_padding_mask=hidden
        )
        if self.careful:
            states = states.masked_fill(hidden.unsqueeze(-1), 0.0)
        return self.inner.head(states.mean(1))


def test_padding_that_torch_leaves_out_in_evaluation_is_followed():
    """torch then puts zeros for padded places, which no other attention does."""
    x = torch.tensor([[3, 4, 5, 0], [6, 0, 0, 0]])
    whole, small, _ = masked_and_small(Padded(careful=True), x)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x), whole.eval()(x))
    torch.testing.assert_close(small.train()(x), whole.train()(x))
    traced = units.trace(Padded(careful=False), x)
    assert {group.name for group in traced.groups} == {
        f"inner.encoder.layers.{i}.linear1" for i in range(2)
    }
    assert "its output differs" in traced.whole["inner.encoder.layers.0.self_attn"]


class Rows(nn.Module):
    """Reads six numbers as three places of two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Linear(2, 12), attentive.layer()
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.inner(self.embed(x.view(-1, 3, 2))).mean(1))


def test_clients_that_train_fewer_heads_and_neurons_end_with_the_same_weights():
    ends, heads = {}, {}
    for example in (None, ONE):
        seen: list[int] = []
        app = toy_app(
            lambda: seeded(Rows),
            example_inputs=example,
            after_step=lambda net, seen=seen: seen.append(
                net.inner.self_attn.num_heads
            ),
        )
        strategy = AutoFLIP(
            FedAvg(fraction_evaluate=0.0),
            threshold=0.7,
            model=seeded(Rows),
            example_inputs=ONE,
            pruning=PruningSettings(operations=0.5, gradual_rounds=1),
        )
        models, _ = run(strategy, LocalGrid(app, NODES), seeded(Rows), rounds=3)
        ends[example is None], heads[example is None] = models[-1], min(seen)
    assert heads[True] == 4 > heads[False]
    every = strategy.rounds.units
    used = every.used(strategy.rounds.plan.masks)
    assert every.operations(used) <= 0.5 * every.operations()
    for name, value in ends[True].items():
        assert_allclose(ends[False][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


# --- what stays whole -----------------------------------------------------------------


def test_keys_of_the_modules_own_stay_whole_and_say_so():
    class Biased(attentive.Cross):
        def __init__(self) -> None:
            super().__init__(add_bias_kv=True)

    traced = units.trace(attentive.Encoder(Biased()), attentive.TOKENS)
    assert [group.name for group in traced.groups] == ["embedding", "encoder.back"]
    assert traced.whole["encoder.ask"] == "encoder.attention adds keys of its own"


def test_attention_weights_that_a_model_returns_stay_whole():
    class Showing(Attending):
        def forward(self, x):
            return self.attention(x, x, x)

    traced = units.trace(Showing(4, 2), torch.randn(3, 2, 4))
    assert "its output differs" in traced.whole["attention"]


def test_a_matrix_of_the_apps_own_keeps_its_channels_and_the_rest_has_units():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(6, 10)
            self.mixing = nn.Parameter(torch.randn(8, 6))
            self.head = nn.Linear(10, 2)

        def forward(self, x):
            return self.head(self.second(self.first(x) @ self.mixing).relu())

    traced = units.trace(Mixed(), torch.randn(1, 3))
    assert [group.name for group in traced.groups] == ["second"]
    assert "mixing is a parameter of the shape (8, 6)" in traced.whole["first"]


class Adapted(nn.Module):
    """A frozen linear layer and what is learned beside it, of low rank."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_with_adapters_over_frozen_weights_their_ranks_alone_are_units():
    model, x = attentive.build("bert")
    model.requires_grad_(False)
    for layer in model.network.bert.encoder.layer:
        own = layer.attention.self
        own.query, own.value = Adapted(own.query, 4), Adapted(own.value, 4)
    model = model.double()
    prunable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(prunable) == 8
    traced = units.trace(model, x[:1])
    able = {g.name: g.size for g in traced.only(prunable).groups}
    name = "network.bert.encoder.layer.{}.attention.self.{}.down"
    assert able == {name.format(i, r): 4 for i in range(2) for r in ("query", "value")}
    scores = {n: s for n, s in random_scores(model).items() if n in prunable}
    masks = units.mask_units(model, scores, share=0.5, example_inputs=x[:1])
    small = units.compact(model, masks, x[:1])
    with enforce(model, masks):
        torch.testing.assert_close(small.eval()(x), model.eval()(x))


# --- what they cost -------------------------------------------------------------------


def test_attention_costs_its_projections_and_its_pairs_of_places_by_hand():
    """Of 5 places and 4 channels, in 2 heads: 3 x 16 + 16 per place, 2 x 4 per pair."""
    model, x = Attending(4, 2, batch_first=True), torch.randn(1, 5, 4)
    products, pairs = 5 * (3 * 16 + 16), 5 * 5 * 2 * 4
    traced = units.trace(model, x)
    assert traced.uses["attention.in_proj_weight"] == 5
    assert traced.uses["attention.out_proj.weight"] == 5 + pairs / 16
    assert traced.operations() == products + pairs == 520
    assert traced.operations(np.array([True, False])) == 260  # all is of some head
    assert costs.flops(model, x) == 520
    _, small, masks = masked_and_small(model, x, share=38 / 80)
    assert costs.flops(small.float(), x) == 260
    assert costs.theoretical_flops(model.float(), x, masks) == 160 + pairs


@pytest.mark.parametrize("name", attentive.NETWORKS)
def test_both_counts_agree_on_what_heads_and_neurons_save(name):
    """They differ by what only thop counts, which has no part in it: normalization."""
    model, x = attentive.build(name)
    traced = units.trace(model, x[:1])
    masks = units.mask_units(model, random_scores(model), share=0.4, example_inputs=x)
    small = units.compact(model, masks, x[:1])
    saved = costs.flops(model, x) - costs.flops(small, x)
    keep = traced.used(masks)
    assert saved == traced.operations() - traced.operations(keep) > 0


def test_a_units_cost_has_its_part_of_the_pairs():
    traced = units.trace(Attending(4, 2, batch_first=True), torch.randn(1, 5, 4))
    scores = {name: np.ones(traced.shapes[name]) for name in traced.parameters}
    # half of the operations, and of the parameters that belong to heads: 30 of 80 - 4
    per_cost = traced.per_cost(traced.means(scores), scores)
    np.testing.assert_allclose(per_cost, [2, 2])


def test_multiples_count_the_channels_of_a_head():
    model = Attending(16, 8, batch_first=True)
    traced = units.trace(model, torch.randn(1, 3, 16))  # 8 heads of 2 channels
    scores = random_scores(model)
    for multiple, step in ((2, 1), (4, 2), (8, 4), (3, 3)):
        left = {
            int(traced.choose(scores, budget=b, limits=Limits(multiple=multiple)).sum())
            for b in range(0, 1000, 20)
        }
        assert left == {8, *range(step, 8, step)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "heads"), [("vit_b_16", 12), ("swin_t", 12)])
def test_torchvisions_transformers_lose_heads_and_neurons_exactly(name, heads):
    import torchvision

    size = {"image_size": 32} if name == "vit_b_16" else {}
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=10, **size)
    model, x = model.double().eval(), torch.randn(2, 3, 32, 32).double()
    traced = units.trace(model, x)  # once: the mask below is of the same model
    of_heads = [group for group in traced.groups if "att" in group.name]
    assert len(of_heads) == len(traced.groups) / 2 == heads
    whole, small, _ = masked_and_small(model, x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), whole(x), rtol=1e-9, atol=1e-9)
