"""What a run leaves behind: our own apps, run in this process, and their folder."""

import json
import logging
import re
import sys

import numpy as np
import pytest
import yaml
from flwr.app import Context, Error, Message, RecordDict
from inprocess import ROOT, LocalGrid, load_script
from safetensors.numpy import load_file

from autoflip_flwr.app import build as experiment
from autoflip_flwr.app import data, training
from autoflip_flwr.app.runlog import log_summary
from autoflip_flwr.compare import results
from autoflip_flwr.errors import AutoFlipError, NodesError, ReplyError, SettingsError
from autoflip_flwr.settings import load

server_app = load_script("autoflip_server_app", ROOT / "server_app.py")
client_app = load_script("autoflip_client_app", ROOT / "client_app.py")

SMALL = (
    "rounds=2 data.max-samples=120 data.max-test-samples=50 training.epochs=1 "
    "strategy.min-nodes=4 strategy.fraction-train=1 data.partition=iid "
    "model.channels=[4,8] model.hidden=16"
)


def go(folder, overrides="", *, nodes=range(1, 5), preset="quickstart", **grid_options):
    """One run of our ServerApp and ClientApp; returns the grid."""
    config = {
        "preset": preset,
        "overrides": f"{SMALL} {overrides}",
        "output-dir": str(folder),
    }
    grid = LocalGrid(client_app.app, nodes, run_config=config, **grid_options)
    context = Context(1, 1, {}, RecordDict(), config)
    server_app.app(grid, context)
    return grid


