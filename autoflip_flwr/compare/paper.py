"""The figures and tables of arXiv:2405.10271 from finished runs: `autoflip paper`.

A figure is a page and a picture, drawn by Vega as in the report. Tables are Markdown:
the paper's figures, ours, and why they cannot be compared where they cannot.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import altair as alt
import numpy as np
import vl_convert
from jinja2.utils import htmlsafe_json_dumps
from numpy.typing import NDArray

from autoflip_flwr import settings as presets
from autoflip_flwr.app import data
from autoflip_flwr.app.data.archive import read_npz
from autoflip_flwr.compare import formats
from autoflip_flwr.compare.charts import COMMON, LABELS, bundled, by_round, lines
from autoflip_flwr.compare.results import (
    Arm,
    CostRow,
    Experiment,
    Run,
    cost_row,
    experiments,
    find_runs,
)
from autoflip_flwr.errors import DataError, SettingsError

_Figure: TypeAlias = alt.Chart | alt.HConcatChart
_Maker: TypeAlias = Callable[[Sequence[Experiment]], tuple[_Figure | None, str]]

#: vl_convert's own page does not escape what a run's settings have in their texts.
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title><div></div>
<script type="application/json">{spec}</script>
<script type="module">{script}</script></html>
"""
_SCRIPT = """const spec = JSON.parse(document.querySelector("script").textContent);
vegaEmbed("div", spec, { actions: false, renderer: "svg" });"""
_BYTES = 4  # of a parameter, as the paper's costs have it
_BINS = 100
_LEAST = 1e-30


