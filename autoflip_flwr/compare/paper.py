"""The figures and tables of arXiv:2405.10271 from finished runs: `autoflip paper`.

Figures are pages of plotly. Tables are Markdown: the paper's figures, ours, and why
they cannot be compared where they cannot.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from autoflip_flwr import settings as presets
from autoflip_flwr.app import build
from autoflip_flwr.compare import formats
from autoflip_flwr.compare.results import (
    Arm,
    CostRow,
    Experiment,
    Run,
    Series,
    cost_row,
    experiments,
    find_runs,
)
from autoflip_flwr.errors import DataError, SettingsError

_Maker: TypeAlias = Callable[[Sequence[Experiment]], tuple[go.Figure | None, str]]

_COLORS = qualitative.Dark24
_BYTES = 4  # of a parameter, as the paper's costs have it
_BINS = 100
_LEAST = 1e-30


class Claim(NamedTuple):
    """What the paper reports of an experiment, in its own words and digits."""

    compression: str = formats.NONE
    flops: str = formats.NONE  # Table 1: original, reduced, "reduced" in percent
    sent: Mapping[str, str] = {}  # Table 2, by strategy
    processed: Mapping[str, str] = {}  # Table 3, by strategy; parameters


#: By preset: Tables 1, 2 and 3.
CLAIMS = {
    "paper-mnist": Claim(
        "1.74",
        "13.25 G / 5.43 G / 41.62 %",
        {"autoflip": "3 rounds, 189.45 GB", "fedavg": "58 rounds, 324.43 GB"},
        {"autoflip": "535 M", "random": "1.43 G"},
    ),
    "paper-cifar10": Claim(
        "2.1",
        "15.67 G / 7.20 G / 46.44 %",
        {"autoflip": "27 rounds, 290.26 GB", "fedavg": "39 rounds, 420.27 GB"},
        {"autoflip": "2.01 G", "random": "3.74 G"},
    ),
    "paper-cifar100": Claim(
        "1.58",
        "7.83 G / 4.07 G / 52.75 %",
        {"autoflip": "7 rounds, 712.70 GB", "fedavg": "49 rounds, 1016.40 GB"},
        {"autoflip": "3.92 G", "random": "9.38 G"},
    ),
    "paper-femnist": Claim(
        "1.8",
        "19.36 G / 10.08 G / 56.49 %",
        {"autoflip": "280 rounds, 369.06 GB", "fedavg": "348 rounds, 458.69 GB"},
        {"autoflip": "15.3 G", "random": "28.3 G"},
    ),
    "paper-shakespeare": Claim(
        "1.8",
        "10.08 G / 4.43 G / 44.44 %",
        {"autoflip": "243 rounds, 122.47 GB", "fedavg": "301 rounds, 151.74 GB"},
        {"autoflip": "5.87 G", "random": "8.34 G"},
    ),
}

_ACCURACY_NOTE = (
    "The paper's accuracies cannot be compared: its released figures are top-5 on "
    "training data of the selected clients. Ours are top-1 of the global model on "
    "held-out data."
)
_DRIFT_NOTE = (
    "Cosine: between the guidance and the squared updates of the round, over the "
    "kept parameters. Variance: of the clients' updates, over all parameters; "
    "pruned ones do not vary. pruning.threshold=0 is the arm without a mask. The "
    "paper claims a lower variance with the mask and shows no figure."
)
_COMPRESSION_NOTE = (
    "In value mode Eq. 4 as written keeps the parameters whose normalized deviation "
    "is at least T_p."
)
_FLOPS_NOTE = (
    "The paper says neither for how many samples it counts nor how zeros save "
    "operations; thop counts one sample and no zeros. Its percentages are about the "
    "share that is left: 5.43 of 13.25 G is 41 %, so 59 % are saved. By the paper's "
    "count: each layer's operations x its density. Compact: thop's count on the "
    "smaller network that clients really train."
)
_COMMUNICATION_NOTE = (
    "The paper's cost is parameters x rounds x clients x sample rate. Its costs for "
    "FEMNIST and Shakespeare are all parameters, pruned ones included, x rounds x "
    "25 clients x 4 bytes, where its text has K = 20; its others fit no number of "
    "clients. Its 90 % is of another accuracy than ours. Measured: bytes really "
    "sent, exploration included."
)
_COMPUTATION_NOTE = (
    "Parameters processed by a client x epochs x sample rate, exploration included. "
    "Of the paper's dense counts only FEMNIST's is a whole multiple of its "
    "parameters (2,150 epochs), so its epochs cannot be told. Measured: "
    "multiply-accumulates of all clients' training, exploration included."
)


def draw(
    name: str,
    folders: Sequence[Path],
    *,
    output: Path,
    overrides: str = "",
    target: float | None = None,
) -> str:
    """Make a figure or table; return the text to print.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    folders : sequence of Path
        Folders with finished runs. fig6 and fig7 need none.
    output : Path
        The folder for figures.
    overrides : str
        For fig6 and fig7: dotted ``key=value`` pairs, as for a run.
    target : float, optional
        Accuracy for table2 and table3, in [0, 1]; None: the default target of each
        preset, see `results.default_target`.

    Raises
    ------
    SettingsError, DataError
        If the name is unknown, or runs, or what they need to keep, are missing.
    """
    if name in _HOLDINGS:
        return _saved(holdings(_HOLDINGS[name], overrides), output, name)
    if name not in _FROM_RUNS:
        raise SettingsError(f"unknown figure or table {name!r}; known: {list(NAMES)}")
    if not folders:
        raise SettingsError(
            f"{name} needs the folders of finished runs: autoflip compare PRESET, then "
            f"autoflip paper {name} runs/compare"
        )
    made, text = _FROM_RUNS[name](experiments(find_runs(folders), target))
    return text if made is None else f"{_saved(made, output, name)}\n\n{text}".rstrip()


def _saved(figure: go.Figure, output: Path, name: str) -> str:
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.html"
    figure.write_html(path, include_plotlyjs="directory")
    return str(path)


# --- by round: Fig. 3, 4, 5, 8, drift --------------------------------------------


def _all_variance(run: Run) -> Series:
    """Return the variance over all parameters: pruned ones do not vary."""
    return run.series("update_variance") * run.series("density")


_METRICS: dict[str, tuple[str, Callable[[Run], Series]]] = {
    "accuracy": ("top-1 accuracy", lambda run: run.series("accuracy")),
    "loss": ("loss", lambda run: run.series("loss")),
    "guidance_cosine": ("guidance cosine", lambda run: run.series("guidance_cosine")),
    "update_variance": ("variance of updates", _all_variance),
    "mask_change": ("mask change", lambda run: run.series("mask_change")),
}


def by_round(found: Sequence[Experiment], metrics: Sequence[str]) -> go.Figure:
    """Draw metrics by round, a column per experiment: mean and deviation over seeds."""
    titles = [each.preset for each in found]
    figure = make_subplots(len(metrics), len(found), column_titles=titles)
    for column, experiment in enumerate(found, 1):
        for place, arm in enumerate(experiment.arms):
            color = _COLORS[place % len(_COLORS)]
            rounds = [row.round for row in arm.runs[0].rounds]
            for row, metric in enumerate(metrics, 1):
                label, read = _METRICS[metric]
                values = np.stack([read(run) for run in arm.runs])
                mean, spread = values.mean(axis=0), values.std(axis=0)
                line = go.Scatter(
                    x=rounds,
                    y=mean,
                    name=arm.name,
                    legendgroup=f"{column} {arm.name}",
                    showlegend=row == 1,
                    line={"color": color},
                )
                figure.add_trace(line, row, column)
                if len(arm.runs) > 1:
                    figure.add_trace(_band(rounds, mean, spread, line), row, column)
                figure.update_yaxes(title_text=label, row=row, col=column)
    figure.update_xaxes(title_text="round", row=len(metrics))
    return figure


def _band(x: list[int], mean: Series, spread: Series, line: go.Scatter) -> go.Scatter:
    """Return the band of one deviation around a line."""
    return go.Scatter(
        x=[*x, *x[::-1]],
        y=np.concatenate([mean + spread, (mean - spread)[::-1]]),
        fill="toself",
        opacity=0.2,
        mode="none",
        fillcolor=line.line.color,
        legendgroup=line.legendgroup,
        showlegend=False,
        hoverinfo="skip",
    )


def _curves(*metrics: str, note: str = _ACCURACY_NOTE) -> _Maker:
    def made(found: Sequence[Experiment]) -> tuple[go.Figure, str]:
        rows = [
            (
                each.preset,
                arm.name,
                len(arm.runs),
                *(_late(arm, _METRICS[metric][1]) for metric in metrics),
            )
            for each in found
            for arm in each.arms
        ]
        labels = [f"{_METRICS[metric][0]}, late" for metric in metrics]
        table = _markdown(["preset", "arm", "seeds", *labels], rows)
        late = "Late: mean over the last tenth of the rounds and over seeds."
        return by_round(found, metrics), f"{table}\n\n{late} {note}"

    return made


def _late(arm: Arm, read: Callable[[Run], Series]) -> str:
    late = [read(run)[-max(1, len(run.rounds) // 10) :] for run in arm.runs]
    return formats.number(float(np.mean(late)))


# --- Fig. 2 -----------------------------------------------------------------------


def deviations(found: Sequence[Experiment]) -> tuple[go.Figure, str]:
    """Draw Fig. 2: how often each normalized deviation is in the guidance."""
    figure, rows = go.Figure(), []
    for each in found:
        run = _with_guidance(each)
        values = _normalized(run)
        counts, edges = np.histogram(values, bins=_BINS, range=(0, 1))
        figure.add_bar(x=edges[:-1], y=counts, name=each.preset, offset=0)
        kept = [int(np.count_nonzero(values >= cut)) for cut in (0.1, 0.3, 0.5)]
        rows.append(
            (
                each.preset,
                values.size,
                _claim(each).compression,
                *(
                    f"{values.size / n:.3g} ({n} kept)" if n else "none kept"
                    for n in kept
                ),
            )
        )
    figure.update_layout(
        xaxis_title="normalized deviation", yaxis_title="parameters", yaxis_type="log"
    )
    headings = ["preset", "parameters", "paper's compression, T_p = 0.3"]
    headings += [f"ours in value mode, T_p = {cut}" for cut in (0.1, 0.3, 0.5)]
    return figure, f"{_markdown(headings, rows)}\n\n{_COMPRESSION_NOTE}"


def _with_guidance(experiment: Experiment) -> Run:
    for arm in experiment.arms:
        for run in arm.runs:
            if (run.directory / "guidance.npz").is_file():
                return run
    raise DataError(
        f"fig2: expected guidance.npz in a run of autoflip on {experiment.preset}, got "
        'none; run it with --overrides "log.guidance=true"'
    )


def _normalized(run: Run) -> NDArray[np.float32]:
    """Return all guidance, flat, in [0, 1] as Eq. 3 has it."""
    with np.load(run.directory / "guidance.npz") as file:
        every = [file[name].reshape(-1) for name in file.files]
    values: NDArray[np.float32] = np.concatenate(every)
    if run.settings.pruning.normalization == "client":  # its unit is a client's mean
        values /= max(float(values.max()), _LEAST)
    return values


# --- Fig. 6 and 7 -----------------------------------------------------------------

_HOLDINGS = {"fig6": "paper-cifar10", "fig7": "paper-cifar100"}


def holdings(preset: str, overrides: str = "") -> go.Figure:
    """Draw who holds how many samples of which class."""
    chosen = presets.load(preset, overrides)
    parts = build.federated(chosen, chosen.strategy.min_nodes)
    clients = list(range(parts.num_partitions))
    counts = np.stack(
        [
            np.bincount(parts.partition(client).y, minlength=parts.num_classes)
            for client in clients
        ]
    )
    figure = go.Figure()
    for label in range(parts.num_classes):
        color = _COLORS[label % len(_COLORS)]
        figure.add_bar(
            x=clients, y=counts[:, label], name=str(label), marker_color=color
        )
    figure.update_layout(
        barmode="stack", xaxis_title="client", yaxis_title="samples", title=preset
    )
    return figure


# --- Tables 1, 2, 3 and Fig. 9 ----------------------------------------------------


def flops(found: Sequence[Experiment]) -> tuple[go.Figure, str]:
    """Make Table 1 and Fig. 9: operations, all and left."""
    bars: dict[str, list[float | None]] = {"all": [], "left": [], "compact": []}
    names, rows = [], []
    for each, arm, cost in _costs(found):
        left = [run.summary.flops.get("unstructured_in_theory") for run in arm.runs]
        known = [value for value in left if value is not None]
        theory = float(np.mean(known)) if known else None
        names.append(f"{each.preset} {arm.name}")
        for bar, value in zip(
            bars.values(), (cost.flops_dense, theory, cost.flops), strict=True
        ):
            bar.append(value)
        rows.append(
            (
                each.preset,
                arm.name,
                _claim(each).compression,
                f"{cost.compression:.3g}",
                _claim(each).flops,
                formats.number(cost.flops_dense),
                _left(theory, cost.flops_dense),
                _left(cost.flops, cost.flops_dense),
            )
        )
    headings = ["preset", "arm", "paper's compression", "ours"]
    headings += ["paper's FLOPs, all / left / %", "ours, all"]
    headings += ["left by the paper's count (saved)", "compact (saved)"]
    figure = go.Figure([go.Bar(x=names, y=y, name=name) for name, y in bars.items()])
    figure.update_layout(yaxis_title="multiply-accumulates of a sample")
    return figure, f"{_markdown(headings, rows)}\n\n{_FLOPS_NOTE}"


def communication(found: Sequence[Experiment]) -> tuple[None, str]:
    """Make Table 2: what is sent until the target accuracy."""
    rows = [
        (
            each.preset,
            arm.name,
            _claim(each).sent.get(arm.settings.strategy.name, formats.NONE),
            formats.ratio(each.target),
            formats.number(cost.rounds_to_target),
            formats.number(cost.communication and _BYTES * cost.communication, "B"),
            formats.number(cost.bytes_to_target, "B"),
        )
        for each, arm, cost in _costs(found)
    ]
    headings = ["preset", "arm", "paper", "our target", "our rounds"]
    headings += ["our cost by the formula", "measured"]
    return None, f"{_markdown(headings, rows)}\n\n{_COMMUNICATION_NOTE}"


def computation(found: Sequence[Experiment]) -> tuple[None, str]:
    """Make Table 3: what a client computes until the target accuracy."""
    rows = [
        (
            each.preset,
            arm.name,
            _claim(each).processed.get(arm.settings.strategy.name, formats.NONE),
            formats.ratio(each.target),
            formats.number(cost.computation),
            formats.number(cost.flops_trained),
        )
        for each, arm, cost in _costs(found)
    ]
    headings = ["preset", "arm", "paper", "our target"]
    headings += ["ours by the formula", "measured, all rounds"]
    return None, f"{_markdown(headings, rows)}\n\n{_COMPUTATION_NOTE}"


def _costs(found: Iterable[Experiment]) -> Iterator[tuple[Experiment, Arm, CostRow]]:
    for each in found:
        for arm in each.arms:
            yield each, arm, cost_row(arm, each.target)


def _claim(experiment: Experiment) -> Claim:
    return CLAIMS.get(experiment.preset, Claim())


def _left(left: float | None, whole: float | None) -> str:
    """Return what is left of operations and, in brackets, the share that is saved."""
    if left is None or not whole:
        return formats.NONE
    return f"{formats.number(left)} ({100 * (1 - left / whole):.1f} %)"


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


_FROM_RUNS: dict[str, _Maker] = {
    "fig2": deviations,
    "fig3": _curves("accuracy"),
    "fig4": _curves("accuracy", "loss"),
    "fig5": _curves("accuracy", "loss"),
    "fig8": _curves("loss"),
    "fig9": flops,
    "table1": lambda found: (None, flops(found)[1]),
    "table2": communication,
    "table3": computation,
    "drift": _curves(
        "guidance_cosine", "update_variance", "mask_change", note=_DRIFT_NOTE
    ),
}

#: What `draw` can make.
NAMES: tuple[str, ...] = tuple(sorted({*_FROM_RUNS, *_HOLDINGS}))
