"""All drawing: the report's charts, and what the paper's figures share with them.

Everything is Vega-Lite, written with Altair. A browser draws it with Vega, whose script
stands in the page; vl-convert draws the same as pictures.
"""

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import Any, NamedTuple, TypeAlias

import altair as alt
import numpy as np
import vl_convert

from autoflip_flwr.app.folder import masks_of
from autoflip_flwr.compare import formats
from autoflip_flwr.compare.results import Arm, Experiment

Rows: TypeAlias = list[dict[str, Any]]

#: The page's ink, then colours that any colour vision tells apart (after Okabe and
#: Ito), 3:1 or more on white and on the dark page. Further arms are dashed.
_COLORS = ("currentColor", "#0077bb", "#d55e00", "#00916a", "#b95e93", "#a67c00")
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2])

_MANY_SEEDS = 5  # have a band of the standard error; fewer, a line for each
_MOST_ROUNDS = 120  # of a run that a chart shows
_SMOOTH = 5  # shown rounds before and after that a smooth line is the mean of

#: What `Run.series` knows, as axes and tables name it.
LABELS = {
    "round": "round",
    "megabytes": "megabytes sent, exploration included",
    "operations": "multiply-accumulates trained, exploration included",
    "accuracy": "top-1 accuracy",
    "loss": "loss",
    "mask_change": "changed share of the mask",
    "guidance_cosine": "cosine",
    "update_variance": "variance of client updates",
    "variance_of_all": "variance over all parameters",
}
#: Those that a run of FedAvg has not.
OF_MASKS = ("mask_change", "guidance_cosine", "update_variance")

_INK = {f"{part}Color": "currentColor" for part in ("label", "title", "tick", "domain")}
_CONFIG = {
    "font": "sans-serif",
    "lineBreak": "\n",
    "view": {"stroke": None},
    "axis": {**_INK, "gridColor": "currentColor", "gridOpacity": 0.15},
    "legend": {"labelColor": "currentColor", "labelLimit": 0, "symbolOpacity": 1}
    | {"orient": "bottom", "columns": 1, "offset": 8, "title": None},
    **{mark: {"color": "currentColor"} for mark in ("rule", "text", "tick")},
    "title": {"color": "currentColor", "anchor": "start"},
    "range": {"category": _COLORS[1:]},
}
#: Of every specification. The report's boxes set the parameters: arms that are not
#: shown, and whether lines are smoothed.
COMMON: dict[str, Any] = {
    "config": _CONFIG,
    "params": [{"name": "hidden", "value": []}, {"name": "smooth", "value": False}],
}
#: The filter for rows of shown arms.
SHOWN = "indexof(hidden, datum.arm) < 0"


@functools.cache
def bundled(script: str) -> str:
    """Return a page's script with Vega in it: about 0.9 MB, made in seconds."""
    return str(vl_convert.javascript_bundle(script))


def arm_name(arm: Arm) -> str:
    """Return an arm's name in lines that fit beside a chart."""
    return fill(arm.name, 40)


def look(arms: Sequence[Arm], symbol: str) -> dict[str, Any]:
    """Return the encodings that give an arm the same look in all charts."""
    looks = [(color, dash) for dash in _DASHES for color in _COLORS]
    every = [looks[index % len(looks)] for index in range(len(arms))]
    names, legend = [arm_name(arm) for arm in arms], {"symbolType": symbol}
    scales = [{"domain": names, "range": own} for own in zip(*every, strict=True)]
    return {
        "color": alt.Color("arm:N", scale=scales[0], legend=legend),
        "strokeDash": alt.StrokeDash("arm:N", scale=scales[1], legend=legend),
    }


