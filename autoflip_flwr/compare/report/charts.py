"""The charts of an experiment, all means over seeds with their standard errors."""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.style
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from autoflip_flwr.app.data.archive import read_npz
from autoflip_flwr.compare.report import formats
from autoflip_flwr.compare.results import Arm, Experiment, Run, Series
from autoflip_flwr.errors import DataError

#: Colours that any colour vision tells apart (Okabe and Ito), darkened for white.
_COLORS = ("#1a1b1e", "#0072b2", "#d55e00", "#009e73", "#b95e93", "#a67c00")
_LINES = cycler(linestyle=("-", "--", ":", "-.")) * (
    cycler(color=_COLORS) + cycler(marker=("o", "s", "^", "D", "v", "P"))
)
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "autoflip",  # the same chart has the same ids
    "text.parse_math": False,
    "font.size": 9.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.4,
    "hatch.color": "white",
}

_UNITS = {
    "accuracy": "top-1 accuracy",
    "mask_change": "changed share of the mask",
    "guidance_cosine": "cosine",
    "update_variance": "variance of client updates",
}

#: Key, label, colour and hatch of what is sent.
_SENT = (
    ("explore_down", "exploration, to clients", _COLORS[1], ""),
    ("explore_up", "exploration, from clients", _COLORS[1], "////"),
    ("train_down", "training, to clients", _COLORS[2], ""),
    ("train_up", "training, from clients", _COLORS[2], "////"),
    ("evaluate_down", "evaluation, to clients", _COLORS[3], ""),
    ("evaluate_up", "evaluation, from clients", _COLORS[3], "////"),
)


@dataclass(frozen=True, slots=True)
class Chart:
    """A finished chart."""

    slug: str  # the title, as a part of a file's name
    title: str
    description: str  # its values as text, for readers who do not see the chart
    svg: bytes
    png: bytes


def charts(experiment: Experiment) -> list[Chart]:
    """Draw every chart that the experiment's runs have values for."""
    styled = list(zip(experiment.arms, cycle(_LINES), strict=False))
    pruned = [each for each in styled if each[0].settings.strategy.name != "fedavg"]
    target = experiment.target
    with matplotlib.style.context(_STYLE, after_reset=True), warnings.catch_warnings():
        # Of letters that the font lacks, and of log axes without a positive value.
        warnings.simplefilter("ignore", UserWarning)
        drawn = [
            _lines("accuracy", "Accuracy by round", styled, target),
            _lines(
                "accuracy",
                "Accuracy by megabytes",
                styled,
                target,
                x=lambda run: run.bytes_sent() / 1e6,
                xlabel="megabytes sent, exploration included",
                xscale="log",
            ),
            _bytes(experiment.arms),
            _densities(experiment.arms),
            _lines("mask_change", "Mask change", pruned),
            _lines("guidance_cosine", "Guidance cosine", pruned),
            _lines("update_variance", "Update variance", pruned, yscale="log"),
        ]
    return [chart for chart in drawn if chart is not None]


