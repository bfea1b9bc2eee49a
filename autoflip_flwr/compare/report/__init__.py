"""A report on finished runs: one HTML page, and its charts as files."""

import base64
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from autoflip_flwr import settings
from autoflip_flwr.compare.charts import Chart, Rows, bundled, charts, figure, tables
from autoflip_flwr.compare.results import (
    Experiment,
    as_override,
    cost_row,
    differing,
    experiments,
    find_runs,
)
from autoflip_flwr.compare.table import AS_PAPERS_COUNT, COSTS, TIME
from autoflip_flwr.compare.verdict import verdicts
from autoflip_flwr.errors import SettingsError
from autoflip_flwr.settings import Settings

_HERE = Path(__file__).parent
_FACTS = ("model.name", "data.name", "data.partition", "rounds", "strategy.min-nodes")


def write_report(
    directories: Iterable[Path], output: Path, target: float | None = None
) -> Path:
    """Report on all finished runs at or below the directories; return the page.

    To `output` go the page ``report.html`` with everything in it, its charts once more
    as PNG files, and for each preset one SVG file with the verdict and accuracy over
    megabytes and over operations. The `target` is that of `results.experiments`.
    """
    result = experiments(find_runs(directories), target)
    output.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        sections=[_section(experiment, output) for experiment in result],
        target=target,
        script=bundled((_HERE / "page.js").read_text(encoding="utf-8")),
    )
    path = output / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _section(experiment: Experiment, output: Path) -> dict[str, Any]:
    """Write the charts of an experiment; return what the template reads."""
    name = quote(experiment.preset, safe="")  # one file name or id for each preset
    rows, told = tables(experiment.arms), verdicts(experiment)
    drawn = [(chart, _svg(chart, rows)) for chart in charts(experiment, rows)]
    for chart, svg in drawn:
        path = output / f"{name}-{chart.slug}.png"
        path.write_bytes(vl_convert.svg_to_png(svg, scale=2))
    both = figure([chart for chart, _ in drawn], experiment.preset, told)
    (output / f"{name}.svg").write_text(_svg(both, rows), encoding="utf-8")
    apart = differing(arm.settings.flat() for arm in experiment.arms)
    facts = experiment.arms[0].settings.flat()
    timed = not any(run.shared for arm in experiment.arms for run in arm.runs)
    return {
        "id": name,
        "preset": experiment.preset,
        "target": experiment.target,
        "facts": {k: as_override(facts[k]) for k in _FACTS if k not in apart},
        "verdicts": told,
        "tables": {
            "Accuracy and costs": COSTS,
            "As papers count": AS_PAPERS_COUNT + (TIME if timed else []),
        },
        "arms": [
            (arm, cost_row(arm, experiment.target), _command(arm.settings))
            for arm in experiment.arms
        ],
        "charts": [(c, base64.b64encode(svg.encode()).decode()) for c, svg in drawn],
        "data": {"rows": rows, "specs": {chart.slug: chart.spec for chart, _ in drawn}},
    }


def _svg(chart: Chart, rows: dict[str, Rows]) -> str:
    return str(vl_convert.vegalite_to_svg(chart.spec | {"datasets": rows}))


def _command(chosen: Settings) -> str | None:
    """Return a command that repeats a run; None if its preset is not known here."""
    try:
        usual = settings.load(chosen.preset).flat()
    except SettingsError:
        return None
    own = [
        f"{key}={as_override(value)}"
        for key, value in chosen.flat().items()
        if value != usual[key]
    ]
    return shlex.join(["autoflip", "run", chosen.preset, *own])