def by_round(arm: Arm, keys: Iterable[str]) -> Rows:
    """Return a row for each round and seed, with the keys of `Run.series`.

    What not all seeds know in a round is unknown: the mean of the others would not go
    with the means before and after it. All seeds stand at their mean megabytes and
    operations, so that there is a mean accuracy.
    """
    every, count = ("round", *keys), min(len(run.rounds) for run in arm.runs)
    known = {k: np.array([r.series(k)[:count] for r in arm.runs]) for k in every}
    for key, values in known.items():
        if key in ("megabytes", "operations"):
            values[:] = values.mean(axis=0)
        dense = key in OF_MASKS and arm.settings.strategy.name == "fedavg"
        values[:, dense | ~np.isfinite(values).all(axis=0)] = np.nan
    shown = {*range(0, count, math.ceil(count / _MOST_ROUNDS)), count - 1}
    return [
        {"arm": arm_name(arm), "seed": run.settings.seed}
        | {key: _short(values[seed, at]) for key, values in known.items()}
        for at in sorted(shown)
        for seed, run in enumerate(arm.runs)
    ]


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def lines(
    of: Experiment, data: Any, key: str, x: str = "round"
) -> alt.LayerChart | alt.FacetChart:
    """Draw rows of `by_round`: a line an arm, its seeds' mean, and their spread.

    The data are Altair's; `key` and `x` are names in `LABELS`.
    """
    valid = f"isValid(datum.{key}) && datum.{x} > 0"
    place = alt.X(f"{x}:Q", title=LABELS[x], axis=alt.Axis(format="~s", tickCount=5))
    value = alt.Y("mean(value):Q", title=LABELS[key], scale=alt.Scale(zero=False))
    if x != "round":
        place = place.scale(type="log", nice=False)
    if "variance" in key:
        value, valid = value.scale(type="log"), f"{valid} && datum.{key} > 0"
    looks = look(of.arms, "stroke")
    base = (
        alt.Chart(data, width=400, height=250)
        .transform_filter(f"{SHOWN} && {valid}")
        .transform_window(
            smoothed=f"mean({key})",
            frame=[-_SMOOTH, _SMOOTH],
            groupby=["arm", "seed"],
            sort=[alt.SortField("round")],
        )
        .transform_calculate(value=f"smooth ? datum.smoothed : datum.{key}")
        .encode(x=place, y=value, color=looks["color"])
    )
    seeds = max(len(arm.runs) for arm in of.arms)
    spread: Any = base.mark_line(strokeWidth=0.7, opacity=0.5).encode(detail="seed:N")
    if seeds >= _MANY_SEEDS:
        spread = base.mark_errorband().encode(y=alt.Y("value:Q", title=LABELS[key]))
    told = {x: x, "mean(value)": LABELS[key], "stderr(value)": "standard error"}
    tooltip = [
        alt.Tooltip(what, type="quantitative", title=title, format=".4~g")
        for what, title in list(told.items())[: 3 if seeds > 1 else 2]
    ]
    means = base.mark_line(point="transparent").encode(strokeDash=looks["strokeDash"])
    layers = [spread, means.encode(tooltip=["arm:N", *tooltip])]
    if key == "accuracy" and of.target is not None:
        one = alt.Chart(data).transform_aggregate(n="count()")
        one, text = one.encode(y=alt.datum(of.target)), f"target {of.target:.3f}"
        layers.append(one.mark_rule(strokeDash=[3, 3]))
        layers.append(one.mark_text(align="left", x=3, dy=8, text=text))
    return alt.layer(*layers)


# --- the report ------------------------------------------------------------------

_METRICS = ("megabytes", "operations", "accuracy", *OF_MASKS)
_SENT = {
    "explore_up": "exploration, from clients",
    "explore_down": "exploration, to clients",
    "train_up": "training, from clients",
    "train_down": "training, to clients",
    "evaluate_up": "evaluation, from clients",
    "evaluate_down": "evaluation, to clients",
}


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
    sent = [
        {"arm": arm_name(arm), "kind": label, "megabytes": _mean(arm, key) / 1e6}
        | {"dense": _mean(arm, "dense_equivalent") / 1e6}
        for arm in arms
        for key, label in _SENT.items()
    ]
    rounds = [row for arm in arms for row in by_round(arm, _METRICS)]
    return {"rounds": rounds, "sent": sent, "kept": [r for a in arms for r in _kept(a)]}


def charts(experiment: Experiment, rows: dict[str, Rows]) -> list[Chart]:
    """Draw every chart that there are values for."""
    arms = experiment.arms
    drawn = [
        _lines("Accuracy over megabytes", experiment, rows["rounds"], x="megabytes"),
        _lines("Accuracy over operations", experiment, rows["rounds"], x="operations"),
        _lines("Accuracy by round", experiment, rows["rounds"]),
        _bytes(arms),
        _densities(arms, rows["kept"]),
        _lines("Mask change", experiment, rows["rounds"], "mask_change"),
        _lines("Guidance cosine", experiment, rows["rounds"], "guidance_cosine"),
        _lines("Update variance", experiment, rows["rounds"], "update_variance"),
    ]
    return [chart for chart in drawn if chart is not None]


