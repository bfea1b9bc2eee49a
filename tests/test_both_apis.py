"""What docs/security.md promises of replies holds on Flower's older API, too."""

import logging
import math

import numpy as np
import pytest
import torch
from autoflip_flwr.legacy import AutoFLIP
from flat import flat
from flwr.clientapp import ClientApp
from flwr.common import (
    Code,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
)
from flwr.serverapp import strategy as message_api
from inprocess import (
    CHANGING,
    LocalGrid,
    assert_masks_change,
    net,
    run,
    samples,
    state_of,
    toy_app,
)
from numpy.testing import assert_allclose, assert_array_equal
from test_legacy import CIDS, Client, options, serve

import autoflip_flwr
from autoflip_flwr import masked
from autoflip_flwr.errors import ExplorationError, ReplyError
from autoflip_flwr.pruners import Magnitude


def of(cid, change):
    """Change one client's training result; clients differ in their examples."""
    examples = 24 + 4 * CIDS.index(cid)

    def tamper(ins, result):
        trained = ins.config["autoflip.phase"] == "train"
        if trained and result.num_examples == examples:
            change(result)
        return result

    return tamper


def poisoning(kind):
    """An inner strategy whose aggregate of round 2 is not finite."""

    class Poisoning(kind):
        def aggregate_fit(self, server_round, results, failures):
            made, metrics = super().aggregate_fit(server_round, results, failures)
            if server_round == 2:
                arrays = parameters_to_ndarrays(made)
                arrays[0] = arrays[0] + np.nan
                made = ndarrays_to_parameters(arrays)
                if kind is FedAvgM:
                    self.momentum_vector = [a + np.inf for a in self.momentum_vector]
            return made, metrics

    return Poisoning


def test_an_aggregate_that_is_not_finite_is_not_the_global_model(caplog):
    seen = []
    strategy = AutoFLIP(poisoning(FedAvg)(**options(net, seen)), model=net())
    with caplog.at_level(logging.WARNING, logger="flwr"):
        serve(strategy, rounds=3)
    assert "round 2: the aggregate is not finite" in caplog.text
    first, second, third = seen[1:]
    for before, same, after in zip(first, second, third, strict=True):
        assert_array_equal(before, same)
        assert np.isfinite(after).all()


def test_a_server_optimizer_goes_on_with_the_momentum_it_had():
    seen = []
    inner = poisoning(FedAvgM)(**options(net, seen), server_momentum=0.9)
    serve(AutoFLIP(inner, model=net()), rounds=3)
    assert all(np.isfinite(a).all() for a in inner.momentum_vector)
    assert all(np.isfinite(a).all() for a in seen[-1])
    assert any((a != b).any() for a, b in zip(seen[1], seen[-1], strict=True))


def test_a_round_needs_as_many_replies_as_it_is_told(caplog):
    def lost(result):
        raise OSError("gone")

    seen = []
    strategy = AutoFLIP(
        FedAvg(**options(net, seen, accept_failures=True)),
        **flat(model=net(), min_replies=5),
    )
    few = pytest.raises(ReplyError, match="the model is untrained")
    with caplog.at_level(logging.WARNING, logger="flwr"), few:
        serve(strategy, rounds=1, tamper=of("11", lost))
    assert "4 valid replies, expected 5 or more" in caplog.text
    for ours, start in zip(seen[-1], state_of(net()).values(), strict=True):
        assert_array_equal(ours, start)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_is_passed_on(value, caplog):
    def change(result):
        result.metrics = {"loss": value}

    seen = []
    take = lambda metrics: seen.extend(metrics) or {}  # noqa: E731
    inner = FedAvg(**options(net, fit_metrics_aggregation_fn=take))
    with caplog.at_level(logging.WARNING, logger="flwr"):
        serve(AutoFLIP(inner, model=net()), rounds=1, tamper=of("14", change))
    assert "dropped" not in caplog.text
    assert [m["loss"] for _, m in seen].count(value) == 1 or math.isnan(value)
    assert len(seen) == len(CIDS)


