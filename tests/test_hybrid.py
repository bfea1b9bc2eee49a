"""Hybrid masks in rounds: whole units first, single weights after, smaller clients."""

import logging

import numpy as np
import pytest
import torch
from flat import flat
from flwr.app import ConfigRecord
from flwr.server.strategy import FedAvg as OlderFedAvg
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st
from inprocess import LocalGrid, masks_in, net, plain_net, run, seeded, toy_app
from numpy.testing import assert_allclose, assert_array_equal
from test_legacy import options, serve
from test_structured import SCORES, mlp
from torch import nn

from autoflip_flwr import AutoFLIP, PruningSettings, masked, units
from autoflip_flwr.errors import MaskError, SettingsError
from autoflip_flwr.method import mask
from autoflip_flwr.server import legacy

NODES = [11, 12, 13, 14, 15]
ONE = torch.zeros(1, 6)


# --- the mask -------------------------------------------------------------------------


def test_units_go_first_and_single_weights_until_the_threshold():
    # of 26 parameters 14 go: neuron 0 with 6, then the 8 lowest that are left
    units_mask = mlp().masks(np.array([False, True, True, True]), SCORES)
    masks = mask.from_scores(SCORES, threshold=14 / 26, units=units_mask)
    assert sum(int((~m).sum()) for m in masks.values()) == 14
    assert_array_equal(masks["b2"], [0, 0])  # 0
    assert_array_equal(masks["w1"], [[0] * 3, [0] * 3, [1] * 3, [1] * 3])  # 1, 2
    assert_array_equal(masks["b1"], [0, 0, 1, 1])
    assert_array_equal(masks["w2"], [[0, 0, 1, 1], [0, 0, 1, 1]])


def test_a_unit_that_stays_keeps_its_largest_weights():
    """Without them neuron 1 loses all, as above."""
    keep = np.array([False, True, True, True])
    units_mask, held = mlp().masks(keep, SCORES), mlp().largest(SCORES, keep)
    masks = mask.from_scores(SCORES, threshold=14 / 26, units=units_mask, held=held)
    assert sum(int((~m).sum()) for m in masks.values()) == 14
    # 6 of neuron 0, 2 of b2, the other 4 of neuron 1, 2 of the 6 of neuron 2
    assert_array_equal(mlp().used(masks), keep)
    assert_array_equal(masks["w1"][1], [1, 0, 0])
    assert_array_equal(masks["w2"][:, 1], [1, 0])


@given(
    seed=st.integers(0, 2**32 - 1),
    threshold=st.floats(0, 1),
    balance=st.sampled_from(["global", "lamp"]),
    left=st.integers(1, 8),
)
def test_single_weights_empty_no_unit_that_stays(seed, threshold, balance, left):
    rng = np.random.default_rng(seed)
    every = mlp(8)
    scores = {
        name: (rng.random(shape) ** 9).astype(np.float32)
        for name, shape in every.shapes.items()
    }
    keep = np.arange(8) < left
    units_mask, held = every.masks(keep, scores), every.largest(scores, keep)
    masks = mask.from_scores(
        scores, threshold=threshold, balance=balance, units=units_mask, held=held
    )
    kept = sum(int(m.sum()) for m in masks.values())
    most = sum(int(m.sum()) for m in units_mask.values())
    assert kept == min(50 - round(50 * threshold), most)
    assert not any((masks[name] & ~units_mask[name]).any() for name in masks)
    if kept >= sum(int(m.sum()) for m in held.values()):
        assert_array_equal(every.used(masks), keep)


def test_with_a_value_as_threshold_as_many_go_as_without_units():
    units_mask = mlp().masks(np.array([True, True, True, False]), SCORES)
    alone = mask.from_scores(SCORES, threshold=2.5, mode="value", floor=0.01)
    both = mask.from_scores(
        SCORES, threshold=2.5, mode="value", floor=0.01, units=units_mask
    )
    # 12 are below, and the floor keeps the best entry of b2
    assert sum(int((~m).sum()) for m in alone.values()) == 11
    assert mask.density(both) == mask.density(alone)
    assert not both["w1"][3].any()


def test_with_a_value_that_is_above_all_the_floor_is_kept_of_what_units_leave():
    units_mask = mlp().masks(np.array([False, True, True, True]), SCORES)
    masks = mask.from_scores(
        SCORES, threshold=100, mode="value", floor=0.25, units=units_mask
    )
    assert {name: int(kept.sum()) for name, kept in masks.items()} == {
        "w1": 3, "b1": 1, "w2": 2, "b2": 1,
    }  # fmt: skip
    assert not masks["w1"][0].any()


