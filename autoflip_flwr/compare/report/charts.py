"""The charts of an experiment, in Vega-Lite.

A browser draws them with Vega, whose script stands in the page. vl-convert draws the
same as pictures, for paper and where no script runs.
"""

import itertools
import math
import statistics
import zlib
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple, TypeAlias
from zipfile import BadZipFile

import altair as alt
import numpy as np

from autoflip_flwr.compare.report import formats
from autoflip_flwr.compare.results import Arm, Experiment
from autoflip_flwr.errors import DataError

#: The page's ink, then colours that any colour vision tells apart (after Okabe and
#: Ito), 3:1 or more on white and on the dark page. Further arms are dashed.
_COLORS = ("currentColor", "#0077bb", "#d55e00", "#00916a", "#b95e93", "#a67c00")
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2])

#: From so many seeds on, a band of the standard error replaces lines of single seeds.
_MANY_SEEDS = 5
#: A chart shows no more rounds of a run than this.
_MOST_ROUNDS = 120
#: A smooth line is the mean with so many shown rounds before and after.
_SMOOTH = 5

_AXES = {
    "round": "round",
    "megabytes": "megabytes sent, exploration included",
    "operations": "multiply-accumulates trained, exploration included",
    "accuracy": "top-1 accuracy",
    "mask_change": "changed share of the mask",
    "guidance_cosine": "cosine",
    "update_variance": "variance of client updates",
}
#: What a run without a mask has of these.
_DENSE = ("round", "megabytes", "operations", "accuracy")
#: Label and colour of what is sent: two shades for each phase.
_SENT = {
    "explore_down": ("exploration, to clients", "#0077bb"),
    "explore_up": ("exploration, from clients", "#66b2dd"),
    "train_down": ("training, to clients", "#d55e00"),
    "train_up": ("training, from clients", "#eea677"),
    "evaluate_down": ("evaluation, to clients", "#00916a"),
    "evaluate_up": ("evaluation, from clients", "#77ccb0"),
    "dense_equivalent": ("dense FedAvg", "currentColor"),
}

_INK = {f"{part}Color": "currentColor" for part in ("label", "title", "tick", "domain")}
_CONFIG = {
    "font": "sans-serif",
    "lineBreak": "\n",
    "view": {"stroke": None},
    "axis": {**_INK, "gridColor": "currentColor", "gridOpacity": 0.15},
    "legend": {"labelColor": "currentColor", "labelLimit": 0, "symbolOpacity": 1}
    | {"orient": "bottom", "columns": 1, "offset": 8, "title": None},
    "title": {"color": "currentColor", "anchor": "start"},
    "rule": {"color": "currentColor"},
    "text": {"color": "currentColor"},
}
#: What the page's boxes set: arms that are not shown, and whether lines are smooth.
_PARAMS = [{"name": "hidden", "value": []}, {"name": "smooth", "value": False}]
_SHOWN = "indexof(hidden, datum.arm) < 0"

Rows: TypeAlias = list[dict[str, Any]]


class Chart(NamedTuple):
    """A chart to draw."""

    title: str
    description: str  # its values as text, for readers who do not see the chart
    spec: dict[str, Any]  # in Vega-Lite, of the rows that `tables` returns

    @property
    def slug(self) -> str:
        """The title, as a part of a file's name."""
        return self.title.lower().replace(" ", "-")


def tables(arms: Sequence[Arm]) -> dict[str, Rows]:
    """Return the rows that the charts show: rounds, bytes sent, kept shares."""
    return {
        "rounds": [row for arm in arms for row in _rounds(arm)],
        "sent": [
            {"arm": _name(arm), "kind": label, "megabytes": _sent(arm, key) / 1e6}
            for arm in arms
            for key, (label, _) in _SENT.items()
        ],
        "kept": [row for arm in arms for row in _kept(arm)],
    }


def charts(experiment: Experiment, rows: dict[str, Rows]) -> list[Chart]:
    """Draw every chart that there are values for."""
    arms, target = experiment.arms, experiment.target
    lines = [
        ("Accuracy over megabytes", "accuracy", "megabytes"),
        ("Accuracy over operations", "accuracy", "operations"),
        ("Accuracy by round", "accuracy", "round"),
        ("Mask change", "mask_change", "round"),
        ("Guidance cosine", "guidance_cosine", "round"),
        ("Update variance", "update_variance", "round"),
    ]
    drawn = [_lines(*each, arms, rows["rounds"], target) for each in lines]
    drawn[3:3] = [_bytes(arms), _densities(arms, rows["kept"])]
    return [chart for chart in drawn if chart is not None]


