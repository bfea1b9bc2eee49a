"""What a run will take, told beforehand: against runs, and of other people's models."""

import sys

import numpy as np
import pytest
import torch
from autoflip_flwr.legacy import AutoFLIP as OlderAutoFLIP
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAvg,
)
from inprocess import LocalGrid, nudging_app, run
from torch import nn

from autoflip_flwr import (
    AutoFLIP,
    AutoFlipMod,
    ExplorationSettings,
    Magnitude,
    PruningSettings,
    WireSettings,
)
from autoflip_flwr.cli import main
from autoflip_flwr.errors import ModelError, SettingsError

NODES = list(range(1, 9))
IMAGE = torch.zeros(1, 1, 8, 8)


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def measured(strategy, model, rounds):
    """Bytes of each round of a run in this process, both ways."""
    start = ArrayRecord(model.state_dict())
    app = nudging_app(mods=[AutoFlipMod(start=lambda context: start)])
    grid = LocalGrid(app, NODES)
    _, result = run(strategy, grid, model, rounds=rounds)
    totals = [0] * rounds
    for sent in [*grid.down, *grid.up]:
        size = sum(r.count_bytes() for r in sent.content.values() if len(r))
        number = next(iter(sent.content.config_records.values()), {})
        totals[int(number.get("server-round", 0)) - 1] += size
    return totals, result.savings


@pytest.mark.parametrize("values", ["float32", "float16", "int8"])
@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("own", [False, True], ids=["sent", "built"])
def test_the_bytes_told_are_those_of_a_run_within_one_per_cent(values, every, own):
    strategy = AutoFLIP(
        FedAvg(fraction_train=0.5, fraction_evaluate=0.0, min_available_nodes=8),
        exploration=ExplorationSettings(every=every, fraction=0.75, own_start=own),
        wire=WireSettings(values=values, outlier=None),
    )
    told = strategy.preview(cnn(), IMAGE, clients=8, rounds=6)
    _, saved = measured(strategy, cnn(), 6)
    assert told.sent == pytest.approx(saved.sent, rel=0.01)
    assert told.explored == pytest.approx(saved.explored, rel=0.01)
    assert told.dense_sent == pytest.approx(saved.dense, rel=0.01)
    assert told.kept == saved.kept
    assert told.parameters == saved.parameters
    assert told.explorers == (6 if every == 0 else 12)


def test_evaluations_and_the_inner_strategys_fractions_count():
    inner = FedAvg(fraction_train=0.25, fraction_evaluate=0.5, min_available_nodes=8)
    told = AutoFLIP(inner).preview(cnn(), IMAGE, clients=8, rounds=2)
    assert (told.federation.sampled, told.federation.evaluated) == (2, 4)
    more = AutoFLIP(inner).preview(cnn(), IMAGE, clients=8, rounds=2, evaluated=0)
    assert more.federation.evaluated == 0
    assert more.dense_sent < told.dense_sent
    private = DifferentialPrivacyClientSideFixedClipping(inner, 1.0, 1.0, 2)
    inside = AutoFLIP(private).preview(cnn(), IMAGE, clients=8, rounds=2)
    assert inside.federation == told.federation
    none = AutoFLIP(FedAvg(fraction_evaluate=0)).preview(cnn(), IMAGE, clients=8)
    assert none.federation.evaluated == 0
    older = OlderAutoFLIP().preview(cnn(), IMAGE, clients=8, rounds=2)
    assert older.federation.sampled == 8


def test_the_exploration_is_paid_for_in_the_first_round_with_fewer_bytes_in_all():
    inner = FedAvg(fraction_train=0.25, fraction_evaluate=0.0)
    told = AutoFLIP(inner).preview(cnn(), IMAGE, clients=8, rounds=20)
    sums, dense = np.cumsum(told.rounds), told.dense_round
    paid = told.paid_after
    assert 1 < paid < 20
    assert sums[paid - 1] <= paid * dense
    assert sums[paid - 2] > (paid - 1) * dense
    short = AutoFLIP(inner).preview(cnn(), IMAGE, clients=8, rounds=2)
    assert short.paid_after is None
    assert "never paid for" in str(short)
    cheaper = ExplorationSettings(fraction=0.2)
    less = AutoFLIP(inner, exploration=cheaper).preview(
        cnn(), IMAGE, clients=8, rounds=2
    )
    assert less.paid_after == 2
    told = "exploration.fraction=0.2: paid for after round 2"
    assert told in short.suggestions
    assert not any("exploration" in s for s in less.suggestions)