@given(seed=st.integers(0, 2**32 - 1), threshold=st.floats(0.1, 0.8))
def test_a_hybrid_mask_prunes_exactly_its_share_and_keeps_its_floor(seed, threshold):
    rng = np.random.default_rng(seed)
    scores = {name: rng.random(s.shape, np.float32) for name, s in SCORES.items()}
    budget = int(0.6 * round(threshold * 26))
    keep = mlp().choose(scores, budget=budget)
    whole = mlp().masks(keep, scores)
    masks = mask.from_scores(scores, threshold=threshold, floor=0.05, units=whole)
    pruned = sum(int((~m).sum()) for m in masks.values())
    assert pruned == round(threshold * 26)
    for name, kept in masks.items():
        assert not (kept & ~whole[name]).any()
        assert kept.any()


# --- rounds ---------------------------------------------------------------------------


def hybrid(make=net, **settings):
    chosen = {"threshold": 0.6, "units": 0.7, "population_weight": 1.0, **settings}
    return AutoFLIP(
        FedAvg(fraction_evaluate=0.0),
        **flat(model=make(), example_inputs=ONE, **chosen),
    )


def test_a_round_sends_whole_units_as_empty_and_meets_the_threshold():
    grid = LocalGrid(toy_app(), NODES)
    run(hybrid(), grid, net(), rounds=1)
    sent = next(each for each in grid.down if each.phase == "train")
    masks = masks_in(sent, net())
    total = sum(keep.size for keep in masks.values())
    assert sum(int((~k).sum()) for k in masks.values()) == round(0.6 * total)
    traced = units.trace(net(), ONE)
    used = traced.used(masks)
    whole = traced.pruned(used, masks)
    neuron = 6 + 2 + 3
    assert 0.7 * 0.6 * total - neuron < whole <= 0.7 * 0.6 * total + neuron
    assert 1 <= used.sum() < 16


