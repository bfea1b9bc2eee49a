"""What `autoflip export` writes answers alone, and as the masked model does."""

import json
import subprocess
import sys

import attentive
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_runlog import go
from test_units import random_scores
from torch import nn

from autoflip_flwr import cli, settings, units
from autoflip_flwr.app import build as experiment
from autoflip_flwr.app import export, models, training
from autoflip_flwr.errors import ModelError, SettingsError
from autoflip_flwr.units.enforce import enforce

#: Answers with exported files in a process that cannot import this package.
ALONE = """
import sys
sys.modules["autoflip_flwr"] = None
import json, numpy, torch
for line in sys.stdin:
    folder, onnx = json.loads(line)
    x = torch.from_numpy(numpy.load(folder + "/x.npy"))
    program = torch.export.load(folder + "/model.pt2").module()
    answers = {"pt2": program(x).tolist(), "one": program(x[:1]).tolist()}
    if onnx:
        from onnx.reference import ReferenceEvaluator
        onnx = ReferenceEvaluator(folder + "/model.onnx")
        answers["onnx"] = onnx.run(None, {"input": x.numpy()})[0].tolist()
    try:
        import autoflip_flwr
    except ImportError:
        print(json.dumps(answers), flush=True)
"""


@pytest.fixture(scope="module")
def answers_of():
    """Ask a process that cannot import this package; one for all tests."""
    command = [sys.executable, "-c", ALONE]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:

        def ask(folder, x, *, onnx=False):
            np.save(folder / "x.npy", x.numpy())
            print(json.dumps([str(folder), onnx]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask


def masked_case(name, shape, share=0.5, **options):
    model = models.build(
        name, num_classes=10, input_shape=shape, seed=0, **options
    ).eval()
    example = torch.randn(1, *shape) if len(shape) == 3 else torch.zeros(1, *shape)
    example = example if len(shape) == 3 else example.long()
    rng = np.random.default_rng(0)
    scores = {n: rng.random(tuple(p.shape)) for n, p in model.named_parameters()}
    masks = units.mask_units(model, scores, share=share, example_inputs=example)
    return model, masks, example


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished hybrid run of our own apps."""
    folder = tmp_path_factory.mktemp("runs") / "hybrid"
    go(folder, "pruning.units=0.8 pruning.threshold=0.7")
    return folder


def test_a_run_is_exported_and_answers_without_this_package(run, capsys, answers_of):
    pytest.importorskip("onnx")
    assert cli.main(["export", str(run)]) == 0
    said = capsys.readouterr().out
    chosen = settings.read(run / "settings.yaml")
    model = experiment.build_model(chosen)
    from safetensors.numpy import load_file as load_arrays

    training.load_arrays(model, load_arrays(run / "model.safetensors"))
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        expected = model.eval()(x).numpy()
    answers = answers_of(run / "export", x, onnx=True)
    np.testing.assert_allclose(answers["pt2"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answers["one"], expected[:1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answers["onnx"], expected, rtol=1e-4, atol=1e-5)
    summary = json.loads((run / "summary.json").read_text())
    left = summary["networks"]["pruned"]["parameters"]
    assert left < summary["parameters"]
    assert f"{left} of {summary['parameters']} parameters" in said


def test_the_small_tensors_lie_where_their_indices_say(run, tmp_path):
    exported = export.export_run(run, tmp_path / "out")
    small = load_file(exported.weights)
    whole = load_file(run / "model.safetensors")
    for name, value in whole.items():
        rebuilt = torch.zeros_like(value)
        index = [
            small.get(f"{name}.kept.{dim}", torch.arange(size))
            for dim, size in enumerate(value.shape)
        ]
        rebuilt[torch.meshgrid(*index, indexing="ij")] = small[name]
        torch.testing.assert_close(rebuilt, value)
    assert any(".kept." in name for name in small)
    assert sum(small[n].numel() for n in whole) == exported.parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("cnn6", (3, 32, 32), {}),
        ("resnet50", (3, 32, 32), {}),
        ("efficientnet_b3", (3, 32, 32), {}),
        ("femnist_cnn", (1, 28, 28), {}),
        ("char_lstm", (20,), {"hidden": 64}),
    ],
)
def test_every_model_is_exported(tmp_path, name, shape, options, answers_of):
    model, masks, example = masked_case(name, shape, **options)
    export.export_model(model, masks, example, tmp_path)
    x = example.repeat(3, *[1] * len(shape))
    with enforce(model, masks), torch.no_grad():
        expected = model(x).numpy()
    answers = answers_of(tmp_path, x)
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(answers["pt2"], expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "encoder",
        "vision-transformer",
        "timm-vit",
        "swin",
        "bert",
        "vit",
        "gpt2",
        "llama",
    ],
)
def test_transformers_are_exported_with_fewer_heads(tmp_path, name, answers_of):
    pytest.importorskip("onnx")
    model, x = attentive.build(name)
    model, x = model.float().eval(), x.float() if x.is_floating_point() else x
    masks = units.mask_units(
        model, random_scores(model), share=0.4, example_inputs=x[:1]
    )
    exported = export.export_model(model, masks, x[:1], tmp_path)
    most = 0.75 if name == "llama" else 0.65  # a quarter of it are embeddings
    assert exported.parameters < most * exported.dense_parameters
    assert any(".kept." in tensor for tensor in load_file(exported.weights))
    with enforce(model, masks), torch.no_grad():
        expected = model(x).numpy()
    answers = answers_of(tmp_path, x, onnx=True)
    for answer in (answers["pt2"], answers["onnx"]):
        np.testing.assert_allclose(answer, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(answers["one"], expected[:1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_normalization_over_missing_channels_needs_no_package_either(
    tmp_path, answers_of
):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 12),
        nn.LayerNorm(12), nn.Linear(12, 2),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    rng = np.random.default_rng(0)
    scores = {n: rng.random(tuple(p.shape)) for n, p in model.named_parameters()}
    masks = units.mask_units(model, scores, share=0.5, example_inputs=x)
    export.export_model(model, masks, x[:1], tmp_path)
    with enforce(model, masks), torch.no_grad():
        expected = model(x).numpy()
    answers = answers_of(tmp_path, x)
    np.testing.assert_allclose(answers["pt2"], expected, rtol=1e-4, atol=1e-5)


def test_a_dense_run_is_exported_whole(tmp_path):
    go(tmp_path / "run", "strategy.name=fedavg rounds=1")
    exported = export.export_run(tmp_path / "run")
    assert exported.parameters == exported.dense_parameters


def test_without_onnx_there_is_no_onnx_file(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert export.export_run(run, tmp_path).onnx is None
    assert not (tmp_path / "model.onnx").exists()


def test_a_model_that_cannot_be_exported_says_so_and_leaves_its_weights(tmp_path):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x) if bool(x.sum() > 0) else x[:, :2]

    with pytest.raises(ModelError, match=r"torch.export cannot export Branching"):
        export.export_model(Branching(), {}, torch.ones(1, 3), tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_a_folder_that_is_not_there_is_one_line_with_what_may_be_meant(
    tmp_path, capsys
):
    (tmp_path / "quickstart-0").mkdir()
    assert cli.main(["export", str(tmp_path / "quikstart-0")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "did you mean 'quickstart-0'?" in said


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "expected a run's folder with settings.yaml" in capsys.readouterr().err
    (tmp_path / "settings.yaml").write_text("rounds: 3\n")
    with pytest.raises(SettingsError, match="with its preset"):
        export.export_run(tmp_path)


def test_a_run_that_has_not_finished_is_named(tmp_path):
    (tmp_path / "settings.yaml").write_text(settings.load("quickstart").as_yaml())
    with pytest.raises(SettingsError, match=r"a finished run, with model.safetensors"):
        export.export_run(tmp_path)


def test_settings_of_a_run_are_read_back(tmp_path):
    chosen = settings.load("mnist", "pruning.units=0.5 data.max-samples=7")
    path = tmp_path / "settings.yaml"
    path.write_text(chosen.as_yaml())
    assert settings.read(path) == chosen
