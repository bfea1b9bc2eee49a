"""The HTML page."""

import base64
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from autoflip_flwr import settings
from autoflip_flwr.compare.report import formats
from autoflip_flwr.compare.report.charts import charts
from autoflip_flwr.compare.results import (
    Arm,
    Experiment,
    as_override,
    cost_row,
    differing,
    experiments,
    find_runs,
    flat,
    telling,
)
from autoflip_flwr.errors import SettingsError
from autoflip_flwr.settings import Settings

_UNSHOWN = ("seed", "data.dir")


def write_report(
    directories: Iterable[Path], output: Path, target: float | None = None
) -> Path:
    """Report on all finished runs at or below the directories.

    Parameters
    ----------
    directories : iterable of Path
        Run folders, or folders of them.
    output : Path
        A folder, made if need be: the page ``report.html`` with everything in it, and
        its charts once more as PNG files.
    target : float, optional
        Accuracy at which costs are compared, in [0, 1]; None: the default target of
        each preset, see `results.default_target`.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    SettingsError, DataError
        If a run's files are incomplete or absent, or the target is not in [0, 1].
    """
    if target is not None and not 0 <= target <= 1:
        raise SettingsError(f"target: expected an accuracy in [0, 1], got {target}")
    result = experiments(find_runs(directories), target)
    output.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {
        "number": formats.number,
        "ratio": formats.ratio,
        "accuracy": formats.accuracy,
        "value": as_override,
    }
    page = environment.get_template("page.html.j2").render(
        sections=[_section(experiment, output) for experiment in result],
        target=target,
    )
    path = output / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _section(experiment: Experiment, output: Path) -> dict[str, Any]:
    """Write the charts of an experiment; return what the template reads."""
    name = quote(experiment.preset, safe="")  # one file name or id for each preset
    drawn = charts(experiment)
    for chart in drawn:
        (output / f"{name}-{chart.slug}.png").write_bytes(chart.png)
    values = [flat(arm.settings) for arm in experiment.arms]
    differ = [key for key in differing(values) if key not in _UNSHOWN]
    common = {k: v for k, v in values[0].items() if k not in (*differ, *_UNSHOWN)}
    return {
        "id": name,
        "preset": experiment.preset,
        "target": experiment.target,
        "arms": [_arm(arm, experiment.target, differ) for arm in experiment.arms],
        "charts": [(c, base64.b64encode(c.svg).decode()) for c in drawn],
        "common": common,
    }


def _arm(arm: Arm, target: float | None, differ: Iterable[str]) -> dict[str, Any]:
    own = telling(arm.settings)
    return {
        "costs": cost_row(arm, target),
        "settings": {key: own[key] for key in differ if key in own},
        "seeds": ", ".join(str(run.settings.seed) for run in arm.runs),
        "command": _command(arm.settings),
        "folders": [str(run.directory) for run in arm.runs],
    }


def _command(chosen: Settings) -> str | None:
    """Return a command that repeats a run; None if a shell line cannot say it."""
    try:
        usual = flat(settings.load(chosen.preset))
    except SettingsError:
        return None
    overrides = " ".join(
        f"{key}={shlex.quote(as_override(value))}"
        for key, value in flat(chosen).items()
        if value != usual[key]
    )
    # Flower reads the text between two double quotes, as TOML.
    if not overrides.isprintable() or '"' in overrides or "\\" in overrides:
        return None
    config = f'preset="{chosen.preset}"'
    if overrides:
        config += f' overrides="{overrides}"'
    nodes = f"num-supernodes={chosen.strategy.min_nodes} client-resources-num-cpus=1"
    return (
        f'flwr run . --stream --federation-config "{nodes}" '
        f"--run-config {shlex.quote(config)}"
    )
