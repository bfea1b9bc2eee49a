"""One strategy object that is started several times, on both APIs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flat import flat
from flwr.app import ArrayRecord, ConfigRecord
from flwr.server.strategy import FedAvg as OlderFedAvg
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from flwr.supercore.privacy_accounting import SamplingMethod
from inprocess import LocalGrid, assert_same_arrays, net, only_in, run, toy_app
from numpy.testing import assert_allclose
from test_legacy import AutoFLIP as OlderAutoFLIP
from test_legacy import options, serve

from autoflip_flwr import AutoFLIP, Checkpointed, ExplorationSettings
from autoflip_flwr.errors import ExplorationError, ReplyError

NODES = [11, 12, 13, 14, 15]


def strategy_of(**more):
    return AutoFLIP(FedAvg(fraction_evaluate=0), **flat(seed=0, **more))


def other_net():
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def test_a_start_with_other_weights_is_a_run_of_its_own():
    def second(strategy):
        grid = LocalGrid(toy_app(), NODES)
        seen, result = run(strategy, grid, other_net(), 2)
        return seen, grid.nodes("explore"), result.savings

    strategy = strategy_of()
    run(strategy, LocalGrid(toy_app(), NODES), net(), 2)
    seen, explored, savings = second(strategy)
    expected, *others = second(strategy_of())
    assert explored == NODES
    assert [explored, savings] == others
    for ours, theirs in zip(seen, expected, strict=True):
        assert_same_arrays(ours, theirs)


def test_a_start_with_the_weights_of_the_last_result_goes_on():
    strategy, grid = strategy_of(), LocalGrid(toy_app(), NODES)
    _, first = run(strategy, grid, net(), 2)
    second = strategy.start(grid, first.arrays, num_rounds=1)
    assert grid.nodes("explore") == NODES, "once"
    assert second.savings.sent > first.savings.sent
    masks = strategy.rounds.plan.masks
    for name, keep in masks.items():
        assert not second.arrays[name].numpy()[~keep].any()


def test_a_run_that_has_ended_does_not_excuse_the_next_one():
    strategy, lost = strategy_of(), only_in("train", NODES, lambda reply: "lost")
    run(strategy, LocalGrid(toy_app(), NODES), net(), 1)
    with pytest.raises(ReplyError, match="the model is untrained: none of 1 rounds"):
        run(strategy, LocalGrid(toy_app(), NODES, tamper=lost), other_net(), 1)


def test_a_run_that_goes_on_keeps_its_density_and_explores_again_when_it_is_due():
    """Rounds of a second start begin at 1, where the schedule would be dense."""
    explorations = ExplorationSettings(every=3)
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), exploration=explorations, seed=0)
    grid = LocalGrid(toy_app(), NODES)
    _, first = run(strategy, grid, net(), 4)
    density = strategy.rounds.density
    assert density == pytest.approx(0.2, abs=0.01)
    assert len(grid.nodes("explore")) == 2 * len(NODES)
    second = strategy.start(grid, first.arrays, num_rounds=1)
    assert strategy.rounds.density == density
    strategy.start(grid, second.arrays, num_rounds=4)
    assert len(grid.nodes("explore")) == 3 * len(NODES)


def test_a_start_after_one_that_failed_explores_from_its_own_weights():
    strategy = strategy_of()
    grid = LocalGrid(toy_app(), NODES, tamper=lambda message, reply: None)
    with pytest.raises(ExplorationError):
        run(strategy, grid, net(), 2)
    grid = LocalGrid(toy_app(), NODES)
    seen, _ = run(strategy, grid, other_net(), 2)
    assert grid.nodes("explore") == NODES
    expected, _ = run(strategy_of(), LocalGrid(toy_app(), NODES), other_net(), 2)
    assert_same_arrays(seen[-1], expected[-1])


def test_nodes_for_which_the_inner_strategy_waits_explore():
    """The grid shows none at first; Flower's sampling asks until there are enough."""

    class Late(LocalGrid):
        asked = 0

        def get_node_ids(self):
            self.asked += 1
            return super().get_node_ids() if self.asked > 1 else []

    grid = Late(toy_app(), NODES)
    run(strategy_of(), grid, net(), 1)
    assert grid.nodes("explore") == NODES