def _lines(
    key: str,
    title: str,
    styled: Sequence[tuple[Arm, dict[str, Any]]],
    target: float | None = None,
    x: Callable[[Run], Series] = lambda run: run.series("round"),
    **options: str,
) -> Chart | None:
    """Draw a metric, a line an arm; None if it is zero or unknown in all rounds."""
    figure, axes = _figure(3.0)
    ends = []
    for arm, look in styled:
        places = _over_seeds(arm, x).mean(axis=0)
        values = _over_seeds(arm, lambda run: run.series(key))
        known = np.isfinite(values).all(axis=0)
        if not known.any():
            continue
        places, values = places[known], values[:, known]
        mean = values.mean(axis=0)
        every = max(1, len(mean) // 6)
        axes.plot(places, mean, label=fill(arm.name, 44), markevery=every, **look)
        if len(values) > 1:
            error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            band = mean - error, mean + error
            axes.fill_between(places, *band, color=look["color"], alpha=0.15, lw=0)
        ends.append(f"{arm.name}: {mean[-1]:.4g}")
    if not any(np.any(line.get_ydata()) for line in axes.lines):
        return None
    if target is not None:
        axes.axhline(target, color="gray", ls=(0, (3, 3)), label=f"target {target:.3f}")
    axes.set(**{"xlabel": "round", "ylabel": _UNITS[key], **options})
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":  # by default powers of ten in TeX
            axis.set_major_formatter(LogFormatter())
            axis.set_minor_formatter(LogFormatter())
    return _finished(figure, axes, title, f"At the end, {'; '.join(ends)}.")


def _over_seeds(arm: Arm, values: Callable[[Run], Series]) -> Series:
    """Return values, seeds x rounds."""
    shortest = min(len(run.rounds) for run in arm.runs)
    return np.array([values(run)[:shortest] for run in arm.runs])


def _bytes(arms: Sequence[Arm]) -> Chart:
    """Draw what was sent, a bar an arm, by phase and direction."""
    names = [fill(arm.name, 26) for arm in arms]
    most = max(name.count("\n") for name in names)
    figure, axes = _figure(0.6 + (0.3 + 0.12 * most) * len(arms))
    rows, left = np.arange(len(arms)), np.zeros(len(arms))
    for key, label, color, hatch in _SENT:
        width = np.array([_mean_bytes(arm, key) for arm in arms]) / 1e6
        axes.barh(rows, width, 0.6, left, color=color, hatch=hatch, label=label)
        left += width
    dense = [_mean_bytes(arm, "dense_equivalent") / 1e6 for arm in arms]
    axes.plot(dense, rows, "k|", markersize=16, mew=2, label="dense FedAvg")
    axes.set_yticks(rows, names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("megabytes")
    totals = [
        f"{arm.name}: {formats.number(_mean_bytes(arm, 'total'), 'B')}" for arm in arms
    ]
    return _finished(figure, axes, "Bytes", f"Sent in all, {'; '.join(totals)}.")


def _mean_bytes(arm: Arm, key: str) -> float:
    return float(np.mean([getattr(run.summary.bytes, key) for run in arm.runs]))


def _densities(arms: Sequence[Arm]) -> Chart | None:
    """Draw a heat map, a row a layer, a column an arm; None if no run has a mask."""
    masked: dict[str, list[dict[str, float]]] = {}
    for arm in arms:
        paths = [run.directory / "mask.npz" for run in arm.runs]
        if runs := [_by_layer(path) for path in paths if path.exists()]:
            masked[arm.name] = runs
    layers = list(dict.fromkeys(n for own in masked.values() for r in own for n in r))
    if not layers:
        return None
    density = np.array(
        [
            [np.mean([run.get(layer, np.nan) for run in runs]) for layer in layers]
            for runs in masked.values()
        ]
    )
    names = [fill(name, 26) for name in masked]
    longest = max(len(line) for name in names for line in name.split("\n"))
    figure, axes = _figure(0.4 + 0.2 * len(layers) + 0.08 * longest)
    edges = [np.arange(count + 1) - 0.5 for count in density.shape]
    axes.pcolormesh(*edges, density.T, cmap="Blues", vmin=0, vmax=1)
    for (column, row), value in np.ndenumerate(density):
        text = "<1" if 0 < value < 0.01 else f"{100 * value:.0f}".replace("nan", "")
        ink = "white" if value > 0.65 else "black"
        axes.text(column, row, text, ha="center", va="center", color=ink)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(layers)), [layer[-16:] for layer in layers])
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    texts = [
        f"{name}: {', '.join(map('{} {:.3f}'.format, layers, values))}"
        for name, values in zip(masked, density, strict=True)
    ]
    return _finished(figure, axes, "Density by layer", f"{'; '.join(texts)}.")


def _by_layer(path: Path) -> dict[str, float]:
    """Return the kept share of every layer, of all its parameters together."""
    layers: dict[str, list[Any]] = {}
    try:
        for name, mask in read_npz(path).items():
            layer = name.rpartition(".")[0] or name
            layers.setdefault(layer, []).append(mask.astype(bool).ravel())
    except ValueError as error:
        raise DataError(
            f"{path}: expected the masks of a run, got {error}; run it again, or "
            "delete the file"
        ) from error
    return {name: float(np.concatenate(own).mean()) for name, own in layers.items()}


def _figure(height: float) -> tuple[Figure, Axes]:
    # 4.4 inches: on a phone a point of text is still about a pixel.
    figure = Figure(figsize=(4.4, height), layout="constrained")
    return figure, figure.add_subplot()


def _finished(figure: Figure, axes: Axes, title: str, values: str) -> Chart:
    """Add a legend below the axes, if there is one, and render the figure."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        lines = sum(1 + label.count("\n") for label in labels)
        figure.set_figheight(figure.get_figheight() + 0.18 * lines)
        figure.legend(handles, labels, loc="outside lower left", handlelength=3)
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=160)
    figure.savefig(svg, format="svg", metadata={"Date": None})
    slug, text = title.lower().replace(" ", "-"), f"{title}. {values}"
    return Chart(slug, title, text, svg.getvalue(), png.getvalue())