@pytest.mark.parametrize("make", [net, plain_net])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_clients_that_train_a_smaller_model_end_with_the_same_weights(make, weight):
    ends = {}
    for example in (None, ONE):
        widths = []
        app = toy_app(
            make,
            example_inputs=example,
            after_step=lambda net, seen=widths: seen.append(net[0].out_features),
        )
        grid = LocalGrid(app, NODES)
        strategy = hybrid(make, population_weight=weight)
        strategy.strategy.fraction_train = 0.6
        seen, _ = run(strategy, grid, make(), rounds=4)
        ends[example is None] = seen[-1]
        assert (min(widths) < 16) is (example is not None)
    masks = strategy.rounds.plan.masks
    for name, value in ends[True].items():
        if name.endswith(("running_mean", "running_var")):
            continue  # of missing units they stay; the next test has the others
        assert_allclose(ends[False][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert any(not keep.all() for keep in masks.values())


def test_batch_norm_follows_what_is_kept_and_rests_where_nothing_is():
    grid = LocalGrid(toy_app(example_inputs=ONE), NODES)
    strategy = hybrid()
    seen, _ = run(strategy, grid, net(), rounds=2)
    used = units.trace(net(), ONE).used(strategy.rounds.plan.masks)
    means = seen[-1]["1.running_mean"]
    assert (~used).any()
    assert not means[~used].any()
    assert means[used].any()
    assert_array_equal(seen[-1]["1.running_var"][~used], 1)


def test_the_older_api_takes_the_model_for_names_and_units():
    strategy = legacy.AutoFLIP(
        OlderFedAvg(**options(net)),
        model=net(),
        example_inputs=ONE,
        threshold=0.6,
        units=0.7,
    )
    serve(strategy, net)
    masks = strategy.rounds.plan.masks
    assert set(masks) == {name for name, _ in net().named_parameters()}
    assert units.trace(net(), ONE).used(masks).sum() < 16


# --- inside an app --------------------------------------------------------------------


def some_masks(model, share=0.5):
    rng = np.random.default_rng(0)
    scores = {n: rng.random(tuple(p.shape)) for n, p in model.named_parameters()}
    return units.mask_units(model, scores, share=share, example_inputs=ONE)


def test_masked_hands_out_a_smaller_model_and_gives_back_what_it_learned():
    model = net()
    masks = some_masks(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with masked(model, masks, ONE) as small:
        assert small is not model
        assert small[0].out_features < 16
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(1.0)
    for name, parameter in model.named_parameters():
        keep = torch.from_numpy(masks[name])
        torch.testing.assert_close(parameter[keep], before[name][keep] + 1)
        assert not bool(parameter[~keep].any())


def test_single_weights_stay_zero_in_the_smaller_model():
    model = net()
    masks = some_masks(model)
    masks["3.bias"][1] = False
    with masked(model, masks, ONE) as small:
        optimizer = torch.optim.Adam(small.parameters(), 0.1)
        small(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        assert small[3].bias[1] == 0
        assert small[3].bias[0] != 0
    assert model[3].bias[1] == 0


def test_an_optimizer_of_the_whole_model_is_refused_where_a_smaller_one_is_trained():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    refused = pytest.raises(MaskError, match=r"optimizer of its parameters")
    with masked(model, some_masks(model), ONE), refused:
        optimizer.step()
    optimizer.step()  # after the block it is as any


def test_a_change_of_the_whole_model_is_refused_where_a_smaller_one_is_trained():
    model = net()
    refused = pytest.raises(MaskError, match="the block has changed the whole model")
    with refused, masked(model, some_masks(model), ONE):
        model.load_state_dict(net().state_dict())


def test_a_layer_that_is_put_into_the_whole_model_is_refused():
    model = net()
    refused = pytest.raises(MaskError, match="the block has changed the whole model")
    with refused, masked(model, some_masks(model), ONE):
        model.load_state_dict(net().state_dict(), assign=True)


def test_what_a_block_learned_before_it_failed_is_not_lost():
    model = net()
    masks = some_masks(model)

    def interrupted() -> None:
        with masked(model, masks, ONE) as small, torch.no_grad():
            small[3].bias.fill_(5.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (model[3].bias == 5).all()


def test_a_smaller_model_may_change_its_type():
    model = net()
    with masked(model, some_masks(model), ONE) as small, torch.no_grad():
        small.double()[3].bias.fill_(2.0)
    assert model[3].bias.dtype == torch.float32
    assert (model[3].bias == 2).all()


def test_the_older_apis_numbers_name_a_smaller_models_masks_too():
    model = net()
    masks = some_masks(model)
    numbers = {str(i): name for i, name in enumerate(model.state_dict())}
    numbered = {i: masks[name] for i, name in numbers.items() if name in masks}
    with masked(model, numbered, ONE) as small:
        assert small[0].out_features < 16


def test_a_tied_weight_is_masked_under_any_of_its_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 16)
            self.one = nn.Linear(16, 16, bias=False)
            self.two = nn.Linear(16, 16, bias=False)
            self.two.weight = self.one.weight
            self.inner = nn.Linear(16, 16)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            x = self.two(self.one(self.first(x).relu()).relu())
            return self.head(self.inner(x).relu())

    model = Tied()
    masks = some_masks(model, share=0.1)
    masks["two.weight"] = masks.pop("one.weight")
    masks["inner.weight"][:12] = masks["inner.bias"][:12] = False
    masks["head.weight"][:, :12] = False
    with masked(model, masks, ONE) as small:
        assert small.inner.out_features < 16
        assert small.two.weight is small.one.weight


@pytest.mark.parametrize("kind", ["hook", "post_accumulate_grad_hook"])
def test_hooks_on_parameters_keep_the_model_whole(kind):
    model = net()
    getattr(model[0].weight, f"register_{kind}")(lambda gradient: None)
    with masked(model, some_masks(model), ONE) as trained:
        assert trained is model


@pytest.mark.parametrize("given", [{}, ConfigRecord({"server-round": 1})])
def test_without_a_mask_the_model_is_trained_as_it_is(given):
    model = net()
    with masked(model, given, ONE) as trained:
        assert trained is model


def test_without_example_inputs_the_model_is_trained_whole():
    model = net()
    with masked(model, some_masks(model)) as trained:
        assert trained is model


# --- what cannot work -----------------------------------------------------------------


def test_units_need_the_model():
    with pytest.raises(SettingsError, match=r"units: .*model=Net\(\)"):
        AutoFLIP(FedAvg(), units=0.5)


def test_a_model_needs_example_inputs():
    with pytest.raises(SettingsError, match="one sample that it runs on"):
        AutoFLIP(FedAvg(), units=0.5, model=net())


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_units_are_a_share(share):
    with pytest.raises(SettingsError, match=r"units: expected a number in \[0, 1\]"):
        hybrid(units=share)


@pytest.mark.parametrize("with_units", [False, True])
def test_a_model_other_than_the_one_that_travels_is_refused(with_units):
    other = lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))  # noqa: E731
    strategy = hybrid(other) if with_units else AutoFLIP(model=other())
    with pytest.raises(SettingsError, match=r"0.weight: expected the shape \(5, 6\)"):
        run(strategy, LocalGrid(toy_app(), NODES), net(), rounds=1)


def test_too_many_units_are_refused_before_anybody_explores():
    grid = LocalGrid(toy_app(), NODES)
    strategy = hybrid(threshold=0.97, units=1.0)
    with pytest.raises(MaskError, match=r"at most .*would lose all their units"):
        run(strategy, grid, net(), rounds=1)
    assert not grid.sent


def test_excluded_parameters_keep_their_units_whole():
    grid = LocalGrid(toy_app(), NODES)
    strategy = hybrid(exclude=["1.*"], units=0.0)
    run(strategy, grid, net(), rounds=1)
    with pytest.raises(MaskError, match=r"at most 0 of .*excluded or not .*\['0'\]"):
        run(hybrid(exclude=["1.*"]), LocalGrid(toy_app(), NODES), net(), rounds=1)


def test_the_summary_says_how_much_falls_on_units(caplog):
    with caplog.at_level(logging.INFO, logger="flwr"):
        hybrid().summary()
    assert "units=0.7" in caplog.text


# --- a target of operations -----------------------------------------------------------


def test_clients_need_at_most_the_operations_that_were_asked_for():
    """The share falls with the density: 40 of 100 pruned first, then 70."""
    strategy = AutoFLIP(
        threshold=0.7,
        model=plain_net(),
        example_inputs=ONE,
        pruning=PruningSettings(operations=0.4, gradual_rounds=1),
    )
    shares = []

    def note(server_round, arrays):
        if server_round:
            every = strategy.rounds.units
            used = every.used(strategy.rounds.plan.masks)
            shares.append(every.operations(used) / every.operations())

    run(
        strategy, LocalGrid(toy_app(plain_net), NODES), plain_net(), 3, after_round=note
    )
    assert shares[1] == shares[2] <= 0.4 < shares[0] <= 1 - 0.4 / 0.7 * 0.6
    assert strategy.rounds.density == pytest.approx(0.3, abs=0.01)


def stepped_net() -> nn.Module:
    """Four neurons of 46 multiply-accumulates and forty of 7; 24 + 160 + 120 in all."""
    return seeded(
        lambda: nn.Sequential(
            *(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3))
        )
    )


@pytest.mark.parametrize("target", [0.3, 0.4, 0.55])
@pytest.mark.parametrize("gradual_rounds", [0, 3])
def test_coarse_units_leave_a_target_in_reach_of_fine_ones(target, gradual_rounds):
    strategy = AutoFLIP(
        threshold=0.75,
        model=stepped_net(),
        example_inputs=ONE,
        pruning=PruningSettings(operations=target, gradual_rounds=gradual_rounds),
    )
    grid = LocalGrid(toy_app(stepped_net), NODES)
    run(strategy, grid, stepped_net(), 4)
    every, masks = strategy.rounds.units, strategy.rounds.plan.masks
    share = every.operations(every.used(masks)) / every.operations()
    assert target - 7 / 304 < share <= target
    total = sum(keep.size for keep in masks.values())
    kept = sum(int(keep.sum()) for keep in masks.values())
    assert kept == total - round(0.75 * total)


def test_a_value_that_prunes_too_little_for_a_target_is_said(caplog):
    """Nothing is below a threshold of 0; in mode value no one knows before."""
    strategy = AutoFLIP(
        threshold=0.0,
        model=plain_net(),
        example_inputs=ONE,
        pruning=PruningSettings(operations=0.4, mode="value", score="guidance"),
    )
    with caplog.at_level(logging.WARNING, logger="flwr"):
        run(strategy, LocalGrid(toy_app(plain_net), NODES), plain_net(), 1)
    (said,) = [
        r.getMessage() for r in caplog.records if "operations:" in r.getMessage()
    ]
    assert "needs 1.000 of the dense multiply-accumulates, asked for 0.400" in said
    assert said.endswith("Prune more parameters, or allow more operations")


def test_a_value_as_threshold_prunes_whole_units_with_their_biases():
    scores = dict(SCORES)
    units_mask = mlp().masks(np.array([False, True, True, True]), scores)
    masks = mask.from_scores(
        scores, threshold=2.5, mode="value", floor=0.01, whole=["b1"], units=units_mask
    )
    assert not masks["b1"][0]
    assert not masks["w1"][0].any()
    assert masks["b1"][1:].all()


def test_a_target_of_operations_needs_the_model_and_one_that_can_be_reached():
    target = PruningSettings(operations=0.4)
    with pytest.raises(SettingsError, match=r"operations: pruning whole units needs"):
        AutoFLIP(pruning=target)
    strategy = AutoFLIP(
        threshold=0.1, model=plain_net(), example_inputs=ONE, pruning=target
    )
    with pytest.raises(MaskError, match=r"operations: expected a share .* got 0\.4"):
        run(strategy, LocalGrid(toy_app(plain_net), NODES), plain_net(), 1)