#: What the paper reports in its own words and digits, by preset: Table 1 (original,
#: reduced and "reduced" in percent), 2 (until 90 %) and 3 (parameters), by strategy.
with (Path(__file__).parent / "claims.csv").open(newline="") as _file:
    _CLAIMS = {row["preset"]: row for row in csv.DictReader(_file)}

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
    """Make the figure or table of a name in `NAMES`; return the text to print.

    Figures go to the folder `output`. All are made from the finished runs in
    `folders`, but fig6 and fig7, which show a preset with `overrides`. The `target` is
    that of `results.experiments`.
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


def _saved(figure: _Figure, output: Path, name: str) -> str:
    output.mkdir(parents=True, exist_ok=True)
    path, spec = output / f"{name}.html", figure.to_dict() | COMMON
    page = _PAGE.format(
        title=name, spec=htmlsafe_json_dumps(spec), script=bundled(_SCRIPT)
    )
    path.write_text(page, encoding="utf-8")
    svg = vl_convert.vegalite_to_svg(spec)
    path.with_suffix(".svg").write_text(svg, encoding="utf-8")
    return str(path)


# --- by round: Fig. 3, 4, 5, 8, drift --------------------------------------------


def _curves(*metrics: str, note: str = _ACCURACY_NOTE) -> _Maker:
    """Draw metrics by round, a column per experiment."""

    def made(found: Sequence[Experiment]) -> tuple[_Figure, str]:
        columns, rows = [], []
        for each in found:
            drawn = [row for arm in each.arms for row in by_round(arm, metrics)]
            values = alt.InlineData(values=drawn)
            parts = [lines(each, values, metric) for metric in metrics]
            columns.append(alt.vconcat(*parts, title=each.preset))
            for arm in each.arms:
                row = {"preset": each.preset, "arm": arm.name, "seeds": len(arm.runs)}
                for metric in metrics:
                    late = fmean(run.late(metric) for run in arm.runs)
                    row[f"{LABELS[metric]}, late"] = formats.number(late)
                rows.append(row)
        own: Any = {"color": "independent", "strokeDash": "independent"}
        told = f"Late: mean over the last tenth of the rounds and over seeds. {note}"
        figure = alt.hconcat(*columns).resolve_scale(**own)
        return figure, f"{_markdown(rows)}\n\n{told}"

    return made


# --- Fig. 2 -----------------------------------------------------------------------


def deviations(found: Sequence[Experiment]) -> tuple[_Figure, str]:
    """Draw Fig. 2: how often each normalized deviation is in the guidance."""
    bars, rows = [], []
    for each in found:
        values = _normalized(_with_guidance(each))
        counts, edges = np.histogram(values, bins=_BINS, range=(0, 1))
        bars += [
            {"preset": each.preset, "from": low, "to": high, "parameters": count}
            for low, high, count in np.c_[edges[:-1], edges[1:], counts].tolist()
            if count
        ]
        row = {
            "preset": each.preset,
            "parameters": values.size,
            "paper's compression, T_p = 0.3": _claim(each, "compression"),
        }
        for cut in (0.1, 0.3, 0.5):
            n = int(np.count_nonzero(values >= cut))
            told = f"{values.size / n:.3g} ({n} kept)" if n else "none kept"
            row[f"ours in value mode, T_p = {cut}"] = told
        rows.append(row)
    deviation = alt.X("from:Q", title="normalized deviation", bin="binned")
    count = alt.Y("parameters:Q").scale(type="log", domainMin=0.5)
    figure = (
        alt.Chart(alt.InlineData(values=bars), width=400, height=250)
        .mark_bar(tooltip=True)
        .encode(x=deviation, x2="to:Q", y=count, y2=alt.datum(0.5))
        .encode(column=alt.Column("preset:N", title=None))
    )
    return figure, f"{_markdown(rows)}\n\n{_COMPRESSION_NOTE}"


def _with_guidance(experiment: Experiment) -> Run:
    for run in (run for arm in experiment.arms for run in arm.runs):
        if (run.directory / "guidance.npz").is_file():
            return run
    raise DataError(
        f"fig2: expected guidance.npz in a run of autoflip on {experiment.preset}, got "
        'none; run it with --overrides "log.guidance=true"'
    )


def _normalized(run: Run) -> NDArray[np.float32]:
    """Return all guidance, flat, in [0, 1] as Eq. 3 has it."""
    every = read_npz(run.directory / "guidance.npz").values()
    values: NDArray[np.float32] = np.concatenate([each.reshape(-1) for each in every])
    if run.settings.pruning.normalization == "client":  # its unit is a client's mean
        values /= max(float(values.max()), _LEAST)
    return values


# --- Fig. 6 and 7 -----------------------------------------------------------------

_HOLDINGS = {"fig6": "paper-cifar10", "fig7": "paper-cifar100"}


def holdings(preset: str, overrides: str = "") -> _Figure:
    """Draw who holds how many samples of which class."""
    chosen = presets.load(preset, overrides)
    parts = data.divided(chosen.data, chosen.strategy.min_nodes, seed=chosen.seed)
    rows = [
        {"client": client, "class": label, "samples": count}
        for client in range(parts.num_partitions)
        for label, count in enumerate(np.bincount(parts.partition(client).y).tolist())
        if count
    ]
    color = alt.Color("class:N", scale=alt.Scale(scheme="tableau20"))
    figure: _Figure = (
        alt.Chart(alt.InlineData(values=rows), title=preset, height=250)
        .mark_bar(tooltip=True)
        .encode(x="client:O", y="samples:Q")
        .encode(color=color.legend(title="class", columns=10, symbolLimit=0))
    )
    return figure


# --- Tables 1, 2, 3 and Fig. 9 ----------------------------------------------------


def flops(found: Sequence[Experiment]) -> tuple[_Figure, str]:
    """Make Table 1 and Fig. 9: operations, all and left."""
    bars, rows = [], []
    for each, arm, cost in _costs(found):
        left = [run.summary.flops.get("unstructured_in_theory") for run in arm.runs]
        known = [value for value in left if value is not None]
        theory = float(np.mean(known)) if known else None
        counts = {"all": cost.flops_dense, "left": theory, "compact": cost.flops}
        bars += [
            {"arm": f"{each.preset} {arm.name}", "counted": kind, "operations": value}
            for kind, value in counts.items()
        ]
        row = {
            "preset": each.preset,
            "arm": arm.name,
            "paper's compression": _claim(each, "compression"),
            "ours": formats.ratio(1, cost.density),
            "paper's FLOPs, all / left / %": _claim(each, "flops"),
            "ours, all": formats.number(cost.flops_dense),
            "left by the paper's count (saved)": _left(theory, cost.flops_dense),
            "compact (saved)": _left(cost.flops, cost.flops_dense),
        }
        rows.append(row)
    operations = alt.X("operations:Q", title="multiply-accumulates of a sample")
    arms = alt.Y("arm:N", sort=None, title=None).axis(labelLimit=0)
    figure = (
        alt.Chart(alt.InlineData(values=bars), width=400)
        .mark_bar(tooltip=True)
        .encode(x=operations.axis(format="~s"), y=arms)
        .encode(yOffset=alt.YOffset("counted:N", sort=None))
        .encode(color=alt.Color("counted:N", sort=None))
    )
    return figure, f"{_markdown(rows)}\n\n{_FLOPS_NOTE}"


def until_target(
    claim: str, columns: Mapping[str, Callable[[CostRow], str]], note: str
) -> _Maker:
    """Make Table 2 or 3: what is sent or computed until the target accuracy."""

    def made(found: Sequence[Experiment]) -> tuple[None, str]:
        rows = [
            {
                "preset": each.preset,
                "arm": arm.name,
                "paper": _claim(each, f"{claim} {arm.settings.strategy.name}"),
                "our target": formats.ratio(each.target),
                **{heading: text(cost) for heading, text in columns.items()},
            }
            for each, arm, cost in _costs(found)
        ]
        return None, f"{_markdown(rows)}\n\n{note}"

    return made


def _costs(found: Iterable[Experiment]) -> Iterator[tuple[Experiment, Arm, CostRow]]:
    for each in found:
        for arm in each.arms:
            yield each, arm, cost_row(arm, each.target)


def _claim(experiment: Experiment, what: str) -> str:
    return _CLAIMS.get(experiment.preset, {}).get(what, formats.NONE)


def _left(left: float | None, whole: float | None) -> str:
    """Return what is left of operations and, in brackets, the share that is saved."""
    if left is None or not whole:
        return formats.NONE
    return f"{formats.number(left)} ({100 * (1 - left / whole):.1f} %)"


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of one row or more, with their keys as headings."""
    lines = [[*rows[0]], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


_FROM_RUNS: dict[str, _Maker] = {
    "fig2": deviations,
    "fig3": _curves("accuracy"),
    "fig4": _curves("accuracy", "loss"),
    "fig5": _curves("accuracy", "loss"),
    "fig8": _curves("loss"),
    "fig9": flops,
    "table1": lambda found: (None, flops(found)[1]),
    "table2": until_target(
        "sent",
        {
            "our rounds": lambda cost: formats.number(cost.rounds_to_target),
            "our cost by the formula": lambda cost: formats.number(
                cost.communication and _BYTES * cost.communication, "B"
            ),
            "measured": lambda cost: formats.number(cost.bytes_to_target, "B"),
        },
        _COMMUNICATION_NOTE,
    ),
    "table3": until_target(
        "processed",
        {
            "ours by the formula": lambda cost: formats.number(cost.computation),
            "measured, all rounds": lambda cost: formats.number(cost.flops_trained),
        },
        _COMPUTATION_NOTE,
    ),
    "drift": _curves(
        "guidance_cosine", "variance_of_all", "mask_change", note=_DRIFT_NOTE
    ),
}

#: What `draw` can make.
NAMES: tuple[str, ...] = tuple(sorted({*_FROM_RUNS, *_HOLDINGS}))