def test_an_evaluation_that_is_not_finite_is_passed_on():
    strategy = AutoFLIP(FedAvg(**options(net)), model=net())
    _, proxies = serve(strategy, rounds=1)
    results = [(p, p.evaluate(p.down[-1], None, 1)) for p in proxies]
    results[0][1].loss = math.nan
    loss, _ = strategy.aggregate_evaluate(1, results, [])
    assert math.isnan(loss)


def test_evaluations_without_any_example_end_no_run(caplog):
    """Flower's own average divides by their number."""
    strategy = AutoFLIP(FedAvg(**options(net)), model=net())
    _, proxies = serve(strategy, rounds=1)
    results = [(p, p.evaluate(p.down[-1], None, 1)) for p in proxies]
    for _, result in results:
        result.num_examples = 0
    assert strategy.aggregate_evaluate(1, results, []) == (None, {})

    def empty(message, reply):
        if message.content["config"].get("autoflip.phase") == "evaluate":
            reply.content["metrics"]["num-examples"] = 0
        return reply

    grid = LocalGrid(toy_app(), range(3), tamper=empty)
    strategy = autoflip_flwr.AutoFLIP(message_api.FedAvg(min_available_nodes=3))
    _, result = run(strategy, grid, net(), 2)
    assert result.evaluate_metrics_clientapp == {}
    assert caplog.text.count("nobody evaluated any example") == 3


class HandWritten(Client):
    """Trains without an optimizer."""

    def fit(self, parameters, config):
        self.load(parameters)
        with masked(self.model, config if self.use_masked else {}), torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.1
        values = list(state_of(self.model).values())
        return values, len(samples(self.partition_id)[1]), {}


@pytest.mark.parametrize("use_masked", [True, False])
def test_what_moved_pruned_weights_is_told_once(use_masked, caplog):
    seen = []
    strategy = AutoFLIP(FedAvg(**options(net, seen)), model=net())
    with caplog.at_level(logging.WARNING, logger="flwr"):
        serve(strategy, client=HandWritten, use_masked=use_masked)
    told = caplog.text.count("training moved up to 100 % of the pruned weights")
    assert told == (0 if use_masked else 1)
    assert "`with masked(model, config): ...`" in caplog.text or use_masked
    assert all(np.isfinite(a).all() for a in seen[-1])


@pytest.mark.parametrize("pruner", [None, Magnitude()])
def test_a_forgotten_mod_is_an_error(pruner, monkeypatch):
    forgotten = lambda *a, **k: ClientApp(client_fn=client_fn)  # noqa: E731
    client_fn = lambda context: Client(net, 0, False, []).to_client()  # noqa: E731
    monkeypatch.setattr("test_legacy.legacy_app", forgotten)
    inner = FedAvg(**options(net, accept_failures=True))
    strategy = AutoFLIP(inner, model=net(), pruner=pruner)
    strategy.expect(2)
    text = "as AutoFlipMod does: ClientApp" if pruner is None else "untrained: none of"
    with pytest.raises((ExplorationError, ReplyError), match=text):
        serve(strategy, rounds=2)


@pytest.mark.parametrize("told", [False, True])
def test_the_density_falls_if_the_number_of_rounds_is_told(told, caplog):
    strategy = AutoFLIP(FedAvg(**options(net)), model=net())
    strategy = strategy.expect(6) if told else strategy
    with caplog.at_level(logging.INFO, logger="flwr"):
        serve(strategy, rounds=1)
    assert strategy.rounds.density == pytest.approx(0.6 if told else 0.2, abs=0.01)
    assert told is not any("AutoFLIP(strategy).expect" in m for m in caplog.messages)