def test_layers_by_hand():
    told = AutoFLIP(model=cnn(), example_inputs=IMAGE).preview()
    last = "none: its channels are the model's outputs"
    rows = [
        (x.name, x.kind, x.parameters, x.operations, x.prunable, x.units)
        for x in told.layers
    ]
    assert rows == [
        ("0", "Conv2d", 160, 64 * 9 * 16, "weight", "16"),
        ("1", "BatchNorm2d", 32, 0, "kept whole", "those of 0"),
        ("4", "Linear", 32800, 32768, "weight", "32"),
        ("6", "Linear", 330, 320, "weight", last),
    ]
    assert told.dense.operations == 64 * 9 * 16 + 32768 + 320
    assert told.client.operations == told.dense.operations
    assert told.dense.gradients == 4 * told.parameters
    buffers = 4 * 16 * 2 + 8
    assert told.dense.fixed == 8 * told.parameters + buffers
    assert told.client.fixed == told.dense.fixed + 4 * told.parameters


def test_units_make_the_clients_network_smaller_in_the_preview():
    model = cnn()
    told = AutoFLIP(units=0.8, model=model, example_inputs=IMAGE).preview()
    assert told.client.operations < 0.8 * told.dense.operations
    assert told.client.per_sample < told.dense.per_sample
    assert not any("operations" in s for s in told.suggestions)
    whole = AutoFLIP(model=model, example_inputs=IMAGE).preview()
    assert whole.client.operations == whole.dense.operations
    third = AutoFLIP(
        pruning=PruningSettings(operations=0.33), model=model, example_inputs=IMAGE
    ).preview()
    share = third.client.operations / third.dense.operations
    assert share == pytest.approx(0.33, abs=0.05)
    suggested = f"pruning.operations=0.33: about {share:.2f} of the operations"
    assert any(s.startswith(suggested) for s in whole.suggestions)


