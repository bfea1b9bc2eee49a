"""The core alone, and the oldest and the newest Flower: the plug-in examples run."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from core_install import closure, linked
from flower import ROOT

from autoflip_flwr.errors import FlowerVersionError
from autoflip_flwr.wire.flower import NEWEST, OLDEST, check_version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXAMPLES = ["message_api/after", "message_api/smaller", "legacy_api/after"]
HERE = Path(__file__).parent

#: What only the extras install.
EXTRAS = {
    "datasets",
    "flwr_datasets",
    "matplotlib",
    "onnx",
    "pandas",
    "pyarrow",
    "ray",
    "tensorboard",
    "thop",
    "torchvision",
}


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A folder for sys.path: the core, and scikit-learn for the examples' digits."""
    folder = tmp_path_factory.mktemp("core")
    names = closure([*PROJECT["dependencies"], "scikit-learn"])
    linked(names, folder)
    (folder / "autoflip_flwr").symlink_to(ROOT / "autoflip_flwr")
    assert not {re.sub("[-.]", "_", name) for name in names} & EXTRAS
    return folder


def python(path, *arguments, cwd=None):
    """Run Python with one folder for all packages."""
    return subprocess.run(
        [sys.executable, "-S", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def results(core):
    """What each example says after four rounds."""
    folders = [ROOT / "examples" / example for example in EXAMPLES]
    done = python(core, HERE / "plugged_in.py", 4, *folders)
    assert done.returncode == 0, done.stderr
    return dict(zip(EXAMPLES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_core_alone_runs_the_examples(results, example):
    result = results[example]
    assert result["accuracy"] > 0.85
    assert result["masked"]
    assert result["warnings"] == []
    assert not EXTRAS & set(result["imported"])
    packed = "train:autoflip.values" if "message" in example else "train:0"
    assert packed in result["sent"]
    assert "train:fc1.weight" not in result["sent"], "only kept values travel"


#: Runs programs in one process; prints what each said, and what a client imports.
EACH = """
import json, sys
from autoflip_flwr import AutoFlipMod, masked, masks_from
result = {"a client": list(sys.modules)}
import contextlib, io, os, traceback
from autoflip_flwr import cli
for name, program in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = eval(program)
        except Exception:
            status = traceback.print_exc()
    result[name] = status, out.getvalue(), err.getvalue()
print(json.dumps(result))
"""

COMMANDS = {"compare smoke": "compare", "report .": "compare"}
OURS = {
    "app.server": "__import__('autoflip_flwr.app.server')",
    "models": "__import__('autoflip_flwr').models.build('resnet50', num_classes=2, "
    "input_shape=(3, 32, 32))",
    "data": "__import__('autoflip_flwr').data.load('mnist', num_partitions=2)",
}
APP = ROOT / "examples" / "message_api" / "after"
INSPECT = ["inspect", "digits_app.task:Net", "--input", "1,1,8,8"]


@pytest.fixture(scope="module")
def said(core, tmp_path_factory):
    programs = {
        **{words: f"cli.main({words.split()})" for words in COMMANDS},
        **OURS,
        "inspect": f"os.chdir({str(APP)!r}) or cli.main({INSPECT})",
    }
    folder = tmp_path_factory.mktemp("empty")
    done = python(core, "-c", EACH, json.dumps(programs), cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_core_alone_inspects_a_model(said):
    status, out, err = said["inspect"]
    assert status == 0, err
    assert "fc1" in out
    assert "pruning.operations=0.33: about 0.3" in out


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_without_its_extra_says_which(said, words):
    status, _, err = said[words]
    assert status == 2, err
    assert f"pip install 'autoflip-flwr[{COMMANDS[words]}]'" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("program", OURS)
def test_our_app_without_its_extra_says_which(said, program):
    _, _, err = said[program]
    assert "MissingExtraError" in err
    assert "pip install 'autoflip-flwr[app]'" in err


@pytest.mark.slow
def test_a_client_imports_neither_the_server_nor_pydantic(said):
    imported = set(said["a client"])
    assert "autoflip_flwr.client" in imported
    ours = {"autoflip_flwr.server", "autoflip_flwr.pruners"}
    assert not {"pydantic", "torch_pruning", *ours} & imported
    assert not EXTRAS & {name.partition(".")[0] for name in imported}


# --- versions of Flower ---------------------------------------------------------------


@pytest.fixture(scope="module", params=[f"{OLDEST}.*", f"{NEWEST}.*"])
def flower(request, tmp_path_factory):
    """A folder with another version of Flower and what it needs."""
    folder = tmp_path_factory.mktemp("flower")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--target",
    ]
    done = subprocess.run(
        [*command, str(folder), f"flwr=={request.param}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, request.param.removesuffix(".*")


@pytest.mark.slow
@pytest.mark.e2e
def test_both_apis_run_on_the_oldest_and_the_newest_flower(flower):
    folder, version = flower
    apps = ("message_api/smaller", "legacy_api/after")
    folders = [ROOT / "examples" / example for example in apps]
    command = [sys.executable, HERE / "plugged_in.py", "4", *folders]
    done = subprocess.run(
        command,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 2
    for result in results:
        assert result["flwr"].startswith(f"{version}.")
        assert result["accuracy"] > 0.85
        assert result["masked"]
        assert result["warnings"] == []


def test_the_range_is_the_one_that_pip_is_told():
    (requirement,) = (d for d in PROJECT["dependencies"] if d.startswith("flwr"))
    above = int(NEWEST.partition(".")[2]) + 1
    assert requirement == f"flwr>={OLDEST},<1.{above}"


def test_an_older_flower_is_refused_with_the_range():
    with pytest.raises(
        FlowerVersionError, match=rf"{OLDEST} to {NEWEST}, got 1\.21\.0"
    ):
        check_version("1.21.0")
    for fine in (f"{OLDEST}.0", "1.41.0", f"{NEWEST}.3", "1.30.0rc1"):
        check_version(fine)


def test_a_newer_flower_is_warned_of(caplog):
    check_version("1.99.0")
    assert "not with 1.99.0" in caplog.text
