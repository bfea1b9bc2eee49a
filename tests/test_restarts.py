"""One strategy object that is started several times, on both APIs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flat import flat
from flwr.app import ArrayRecord
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

from autoflip_flwr import AutoFLIP, Checkpointed
from autoflip_flwr.errors import ReplyError

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
