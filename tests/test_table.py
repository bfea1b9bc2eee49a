"""The table that a comparison ends with."""

import json

import numpy as np
import pytest
from test_results import run

from autoflip_flwr.compare import formats
from autoflip_flwr.compare.results import experiments
from autoflip_flwr.compare.table import compared
from autoflip_flwr.compare.verdict import verdicts


def test_every_number_of_an_arm_stands_under_its_heading(tmp_path):
    runs = [
        run(tmp_path / "dense", "strategy.name=fedavg", accuracy=(0.5, 0.6, 0.9)),
        run(tmp_path / "ours", "exploration.epochs=2", accuracy=(0.5, 0.8, 0.8)),
        run(tmp_path / "more", "exploration.epochs=3", accuracy=(0.5, 0.5, 0.5)),
    ]
    (experiment,) = experiments(runs, 0.8)
    text = compared(experiment)
    table = [line for line in text.splitlines() if line.startswith("  ")]
    above, columns = table[0].split(), table[1].split()
    assert above == ["rounds", "to", "bytes", "to", "FLOPs", "FLOPs"]
    headings = ["strategy", "seeds", "accuracy", "density", "bytes", "of", "dense"]
    assert columns == [*headings, "target", "target", "of", "dense", "trained"]
    dense, more = table[2], table[4]
    assert dense.split()[:3] == ["fedavg", "1", "0.9000"]
    assert "exploration.epochs=2" in " ".join(text.split())
    assert "–" in more  # noqa: RUF001 - it never reaches the target
    assert "until it first reaches 0.8000" in text
    summary = json.loads((tmp_path / "dense" / "summary.json").read_text())
    assert formats.number(summary["bytes"]["total"], "B") in dense
    trained = dense.split()[-1]
    assert trained == "–" or float(trained) > 0  # noqa: RUF001 - in the last column
    assert all(len(line) <= 132 for line in text.splitlines())


def verdict(folder, dense, ours, sent=(10, 10, 2), trained=1000.0):
    """Compare accuracies by seed: FedAvg sends 3 x 22 B and trains 3 x 1000."""
    runs = [
        run(
            folder / f"{name}-{seed}",
            f"strategy.name={name} seed={seed}",
            accuracy=(0.1, 0.1, accuracy),
            explore=(0, 0),
            sent=sent if name == "autoflip" else (10, 10, 2),
            trained=trained if name == "autoflip" else 1000.0,
        )
        for name, values in (("fedavg", dense), ("autoflip", ours))
        for seed, accuracy in values.items()
    ]
    (text,) = verdicts(experiments(runs)[0])
    return text


def test_a_verdict_by_hand(tmp_path):
    # Differences -1, 0, +1 points: s = 1, over sqrt(3) = 0.577, and Student's 97.5 %
    # quantile with 2 degrees of freedom is 4.303: 2.48. 66 B / 22 B and 1000 / 400.
    dense = dict(enumerate((0.90, 0.91, 0.92)))
    ours = dict(enumerate((0.89, 0.91, 0.93)))
    assert verdict(tmp_path, dense, ours, (3, 3, 1 + 1 / 3), 400.0) == (
        "autoflip: 3.0 x fewer bytes, 2.5 x fewer operations than fedavg, "
        "+0.0 points (95 % interval -2.5 to +2.5, 3 seeds): undecided"
    )


def test_the_interval_is_that_of_scipys_paired_test(tmp_path):
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    dense, ours = rng.uniform(0.8, 0.9, 5), rng.uniform(0.8, 0.9, 5)
    low, high = 100 * np.array(ttest_rel(ours, dense).confidence_interval(0.95))
    text = verdict(tmp_path, dict(enumerate(dense)), dict(enumerate(ours)))
    assert f"(95 % interval {low:+.1f} to {high:+.1f}, 5 seeds)" in text


@pytest.mark.parametrize(
    ("ours", "end"),
    [
        ((0.80, 0.81), "-10.0 points (95 % interval -10.0 to -10.0, 2 seeds): a loss"),
        ((0.95, 0.96), "+5.0 points (95 % interval +5.0 to +5.0, 2 seeds): a gain"),
    ],
)
def test_a_loss_is_called_a_loss(tmp_path, ours, end):
    text = verdict(tmp_path, {0: 0.90, 1: 0.91}, dict(enumerate(ours)))
    assert text.endswith(end)


def test_one_seed_has_no_interval_and_more_costs_are_said_as_such(tmp_path):
    # 132 B instead of 66 B; 3 x 1020 operations instead of 3 x 1000.
    assert verdict(tmp_path, {0: 0.9, 1: 0.5}, {0: 0.85}, (20, 20, 4), 1020.0) == (
        "autoflip: 2.0 x more bytes, 1.02 x more operations than fedavg, "
        "-5.0 points (1 seed, so no interval)"
    )


def test_without_a_common_seed_or_an_accuracy_nothing_is_claimed(tmp_path):
    assert verdict(tmp_path / "seeds", {0: 0.9}, {1: 0.9}) == (
        "autoflip: no seed in common with fedavg, so no comparison"
    )
    assert verdict(tmp_path / "accuracy", {0: None}, {0: 0.9}, trained=None) == (
        "autoflip: no fewer bytes than fedavg, accuracy unknown"
    )


def test_errors_over_seeds_leave_the_table_its_width(tmp_path):
    runs = [
        run(
            tmp_path / f"{name}-{seed}",
            f"strategy.name={name} seed={seed}",
            accuracy=(0.1, 0.5 + 0.123 * seed, 0.9 - 0.0123 * seed),
            sent=(1_234_567 + 98_765 * seed, 1_234_567, 123_456),
            trained=1.2345e12 + 9.87e10 * seed,
        )
        for name in ("fedavg", "autoflip")
        for seed in range(3)
    ]
    text = compared(experiments(runs, 0.6)[0])
    table = [line for line in text.splitlines() if line.startswith("  ")]
    assert table[1].endswith("trained"), "the last heading is whole"
    assert all(line.endswith(" T") for line in table[2:]), "and its values"
    assert all(len(line) <= 132 for line in text.splitlines())


def test_verdicts_stand_under_the_table(tmp_path):
    runs = [
        run(tmp_path / name, f"strategy.name={name}")
        for name in ("fedavg", "autoflip", "l1")
    ]
    (experiment,) = experiments(runs)
    text = " ".join(compared(experiment).split())
    for line in verdicts(experiment):
        assert line in text
