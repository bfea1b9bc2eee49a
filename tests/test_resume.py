"""`resume=true` of our own app: the run folder of a server that was killed."""

import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from inprocess import LocalGrid
from safetensors.numpy import load_file
from test_runlog import SMALL, client_app, files_in, lines_of, server_app, summary_of

from autoflip_flwr.errors import CheckpointError, SettingsError

MORE = (
    "training.device=cpu rounds=4 strategy.fraction-train=0.5 "
    "exploration.warm-start=true"
)


class Killed(BaseException):
    """Ends a run at once: nothing of ours catches it."""


def serve(folder, overrides="", *, resume=True, tamper=None):
    config = {
        "preset": "quickstart",
        "overrides": f"{SMALL} {MORE} {overrides}",
        "output-dir": str(folder),
        "resume": resume,
    }
    grid = LocalGrid(client_app.app, range(1, 5), run_config=config, tamper=tamper)
    server_app.app(grid, Context(1, 1, {}, RecordDict(), config))
    return grid


def killed_in(server_round, phase="train"):
    def tamper(message, reply):
        for config in message.content.config_records.values():
            found = (config.get("server-round"), config.get("autoflip.phase", "train"))
            if found == (server_round, phase):
                raise Killed
        return reply

    return tamper


def learned(folder):
    """The lines of a run without what its server sent in vain."""
    sent = ("bytes_down", "bytes_up", "flops", "seconds")
    return [{k: v for k, v in row.items() if k not in sent} for row in lines_of(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    serve(folder, resume=False)
    return folder


@pytest.mark.parametrize("server_round", [1, 2, 4])
def test_a_killed_run_ends_with_the_same_folder(whole, server_round, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        serve(folder, resume=False, tamper=killed_in(server_round))
    assert not (folder / "summary.json").exists()
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write('{"round": 99}\n')  # logged after the last checkpoint
    serve(folder)
    assert learned(folder) == learned(whole)
    weights, expected = (load_file(f / "model.safetensors") for f in (folder, whole))
    for name, value in expected.items():
        np.testing.assert_array_equal(weights[name], value)
    # The bytes are those that were really sent, also in vain: the roll is called again
    # if no checkpoint has it, two clients are asked again, of whom none had answered to
    # any use.
    found, one = (summary_of(f)["bytes"] for f in (folder, whole))
    assert found["roll_call"] == (2 if server_round == 1 else 1) * one["roll_call"]
    assert found["explore_down"] == one["explore_down"]
    assert found["explore_up"] == one["explore_up"]
    assert found["train_up"] == one["train_up"]
    assert sum(row["bytes_down"] for row in lines_of(folder)) == (
        found["explore_down"] + found["train_down"]
    )
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}


def test_the_guidance_does_not_outlive_the_run(whole):
    assert {path.name for path in whole.iterdir()} == {
        "checkpoints",
        "mask.npz",
        "metrics.jsonl",
        "model.safetensors",
        "settings.yaml",
        "summary.json",
    }


def test_killed_in_the_exploration_clients_do_not_explore_again(tmp_path):
    with pytest.raises(Killed):
        serve(tmp_path / "run", tamper=killed_in(1, "train"))
    later = serve(tmp_path / "run")
    assert not later.nodes("explore")


def test_resume_of_nothing_begins(tmp_path, whole):
    serve(tmp_path / "new" / "run")
    assert learned(tmp_path / "new" / "run") == learned(whole)


def test_a_run_that_got_no_checkpoint_is_begun_anew(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.yaml").write_text("")
    serve(folder)
    assert (folder / "settings.yaml").read_text().startswith("preset: quickstart")


@pytest.mark.parametrize(
    ("overrides", "resume", "error", "message"),
    [
        ("", True, SettingsError, "is finished; to run it again name a new folder"),
        ("", False, SettingsError, r"holds another run; .*resume=true"),
    ],
)
def test_a_finished_run_is_left_as_it_is(whole, overrides, resume, error, message):
    before = files_in(whole)
    with pytest.raises(error, match=message):
        serve(whole, overrides, resume=resume)
    assert files_in(whole) == before


def test_other_settings_are_refused_by_name(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        serve(folder, tamper=killed_in(2))
    before = files_in(folder)
    with pytest.raises(CheckpointError, match=r"pruning.threshold: 0.8 there, 0.5"):
        serve(folder, "pruning.threshold=0.5")
    assert files_in(folder) == before
    serve(folder, "log.tensorboard=false")


HOLD = """
import sys, time
from pathlib import Path
from autoflip_flwr.app.runlog import _held
lock = _held(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_two_servers_do_not_write_to_one_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SettingsError, match="another server is at work in"):
            serve(folder)
    finally:
        other.kill()
        other.communicate()
    serve(folder)


RUN = """
import sys
sys.path.insert(0, sys.argv[2])
from test_resume import limited
limited(sys.argv[1], moment=sys.argv[3])
"""

#: A file system of its own, which nobody else sees and which ends with the process.
OWN_DISK = """
mount -t tmpfs -o size=4m tmpfs "$1" || exit 77
"$3" -c "$4" "$1/run" "$5" "$6"
status=$?
cp -r "$1/run" "$2"
exit $status
"""


def limited(folder, *, moment):
    """Run with no room on the disk, or in a file, at the fourth of something."""
    from autoflip_flwr.app import runlog
    from autoflip_flwr.pruners import store
    from autoflip_flwr.server import checkpoint

    owner, name = {
        "checkpoint": (checkpoint, "write"),
        "file": (checkpoint, "write"),
        "answer": (store.Answers, "put"),
        "metrics": (runlog.RunLog, "round"),
    }[moment]
    folder, work, done = Path(folder), getattr(owner, name), []

    def full_at_last(*arguments):
        if len(done) == 3 and moment == "file":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        elif len(done) == 3:
            filler = (folder.parent / "filler").open("wb", buffering=0)
            with filler, contextlib.suppress(OSError):
                while filler.write(bytes(512)):
                    pass
        work(*arguments)
        done.append(arguments)

    setattr(owner, name, full_at_last)
    serve(folder, "pruning.pruned-weights=keep")


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("moment", "kept", "left"),
    [
        ("checkpoint", [1, 2], {"train": 4, "explore": 0}),
        ("file", [1, 2], {"train": 4, "explore": 0}),
        ("answer", [0], {"train": 8, "explore": 1}),
        ("metrics", [2, 3], {"train": 2, "explore": 0}),
    ],
)
def test_a_disk_that_takes_no_more_ends_the_run_and_the_last_checkpoint_is_whole(
    moment, kept, left, tmp_path
):
    folder, here = tmp_path / "run", str(Path(__file__).parent)
    command = [sys.executable, "-c", RUN, str(folder), here, moment]
    if moment != "file":
        (tmp_path / "disk").mkdir()
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", OWN_DISK, "sh"]
        command += [str(tmp_path / "disk"), str(folder), sys.executable, RUN, here]
        command += [moment]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no file system of its own could be mounted: {done.stderr}")
    assert done.returncode == 1
    assert ("No space left on device" in done.stderr) == (moment != "file")
    assert "CheckpointError: cannot write" in done.stderr
    assert "make room, then go on with resume=true" in done.stderr
    found = sorted(path.name for path in (folder / "checkpoints").glob("round*"))
    assert found == [f"round-{number:06d}.safetensors" for number in kept]
    grid = serve(folder, "pruning.pruned-weights=keep")
    assert {phase: len(grid.nodes(phase)) for phase in left} == left
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
