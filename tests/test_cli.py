"""The console script."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from flwr.common.config import parse_config_args

from autoflip_flwr import settings
from autoflip_flwr.app import launch
from autoflip_flwr.cli import main


def test_presets_says_of_each_what_it_needs_takes_and_shows(capsys):
    assert main(["presets"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["preset", "data", "minutes", "shows"]
    assert [line.split()[0] for line in lines] == list(settings.presets())
    for line in lines:
        name, data, minutes, shows = re.split(" {2,}", line)
        assert settings.about(name) == {
            "data": data,
            "minutes": minutes,
            "shows": shows,
        }
        assert float(minutes.replace(",", "")) > 0


def test_listing_presets_and_checking_a_run_import_neither_torch_nor_flower():
    code = (
        "import sys; from autoflip_flwr.cli import main; main(['presets']); "
        "from autoflip_flwr.app import launch; "
        "sys.exit(bool({'torch', 'flwr', 'sklearn', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("rum quickstart", "invalid choice: 'rum' (choose from"),
        ("rum quickstart", "did you mean 'run'?"),
        ("run", "required: preset"),
        ("run smoke --resume", "--resume: name the folder of the run: --output FOLDER"),
        ("run quickstrat", "known: ['cifar10', "),
        ("run quickstrat", "did you mean 'quickstart'?"),
        ("presets quickstrat", "did you mean 'quickstart'?"),
        ("run quickstart --ouput x", "did you mean '--output'?"),
        ("run quickstart rounds", "expected dotted key=value pairs, got 'rounds'"),
        ("run quickstart roudns=3", "did you mean 'rounds'?"),
        ("run quickstart trainig.epochs=3", "did you mean 'training'?"),
        ("run quickstart learning-rate=1", "did you mean training.learning-rate?"),
        ("run quickstart epochs=1", "mean exploration.epochs or training.epochs?"),
        ("run quickstart rounds=0", "rounds: expected a whole number >= 1, got 0"),
        ("run quickstart strategy.name=fedavgg", "did you mean 'fedavg'?"),
        ("run quickstart data.name=digts", "did you mean 'digits'?"),
        ("run mnist data.dir=/nowhere/at/all", "/nowhere/at/all: expected an .npz"),
        ("run quickstart strategy.min-nodes=3000", "3000 clients cannot each get one"),
        ("run quickstart model.name=cmn", "did you mean 'cnn'?"),
        ("run quickstart model.hidden=0", "model 'cnn': hidden: "),
        ("run quickstart --output {taken}", "holds another run"),
        ("run quickstart --output {taken} --resume", "is finished"),
    ],
)
def test_what_would_end_a_run_is_one_line_before_it_starts(
    words, told, tmp_path, capsys, monkeypatch
):
    def start(*arguments):
        raise AssertionError(f"started: {arguments}")

    monkeypatch.setattr(launch, "_flwr_run", start)
    for name in ("settings.yaml", "summary.json"):
        (tmp_path / name).touch()
    assert main(words.format(taken=tmp_path).split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert told in captured.err


def test_a_run_gets_its_nodes_its_folder_and_settings_that_mean_the_same_anywhere(
    tmp_path, monkeypatch
):
    """The SuperLink has another working directory."""
    given = {}

    def start(app, *arguments):
        assert (Path(app) / "server_app.py").exists()
        options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        given.update(parse_config_args([options["--run-config"]]))
        given.update(parse_config_args([options["--federation-config"]]))
        (Path(given["output-dir"]) / "summary.json").touch()
        return 0

    digits = tmp_path / "my: #data"
    digits.mkdir()
    (tmp_path / "runs").mkdir()
    x, y = np.zeros((40, 28, 28), np.uint8), np.arange(40) % 10
    np.savez(digits / "mnist.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setattr(launch, "_flwr_run", start)
    monkeypatch.chdir(tmp_path)
    words = ["data.dir='my: #data'", "strategy.min-nodes=7", "rounds=3"]
    words += ["strategy.names=names.json"]
    assert main(["run", "mnist", *words, "--output", "runs"]) == 0
    assert given["num-supernodes"] == 7
    assert given["output-dir"] == str(tmp_path / "runs")
    assert given["resume"] is False
    chosen = settings.load(given["preset"], given["overrides"])
    assert chosen.rounds == 3
    assert chosen.data.dir == str(digits)
    assert chosen.strategy.names == str(tmp_path / "names.json")


#: Stands in for `flwr`: `run` prints rounds until `stop` has been called.
FLWR = """#!/bin/sh
cd "$(dirname "$0")"
[ "$1" = stop ] && { echo "$2" > stopped; echo "stopping $2"; exit; }
printf 'Successfully started run 77\\n\\033[92mINFO \\033[0m:      1/9  acc 0.5\\n'
while [ ! -e stopped ]; do sleep 0.1; done
"""


def test_ctrl_c_stops_the_run_and_not_only_its_log(tmp_path):
    """The terminal sends its signal to the whole foreground group."""
    flwr = tmp_path / "flwr"
    flwr.write_text(FLWR)
    flwr.chmod(0o755)
    code = (
        "import signal, sys; from autoflip_flwr.cli import main; "
        # A shell that starts the tests in the background has it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.executable = {str(tmp_path / 'python')!r}; "
        f"sys.exit(main(['run', 'quickstart', '--output', {str(tmp_path / 'run')!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "Successfully started run 77\n"
        assert running.stdout.readline() == "1/9  acc 0.5\n"  # without Flower's mark
        os.killpg(running.pid, signal.SIGINT)
        out = running.stdout.read()
    assert "stopping 77" in out
    assert f"--output {tmp_path / 'run'} --resume" in out
    assert running.returncode == 130
    assert (tmp_path / "stopped").read_text() == "77\n"


@pytest.mark.parametrize("late", [1, 2, 3])
def test_a_run_begins_again_where_ray_has_not_started(late, tmp_path, capfd):
    """Stands in for `flwr`: Ray is late so many times, and then the run ends well."""
    run, flwr = tmp_path / "run", tmp_path / "flwr"
    flwr.write_text(f"""#!/bin/sh
echo try >> "{tmp_path}/tries"
while [ $# -gt 0 ]; do
    if [ "$1" = --run-config ]; then grep resume "$2"; fi
    shift
done
if [ $(wc -l < "{tmp_path}/tries") -gt {late} ]; then
    touch "{run}/summary.json"
else
    touch "{run}/settings.yaml"
    echo "Exception: The current node timed out during startup. This could"
    exit 1
fi
""")
    flwr.chmod(0o755)
    run.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "executable", str(tmp_path / "python"))
        status = main(["run", "quickstart", "--output", str(run)])
    out = capfd.readouterr().out
    assert out.count("beginning again") == min(late, 2)
    assert out.count("resume = false") == 1  # later ones find the first one's folder
    if late < 3:
        assert status == 0
    else:
        assert status == 124
        assert "the machine is busy; close other programs" in out
    assert (tmp_path / "tries").read_text().count("try") == min(late + 1, 3)


def test_a_run_that_ends_without_a_summary_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_flwr_run", lambda *arguments: 0)
    assert main(["run", "quickstart", "--output", str(tmp_path)]) == 1


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