class Saver(FedAvg):
    """Keeps what it aggregates, as a strategy does that saves its best model."""

    def aggregate_fit(self, server_round, results, failures):
        made, metrics = super().aggregate_fit(server_round, results, failures)
        saved.append(parameters_to_ndarrays(made))
        return made, metrics


saved = []


def test_the_inner_strategy_sees_the_masked_model_in_every_round():
    saved.clear()
    strategy = AutoFLIP(
        Saver(**options(net, fraction_fit=0.4)), **flat(model=net(), **CHANGING)
    )
    masks = []
    begin = strategy.rounds.begin

    def watch(*args):
        masks.append(begin(*args).masks)
        return strategy.rounds.plan

    strategy.rounds.begin = watch
    serve(strategy)
    assert_masks_change(masks)
    for arrays, keeps in zip(saved, masks, strict=True):
        for name, array in zip(state_of(net()), arrays, strict=True):
            if name in keeps:
                assert not array[~keeps[name]].any(), name


# --- what a result tells beside its arrays --------------------------------------------


def told(**metrics):
    return lambda result: result.metrics.update(metrics)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (told(blobs=[bytes(2 << 20)]), "a whole reply of at most"),
        (told(loss="none"), "['loss (number)'], as most replies have"),
        (lambda result: result.metrics.clear(), "as most replies have, got none"),
    ],
)
def test_a_result_that_tells_other_things_than_most_is_dropped(change, text, caplog):
    strategy = AutoFLIP(FedAvg(**options(net)), model=net())
    serve(strategy, rounds=1, tamper=of("13", change))
    assert list(strategy.rounds.dropped) == [13]
    assert text in caplog.text


def test_metrics_that_most_do_not_send_are_removed_and_named(caplog):
    seen = []

    def aggregate(metrics):
        seen.extend(own for _, own in metrics)
        return {}

    inner = FedAvg(**options(net, fit_metrics_aggregation_fn=aggregate))
    strategy = AutoFLIP(inner, model=net())
    serve(strategy, rounds=1, tamper=of("13", told(extra=b"x" * 9)))
    assert [set(metrics) for metrics in seen] == [{"loss"}] * 5
    assert "node 13 is removed what most do not send: ['extra (bytes)']" in caplog.text


# --- what the inner strategy holds and sends ------------------------------------------


def test_a_server_optimizer_inside_differential_privacy_has_the_masked_model():
    """Both compare the replies with the model that the clients got."""
    held = []

    class Recording(DifferentialPrivacyServerSideFixedClipping):
        def aggregate_fit(self, server_round, results, failures):
            own = self.current_round_params, self.strategy.current_weights
            held.append([[a.copy() for a in arrays] for arrays in own])
            held[-1].append(list(strategy.rounds.arrays.values()))
            return super().aggregate_fit(server_round, results, failures)

    inner = FedAdam(**options(net, fraction_evaluate=0))
    strategy = AutoFLIP(Recording(inner, 0.0, 1e9, 5), model=net(), **flat(**CHANGING))
    serve(strategy, rounds=3)
    assert len(held) == 3
    for private, optimizer, sent in held:
        for one, other, ours in zip(private, optimizer, sent, strict=True):
            assert_array_equal(one, ours)
            assert_array_equal(other, ours)


def test_what_the_inner_strategy_sends_is_what_clients_train():
    calls = []

    class Doubling(FedAvg):
        def configure_fit(self, server_round, parameters, client_manager):
            arrays = [2 * a for a in parameters_to_ndarrays(parameters)]
            doubled = ndarrays_to_parameters(arrays)
            return super().configure_fit(server_round, doubled, client_manager)

    plain = flat(threshold=0.0)
    strategy = AutoFLIP(Doubling(**options(net)), model=net(), **plain)
    serve(strategy, rounds=1, calls=calls)
    trained = [arrays for _, c, arrays in calls if c["autoflip.phase"] == "train"]
    assert len(trained) == len(CIDS)
    for arrays in trained:
        for ours, start in zip(arrays, state_of(net()).values(), strict=True):
            assert_array_equal(ours, 2 * start)


