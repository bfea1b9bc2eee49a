"""The arms of an experiment as a table for the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from autoflip_flwr.compare.report import formats
from autoflip_flwr.compare.report.verdict import verdicts
from autoflip_flwr.compare.results import Experiment, cost_row

_WIDTH = 132
_HEADINGS = (
    "seeds",
    "accuracy",
    "density",
    "bytes",
    "of dense",
    "rounds to\ntarget",
    "bytes to\ntarget",
    "FLOPs\nof dense",
    "FLOPs\ntrained",
)


def compared(experiment: Experiment) -> str:
    """Return the table that `autoflip compare` ends with."""
    target = experiment.target
    goal = "no accuracy" if target is None else f"{target:.4f}"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("strategy", overflow="fold", min_width=20)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=heading == "accuracy")
    for row in (cost_row(arm, target) for arm in experiment.arms):
        rounds, sent = row.rounds_to_target, row.bytes_to_target
        table.add_row(
            row.name,
            str(row.seeds),
            formats.accuracy(row.accuracy),
            formats.ratio(row.density),
            formats.number(row.bytes_total.mean, "B"),
            formats.ratio(row.bytes_total.mean, row.bytes_dense),
            formats.number(rounds and rounds.mean),
            formats.number(sent and sent.mean, "B"),
            formats.ratio(row.flops, row.flops_dense),
            formats.number(row.flops_trained and row.flops_trained.mean),
        )
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
