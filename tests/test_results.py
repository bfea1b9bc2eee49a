"""Runs read back: arms over seeds, targets, and costs worked out by hand."""

import json
import shlex

import numpy as np
import pytest

from autoflip_flwr import settings
from autoflip_flwr.compare.results import (
    Arm,
    arms,
    as_override,
    cost_row,
    default_target,
    experiments,
    find_runs,
    mean_and_error,
    read_run,
)
from autoflip_flwr.errors import DataError, SettingsError


def write_run(
    folder,
    overrides="",
    *,
    preset="quickstart",
    accuracy=(0.25, 0.5, 0.75),
    explore=(100, 25),
    sent=(10, 10, 2),
    parameters=1000,
    density=1.0,
    dense=100,
    masks=None,
    trained=None,
    **more,
):
    """Write what a run leaves: `sent` bytes down, up and to evaluate in every round."""
    folder.mkdir(parents=True)
    chosen = settings.load(preset, f"rounds={len(accuracy)} {overrides}")
    (folder / "settings.yaml").write_text(chosen.as_yaml())
    down, up, evaluate = sent
    rows = [
        {
            "round": n,
            "accuracy": value,
            "accuracy_top5": value,
            "loss": 1.0,
            "density": density,
            "bytes_down": down + (explore[0] if n == 1 else 0),
            "bytes_up": up + (explore[1] if n == 1 else 0),
            "bytes_evaluate": evaluate,
            "mask_change": 0.0 if n == 1 else 0.1 / n,
            "update_variance": 1e-3 / n,
            "guidance_cosine": 1 / n,
            "flops": trained,
            "dropped": 0,
            "seconds": 0.5,
        }
        for n, value in enumerate(accuracy, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rounds = len(accuracy)
    summary = {
        "strategy": chosen.strategy.name,
        "preset": preset,
        "rounds": rounds,
        "accuracy": accuracy[-1],
        "parameters": parameters,
        "density": density,
        "bytes": {
            "explore_down": explore[0],
            "explore_up": explore[1],
            "train_down": down * rounds,
            "train_up": up * rounds,
            "evaluate_down": evaluate * rounds // 2,
            "evaluate_up": evaluate * rounds // 2,
            "roll_call": 0,
            "total": sum(explore) + sum(sent) * rounds,
            "dense_equivalent": dense * rounds,
        },
        "flops": {
            "dense": 8000,
            "pruned": 6000,
            "unstructured_in_theory": 2000,
            "trained": trained and trained * rounds,
        },
        "seconds": {"explore": 1.0, "train": 2.0, "total": 4.0},
        **more,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    if masks is not None:
        np.savez_compressed(folder / "mask.npz", **masks)
    return folder


def run(folder, overrides="", **options):
    return read_run(write_run(folder, overrides, **options))


def names(result):
    return [arm.name for arm in result]


def test_a_run_is_read_as_it_was_written(tmp_path):
    read = run(tmp_path / "a", "seed=7", accuracy=(0.1, 0.4))
    assert read.settings.seed == 7
    assert read.settings.rounds == 2
    assert [row.round for row in read.rounds] == [1, 2]
    assert read.series("accuracy").tolist() == [0.1, 0.4]
    assert read.summary.parameters == 1000
    assert read.summary.bytes.explore_down == 100
    assert read.summary.seconds["total"] == 4.0


def test_a_metric_that_a_round_does_not_know_is_not_a_number(tmp_path):
    run(tmp_path / "a")
    path = tmp_path / "a" / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.25", "null").replace("mask_", "old_"))
    read = read_run(tmp_path / "a")
    assert np.isnan(read.series("mask_change")).all()
    assert np.isnan(read.series("accuracy")[0])
    assert read.series("accuracy")[1:].tolist() == [0.5, 0.75]


def test_without_a_count_of_kept_parameters_the_density_tells_it(tmp_path):
    old = run(tmp_path / "old", density=0.25)
    new = run(tmp_path / "new", density=0.25, kept_parameters=300)
    assert cost_row(Arm("old", (old,)), None).density == pytest.approx(0.25)
    assert cost_row(Arm("new", (new,)), None).density == pytest.approx(0.3)


def test_rounds_and_bytes_to_a_target_by_hand(tmp_path):
    result = run(tmp_path / "a", accuracy=(0.25, 0.75, 0.5))
    # Round 1: 100 + 25 explored, 10 + 10 + 2 trained and evaluated; then 22 a round.
    assert result.series("bytes").tolist() == [147, 169, 191]
    for target, rounds, sent in (
        (0.2, (1, None), (147, None)),
        (0.75, (2, None), (169, None)),  # met exactly, it is reached
        (0.76, None, None),
    ):
        row = cost_row(Arm("a", (result,)), target)
        assert (row.rounds_to_target, row.bytes_to_target) == (rounds, sent)


def test_the_standard_error_by_hand():
    # Deviations -1, 0, 1: s = sqrt(2 / 2) = 1, over sqrt(3).
    assert mean_and_error([1, 2, 3]) == (2, pytest.approx(1 / 3**0.5))
    assert mean_and_error([4]) == (4, None)


def test_costs_by_hand(tmp_path):
    # quickstart: 10 clients, half of them a round, 2 local epochs.
    common = {"parameters": 1000, "density": 0.2, "dense": 50}
    runs = (
        run(tmp_path / "0", accuracy=(0.1, 0.6, 0.9), **common),
        run(tmp_path / "1", "seed=1", accuracy=(0.1, 0.2, 0.3, 0.5), **common),
    )
    row = cost_row(Arm("autoflip", runs), 0.5)
    assert (row.name, row.seeds, row.reached) == ("autoflip", 2, 2)
    assert row.density == pytest.approx(0.2)
    assert row.rounds_to_target == pytest.approx((3, 1))  # 2 and 4
    assert row.communication == pytest.approx(200 * 3 * 10 * 0.5)
    # One exploration epoch of all; 2 local epochs, every other of 3 rounds.
    assert row.computation == pytest.approx(1000 * 1 + 200 * 2 * 0.5 * 3)
    assert row.bytes_to_target == pytest.approx((191, 22))  # 169 and 213
    assert row.bytes_total == pytest.approx((202, 11))  # 191 and 213
    assert row.bytes_explore == 125
    assert row.bytes_dense == 175  # 3 and 4 rounds
    assert row.accuracy == (pytest.approx(0.7), pytest.approx(0.2))
    assert (row.flops, row.flops_dense) == (6000, 8000)
    assert row.seconds == (4, 0)
    assert row.flops_trained is None
    assert row.samples is None


def test_trained_flops_and_samples_are_told_where_they_are_known(tmp_path):
    more = {
        "flops": {"dense": 8, "pruned": 6, "trained": 1e9},
        "samples": {"explore": 100, "train": 400},
    }
    row = cost_row(Arm("a", (run(tmp_path / "a", **more),)), None)
    assert row.flops_trained == (1e9, None)
    assert row.samples == (500, None)


def test_a_target_that_a_seed_misses_has_no_mean(tmp_path):
    runs = (run(tmp_path / "0"), run(tmp_path / "1", "seed=1", accuracy=(0.1, 0.2)))
    row = cost_row(Arm("a", runs), 0.5)
    assert row.reached == 1
    assert row.rounds_to_target is None
    assert row.bytes_to_target is None
    assert row.communication is None
    assert cost_row(Arm("a", runs), None).reached == 0


def test_the_default_target_is_one_that_half_of_the_arms_reach(tmp_path):
    good = run(
        tmp_path / "good", "strategy.name=fedavg", accuracy=[0.5] * 18 + [0.9] * 2
    )
    weak = run(tmp_path / "weak", accuracy=[0.1] * 18 + [0.6, 0.8])
    result = arms([good, weak])
    assert default_target(result) == pytest.approx(0.99 * 0.7)  # last 2 of 20 rounds
    assert all(cost_row(arm, default_target(result)).reached == 1 for arm in result)
    blind = run(tmp_path / "blind", "pruning.threshold=0.5", accuracy=[None] * 3)
    assert default_target(arms([good, weak, blind])) == pytest.approx(0.99 * 0.7)
    assert default_target(arms([blind])) is None
    failed = run(tmp_path / "failed", "pruning.threshold=0.3", accuracy=[0.1] * 20)
    assert default_target(arms([good, weak, failed])) == pytest.approx(0.99 * 0.7)


def test_seeds_and_places_of_data_make_one_arm(tmp_path):
    runs = [
        run(tmp_path / f"{seed}", f"seed={seed} data.dir=/data/{seed}")
        for seed in (10, 9)
    ]
    (arm,) = arms(runs)
    assert arm.name == "autoflip"
    assert [r.settings.seed for r in arm.runs] == [9, 10]


def test_arms_are_named_by_what_differs_within_their_strategy(tmp_path):
    overrides = [
        "pruning.mode=compression pruning.threshold=10",
        "pruning.mode=compression pruning.threshold=2",
        "strategy.name=fedavg training.learning-rate=0.5",
    ]
    runs = [run(tmp_path / str(i), text) for i, text in enumerate(overrides)]
    assert names(arms(runs)) == [
        "fedavg",
        "autoflip pruning.threshold=2.0",
        "autoflip pruning.threshold=10.0",
    ]


def test_lists_and_nothing_are_named_as_overrides_write_them(tmp_path):
    runs = [run(tmp_path / "a", "model.channels=[4,8]"), run(tmp_path / "b")]
    assert names(arms(runs)) == [
        "autoflip model.channels=[4,8]",
        "autoflip model.channels=null",
    ]


@pytest.mark.parametrize("name", ["my: data", "a #1", "12", "true", "*bias", ""])
def test_a_text_is_written_so_that_an_override_reads_it(name):
    told = as_override(name)
    words = shlex.join([f"data.dir={told}"])
    assert settings.load("smoke", words).data.dir == name
    assert (told == name) == (name in ("*bias", ""))


def test_settings_that_fedavg_does_not_read_make_no_arm_of_it(tmp_path):
    dense = "strategy.name=fedavg"
    runs = [
        run(tmp_path / "a", f"{dense} pruning.threshold=0.3"),
        run(tmp_path / "b", f"{dense} pruning.threshold=0.6 seed=1"),
    ]
    (arm,) = arms(runs)
    assert arm.name == "fedavg"
    assert len(arm.runs) == 2


def test_a_repetition_is_no_further_sample(tmp_path):
    runs = [run(tmp_path / "a"), run(tmp_path / "b", accuracy=(0.1, 0.2, 0.3))]
    (arm,) = arms(runs)
    assert [r.directory.name for r in arm.runs] == ["b"]


def test_every_preset_is_an_experiment_of_its_own(tmp_path):
    runs = [run(tmp_path / "s", preset="smoke"), run(tmp_path / "q")]
    result = experiments(runs)
    assert [e.preset for e in result] == ["quickstart", "smoke"]
    assert [e.target for e in result] == [pytest.approx(0.99 * 0.75)] * 2
    assert [e.target for e in experiments(runs, 0.5)] == [0.5, 0.5]


def test_runs_are_found_once_at_any_depth_without_those_in_the_making(tmp_path):
    write_run(tmp_path / "x" / "b")
    write_run(tmp_path / "x" / "deep" / "a")
    write_run(tmp_path / "x" / "c.partial")
    (tmp_path / "x" / "dead").mkdir()
    result = find_runs([tmp_path / "x", tmp_path / "x" / "b"])
    assert [r.directory.name for r in result] == ["b", "a"]


def test_a_folder_without_runs_is_an_error_that_names_it(tmp_path):
    write_run(tmp_path / "a.partial")
    with pytest.raises(DataError, match=rf"{tmp_path}.*expected.*got none.*output-dir"):
        find_runs([tmp_path])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.jsonl", '{"round": 1, "accur'),
        ("metrics.jsonl", ""),
        ("metrics.jsonl", "[1]"),
        ("metrics.jsonl", '{"accuracy": 0.5}'),
        ("metrics.jsonl", '{"round": 1, "accuracy": "high"}'),
        ("summary.json", '{"parameters": 1'),
        ("summary.json", "[]"),
        ("summary.json", '{"parameters": 1, "density": "x", "bytes": 3}'),
        ("metrics.jsonl", '{"round": 1, "bytes_up": true}'),
    ],
)
def test_torn_files_are_errors_that_name_the_file_and_the_remedy(tmp_path, file, text):
    folder = write_run(tmp_path / "torn")
    (folder / file).write_text(text)
    with pytest.raises(DataError, match=rf"torn/{file}.*expected.*run it again"):
        find_runs([tmp_path])


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ('"density": 1.0', '"density": "x"', r"density 'x' \(.*number"),
        ('"density": 1.0', '"density": NaN', r"density 'nan' \(.*finite"),
        ('"total": 191', '"total": null', r"bytes\.total 'None' \(.*number"),
        ('"train_up"', '"other"', r"bytes\.train_up .*required"),
        ('"pruned": 6000', '"pruned": []', r"flops\.pruned .*number"),
    ],
)
def test_every_wrong_value_of_a_summary_is_named(tmp_path, was, now, message):
    path = write_run(tmp_path / "a") / "summary.json"
    text = path.read_text()
    assert was in text
    path.write_text(text.replace(was, now))
    with pytest.raises(DataError, match=message):
        read_run(path.parent)


def test_missing_metrics_and_broken_settings_name_the_folder(tmp_path):
    folder = write_run(tmp_path / "torn")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"torn/metrics\.jsonl"):
        find_runs([tmp_path])
    (folder / "settings.yaml").write_text("preset: quickstart\nunknown: 1\n")
    with pytest.raises(SettingsError, match=r"torn.*unknown"):
        find_runs([tmp_path])


def test_a_target_that_is_no_accuracy_is_refused():
    with pytest.raises(SettingsError, match=r"accuracy in \[0, 1\], got 90"):
        experiments([], 90)


def test_a_file_that_is_no_text_is_named(tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"a/metrics\.jsonl: 'utf-8'"):
        read_run(tmp_path / "a")