def figure(charts: Sequence[Chart], title: str, verdicts: Sequence[str]) -> Chart:
    """Draw accuracy over megabytes and over operations as one picture."""
    own = {"$schema", "autosize", "config", "description", "params"}
    pair = [chart.spec for chart in charts if " over " in chart.title]
    parts = [{k: v for k, v in spec.items() if k not in own} for spec in pair]
    spec = {"title": {"text": title, "subtitle": verdicts}, "hconcat": parts}
    return Chart(title, "", {"config": _CONFIG, "params": _PARAMS, **spec})


def _chart(title: str, values: str, vega: Any) -> Chart:
    text = f"{title}. {values}"
    common = {"description": text, "config": _CONFIG, "params": _PARAMS}
    fit = {"autosize": {"type": "fit-x", "contains": "padding"}}
    return Chart(title, text, {**vega.to_dict(), **common, **fit})


def _name(arm: Arm) -> str:
    return fill(arm.name, 40)


def _look(arms: Sequence[Arm], symbol: str) -> dict[str, Any]:
    """Return the encodings that give an arm the same look in all charts."""
    looks = itertools.cycle(itertools.product(_DASHES, _COLORS))
    dashes, colors = zip(*itertools.islice(looks, len(arms)), strict=True)
    scale: Any = {"domain": [_name(arm) for arm in arms]}
    legend = alt.Legend(symbolType=symbol)
    return {
        "color": alt.Color("arm:N", legend=legend).scale(range=colors, **scale),
        "strokeDash": alt.StrokeDash("arm:N", legend=legend).scale(
            range=dashes, **scale
        ),
    }


def _rounds(arm: Arm) -> Rows:
    """Return a row for each seed and round.

    What not all seeds know in a round is unknown: the mean of the others would not go
    with the means before and after it. All seeds stand at their mean megabytes and
    operations, so that there is a mean accuracy.
    """
    count = min(len(run.rounds) for run in arm.runs)
    known = {k: np.array([r.series(k)[:count] for r in arm.runs]) for k in _AXES}
    for key, values in known.items():
        if key in ("megabytes", "operations"):
            values[:] = values.mean(axis=0)
        if key not in _DENSE and arm.settings.strategy.name == "fedavg":
            values[:] = np.nan  # it has no mask
        values[:, ~np.isfinite(values).all(axis=0)] = np.nan
    shown = {*range(0, count, math.ceil(count / _MOST_ROUNDS)), count - 1}
    return [
        {"arm": _name(arm), "seed": run.settings.seed}
        | {key: _short(values[seed, at]) for key, values in known.items()}
        for at in sorted(shown)
        for seed, run in enumerate(arm.runs)
    ]


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _lines(
    title: str, key: str, x: str, arms: Sequence[Arm], rows: Rows, target: float | None
) -> Chart | None:
    """Draw a metric, a line an arm; None if it is zero or unknown in all rounds."""
    known = [row for row in rows if row[key] is not None and row[x] is not None]
    if not any(row[key] for row in known):
        return None
    ends = []
    for arm in arms:
        values = [row[key] for row in known if row["arm"] == _name(arm)]
        if values:
            ends.append(f"{arm.name}: {statistics.fmean(values[-len(arm.runs) :]):.4g}")
    place = alt.X(f"{x}:Q", title=_AXES[x], axis=alt.Axis(format="~s", tickCount=5))
    value = alt.Y("mean(value):Q", title=_AXES[key]).scale(zero=False)
    # A logarithm needs positive values; a comparison with null is false.
    valid = f"{_SHOWN} && isValid(datum.{key}) && datum.{x} > 0"
    if x != "round":
        place = place.scale(type="log", nice=False)
    if key == "update_variance":
        value, valid = value.scale(type="log"), f"{valid} && datum.{key} > 0"
    base = (
        alt.Chart(alt.NamedData("rounds"), width=400, height=250)
        .transform_filter(valid)
        .transform_window(
            smoothed=f"mean({key})",
            frame=[-_SMOOTH, _SMOOTH],
            groupby=["arm", "seed"],
            sort=[alt.SortField("round")],
        )
        .transform_calculate(value=f"smooth ? datum.smoothed : datum.{key}")
        .encode(x=place, y=value, **_look(arms, "stroke"))
    )
    spread: Any = base.mark_line(strokeWidth=0.7, opacity=0.5).encode(detail="seed:N")
    if max(len(arm.runs) for arm in arms) >= _MANY_SEEDS:
        spread = base.mark_errorband().encode(y=alt.Y("value:Q", title=_AXES[key]))
    told = (f"{x}:Q", "mean(value):Q", "stderr(value):Q")
    tooltip = ["arm:N", *(alt.Tooltip(what, format=".4~g") for what in told)]
    layers = [spread, base.mark_line(point="transparent").encode(tooltip=tooltip)]
    if key == "accuracy" and target is not None:
        one = alt.Chart(alt.NamedData("rounds")).transform_aggregate(n="count()")
        one = one.encode(y=alt.datum(target))
        text = one.mark_text(align="left", x=3, dy=8, text=f"target {target:.3f}")
        layers += [one.mark_rule(strokeDash=[3, 3]), text]
    return _chart(title, f"At the end, {'; '.join(ends)}.", alt.layer(*layers))