def lines_of(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OVERRIDES = "data.holdout=0.2 strategy.fraction-evaluate=1 pruning.gradual-rounds=0"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, looked at by many tests."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "one"
    return folder, go(folder, OVERRIDES)


def test_settings_are_written_resolved_and_are_a_preset_again(finished):
    folder, _ = finished
    written = yaml.safe_load((folder / "settings.yaml").read_text())
    assert written["preset"] == "quickstart"
    assert written["rounds"] == 2
    assert written["data"]["max-samples"] == 120
    assert written["pruning"]["population-weight"] == 1.0
    assert written["training"]["optimizer"] == "sgd"
    expected = load("quickstart", f"{SMALL} {OVERRIDES}")
    assert written == yaml.safe_load(expected.as_yaml())


def test_every_round_is_a_line_with_the_documented_keys(finished):
    folder, _ = finished
    lines = lines_of(folder)
    assert [line["round"] for line in lines] == [1, 2]
    for line in lines:
        assert set(line) >= {
            "round",
            "accuracy",
            "accuracy_top5",
            "loss",
            "density",
            "bytes_down",
            "bytes_up",
            "bytes_evaluate",
            "mask_change",
            "update_variance",
            "seconds",
        }
        assert 0 <= line["accuracy"] <= line["accuracy_top5"] <= 1
        assert line["loss"] > 0
        assert line["density"] == pytest.approx(0.2, abs=0.01)
        assert line["bytes_evaluate"] > 0
        assert line["update_variance"] > 0
        assert line["seconds"] >= 0


def test_the_summary_has_the_documented_keys(finished):
    folder, _ = finished
    summary = summary_of(folder)
    assert set(summary) >= {
        "strategy",
        "preset",
        "rounds",
        "accuracy",
        "accuracy_top5",
        "loss",
        "parameters",
        "density",
        "bytes",
        "flops",
        "networks",
        "seconds",
    }
    assert summary["strategy"] == "autoflip"
    assert summary["preset"] == "quickstart"
    assert summary["rounds"] == 2
    assert set(summary["bytes"]) >= {
        "explore_down",
        "explore_up",
        "train_down",
        "train_up",
        "evaluate_down",
        "evaluate_up",
        "total",
        "dense_equivalent",
    }
    assert set(summary["flops"]) >= {"dense", "pruned"}
    for network in ("dense", "pruned"):
        assert set(summary["networks"][network]) == {
            "parameters",
            "bytes",
            "peak_bytes",
            "step_seconds",
            "inference_seconds",
        }
    assert set(summary["seconds"]) >= {"explore", "train", "total"}
    last = lines_of(folder)[-1]
    for key in ("accuracy", "accuracy_top5", "loss", "density"):
        assert summary[key] == last[key]


def test_bytes_add_up_over_rounds_phases_and_messages(finished):
    folder, grid = finished
    counted = summary_of(folder)["bytes"]
    by_hand = {}
    for direction, sent in (("down", grid.down), ("up", grid.up)):
        for each in sent:
            key = f"{each.phase}_{direction}"
            size = sum(r.count_bytes() for r in each.content.values() if len(r))
            by_hand[key] = by_hand.get(key, 0) + size
    for key in set(by_hand) - {"query_down", "query_up"}:
        assert counted[key] == by_hand[key], key
    assert counted["total"] == sum(by_hand.values())
    lines = lines_of(folder)
    assert sum(line["bytes_down"] for line in lines) == (
        counted["explore_down"] + counted["train_down"]
    )
    assert sum(line["bytes_up"] for line in lines) == (
        counted["explore_up"] + counted["train_up"]
    )
    assert sum(line["bytes_evaluate"] for line in lines) == (
        counted["evaluate_down"] + counted["evaluate_up"]
    )


def test_the_flops_trained_are_those_of_every_sample_of_every_epoch(finished):
    """Three forward passes a sample: explorers through the whole model."""
    folder, grid = finished
    summary = summary_of(folder)
    counted = {"explore": 0, "train": 0}
    for sent in grid.up:
        if sent.phase in counted:
            epochs = sent.metrics.get("autoflip.epochs", 1)
            counted[sent.phase] += sent.metrics["num-examples"] * epochs
    assert summary["samples"] == counted  # an epoch a round in this run
    assert counted["explore"] > 0
    flops = summary["flops"]
    assert flops["pruned"] < flops["dense"]
    expected = counted["explore"] * flops["dense"] + counted["train"] * flops["pruned"]
    assert flops["trained"] == pytest.approx(3 * expected, rel=1e-3)
    assert flops["trained"] == sum(line["flops"] for line in lines_of(folder))


def test_kept_parameters_count_those_that_are_never_pruned(tmp_path):
    go(tmp_path / "run", "pruning.exclude=[fc1*] pruning.units=0")
    summary = summary_of(tmp_path / "run")
    masks = np.load(tmp_path / "run" / "mask.npz")
    kept = sum(int(masks[name].sum()) for name in masks.files)
    whole = sum(
        value.size
        for name, value in load_file(tmp_path / "run" / "model.safetensors").items()
        if name.startswith("fc1")
    )
    assert summary["density"] == pytest.approx(0.2, abs=0.01)
    assert summary["kept_parameters"] == kept + whole
    run = results.read_run(tmp_path / "run")
    row = results.cost_row(results.arms([run])[0], None)
    assert row.density == pytest.approx((kept + whole) / summary["parameters"])


def test_guidance_and_updates_are_compared(finished):
    folder, _ = finished
    for line in lines_of(folder):
        assert 0 < line["guidance_cosine"] <= 1


def test_tensorboard_gets_every_rounds_metrics(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    go(tmp_path / "run", "log.tensorboard=true")
    events = event_accumulator.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    lines = lines_of(tmp_path / "run")
    for key in ("accuracy", "loss", "bytes_up", "density", "mask_change"):
        values = [(event.step, event.value) for event in events.Scalars(key)]
        assert values == [
            (line["round"], pytest.approx(line[key], rel=1e-6)) for line in lines
        ]
    go(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("events.*"))


def test_tensorboard_that_is_missing_is_said_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(AutoFlipError, match=r"pip install 'autoflip-flwr\[tensorboard"):
        go(tmp_path / "run", "log.tensorboard=true")


def test_the_model_loads_and_is_zero_where_the_mask_says_so(finished):
    folder, _ = finished
    arrays = load_file(folder / "model.safetensors")
    masks = np.load(folder / "mask.npz", allow_pickle=False)
    model = experiment.build_model(load("quickstart", SMALL))
    training.load_arrays(model, arrays)
    assert set(masks.files) == {name for name, _ in model.named_parameters()}
    kept = total = 0
    for name in masks.files:
        keep = masks[name]
        assert keep.dtype == np.bool_
        assert keep.shape == arrays[name].shape
        assert not arrays[name][~keep].any()
        kept, total = kept + int(keep.sum()), total + keep.size
    summary = summary_of(folder)
    assert summary["parameters"] == total
    assert summary["density"] == pytest.approx(kept / total)


def test_the_written_accuracy_is_the_written_models_on_held_out_data(finished):
    folder, _ = finished
    settings = load("quickstart", SMALL)
    model = experiment.build_model(settings)
    training.load_arrays(model, load_file(folder / "model.safetensors"))
    test = data.held_out(settings.data, seed=settings.seed)
    assert len(test) == 50
    result = training.evaluate(model, test.x, test.y)
    summary = summary_of(folder)
    assert summary["accuracy"] == pytest.approx(result.accuracy)
    assert summary["accuracy_top5"] == pytest.approx(result.accuracy_top5)
    assert summary["loss"] == pytest.approx(result.loss, rel=1e-5)


def test_two_runs_of_one_seed_write_the_same_and_another_seed_does_not(tmp_path):
    def written(folder, overrides, nodes):
        go(folder, overrides, nodes=nodes)
        lines = lines_of(folder)
        for line in lines:
            del line["seconds"]
        return (folder / "model.safetensors").read_bytes(), lines

    some = "strategy.fraction-train=0.5 rounds=3 training.device=cpu"
    first = written(tmp_path / "a", some, [1, 2, 3, 4])
    again = written(tmp_path / "b", some, [71, 52, 93, 14])
    assert again == first, "node ids are random and do not matter"
    other = written(tmp_path / "c", f"{some} seed=1", [1, 2, 3, 4])
    assert other[0] != first[0]


def test_a_folder_with_another_run_is_refused_and_nothing_is_lost(finished):
    folder, _ = finished
    before = files_in(folder)
    grid = LocalGrid(client_app.app, [1, 2])
    config = {"preset": "quickstart", "overrides": SMALL, "output-dir": str(folder)}
    with pytest.raises(SettingsError, match="another run"):
        server_app.app(grid, Context(1, 1, {}, RecordDict(), config))
    assert not grid.sent
    assert files_in(folder) == before


def test_a_folder_whose_run_has_not_finished_a_round_is_refused_too(tmp_path):
    """A run that is exploring, or died while it was, has written its settings."""

    def tamper(message, reply):
        if message.metadata.message_type == "train":
            return Message(Error(1, "out"), reply_to=Message(RecordDict(), 1, "train"))
        return reply

    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="exploration"):
        go(folder, tamper=tamper)
    before = (folder / "settings.yaml").read_bytes()
    with pytest.raises(SettingsError, match="another run"):
        go(folder, "seed=5")
    assert (folder / "settings.yaml").read_bytes() == before


def test_an_existing_empty_folder_is_used(tmp_path):
    go(tmp_path)
    assert summary_of(tmp_path)["rounds"] == 2


def test_without_a_name_a_new_folder_is_made_below_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    go("")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("quickstart-autoflip-")
    assert (folder / "summary.json").exists()


def test_dense_fedavg_is_its_own_equivalent_and_has_no_mask(tmp_path):
    grid = go(tmp_path / "run", "strategy.name=fedavg")
    summary = summary_of(tmp_path / "run")
    assert summary["strategy"] == "fedavg"
    assert summary["density"] == 1.0
    counted = summary["bytes"]
    assert counted["explore_down"] == counted["explore_up"] == 0
    sent = counted["train_down"] + counted["train_up"]
    assert counted["dense_equivalent"] == sent
    assert not (tmp_path / "run" / "mask.npz").exists()
    assert not grid.nodes("explore")
    assert (load_file(tmp_path / "run" / "model.safetensors")["fc1.weight"] != 0).all()


def test_the_dense_equivalent_is_what_a_fedavg_run_sends(tmp_path):
    some = "strategy.fraction-train=0.5 strategy.fraction-evaluate=1 data.holdout=0.2"
    go(tmp_path / "pruned", some)
    go(tmp_path / "dense", f"{some} strategy.name=fedavg")
    dense = summary_of(tmp_path / "dense")["bytes"]
    phases = ("train_down", "train_up", "evaluate_down", "evaluate_up")
    expected = sum(dense[key] for key in phases)
    assert summary_of(tmp_path / "pruned")["bytes"]["dense_equivalent"] == expected


def test_the_last_lines_of_the_log_say_what_came_of_it(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="flwr"):
        go(tmp_path / "run", "pruning.units=0.8")
    text = "\n".join(r.getMessage() for r in caplog.records)
    summary = summary_of(tmp_path / "run")
    assert f"top-1 accuracy  {summary['accuracy']:.4f} on held-out data" in text
    assert text.count("FedAvg would have sent") == 1, "the app counts and reports once"
    assert f"{summary['parameters']} parameters" in text
    left = summary["networks"]["pruned"]["parameters"]
    share = summary["flops"]["pruned"] / summary["flops"]["dense"]
    assert f"clients train   {left} of {summary['parameters']} parameters" in text
    megabytes = summary["networks"]["pruned"]["bytes"] / 1e6
    assert f"{megabytes:.2f} MB of " in text
    assert f"{share:.3f} of the FLOPs" in text
    for measured in ("training step", "inference", "peak memory"):
        assert measured in text
    assert str(tmp_path / "run") in text


def test_a_round_is_a_line_and_flower_is_quiet_unless_asked(tmp_path, caplog):
    told = {}
    for verbose in ("false", "true"):
        with caplog.at_level(logging.INFO, logger="flwr"):
            go(tmp_path / verbose, f"log.verbose={verbose}")
        told[verbose] = [record.getMessage() for record in caplog.records]
        caplog.clear()
    sent = [summary_of(tmp_path / "false")["bytes"][k] for k in ("total", "roll_call")]
    dense = summary_of(tmp_path / "false")["bytes"]["dense_equivalent"]
    assert sent[1] > 0
    rounds = [
        line for line in told["false"] if re.match(r"\d+/2  acc 0\.\d{3}  ", line)
    ]
    assert [line[:3] for line in rounds] == ["1/2", "2/2"]
    assert f"sent {sent[0] / 1e6:.1f} MB (FedAvg {dense / 1e6:.1f})" in rounds[1]
    assert rounds[1].endswith("density 0.20  0:00 left")
    assert len(told["false"]) < 16
    for flowers in ("[ROUND 1/2]", "Final results:"):
        assert flowers in told["true"]
        assert flowers not in told["false"]
    assert not logging.getLogger("flwr").filters


def test_a_run_does_not_wait_for_ever_for_nodes(tmp_path, clock):
    with pytest.raises(NodesError, match=r"needs 4 nodes .* 2 are connected") as told:
        go(tmp_path / "run", nodes=[1, 2])
    assert 59 < clock.slept < 62
    assert "num-supernodes=4 client-resources-num-cpus=1" in str(told.value)
    assert "autoflip run quickstart" in str(told.value)


@pytest.mark.parametrize("faster", [False, True])
def test_the_end_says_once_where_a_step_is_not_faster(finished, caplog, faster):
    folder, _ = finished
    summary = summary_of(folder)
    summary["networks"]["pruned"]["step_seconds"] = 0.9 if faster else 1.1
    summary["networks"]["dense"]["step_seconds"] = 1.0
    with caplog.at_level(logging.INFO, logger="flwr"):
        log_summary(summary, folder)
    assert caplog.text.count("the step is not faster") == (0 if faster else 1)


def test_dropped_replies_are_counted_and_the_run_goes_on(tmp_path):
    def tamper(message, reply):
        if message.metadata.message_type == "query":
            return reply
        config = message.content["config"]
        lost = message.metadata.dst_node_id == 2 and config["server-round"] == 2
        if lost and config["autoflip.phase"] == "train":
            reply.content["metrics"]["num-examples"] = float("nan")
        return reply

    go(tmp_path / "run", tamper=tamper)
    assert [line["dropped"] for line in lines_of(tmp_path / "run")] == [0, 1]


def test_a_run_whose_last_round_fails_ends_with_an_error_after_the_one_before(tmp_path):
    def tamper(message, reply):
        config = next(iter(message.content.config_records.values()), {})
        last = config.get("server-round") == 3
        return None if last and config["autoflip.phase"] == "train" else reply

    folder = tmp_path / "run"
    overrides = "rounds=3 pruning.population-weight=0 strategy.fraction-train=0.5"
    with pytest.raises(ReplyError, match="round 3 was lost 3 times"):
        go(folder, overrides, tamper=tamper)
    assert [line["round"] for line in lines_of(folder)] == [1, 2]
    assert (folder / "checkpoints" / "round-000002.safetensors").exists()
    assert not (folder / "summary.json").exists()
