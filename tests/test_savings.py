"""What a run has saved, at its end, on both APIs."""

import logging
from threading import Lock

import pytest
import torch
from flwr.compat.common import recorddict_compat as compat
from flwr.server.strategy import FedAvg as OlderFedAvg
from flwr.serverapp.strategy import FedAvg
from inprocess import LocalGrid, net, plain_net, run, toy_app
from test_legacy import options, serve

from autoflip_flwr import AutoFLIP, Checkpointed, PruningSettings
from autoflip_flwr.errors import ModelError
from autoflip_flwr.server import legacy as older
from autoflip_flwr.server.savings import Savings

NODES = [11, 22, 33, 44]


def bytes_of(sent):
    return sum(r.count_bytes() for s in sent for r in s.content.values() if len(r))


def inner():
    return FedAvg(fraction_train=0.5, fraction_evaluate=0.5, min_available_nodes=4)


def lines(caplog):
    return [m for m in caplog.messages if m.startswith("AutoFLIP: ")]


def test_the_bytes_are_those_of_all_messages_and_of_a_run_of_fedavg(caplog):
    dense = LocalGrid(toy_app(mods=[]), NODES)
    run(inner(), dense, net(), rounds=3)
    grid = LocalGrid(toy_app(), NODES)
    strategy = AutoFLIP(inner(), threshold=0.5)
    assert strategy.savings is None, "nothing has been sent"
    with caplog.at_level(logging.INFO, logger="flwr"):
        _, result = run(strategy, grid, net(), rounds=3)
    saved = result.savings
    assert saved == strategy.savings
    assert saved.sent == bytes_of(grid.down) + bytes_of(grid.up)
    explored = [s for s in grid.down + grid.up if s.phase == "explore"]
    assert saved.explored == bytes_of(explored) > 0
    assert saved.dense == bytes_of(dense.down) + bytes_of(dense.up)
    assert saved.parameters == sum(p.numel() for p in net().parameters())
    keeps = strategy.rounds.plan.masks
    assert saved.kept == sum(int(keep.sum()) for keep in keeps.values())
    assert saved.operations is None, "there is no sample of the input"
    kept, sent = lines(caplog)
    assert f"{saved.kept} of {saved.parameters} parameters" in kept
    assert f"{saved.sent / 1e6:.2f} MB" in sent
    assert f"FedAvg would have sent {saved.dense / 1e6:.2f} MB" in sent


def test_a_model_that_cannot_be_copied_loses_no_run():
    model, example = plain_net(), torch.zeros(1, 6)
    model.lock = Lock()
    strategy = AutoFLIP(inner(), threshold=0.5, model=model, example_inputs=example)
    _, result = run(strategy, LocalGrid(toy_app(plain_net), NODES), plain_net(), 2)
    assert result.arrays
    assert result.savings.operations is None
    with pytest.raises(ModelError, match=r"Sequential cannot be copied: cannot pickle"):
        strategy.preview()


def test_with_the_model_and_a_sample_operations_are_told_too(caplog):
    model, example = plain_net(), torch.zeros(1, 6)
    strategy = AutoFLIP(
        inner(),
        threshold=0.5,
        units=0.9,
        model=model,
        example_inputs=example,
        pruning=PruningSettings(vectors=True, gradual_rounds=0),
    )
    grid = LocalGrid(toy_app(plain_net), NODES)
    with caplog.at_level(logging.INFO, logger="flwr"):
        _, result = run(strategy, grid, model, rounds=2)
    saved = result.savings
    assert saved.dense_operations == 6 * 16 + 16 * 3
    masks = strategy.rounds.plan.masks
    alive = masks["0.weight"].any(axis=1) | masks["2.weight"].any(axis=0)
    left = int((alive | masks["0.bias"]).sum())
    assert left < 16
    assert saved.operations == left * (6 + 3)
    assert len(lines(caplog)) == 3
    share = saved.operations / saved.dense_operations
    assert lines(caplog)[2].endswith(
        f"a sample: {share:.3f} of them where `masked` gets a sample"
    )


def test_the_rows_by_hand():
    saved = Savings(
        parameters=1000,
        kept=250,
        sent=3_000_000,
        explored=500_000,
        dense=10_000_000,
        operations=400,
        dense_operations=1600,
    )
    assert saved.rows() == {
        "kept": "250 of 1000 parameters: 0.250 of them",
        "bytes sent": "3.00 MB (exploration 0.50 MB); FedAvg would have sent 10.00 MB: "
        "0.300 of it",
        "operations": "400 of 1600 multiply-accumulates a sample: 0.250 of them where "
        "`masked` gets a sample",
    }


def test_a_caller_that_counts_gets_no_lines(caplog):
    strategy = AutoFLIP(inner(), threshold=0.5)
    strategy.traffic = None
    with caplog.at_level(logging.INFO, logger="flwr"):
        _, result = run(strategy, LocalGrid(toy_app(), NODES), net(), rounds=1)
    assert strategy.savings is None
    assert not hasattr(result, "savings")
    assert not lines(caplog)


def older_run(around=lambda inner: inner):
    """Run the older server; return what was saved, and the bytes of its records."""
    strategy = around(OlderFedAvg(**options(net), fraction_evaluate=0.0))
    _, proxies = serve(strategy, rounds=3)
    contents = [compat.fitins_to_recorddict(i, True) for p in proxies for i in p.down]
    contents += [compat.fitres_to_recorddict(r, True) for p in proxies for r in p.up]
    sent = sum(r.count_bytes() for c in contents for r in c.values() if len(r))
    return getattr(strategy, "savings", None), sent


def test_the_older_api_tells_it_when_the_strategy_is_given_up(caplog):
    with caplog.at_level(logging.INFO, logger="flwr"):
        saved, sent = older_run(lambda inner: older.AutoFLIP(inner, model=net()))
    _, dense = older_run()
    assert saved.sent == pytest.approx(sent, rel=0.03)  # without Flower's status
    assert saved.dense == pytest.approx(dense, rel=0.03)
    assert 0 < saved.explored < saved.sent
    assert saved.kept < saved.parameters == sum(p.numel() for p in net().parameters())
    kept, told = lines(caplog)
    assert f"{saved.kept} of {saved.parameters} parameters" in kept
    assert f"FedAvg would have sent {saved.dense / 1e6:.2f} MB" in told


@pytest.mark.parametrize("evaluated", [0.0, 1.0])
def test_the_older_api_tells_it_once_after_the_last_round_that_it_expects(
    evaluated, caplog
):
    inner = OlderFedAvg(**options(net), fraction_evaluate=evaluated)
    strategy = older.AutoFLIP(inner, model=net()).expect(2)
    with caplog.at_level(logging.INFO, logger="flwr"):
        serve(strategy, rounds=2)
        assert len(lines(caplog)) == 2, "Flower still holds the strategy"
        del strategy
    assert len(lines(caplog)) == 2


def test_a_resumed_run_tells_the_bytes_of_all_its_rounds(tmp_path):
    """The same nodes, whole: 2 rounds and 2 more send what 4 do."""

    def go(folder, rounds):
        strategy = AutoFLIP(
            FedAvg(fraction_evaluate=0.0, min_available_nodes=4),
            threshold=0.5,
            store=folder / "guidance",
            pruning=PruningSettings(gradual_rounds=2),
        )
        run_ = Checkpointed(strategy, folder / "checkpoints")
        return run(run_, LocalGrid(toy_app(), NODES), net(), rounds=rounds)[1].savings

    whole = go(tmp_path / "whole", 4)
    go(tmp_path / "parts", 2)
    resumed = go(tmp_path / "parts", 4)
    assert resumed == whole
