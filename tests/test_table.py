"""The table that a comparison ends with."""

import json

from test_results import run

from autoflip_flwr.compare.report import formats
from autoflip_flwr.compare.report.table import compared
from autoflip_flwr.compare.results import experiments


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
