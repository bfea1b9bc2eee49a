"""The charts of an experiment, all means over seeds with their standard errors."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from autoflip_flwr.compare.report import formats
from autoflip_flwr.compare.report.figures import (
    COLORS,
    INK,
    Chart,
    Styled,
    add_key,
    finish,
    house_style,
    new_figure,
    style,
    tag_ends,
)
from autoflip_flwr.compare.results import Arm, Experiment, Run, Series
from autoflip_flwr.errors import DataError

#: Key, name, colour and hatch of a phase; key, name and strength of a direction.
_PHASES = (
    ("explore", "exploration", COLORS[1], "xxxx"),
    ("train", "training", COLORS[2], "////"),
    ("evaluate", "evaluation", COLORS[3], "...."),
)
_WAYS = (("down", "to clients", 0.15), ("up", "from clients", 0.55))


def charts(experiment: Experiment) -> list[Chart]:
    """Draw every chart that the experiment's runs have values for."""
    with house_style():
        return list(_charts(experiment))


def _charts(experiment: Experiment) -> Iterator[Chart]:
    arms = style(experiment.arms)
    target = experiment.target
    accuracy = _by_round(arms, "accuracy")
    if accuracy:
        yield _lines(
            "accuracy-by-round",
            "Accuracy by round",
            accuracy,
            ("round", "top-1 accuracy"),
            target=target,
        )
        megabytes = _by_megabytes(arms)
        ends = [curve.x[-1] for curve in megabytes]
        yield _lines(
            "accuracy-by-megabytes",
            "Accuracy by megabytes sent",
            megabytes,
            ("megabytes sent, exploration included", "top-1 accuracy"),
            target=target,
            log_x=max(ends) > 8 * min(ends),  # else the cheap arms are a thin stroke
        )
    yield _bytes(arms)
    density = _layer_densities(arms)
    if density:
        yield _density(density)
    pruned = [each for each in arms if each.arm.settings.strategy.name != "fedavg"]
    for key, title, unit in (
        ("mask_change", "Mask change by round", "share of the mask that changed"),
        ("guidance_cosine", "Guidance cosine by round", "cosine"),
        ("update_variance", "Update variance by round", "variance of client updates"),
    ):
        curves = _by_round(pruned, key)
        if any(curve.mean.any() for curve in curves):  # a mask that never changes: no
            yield _lines(
                key.replace("_", "-"),
                title,
                curves,
                ("round", unit),
                log_y=key == "update_variance",
            )


@dataclass(frozen=True, slots=True)
class _Curve:
    """A line over seeds."""

    arm: Styled
    x: Series
    mean: Series
    error: Series | None  # None: a single seed


def _by_round(arms: Sequence[Styled], key: str) -> list[_Curve]:
    """Return the arms' curves of a metric; none for an arm that does not know it."""
    found = []
    for arm in arms:
        rounds, values = _over_seeds(arm.arm.runs, lambda run: run.series(key))
        if len(rounds):
            found.append(_curve(arm, rounds, values))
    return found


def _by_megabytes(arms: Sequence[Styled]) -> list[_Curve]:
    found = []
    for arm in arms:
        runs = arm.arm.runs
        rounds, values = _over_seeds(runs, lambda run: run.series("accuracy"))
        known, sent = _over_seeds(runs, Run.bytes_sent)
        megabytes = sent.mean(axis=0)[np.isin(known, rounds)] / 1e6
        if len(rounds):
            found.append(_curve(arm, megabytes, values))
    return found


def _curve(arm: Styled, x: Series, values: Series) -> _Curve:
    seeds = len(values)
    error = values.std(axis=0, ddof=1) / np.sqrt(seeds) if seeds > 1 else None
    return _Curve(arm, x, values.mean(axis=0), error)


def _over_seeds(
    runs: Sequence[Run], values: Callable[[Run], Series]
) -> tuple[Series, Series]:
    """Return the rounds that all seeds have values of, and those, seeds x rounds."""
    tables = []
    for run in runs:
        pairs = zip((row["round"] for row in run.rounds), values(run), strict=True)
        tables.append({n: value for n, value in pairs if np.isfinite(value)})
    rounds = [n for n in tables[0] if all(n in table for table in tables)]
    table = [[table[n] for n in rounds] for table in tables]
    return np.array(rounds, np.float64), np.array(table, np.float64)