def _bytes(arms: Sequence[Arm]) -> Chart:
    """Draw what was sent, a bar an arm, by phase and direction."""
    labels, colors = zip(*_SENT.values(), strict=True)
    base = (
        alt.Chart(alt.NamedData("sent"), width=400, height=32 * len(arms))
        .transform_filter(_SHOWN)
        .encode(y=alt.Y("arm:N", sort=None, title=None), x="megabytes:Q")
        .encode(color=alt.Color("kind:N").scale(domain=labels, range=colors))
        .encode(tooltip=["arm:N", "kind:N", "megabytes:Q"])
    )
    dense = f"datum.kind === '{labels[-1]}'"
    bars = base.transform_filter(f"!({dense})").mark_bar()
    dense_bars = base.transform_filter(dense).mark_tick(thickness=3)
    sent = [f"{arm.name}: {formats.number(_sent(arm, 'total'), 'B')}" for arm in arms]
    return _chart("Bytes", f"Sent in all, {'; '.join(sent)}.", bars + dense_bars)


def _sent(arm: Arm, key: str) -> float:
    return statistics.fmean(getattr(run.summary.bytes, key) for run in arm.runs)


def _densities(arms: Sequence[Arm], rows: Rows) -> Chart | None:
    """Draw the kept share, bars a layer, one an arm; None if no run has a mask."""
    if not rows:
        return None
    texts: dict[str, list[str]] = {
        name: [] for name in dict.fromkeys(row["arm"] for row in rows)
    }
    for row in rows:
        texts[row["arm"]].append(f"{row['layer']} {row['kept']:.3f}")
    layers = len({row["layer"] for row in rows})
    chart = (
        alt.Chart(alt.NamedData("kept"), width=400)
        .properties(height=layers * (10 + 6 * len(texts)))
        .transform_filter(_SHOWN)
        .mark_bar()
        .encode(y=alt.Y("layer:N", sort=None, title=None))
        .encode(yOffset=alt.YOffset("arm:N", sort=list(texts)))
        .encode(x=alt.X("kept:Q", title="kept share of the layer").scale(domain=[0, 1]))
        .encode(tooltip=["arm:N", "layer:N", "kept:Q"], **_look(arms, "square"))
    )
    values = [f"{name}: {', '.join(each)}" for name, each in texts.items()]
    return _chart("Density by layer", f"{'; '.join(values)}.", chart)


def _kept(arm: Arm) -> Rows:
    """Return a row a layer: the kept share of all its parameters together."""
    shares: dict[str, list[float]] = {}
    for path in (run.directory / "mask.npz" for run in arm.runs):
        for layer, masks in _by_layer(path).items():
            shares.setdefault(layer, []).append(float(np.concatenate(masks).mean()))
    return [
        {"arm": _name(arm), "layer": layer, "kept": statistics.fmean(each)}
        for layer, each in shares.items()
    ]


def _by_layer(path: Path) -> dict[str, list[Any]]:
    layers: dict[str, list[Any]] = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as masks:
            for name, mask in masks.items():
                layer = name.rpartition(".")[0] or name
                layers.setdefault(layer, []).append(mask.astype(bool).ravel())
    except FileNotFoundError:  # a dense run
        return {}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: expected the masks of a run, got {error}; run it again, or "
            "delete the file"
        ) from error
    return layers
