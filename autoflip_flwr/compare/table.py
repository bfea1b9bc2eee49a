"""The arms of an experiment as tables, for the terminal and the page."""

from collections.abc import Callable
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from autoflip_flwr.compare import formats
from autoflip_flwr.compare.results import CostRow, Experiment, cost_row
from autoflip_flwr.compare.verdict import verdicts

_WIDTH = 132

#: Heading and text of a column.
Columns = list[tuple[str, Callable[[CostRow], str]]]

COSTS: Columns = [
    ("seeds", lambda row: str(row.seeds)),
    ("accuracy", lambda row: formats.accuracy(row.accuracy)),
    ("density", lambda row: formats.ratio(row.density)),
    ("bytes", lambda row: formats.number(row.bytes_total.mean, "B")),
    ("of dense", lambda row: formats.ratio(row.bytes_total.mean, row.bytes_dense)),
    ("rounds to\ntarget", lambda row: _reached(row)),
    ("bytes to\ntarget", lambda row: formats.number(row.bytes_to_target, "B")),
    ("FLOPs\nof dense", lambda row: formats.ratio(row.flops, row.flops_dense)),
    ("FLOPs\ntrained", lambda row: formats.number(row.flops_trained)),
]
AS_PAPERS_COUNT: Columns = [
    ("compression", lambda row: formats.ratio(1, row.density)),
    ("parameters to target", lambda row: formats.number(row.communication)),
    ("parameters processed", lambda row: formats.number(row.computation)),
    ("FLOPs of a sample", lambda row: formats.number(row.flops)),
    ("exploration (measured)", lambda row: formats.number(row.bytes_explore, "B")),
    ("samples trained (measured)", lambda row: formats.number(row.samples)),
]
TIME: Columns = [("time (measured)", lambda row: formats.number(row.seconds, "s"))]


def _reached(row: CostRow) -> str:
    partly = 0 < row.reached < row.seeds
    text = f"{row.reached} of {row.seeds} seeds"
    return text if partly else formats.number(row.rounds_to_target)


def compared(experiment: Experiment) -> str:
    """Return the table that `autoflip compare` ends with."""
    target = experiment.target
    goal = "no accuracy" if target is None else f"{target:.4f}"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("strategy", overflow="fold", min_width=20)
    for heading, _ in COSTS:
        table.add_column(heading, justify="right", no_wrap=heading == "accuracy")
    for row in (cost_row(arm, target) for arm in experiment.arms):
        brief = {  # a terminal has no room for these errors
            key: value._replace(error=None)
            for key in ("rounds_to_target", "bytes_to_target", "flops_trained")
            if (value := getattr(row, key))
        }
        table.add_row(row.name, *(text(replace(row, **brief)) for _, text in COSTS))
    console = Console(width=_WIDTH, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(f"{experiment.preset}: mean and standard error over seeds")
        console.print(table)
        console.print(
            "Accuracy: top-1 of the global model on held-out data after the last",
            f"round. To target: until it first reaches {goal}. Bytes and FLOPs",
            "trained include exploration. Of dense: bytes as a share of what FedAvg",
            "sends in as many rounds, FLOPs of the network that clients train as a",
            "share of the whole one's.",
        )
        for verdict in verdicts(experiment):
            console.print(f"\n{verdict}")
    lines = captured.get().rstrip().splitlines()
    return "\n".join(line.rstrip() for line in lines)