def figure(charts: Sequence[Chart], title: str, verdicts: Sequence[str]) -> Chart:
    """Draw accuracy over megabytes and over operations as one picture."""
    own = {"$schema", "autosize", "description", *COMMON}
    pair = [chart.spec for chart in charts if " over " in chart.title]
    parts = [{k: v for k, v in spec.items() if k not in own} for spec in pair]
    spec = {"title": {"text": title, "subtitle": verdicts}, "hconcat": parts}
    return Chart(title, "", COMMON | spec)


def _chart(title: str, values: str, vega: Any) -> Chart:
    text = f"{title}. {values}"
    fit = {"autosize": {"type": "fit-x", "contains": "padding"}, "description": text}
    return Chart(title, text, vega.to_dict() | COMMON | fit)


def _lines(
    title: str, of: Experiment, rows: Rows, key: str = "accuracy", x: str = "round"
) -> Chart | None:
    """Draw a metric, a line an arm; None if it is zero or unknown in all rounds."""
    known = [row for row in rows if None not in (row[key], row[x])]
    if not any(row[key] for row in known):
        return None
    ends = []
    for arm in of.arms:
        values = [row[key] for row in known if row["arm"] == arm_name(arm)]
        if last := values[-len(arm.runs) :]:
            ends.append(f"{arm.name}: {statistics.fmean(last):.4g}")
    chart = lines(of, alt.NamedData("rounds"), key, x)
    return _chart(title, f"At the end, {'; '.join(ends)}.", chart)


def _bytes(arms: Sequence[Arm]) -> Chart:
    """Draw what was sent, a bar an arm, by phase and direction."""
    color = alt.Color(
        "kind:N", scale=alt.Scale(domain=[*_SENT.values()], scheme="paired")
    )
    base = alt.Chart(alt.NamedData("sent"), width=400, height=32 * len(arms))
    base = base.transform_filter(SHOWN).encode(y=alt.Y("arm:N", sort=None, title=None))
    x = alt.X("megabytes:Q", title="megabytes; a tick: what FedAvg sends")
    bars = base.mark_bar().encode(x=x, color=color, tooltip=["kind:N", "megabytes:Q"])
    ticks = base.mark_tick(thickness=3).encode(x="max(dense):Q")
    sent = [f"{arm.name}: {formats.number(_mean(arm, 'total'), 'B')}" for arm in arms]
    return _chart("Bytes", f"Sent in all, {'; '.join(sent)}.", bars + ticks)


def _mean(arm: Arm, key: str) -> float:
    return statistics.fmean(getattr(run.summary.bytes, key) for run in arm.runs)


def _densities(arms: Sequence[Arm], rows: Rows) -> Chart | None:
    """Draw the kept share, bars a layer, one an arm; None if no run has a mask."""
    texts: dict[str, list[str]] = {}
    for row in rows:
        texts.setdefault(row["arm"], []).append(f"{row['layer']} {row['kept']:.3f}")
    if not rows:
        return None
    layers = len({row["layer"] for row in rows})
    chart = (
        alt.Chart(alt.NamedData("kept"), width=400)
        .properties(height=layers * (10 + 6 * len(texts)))
        .transform_filter(SHOWN)
        .mark_bar()
        .encode(y=alt.Y("layer:N", sort=None, title=None))
        .encode(yOffset=alt.YOffset("arm:N", sort=list(texts)))
        .encode(x=alt.X("kept:Q", title="kept share of the layer").scale(domain=[0, 1]))
        .encode(tooltip=["arm:N", "layer:N", "kept:Q"], **look(arms, "square"))
    )
    values = [f"{name}: {', '.join(each)}" for name, each in texts.items()]
    return _chart("Density by layer", f"{'; '.join(values)}.", chart)


def _kept(arm: Arm) -> Rows:
    """Return a row a layer: the kept share of all its parameters together."""
    kept: dict[str, list[Any]] = {}
    for run in arm.runs:
        for name, mask in masks_of(run.directory).items():
            layer = name.rpartition(".")[0] or name
            kept.setdefault(layer, []).append(mask.ravel())
    name = arm_name(arm)
    return [
        {"arm": name, "layer": layer, "kept": float(np.concatenate(masks).mean())}
        for layer, masks in kept.items()
    ]