def _lines(
    slug: str,
    title: str,
    curves: Sequence[_Curve],
    axis_labels: tuple[str, str],
    *,
    target: float | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> Chart:
    arms = [curve.arm for curve in curves]
    figure, axes = new_figure(3.0, arms)
    axes.set_xlabel(axis_labels[0])
    axes.set_ylabel(axis_labels[1])
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    handles, labels = [], [arm.label for arm in arms]
    for i, curve in enumerate(curves):
        arm = curve.arm
        every = max(1, len(curve.x) // 6)
        handles += axes.plot(
            curve.x,
            curve.mean,
            color=arm.color,
            linestyle=arm.dash,
            linewidth=1.4,
            marker=arm.marker,
            markersize=4.5,
            # Shifted from arm to arm, so that markers do not hide each other.
            markevery=(i * every // len(curves), every),
        )
        if curve.error is not None:
            low, high = curve.mean - curve.error, curve.mean + curve.error
            axes.fill_between(
                curve.x, low, high, color=arm.color, alpha=0.15, linewidth=0
            )
    if target is not None:
        handles.append(axes.axhline(target, color=INK, linewidth=0.9, dashes=(3, 3)))
        labels.append(f"target {target:.3f}")
    add_key(figure, labels, handles)
    tag_ends(figure, axes, [(c.x[-1], c.mean[-1], c.arm) for c in curves])
    ends = "; ".join(f"{c.arm.tag} {c.arm.name}: {c.mean[-1]:.4g}" for c in curves)
    return finish(figure, slug, title, f"{title}. At the end, {ends}.")


def _bytes(arms: Sequence[Styled]) -> Chart:
    """Draw a bar an arm, its name above it: what was sent, by phase and direction."""
    title = "Bytes sent, by phase and direction"
    row, line = 0.52, 0.17  # inches; `line` for every further line of a name
    heights = [row + line * each.label.count("\n") for each in arms]
    figure, axes = new_figure(sum(heights) + 1.2, [])
    bottoms = np.cumsum(heights)
    totals = []
    for arm, bottom in zip(arms, bottoms, strict=True):
        left = 0.0
        for phase, _, color, hatch in _PHASES:
            for way, _, strength in _WAYS:
                width = _mean_bytes(arm.arm, f"{phase}_{way}")
                # Apart, as an SVG's hatch does not know a half transparent ground.
                for fill in (
                    {"facecolor": (color, strength)},
                    {"facecolor": "none", "edgecolor": color, "hatch": hatch},
                ):
                    axes.barh(bottom - 0.12, width, 0.2, left, linewidth=0.8, **fill)
                left += width
        total = _mean_bytes(arm.arm, "total") * 1e6
        dense = _mean_bytes(arm.arm, "dense_equivalent")
        axes.plot([dense] * 2, [bottom - 0.26, bottom + 0.02], color=INK, linewidth=2)
        text = f"{arm.label}: {formats.number(total, 'B')}"
        axes.text(0, bottom - 0.25, text, va="bottom", linespacing=1.1)
        totals.append(text.replace("\n", " "))
    axes.set_ylim(bottoms[-1] + 0.1, 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("megabytes")
    figure.legend(
        [
            *(Patch(fill=False, edgecolor=c, hatch=h) for _, _, c, h in _PHASES),
            *(Patch(facecolor=(INK, strength)) for _, _, strength in _WAYS),
            Line2D([], [], color=INK, linewidth=2, linestyle="none", marker="|"),
        ],
        [*(p[1] for p in _PHASES), *(w[1] for w in _WAYS), "dense FedAvg"],
        loc="outside lower left",
        ncols=2,
        frameon=False,
        borderpad=0,
    )
    return finish(figure, "bytes", title, f"{title}. {'; '.join(totals)}.")


def _mean_bytes(arm: Arm, key: str) -> float:
    """Return megabytes."""
    return float(np.mean([run.summary["bytes"][key] for run in arm.runs])) / 1e6


def _layer_densities(arms: Sequence[Styled]) -> list[tuple[Styled, dict[str, float]]]:
    """Return the density of every layer, of the arms that have masks."""
    found = []
    for arm in arms:
        paths = [run.directory / "mask.npz" for run in arm.arm.runs]
        kept = [_kept_of(path) for path in paths if path.exists()]
        if kept:
            found.append((arm, kept))
    names = list(dict.fromkeys(n for _, runs in found for run in runs for n in run))
    layers = _layers(names)
    return [
        (
            arm,
            {
                layer: float(np.mean([_density_of(run, members) for run in runs]))
                for layer, members in layers.items()
                if all(name in run for run in runs for name in members)
            },
        )
        for arm, runs in found
    ]


def _kept_of(path: Path) -> dict[str, tuple[int, int]]:
    """Return how many entries each mask of a file keeps, and how many it has."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as masks:
            return {
                name: (int(np.count_nonzero(masks[name])), masks[name].size)
                for name in masks.files
            }
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: expected the masks of a run, got {error}; run it again, or "
            "delete the file"
        ) from error


def _density_of(kept: dict[str, tuple[int, int]], names: Sequence[str]) -> float:
    return sum(kept[name][0] for name in names) / sum(kept[name][1] for name in names)


def _layers(names: Sequence[str], most: int = 40) -> dict[str, list[str]]:
    """Group parameters by layer; a network of many layers, by larger parts of it."""
    paths = {name: name.split(".")[:-1] or [name] for name in names}
    groups: dict[str, list[str]] = {}
    for depth in range(max(map(len, paths.values()), default=1), 0, -1):
        groups = {}
        for name, path in paths.items():
            groups.setdefault(".".join(path[:depth]), []).append(name)
        if len(groups) <= most:
            break
    return groups


def _density(found: Sequence[tuple[Styled, dict[str, float]]]) -> Chart:
    """Draw a table of bars: a row a layer, a column an arm."""
    title = "Density by layer"
    arms = [arm for arm, _ in found]
    layers = list(dict.fromkeys(layer for _, own in found for layer in own))
    figure, axes = new_figure(0.21 * len(layers) + 0.6, arms)
    for column, (_, own) in enumerate(found):
        for row, density in enumerate(own.get(layer, np.nan) for layer in layers):
            if np.isnan(density):
                continue
            axes.barh(
                row,
                density * 0.94,
                left=column,
                height=0.78,
                facecolor=(COLORS[1], 0.3),
                edgecolor=COLORS[1],
                linewidth=0.6,
            )
            axes.text(column + 0.04, row, _percent(density), va="center")
    axes.set_xlim(0, len(arms))
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_yticks(range(len(layers)), [_short(layer) for layer in layers])
    axes.set_xticks([i + 0.47 for i in range(len(arms))], [arm.tag for arm in arms])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    add_key(figure, [arm.label for arm in arms])
    texts = "; ".join(
        f"{arm.tag} {arm.name}: "
        + ", ".join(f"{layer} {density:.3f}" for layer, density in own.items())
        for arm, own in found
    )
    return finish(figure, "density-by-layer", title, f"{title}. {texts}.")


def _percent(density: float) -> str:
    return "<1" if 0 < density < 0.01 else f"{100 * density:.0f}"


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
