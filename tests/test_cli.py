"""The console script."""

import yaml

from autoflip_flwr import settings
from autoflip_flwr.cli import main


def test_presets_lists_every_preset(capsys):
    assert main(["presets"]) == 0
    assert capsys.readouterr().out.split() == list(settings.presets())


def test_presets_shows_one_with_overrides(capsys):
    assert main(["presets", "quickstart", "rounds=7", "pruning.floor=0.5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["rounds"] == 7
    assert shown["pruning"]["floor"] == 0.5


def test_an_unknown_preset_is_named_and_ends_with_2(capsys):
    assert main(["presets", "nope"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "unknown preset 'nope'" in captured.err
    assert "quickstart" in captured.err
