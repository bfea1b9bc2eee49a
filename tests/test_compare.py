"""Comparisons: what is run, side by side on Ray, and picked up again."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_runlog import SMALL, go

from autoflip_flwr import cli, settings
from autoflip_flwr.compare import plan as compare
from autoflip_flwr.errors import SettingsError


def names(planned):
    return [run.directory.name for run in planned]


def test_a_value_may_be_a_list_with_brackets_in_it():
    found = compare.parse_vary(['pruning.exclude=["conv[12]*",fc],[]'])
    assert found == {"pruning.exclude": ['["conv[12]*",fc]', "[]"]}


def test_every_strategy_is_run_with_every_seed(tmp_path):
    planned = compare.plan(
        "smoke", output=tmp_path, strategies=["fedavg", "l1"], seeds=2
    )
    assert names(planned) == ["fedavg-0", "fedavg-1", "l1-0", "l1-1"]
    assert {run.directory.parent for run in planned} == {tmp_path / "smoke"}
    assert [run.settings.seed for run in planned] == [0, 1, 0, 1]
    assert planned[2].settings == settings.load("smoke", "strategy.name=l1 seed=0")


def test_an_ablation_is_one_plan_and_dense_runs_are_made_once(tmp_path):
    planned = compare.plan(
        "smoke",
        output=tmp_path,
        seeds=1,
        vary=compare.parse_vary(["pruning.threshold=0.1,0.3", "rounds=2,3"]),
        overrides="pruning.units=0",
    )
    assert names(planned) == [
        "fedavg,rounds=2-0",
        "fedavg,rounds=3-0",
        "autoflip,pruning.threshold=0.1,rounds=2-0",
        "autoflip,pruning.threshold=0.1,rounds=3-0",
        "autoflip,pruning.threshold=0.3,rounds=2-0",
        "autoflip,pruning.threshold=0.3,rounds=3-0",
    ]
    last = planned[-1].settings
    assert (last.pruning.threshold, last.pruning.units, last.rounds) == (0.3, 0.0, 3)


def test_seeds_are_so_many_or_these(tmp_path):
    assert compare.parse_seeds("3") == 3
    assert compare.parse_seeds("11,12, 13") == [11, 12, 13]
    planned = compare.plan(
        "smoke", output=tmp_path, strategies=["l1"], seeds=[12, 11, 12]
    )
    assert names(planned) == ["l1-12", "l1-11"], "each once"
    assert [run.settings.seed for run in planned] == [12, 11]


@pytest.mark.parametrize("text", ["", "two", "1;2", "-1", "1,,2", "1.5"])
def test_other_seeds_are_refused(text):
    with pytest.raises(SettingsError, match=r"--seeds: .*such as 11,12,13, got"):
        compare.parse_seeds(text)


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        (["quikstart"], ["unknown preset 'quikstart'", "did you mean 'quickstart'?"]),
        (["smoke", "--strategies", "fedavg,autoflp"], ["did you mean 'autoflip'?"]),
        (["smoke", "--vary", "pruning.treshold=1,2"], ["did you mean 'threshold'?"]),
        (
            ["smoke", "--strategies", "l1,l2", "--vary", "pruning.treshold=1,2"],
            ["did you mean 'pruning.threshold'?"],
        ),
        (["smoke", "--vary", "rounds:2"], ["key=value", "'rounds:2'"]),
        (["smoke", "--overrides", "prunning.units=1"], ["did you mean 'pruning'?"]),
        (["smoke", "--seeds", "three"], ["--seeds", "'three'"]),
        (["smoke", "rounds=3"], ["'rounds=3'", '--overrides "rounds=3 ..."']),
    ],
)
def test_a_typo_is_one_line_with_what_may_be_meant(words, hints, tmp_path, capsys):
    assert cli.main(["compare", *words, "--output", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for hint in hints:
        assert hint in captured.err
    assert not list(tmp_path.iterdir())


def test_a_list_may_be_varied():
    found = compare.parse_vary(["model.channels=[4,8],[8,16]", "seedless=1"])
    assert found == {"model.channels": ["[4,8]", "[8,16]"], "seedless": ["1"]}


def test_a_key_may_be_varied_in_two_words():
    found = compare.parse_vary(["rounds=2,3", "seedless=1", "rounds=4"])
    assert found == {"rounds": ["2", "3", "4"], "seedless": ["1"]}


@pytest.mark.parametrize("word", ["rounds", "=3", "rounds=", "rounds=,"])
def test_a_mistaken_variation_is_refused(word):
    with pytest.raises(SettingsError, match=r"--vary: expected key=value,value"):
        compare.parse_vary([word])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategies": ["fedavg", "l3"]}, r"unknown strategies \['l3'\]; known: .*l1"),
        ({"strategies": []}, "unknown strategies"),
        ({"seeds": 0}, "one seed or more, got 0"),
        ({"seeds": []}, r"one seed or more, got \[\]"),
        ({"vary": {"seed": ["1"]}}, "--seeds"),
        ({"overrides": "seed=4"}, "seed is given by --seeds"),
        ({"overrides": "strategy.name=l1"}, "strategy.name is given by .*--strategies"),
        ({"vary": {"pruning.treshold": ["1"]}}, "unknown pruning keys"),
        (
            {"strategies": ["fedavg", "l1"], "vary": {"pruning.treshold": ["1"]}},
            r"none of \['fedavg', 'l1'\] reads \['pruning.treshold'\]",
        ),
        (
            {"strategies": ["random"], "vary": {"baselines.dense-rounds": ["1", "2"]}},
            r"none of \['random'\] reads \['baselines.dense-rounds'\]",
        ),
        ({"vary": {"data.dir": ["a/b", "a_b"]}}, "would share the folder"),
        ({"overrides": "rounds=0"}, "rounds"),
    ],
)
def test_impossible_plans_are_refused_before_anything_runs(tmp_path, options, message):
    with pytest.raises(SettingsError, match=message):
        compare.plan("smoke", output=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tmp_path):
    (run,) = compare.plan("smoke", output=tmp_path, strategies=["l1"], seeds=1)
    run.directory.mkdir(parents=True)
    (run.directory / "settings.yaml").write_text(run.settings.as_yaml())
    (run.directory / "summary.json").write_text("{}")
    (again,) = compare.plan(
        "smoke",
        output=tmp_path,
        strategies=["l1"],
        seeds=1,
        overrides="log.tensorboard=true",
    )
    assert again.finished
    with pytest.raises(SettingsError, match=r"l1-0 holds a run of other"):
        compare.plan(
            "smoke", output=tmp_path, strategies=["l1"], seeds=1, overrides="rounds=9"
        )


def test_a_run_that_another_comparison_finished_is_looked_at_again(tmp_path):
    (run,) = compare.plan("smoke", output=tmp_path, strategies=["l1"], seeds=1)
    other = settings.load("smoke", "strategy.name=l1 rounds=9")
    run.directory.mkdir(parents=True)
    (run.directory / "settings.yaml").write_text(other.as_yaml())
    (run.directory / "summary.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"l1-0 holds a run of other"):
        compare.run([run])


def test_a_folder_in_the_way_is_not_deleted(tmp_path):
    mine = tmp_path / "smoke" / "l1-0" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years")
    with pytest.raises(SettingsError, match=r"l1-0 is in the way"):
        compare.plan("smoke", output=tmp_path, strategies=["l1"], seeds=1)
    assert mine.read_text() == "years"


def test_strategies_are_not_repeated_for_what_they_do_not_read(tmp_path):
    planned = compare.plan(
        "smoke",
        output=tmp_path,
        strategies=["fedavg", "l1", "autoflip"],
        seeds=1,
        vary={
            "pruning.population-weight": ["0.5", "1"],
            "wire.values": ["float16", "float32"],
        },
    )
    assert names(planned) == [
        "fedavg-0",
        "l1,wire.values=float16-0",
        "l1,wire.values=float32-0",
        *(
            f"autoflip,pruning.population-weight={weight},wire.values=float{bits}-0"
            for weight in ("0.5", "1")
            for bits in (16, 32)
        ),
    ]


def test_two_comparisons_do_not_write_to_one_folder(tmp_path):
    planned = compare.plan("smoke", output=tmp_path, strategies=["l1"], seeds=1)
    folder = tmp_path / "smoke"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(compare.ComparisonError, match="another comparison"):
            compare.run(planned)


def test_a_run_killed_before_it_got_its_name_gets_it(tmp_path):
    (run,) = compare.plan("smoke", output=tmp_path, strategies=["l1"], seeds=1)
    run.partial.mkdir(parents=True)
    (run.partial / "settings.yaml").write_text(run.settings.as_yaml())
    (run.partial / "summary.json").write_text("{}")
    compare.run([run])
    assert run.finished
    assert not run.partial.exists()


def test_an_error_without_a_message_is_named_all_the_same():
    assert compare._reason(MemoryError()) == "MemoryError: no message"
    assert compare._reason(KeyError("x")) == "KeyError: 'x'"


@pytest.mark.parametrize("target", ["95", "-0.1"])
def test_a_target_that_is_no_accuracy_is_refused_first(target, tmp_path, capsys):
    words = ["compare", "smoke", "--output", str(tmp_path), "--target", target]
    assert cli.main(words) == 2
    assert "--target: expected an accuracy in [0, 1]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Three strategies, by a command that was killed when the first had finished.

    Returns their folder, what was in it then, when the first's summary was written, and
    what the command said that went on.
    """
    output = tmp_path_factory.mktemp("compare")
    process = subprocess.Popen(
        command(output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    first = output / "smoke" / "fedavg-0" / "summary.json"
    try:
        _wait_for(first, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    written, begun = first.stat().st_mtime_ns, runs_in(output / "smoke")
    done = subprocess.run(command(output), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output / "smoke", begun, written, done


def runs_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def command(output, *more):
    return [
        *[str(Path(sys.executable).with_name("autoflip")), "compare", "smoke"],
        *["--strategies", "fedavg,autoflip,random", "--seeds", "1"],
        *["--output", str(output), "--overrides", f"{SMALL} rounds=8", *more],
    ]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_an_interrupted_comparison_goes_on_where_it_was(compared):
    folder, begun, written, _ = compared
    assert any(name.endswith(".partial") for name in begun), begun
    assert (folder / "fedavg-0" / "summary.json").stat().st_mtime_ns == written
    rows = (folder / "autoflip-0" / "metrics.jsonl").read_text()
    assert [json.loads(row)["round"] for row in rows.splitlines()] == [*range(1, 9)]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_command_runs_all_and_ends_with_a_table(compared):
    folder, *_, done = compared
    assert runs_in(folder) == ["autoflip-0", "fedavg-0", "random-0"]
    assert "autoflip" in done.stdout
    assert "top-1" in done.stdout
    summary = json.loads((folder / "autoflip-0" / "summary.json").read_text())
    assert f"{summary['accuracy']:.4f}" in done.stdout
    assert "than fedavg, " in done.stdout
    assert "(1 seed, so no interval)" in done.stdout
    assert "AutoFLIP run finished" in (folder / "autoflip-0" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_compared_run_is_the_run_itself(compared, tmp_path):
    """Bit for bit the weights of the same apps on another grid, never interrupted."""
    folder, *_ = compared
    for name in ("fedavg", "autoflip", "random"):
        overrides = f"rounds=8 strategy.name={name} seed=0"
        go(tmp_path / name, overrides, preset="smoke")
        expected = load_file(tmp_path / name / "model.safetensors")
        found = load_file(folder / f"{name}-0" / "model.safetensors")
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_finished_comparison_is_not_run_again(compared):
    folder, *_, first = compared
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    done = subprocess.run(
        command(folder.parent), capture_output=True, text=True, check=False
    )
    assert done.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*")} == before


def _wait_for(path, process):
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, "it ended too soon"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_run_that_fails_is_named_and_the_others_are_finished(tmp_path):
    words = command(tmp_path, "--vary", "pruning.floor=0.9,0.01")
    words[words.index("fedavg,autoflip,random")] = "autoflip"
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "1 of 2 runs failed" in done.stderr
    assert "the floor keeps at least" in done.stderr
    assert "Traceback" not in done.stderr
    assert sum((path / "summary.json").exists() for path in tmp_path.glob("*/*")) == 1


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_node_that_fails_dies_or_is_late_ends_no_run(tmp_path):
    """On a Ray of its own, in a process of its own; its GPU is for four clients."""
    script = tmp_path / "nodes.py"
    script.write_text(NODES)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "100": "fine",
        "101": "ValueError: no data",
        "102": "WorkerCrashedError",
        "103": None,
        "at once": 4,
        "its GPU": "0",
    }


NODES = """
import json, logging, os, time
import ray
from flwr.app import ConfigRecord, Message, RecordDict
from autoflip_flwr.compare import simulation

def app():
    def answer(message, context):
        if context.node_id == 101:
            raise ValueError("no data")
        if context.node_id == 102:
            os._exit(1)
        if context.node_id == 103:
            time.sleep(600)
        gpu = ConfigRecord({"gpu": os.environ["CUDA_VISIBLE_DEVICES"]})
        return Message(RecordDict({"config": gpu}), reply_to=message)
    return answer

def sleeping():
    def answer(message, context):
        if context.node_id < 108:
            time.sleep(600)
        return Message(RecordDict(), reply_to=message)
    return answer

ray.init(num_cpus=8, num_gpus=1, include_dashboard=False, log_to_driver=False,
         logging_level=logging.ERROR)
grid = simulation.RayGrid(4, {}, client_app=app)
messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
found = dict.fromkeys(grid.get_node_ids())
nodes = {m.metadata.dst_node_id: m for m in messages}
ids, replies = grid.push_messages(messages), []
while len(replies) < 3:
    time.sleep(0.1)
    replies += grid.pull_messages(ids)
for reply in replies:
    sent = next(
        n for n, m in nodes.items()
        if m.metadata.message_id == reply.metadata.reply_to_message_id
    )
    text = reply.error.reason if reply.has_error() else "fine"
    if text == "fine":
        found["its GPU"] = reply.content["config"]["gpu"]
    found[sent] = text if "Worker" not in text else text.partition(":")[0]
late = simulation.RayGrid(20, {}, client_app=sleeping)
nodes = late.get_node_ids()
messages = [Message(RecordDict(), node, "query") for node in nodes]
assert late.send_and_receive(messages[:8], timeout=3) == []
assert len(late.send_and_receive(messages[8:12], timeout=60)) == 4
grid.give_up()
message = grid.create_message(RecordDict(), "query", 100, "7", ttl=60.0)
(pushed,) = grid.push_messages([message])
pulled = []
while not pulled:
    time.sleep(0.1)
    pulled = grid.pull_messages([pushed, "no such message"])
assert pulled[0].metadata.reply_to_message_id == pushed
assert grid.pull_messages([pushed]) == []
found["at once"] = simulation.clients_at_once()
print(json.dumps(found))
ray.shutdown()
"""


@pytest.mark.parametrize("late", [0, 2, 3])
def test_ray_begins_again_where_it_has_not_started(late):
    calls = []

    def init(**_):
        calls.append("init")
        if calls.count("init") <= late:
            raise Exception("The current node timed out during startup. This could")

    ray = SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown"))
    if late < 3:
        compare._begin(ray)
    else:
        with pytest.raises(compare.ComparisonError, match=r"busy; close other"):
            compare._begin(ray)
    assert calls == (["init", "shutdown"] * 3)[: 2 * late + (late < 3)]


def test_another_failure_of_ray_is_not_hidden():
    def init(**_):
        raise ConnectionError("no cluster")

    with pytest.raises(ConnectionError, match="no cluster"):
        compare._begin(SimpleNamespace(init=init))