def test_an_inner_strategy_that_sends_no_weights_has_the_global_model_evaluated():
    class Sparing(FedAvg):
        def configure_evaluate(self, server_round, parameters, client_manager):
            made = super().configure_evaluate(server_round, parameters, client_manager)
            for _, ins in made:
                ins.parameters = ndarrays_to_parameters([])
            return made

    def sent(inner):
        strategy = AutoFLIP(inner(**options(net)), model=net())
        serve(strategy, rounds=1)
        return strategy.traffic.sent

    assert sent(Sparing) == sent(FedAvg)
    assert sent(FedAvg)["evaluate", "down"] > 0


def test_a_client_that_says_that_it_failed_to_explore_is_told_with_its_reason(caplog):
    def fail(ins, result):
        if ins.config["autoflip.phase"] == "explore" and result.num_examples == 28:
            result.status = Status(Code.FIT_NOT_IMPLEMENTED, "no training here")
        return result

    with caplog.at_level(logging.WARNING, logger="flwr"):
        serve(AutoFLIP(FedAvg(**options(net)), model=net()), rounds=1, tamper=fail)
    assert "node 12 is left out: no training here" in caplog.text


# --- what a server optimizer must not move -----------------------------------------


@pytest.mark.parametrize(
    ("older", "newer", "settings"),
    [
        (FedAvgM, message_api.FedAvgM, {"server_momentum": 0.9}),
        (FedAdam, message_api.FedAdam, {"eta": 0.01, "tau": 1e-3}),
    ],
    ids=["FedAvgM", "FedAdam"],
)
def test_a_server_optimizer_leaves_buffers_at_the_clients_mean(older, newer, settings):
    """Momentum carries a running variance below zero: the model returns NaN."""
    keys = list(net().state_dict())
    names = [name for name in keys if "running" in name]
    replied = []  # examples and buffers

    def note(message, reply):
        record = reply.content.array_records["arrays"]
        if all(name in record for name in names):  # it was trained, not explored
            examples = reply.content["metrics"]["num-examples"]
            replied.append((examples, {n: record[n].numpy() for n in names}))
        return reply

    pruning, rounds, seen = flat(threshold=0.5), 6, []
    inner = newer(fraction_evaluate=0, **settings)
    grid = LocalGrid(toy_app(), map(int, CIDS), tamper=note)
    models, _ = run(autoflip_flwr.AutoFLIP(inner, **pruning), grid, net(), rounds)
    serve(
        AutoFLIP(older(**options(net, seen), **settings), model=net(), **pruning),
        net,
        rounds,
    )
    assert len(replied) == rounds * len(CIDS)
    for number in range(rounds):
        of_round = replied[number * len(CIDS) : (number + 1) * len(CIDS)]
        total = sum(examples for examples, _ in of_round)
        for name in names:
            mean = sum(examples * own[name] for examples, own in of_round) / total
            assert_allclose(models[number + 1][name], mean, rtol=1e-6)
            also = seen[number + 1][keys.index(name)]
            assert_allclose(also, mean, rtol=1e-3, atol=1e-4)
    assert all((own["1.running_var"] > 0).all() for _, own in replied)


def test_buffers_of_a_private_strategy_keep_its_noise():
    seen = []
    inner = DifferentialPrivacyServerSideFixedClipping(
        FedAvgM(**options(net, seen), server_momentum=0.9),
        noise_multiplier=50.0,
        clipping_norm=1.0,
        num_sampled_clients=len(CIDS),
    )
    serve(AutoFLIP(inner, model=net(), **flat(threshold=0.5)), net, 1)
    index = list(net().state_dict()).index("1.running_mean")
    assert np.abs(seen[1][index]).max() > 2  # their mean is below 1
