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
    bytes_to_ndarray,
    ndarray_to_bytes,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.strategy import FedAvg, FedAvgM
from inprocess import CHANGING, assert_masks_change, net, samples, state_of
from numpy.testing import assert_array_equal
from test_legacy import CIDS, Client, options, serve

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


def test_a_reply_far_from_the_others_is_dropped_and_named(caplog):
    def huge(result):
        values = np.frombuffer(result.parameters.tensors[0], np.float32).copy()
        values[:] = 1e30
        result.parameters.tensors[0] = values.tobytes()

    seen = []
    strategy = AutoFLIP(FedAvg(**options(net, seen)), model=net())
    with caplog.at_level(logging.WARNING, logger="flwr"):
        serve(strategy, rounds=1, tamper=of("13", huge))
    assert "the reply of node 13 is dropped: expected at most 100 times" in caplog.text
    assert all(np.abs(a).max() < 1e3 for a in seen[-1])


def test_a_reply_of_too_many_examples_is_dropped_and_named(caplog):
    def many(result):
        result.num_examples = 10**12

    with caplog.at_level(logging.WARNING, logger="flwr"):
        serve(
            AutoFLIP(FedAvg(**options(net)), model=net()),
            rounds=1,
            tamper=of("12", many),
        )
    assert "the reply of node 12 is dropped" in caplog.text
    assert "has examples" in caplog.text


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


def test_an_explorer_far_from_the_others_is_left_out(caplog):
    def loud(ins, result):
        if ins.config["autoflip.phase"] == "explore" and result.num_examples == 32:
            frame = np.frombuffer(result.parameters.tensors[0], np.uint8).copy()
            levels = frame[: 8 * 4].view("<f4")
            levels *= np.float32(1e20)
            result.parameters.tensors[0] = frame.tobytes()
        return result

    with caplog.at_level(logging.WARNING, logger="flwr"):
        serve(AutoFLIP(FedAvg(**options(net)), model=net()), rounds=1, tamper=loud)
    assert "node 13 is left out: expected at most 100 times the median" in caplog.text


# --- a whole result, its metrics, its weight ------------------------------------------


def last_model(tamper=None, rounds=1, **settings):
    seen = []
    strategy = AutoFLIP(FedAvg(**options(net, seen)), **flat(model=net(), **settings))
    serve(strategy, rounds=rounds, tamper=tamper)
    return strategy, seen[-1]


def assert_dropped(change, caplog, text, **settings):
    """Node 13's result is named and changes nothing."""

    def lost(result):
        raise OSError("gone")

    _, expected = last_model(of("13", lost), **settings)
    caplog.clear()
    strategy, found = last_model(of("13", change), **settings)
    for ours, other in zip(found, expected, strict=True):
        assert_array_equal(ours, other)
    assert list(strategy.rounds.dropped) == [13]
    assert text in caplog.text


def told(**metrics):
    return lambda result: result.metrics.update(metrics)


def array_as(name, value):
    """Change an array that travels beside the mask: buffers, in the model's order."""
    names = [n for n in state_of(net()) if n not in dict(net().named_parameters())]

    def change(result):
        index = 1 + names.index(name)
        before = bytes_to_ndarray(result.parameters.tensors[index])
        after = np.full_like(before, value)
        result.parameters.tensors[index] = ndarray_to_bytes(after)

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (told(blob=bytes(2 << 20)), "a whole reply of at most"),
        (told(loss=1.7e308), "a finite metric 'loss'"),
        (told(loss=1e6), "it reports loss 1e+06"),
        (told(loss="none"), "['loss (number)'], as most replies have"),
        (lambda result: result.metrics.clear(), "as most replies have, got none"),
        (array_as("1.num_batches_tracked", 2**63 - 1), "1.num_batches_tracked"),
    ],
)
def test_a_result_that_would_stop_or_steer_the_others_is_dropped(change, text, caplog):
    assert_dropped(change, caplog, text)


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


def test_a_result_counts_as_ten_times_the_usual_examples_at_most():
    """Others have 24, 28, 36 and 40: with 3,200 of 13 the median is 36."""

    def examples(count):
        def change(result):
            result.num_examples = count

        return of("13", change)

    _, found = last_model(examples(3200))
    _, expected = last_model(examples(360))
    for ours, other in zip(found, expected, strict=True):
        assert_array_equal(ours, other)
    _, uncapped = last_model(examples(3200), weight_cap=None)
    assert any((a != b).any() for a, b in zip(found, uncapped, strict=True))


@pytest.mark.parametrize("times", [2, 3])
def test_a_round_that_loses_everybody_begins_again_or_ends_the_run(times, caplog):
    calls = []

    def tamper(ins, result):
        if ins.config["autoflip.phase"] == "train":
            calls.append(ins)
            if 5 < len(calls) <= 5 + 5 * times:  # in round 2
                raise OSError("the SuperLink is locked")
        return result

    if times == 3:
        with pytest.raises(ReplyError, match="round 2 was lost 3 times"):
            last_model(tamper, rounds=3)
        return
    _, found = last_model(tamper, rounds=3)
    _, expected = last_model(rounds=3)
    for ours, other in zip(found, expected, strict=True):
        assert_array_equal(ours, other)
    assert "round 2 begins again" in caplog.text
