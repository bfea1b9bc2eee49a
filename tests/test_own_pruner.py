"""A user's own pruner: the example runs, a mistake in one is named."""

import importlib.util

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from inprocess import ROOT, LocalGrid, net, run, toy_app

from autoflip_flwr import AutoFLIP, Checkpointed, Magnitude, Pruner
from autoflip_flwr.errors import SettingsError


def example():
    path = ROOT / "examples" / "own_pruner" / "own_pruner.py"
    spec = importlib.util.spec_from_file_location("own_pruner", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(path.read_text().splitlines()) <= 30
    return module.LargestMove()


def test_the_example_prunes_what_moved_least():
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), threshold=0.5, pruner=example())
    grid = LocalGrid(toy_app(), range(11, 14))
    seen, _ = run(strategy, grid, net(), 3)
    assert strategy.rounds.density == pytest.approx(0.5, abs=0.01)
    assert not grid.nodes("explore"), "it asks for no exploration"
    keep = strategy.rounds.plan.masks["0.weight"]
    assert not seen[-1]["0.weight"][~keep].any()
    start, before = net().state_dict()["0.weight"].numpy(), seen[-2]["0.weight"]
    moved = np.abs(before - start)
    assert moved[keep].mean() > moved[~keep].mean()


def test_repr_names_the_pruner_and_what_was_chosen():
    text = repr(
        AutoFLIP(FedAvg(fraction_evaluate=0), threshold=0.9, pruner=Magnitude())
    )
    assert text == "AutoFLIP(FedAvg(), threshold=0.9, pruner=Magnitude())"


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (["fedavg"], {}, r"strategy: expected a strategy such as FedAvg\(\), got 'fed"),
        ([FedAvg], {}, r"got the class FedAvg; make one: AutoFLIP\(FedAvg\(\)\)"),
        ([], {"threshold": "0.8"}, "threshold: expected a number"),
        ([], {"units": 0.8}, r"units: .*model=Net\(\)"),
        ([], {"pruner": Magnitude}, r"pruner: expected a Pruner such as Magnitude\(\)"),
        ([], {"pruner": "magnitude"}, "pruner: expected a Pruner"),
        ([], {"pruning": {"floor": 0.1}}, r"pruning: expected PruningSettings\("),
        ([], {"exploration": 3}, "exploration: expected ExplorationSettings"),
        ([], {"wire": "float16"}, r"wire: expected WireSettings\("),
        ([], {"model": net}, r"model: expected an nn.Module such as Net\(\)"),
        ([], {"seed": 1.5}, "seed: expected a whole number, got 1.5"),
        ([], {"seed": True}, "seed: expected a whole number"),
        ([], {"store": 7}, "store: expected a Path, got 7"),
        ([], {"store": __file__}, "store: expected a folder, .* is a file"),
    ],
)
def test_a_wrong_type_is_refused_when_the_strategy_is_made(
    arguments, keywords, message
):
    with pytest.raises(SettingsError, match=message):
        AutoFLIP(*arguments, **keywords)


def test_what_belongs_outside_is_refused_inside(tmp_path):
    with pytest.raises(SettingsError, match="Checkpointed goes around AutoFLIP"):
        AutoFLIP(Checkpointed(FedAvg(fraction_evaluate=0), tmp_path))
    with pytest.raises(SettingsError, match="is around one already"):
        AutoFLIP(AutoFLIP())


def test_a_strategy_of_the_other_api_is_told_where_it_goes():
    from flwr.server.strategy import FedAvg as Older

    from autoflip_flwr import legacy

    with pytest.raises(SettingsError, match=r"autoflip_flwr\.legacy\.AutoFLIP"):
        AutoFLIP(Older())
    with pytest.raises(SettingsError, match=r"go into autoflip_flwr\.AutoFLIP"):
        legacy.AutoFLIP(FedAvg(fraction_evaluate=0))


def test_both_apis_have_one_constructor_with_ten_keywords():
    import inspect

    from autoflip_flwr import legacy

    one, other = (inspect.signature(a) for a in (AutoFLIP, legacy.AutoFLIP))
    assert one == other
    assert len(one.parameters) == 1 + 10
    assert "threshold" in AutoFLIP.__doc__


def test_a_pruner_without_masks_cannot_be_made():
    with pytest.raises(TypeError, match="masks"):
        type("Nothing", (Pruner,), {})()