def test_a_preview_leaves_the_strategy_and_the_model_as_they_were():
    model, inner = cnn(), FedAvg(min_available_nodes=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strategy = AutoFLIP(inner, seed=1)
    strategy.preview(model, IMAGE)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert strategy.savings is None
    again = AutoFLIP(inner, seed=1)
    grids = []
    for each in (strategy, again):
        grids.append(LocalGrid(nudging_app(), NODES))
        run(each, grids[-1], model, rounds=2)
    for one, other in zip(grids[0].down, grids[1].down, strict=True):
        assert one.arrays == other.arrays


class Tied(nn.Module):
    """A frozen backbone, and an output tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.backbone = nn.Linear(16, 16).requires_grad_(False)
        self.head = nn.Linear(16, 16)
        self.output = nn.Linear(16, 50, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids):
        return self.output(self.head(self.backbone(self.embedding(ids))))


def test_frozen_and_tied_tensors_are_named():
    ids = torch.zeros(1, 5, dtype=torch.int64)
    told = AutoFLIP(model=Tied(), example_inputs=ids).preview()
    layers = {layer.name: layer for layer in told.layers}
    assert layers["backbone"].prunable == "frozen"
    assert layers["backbone"].units == "none: not all is pruned"
    assert layers["output"].prunable == "tied to embedding.weight"
    assert layers["output"].parameters == 0
    assert "shared" in layers["embedding"].units
    text = str(told)
    once = "it is pruned, counted and sent once"
    assert f"tied: output.weight is embedding.weight; {once}" in text
    assert told.parameters == 50 * 16 + 16 * 16 + 16
    assert "frozen: 2 tensors, 1088 B, are not trained" in text
    assert "give it the model" not in text
    unknown = str(AutoFLIP().preview(Tied(), ids))
    assert "AutoFLIP takes them for two: give it the model" in unknown
    assert "AutoFLIP takes them for trained: give it the model" in unknown


def test_a_model_without_units_says_why():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Bilinear(4, 4, 2)

        def forward(self, x):
            return self.mix(x, x)

    told = AutoFLIP().preview(Odd(), torch.zeros(1, 4))
    (layer,) = told.layers
    assert (layer.name, layer.parameters, layer.units) == ("mix", 34, "none")
    assert "no whole units: the units of mix are not known" in str(told)


def test_settings_with_which_a_run_would_not_start_are_told():
    narrow = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 500))
    strategy = AutoFLIP(units=1.0, model=narrow, example_inputs=torch.zeros(1, 6))
    (warning,) = strategy.preview().warnings
    assert warning.startswith("the run would not start, so here units=0: ")
    (warning,) = AutoFLIP().preview(narrow, torch.zeros(1, 6)).warnings
    assert warning.startswith("too narrow to prune whole units: ")


@pytest.mark.parametrize(
    ("strategy", "options", "text"),
    [
        (AutoFLIP(), {"sampled": 11}, "expected 1 <= sampled <= clients"),
        (AutoFLIP(), {"rounds": 0}, r"rounds >= 1, got Federation\("),
        (AutoFLIP(pruner=Magnitude()), {}, "got Magnitude and mode quantile"),
        (
            AutoFLIP(pruning=PruningSettings(mode="value", threshold=0.1)),
            {},
            "got AutoFlipPruner and mode value",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(strategy, options, text):
    with pytest.raises(SettingsError, match=text):
        strategy.preview(cnn(), IMAGE, **options)


def test_without_a_model_or_with_a_wrong_input_the_error_says_what_to_give():
    with pytest.raises(SettingsError, match=r"preview\(Net\(\), torch.zeros\("):
        AutoFLIP().preview()
    with pytest.raises(ModelError, match=r"float32 of shape \(1, 3, 8, 8\).*channels"):
        AutoFLIP().preview(cnn(), torch.zeros(1, 3, 8, 8))


# --- the command ----------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 12, 2, batch_first=True)
        self.fc = nn.Linear(12, classes)

    def forward(self, ids):
        return self.fc(self.lstm(self.embedding(ids))[0][:, -1])

class Sized(Net):
    def __init__(self, classes):
        super().__init__(classes)

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    package = tmp_path / "inspected_app"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "task.py").write_text(MODULE)
    (package / "broken.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path[:])
    return tmp_path


def test_the_command_shows_the_preview_of_a_model_in_the_folder(folder, capsys):
    command = ["inspect", "inspected_app.task:Net", "--input", "1,6:int64"]
    command += ["--clients", "20", "--rounds", "100", "--sampled", "5"]
    assert main([*command, "--evaluated", "0"]) == 0
    shown = capsys.readouterr().out
    assert "100 rounds; 20 clients, of which 5 train and 0 evaluate in each" in shown
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("lstm")]
    gates = 4 * 12 * (8 + 12 + 12 + 12)
    assert row[:5] == ["lstm", "LSTM", str(gates + 2 * 2 * 48), "12.7", "k"]
    assert 6 * gates == 12672
    assert "wire.values=int8" in shown
    assert main([*command, "--overrides", "wire.values=int8"]) == 0
    assert "wire.values=" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "given", "text"),
    [
        ("inspected_app.task", "1,6", "expected package.module:Net, got"),
        ("inspected_app.task:Nett", "1,6", "has no 'Nett'; did you mean Net?"),
        (
            "inspected_app.tsk:Net",
            "1,6",
            "no module 'inspected_app.tsk'; did you mean inspected_app.task?",
        ),
        ("inspected_ap.task:Net", "1,6", "did you mean inspected_app?"),
        (
            "inspected_app.broken:Net",
            "1,6",
            "broken cannot be imported: No module named 'no_such_package'",
        ),
        ("inspected_app.task:Sized", "1,6", "a function without arguments that makes"),
        (
            "inspected_app.task:number",
            "1,6",
            "expected an nn.Module, or what makes",
        ),
        ("inspected_app.task:Net", "1,6", "does not run on the example inputs"),
        ("inspected_app.task:Net", "1x6", "--input: expected the shape of one sample"),
        ("inspected_app.task:Net", "1,6:int46", "got '1,6:int46'"),
    ],
)
def test_bad_input_is_one_line_and_ends_with_2(folder, capsys, model, given, text):
    assert main(["inspect", model, "--input", given]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert text in captured.err
    assert captured.err.count("\n") == 1


def test_a_wrong_setting_is_named(folder, capsys):
    command = ["inspect", "inspected_app.task:Net", "--input", "1,6:int64"]
    assert main([*command, "--overrides", "pruning.treshold=1"]) == 2
    assert "did you mean 'threshold'?" in capsys.readouterr().err


def test_a_setting_that_a_preview_does_not_read_is_named(folder, capsys):
    command = ["inspect", "inspected_app.task:Net", "--input", "1,6:int64"]
    assert main([*command, "--overrides", "strategy.fraction-train=0.1"]) == 2
    assert "does not read ['strategy.fraction-train']" in capsys.readouterr().err


def test_a_lazy_model_is_an_error_that_names_its_parameters():
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(ModelError, match=r"lazy ones \(1.weight, 1.bias\); run the"):
        AutoFLIP(FedAvg(), model=lazy)
