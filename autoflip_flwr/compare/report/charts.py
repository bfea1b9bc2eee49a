"""The charts of an experiment, in Vega-Lite: drawn by the page, and as pictures."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np

from autoflip_flwr.app.folder import masks_of
from autoflip_flwr.compare import drawing, formats
from autoflip_flwr.compare.drawing import COMMON, SHOWN, Rows, arm_name, lines, look
from autoflip_flwr.compare.results import Arm, Experiment

_METRICS = ("megabytes", "operations", "accuracy", *drawing.OF_MASKS)
_SENT = {
    f"{phase}_{way}": f"{label}, {ends} clients"
    for phase, label in (
        ("explore", "exploration"),
        ("train", "training"),
        ("evaluate", "evaluation"),
    )
    for way, ends in (("up", "from"), ("down", "to"))
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
    rounds = [row for arm in arms for row in drawing.by_round(arm, _METRICS)]
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
