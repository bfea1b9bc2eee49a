"""The HTML page."""

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from autoflip_flwr import settings
from autoflip_flwr.compare.report import formats
from autoflip_flwr.compare.report.charts import charts
from autoflip_flwr.compare.report.figures import Styled, inline, style
from autoflip_flwr.compare.results import (
    CostRow,
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

_HERE = Path(__file__).parent


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
        If a run's folder is torn or there is none, or the target is no accuracy.
    """
    if target is not None and not 0 <= target <= 1:
        raise SettingsError(f"target: expected an accuracy in [0, 1], got {target}")
    found = experiments(find_runs(directories), target)
    output.mkdir(parents=True, exist_ok=True)
    names = _file_names([experiment.preset for experiment in found])
    sections = [
        _section(experiment, name, output)
        for experiment, name in zip(found, names, strict=True)
    ]
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        title="Federated pruning: accuracy and costs",
        lead=_lead(found),
        css=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        sections=sections,
        target_note=_target_note(target),
    )
    path = output / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _section(experiment: Experiment, name: str, output: Path) -> dict[str, Any]:
    drawn = charts(experiment)
    for chart in drawn:
        (output / f"{name}-{chart.slug}.png").write_bytes(chart.png)
    values = [flat(arm.settings) for arm in experiment.arms]
    differ = [key for key in differing(values) if key not in ("seed", "data.dir")]
    return {
        "id": name,
        "preset": experiment.preset,
        "lead": _section_lead(experiment, differ),
        "rows": [
            _row(each, cost_row(each.arm, experiment.target), differ)
            for each in style(experiment.arms)
        ],
        "charts": [
            {
                "title": chart.title,
                "description": chart.description,
                "svg": Markup(inline(chart.svg, f"{name}-{chart.slug}-")),
            }
            for chart in drawn
        ],
        "common": [
            (key, as_override(value))
            for key, value in values[0].items()
            if key not in (*differ, "seed", "data.dir")
        ],
    }


def _row(styled: Styled, costs: CostRow, differ: Sequence[str]) -> dict[str, Any]:
    """Return an arm's texts."""
    arm = styled.arm
    own = telling(arm.settings)
    rounds = formats.measured(costs.rounds_to_target)
    if 0 < costs.reached < costs.seeds:
        rounds = f"{costs.reached} of {costs.seeds} seeds"
    return {
        "tag": styled.tag,
        "name": styled.name,
        "full_name": costs.name,
        "accuracy": formats.accuracy(costs.accuracy),
        "seeds": costs.seeds,
        "density": formats.share(costs.density),
        "bytes_total": formats.number(costs.bytes_total.mean, "B"),
        "bytes_share": formats.ratio(costs.bytes_total.mean, costs.bytes_dense),
        "bytes_explore": formats.number(costs.bytes_explore, "B"),
        "bytes_to_target": formats.measured(costs.bytes_to_target, "B"),
        "rounds_to_target": rounds,
        "communication": formats.number(costs.communication),
        "compression": f"{formats.share(costs.compression)}×",  # noqa: RUF001
        "computation": formats.number(costs.computation),
        "flops": formats.number(costs.flops),
        "flops_share": formats.ratio(costs.flops, costs.flops_dense),
        "flops_trained": formats.measured(costs.flops_trained),
        "samples": formats.measured(costs.samples),
        "seconds": formats.measured(costs.seconds, "s"),
        "own": [(key, as_override(own[key])) for key in differ if key in own],
        "seed_list": ", ".join(str(run.settings.seed) for run in arm.runs),
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


def _file_names(presets: Sequence[str]) -> list[str]:
    """Return a name for files and ids for each preset, whatever it is called."""
    safe = [re.sub(r"[^A-Za-z0-9_-]", "-", preset) for preset in presets]
    return [
        name if safe.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(safe)
    ]


def _lead(found: Sequence[Experiment]) -> str:
    arms = [arm for experiment in found for arm in experiment.arms]
    runs = sum(len(arm.runs) for arm in arms)
    return (
        f"{_count(runs, 'run')} in {_count(len(arms), 'arm')} of "
        f"{_count(len(found), 'experiment')}. An arm is one choice of settings, run "
        "with several seeds; its letter stands for it in tables and charts."
    )


def _section_lead(experiment: Experiment, differ: Sequence[str]) -> str:
    first = experiment.arms[0].settings
    strategy, target = first.strategy, experiment.target
    facts = {
        "model.name": f"model {first.model.name}",
        "data.name": f"data {first.data.name}",
        "data.partition": f"{first.data.partition} partition",
        "rounds": _count(first.rounds, "round"),
        "strategy.min-nodes": _count(strategy.min_nodes, "client"),
        "strategy.fraction-train": f"{strategy.fraction_train:g} of them in a round",
    }
    if target is not None:
        facts["target"] = f"target accuracy {target:.4f}"
    text = ", ".join(fact for key, fact in facts.items() if key not in differ)
    return f"{text[:1].upper()}{text[1:]}."


def _target_note(target: float | None) -> str:
    if target is not None:
        return f"The accuracy {target:g}, as asked for."
    return (
        "0.99 of the median arm's late accuracy, the mean over its last tenth of "
        "the rounds and over seeds; half of the arms can reach it, a seed may not."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