def test_a_warm_start_whose_round_was_lost_is_in_the_checkpoint():
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), seed=0)
    lost = only_in("train", NODES, lambda reply: "lost")
    grid, start = (
        LocalGrid(toy_app(), NODES, tamper=lost),
        ArrayRecord(net().state_dict()),
    )
    with pytest.raises(ReplyError):
        strategy.start(grid, start, num_rounds=1)
    warm = strategy.rounds.arrays
    resumed = AutoFLIP(
        FedAvg(fraction_evaluate=0), seed=0, store=strategy.rounds.directory
    )
    resumed.restore(strategy.state(start), start)
    assert_same_arrays(resumed.rounds.arrays, warm)
    assert any((warm[n] != a.numpy()).any() for n, a in start.items())


def test_a_config_may_hold_what_numpy_computed():
    config = ConfigRecord({"lr": np.float64(0.1) * 0.5})
    strategy = strategy_of()
    arrays = ArrayRecord(net().state_dict())
    grid = LocalGrid(toy_app(), NODES)
    strategy.start(grid, arrays, num_rounds=1, train_config=config)
    assert sorted(grid.nodes("train")) == NODES


def test_a_run_with_checkpoints_goes_on_with_the_same_object(tmp_path):
    """Round 3 is lost for good, then once: the tries are counted anew."""
    left = [3 * len(NODES)]  # replies of round 3 that are lost

    def tamper(message, reply):
        config = next(iter(message.content.config_records.values()))
        if (config["autoflip.phase"], config["server-round"]) == ("train", 3):
            left[0] -= 1
            return None if left[0] >= 0 else reply
        return reply

    def settings():
        return strategy_of(every=2, store=tmp_path / "guidance")

    strategy = Checkpointed(settings(), tmp_path / "run")
    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    with pytest.raises(ReplyError, match="round 3 was lost 3 times"):
        run(strategy, grid, net(), 4)
    left[0] = len(NODES)
    seen, result = run(strategy, grid, net(), 4)
    expected, whole = run(settings(), LocalGrid(toy_app(), NODES), net(), 4)
    for name, value in expected[-1].items():  # sampled, so summed, in another order
        assert_allclose(seen[-1][name], value, rtol=1e-4, atol=1e-6)
    assert result.savings.kept == whole.savings.kept
    assert result.savings.sent < 1.5 * whole.savings.sent, "no round counts twice"


def test_on_the_older_api_a_second_run_explores_from_its_own_weights():
    calls = []
    strategy = OlderAutoFLIP(OlderFedAvg(**options(net)), model=net())
    serve(strategy, rounds=1)
    for_next = options(other_net)["initial_parameters"]
    strategy.strategy.initial_parameters = for_next
    serve(strategy, rounds=1, calls=calls)
    explored = [arrays for _, c, arrays in calls if c["autoflip.phase"] == "explore"]
    assert len(explored) == 5
    start = ArrayRecord(other_net().state_dict()).to_numpy_ndarrays()
    for arrays in explored:
        for ours, expected in zip(arrays, start, strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_a_lost_round_of_a_strategy_that_accounts_for_privacy_is_begun_again():
    """Flower's accountant refuses a round that it has begun and not ended."""
    spent, lost = [], []

    def change(reply):
        reply.content["metrics"]["num-examples"] = 10  # it demands equal weights
        if len(lost) < len(NODES):
            lost.append(reply)
            return "lost"
        return reply

    accountant = SimpleNamespace(
        config=SimpleNamespace(
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
            population_size=len(NODES),
            max_epsilon=None,
        ),
        compose=spent.append,
        get_privacy_spent=lambda: SimpleNamespace(epsilon=1, delta=0, num_releases=1),
    )
    inner = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(fraction_evaluate=0), 0.1, 1.0, len(NODES), accountant=accountant
    )
    grid = LocalGrid(toy_app(), NODES, tamper=only_in("train", NODES, change))
    run(AutoFLIP(inner, **flat()), grid, net(), 2)
    assert len(lost) == len(NODES)
    assert len(spent) == 2
