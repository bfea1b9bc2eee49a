"""The console script `autoflip`."""

import argparse
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from autoflip_flwr import __version__, settings
from autoflip_flwr.errors import AutoFlipError, SettingsError, needs_extra


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with what may have been meant."""

    def error(self, message: str) -> NoReturn:
        """Raise an error of ours; `main` prints it."""
        got, *known = re.findall(r"'([^']*)'", message) or [""]
        raise SettingsError(f"{message}{settings.meant(got, known)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    try:
        chosen, unknown = _parser().parse_known_args(arguments)
        if unknown:
            options = re.findall(r"--[\w-]+", chosen.parser.format_usage())
            raise SettingsError(
                f"unknown argument {unknown[0]!r}; {chosen.parser.prog} knows: "
                f"{options}{settings.meant(unknown[0], options)}"
            )
        told = chosen.run(chosen)
        if isinstance(told, int):
            return told
        print(told)
    except AutoFlipError as error:
        print(f"autoflip: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "autoflip: interrupted; repeat the command to go on",
            file=sys.stderr,
        )
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="autoflip", description="AutoFLIP: federated pruning for Flower."
    )
    parser.add_argument(
        "--version", action="version", version=f"autoflip-flwr {__version__}"
    )
    commands = parser.add_subparsers(required=True)

    def command(run: Callable[[argparse.Namespace], str | int], text: str) -> Any:
        added = commands.add_parser(run.__name__.lstrip("_"), help=text)
        added.set_defaults(run=run, parser=added)
        return added.add_argument

    add = command(_run, "check a preset and run it with `flwr run`, on simulated nodes")
    add("preset", help="see `autoflip presets`")
    overrides = {"nargs": "*", "default": [], "metavar": "key=value"}
    add("overrides", **overrides, help="settings by their dotted names, applied last")
    add("--output", default="", help="folder of the run (default: a new one in runs/)")
    add("--resume", action="store_true", help="go on with the run in --output")

    add = command(_presets, "list the presets, or show all values of one")
    add("name", nargs="?", help="show all values of this preset")
    add("overrides", **overrides, help="applied as in a run")

    add = command(_inspect, "tell what a run will take, without data")
    add("model", metavar="package.module:Net", help="a class, function or model")
    add(
        "--input",
        action="append",
        required=True,
        metavar="SHAPE[:TYPE]",
        help="of one sample: 1,3,32,32 or 1,80:int64; once for each argument",
    )
    add("--clients", type=int, default=10, help="connected clients (default 10)")
    add("--rounds", type=int, default=20, help="default 20")
    add("--sampled", type=int, help="that train in a round (default: all)")
    add("--evaluated", type=int, help="that evaluate in a round (default: all)")
    add("--overrides", default="", help='dotted "key=value key=value": settings')

    add = command(_export, "write a run's final model for use without this package")
    add("folder", type=Path, help="a run's output-dir")
    add("--output", type=Path, help="default: export/ in the run's folder")

    target = (
        "top-1 accuracy, in [0, 1], up to which rounds and bytes are counted "
        "(default: 0.99 times the final accuracy of the median arm)"
    )
    add = command(_compare, "compare strategies over seeds, in simulation")
    add("preset", help="see `autoflip presets`")
    add("--strategies", default="fedavg,autoflip", help="values of strategy.name: a,b")
    add("--seeds", default="3", help="how many, or which: 3 (default) or 11,12,13")
    add(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="a setting and its values; may be given more than once",
    )
    add("--overrides", default="", help='dotted "key=value key=value" for all runs')
    add("--output", type=Path, default=Path("runs/compare"), help="folder of the runs")
    add("--target", type=float, help=target)

    add = command(_report, "make one HTML page and figures of finished runs")
    add("folders", nargs="+", type=Path, metavar="DIR", help="runs or folders of runs")
    add("--output", type=Path, help="default: report/ in the first DIR")
    add("--target", type=float, help=target)

    add = command(_paper, "make a figure or table of the paper from finished runs")
    add("name", help="fig2 to fig9, table1 to table3, drift")
    add("folders", nargs="*", type=Path, metavar="DIR", help="not for fig6 and fig7")
    add("--overrides", default="", help="fig6, fig7: where the data is, data.dir=PATH")
    add("--output", type=Path, default=Path("runs/paper"), help="folder of figures")
    add("--target", type=float, help=target)
    return parser


def _presets(chosen: argparse.Namespace) -> str:
    if chosen.name is None:
        return _table(settings.presets())
    return settings.load(chosen.name, shlex.join(chosen.overrides)).as_yaml().rstrip()


def _inspect(chosen: argparse.Namespace) -> str:
    from autoflip_flwr.server.inspection import inspect  # seconds to import

    names = ("clients", "rounds", "sampled", "evaluated")
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.ERROR)  # the table says it, too
    try:
        told = inspect(
            chosen.model,
            chosen.input,
            f"rounds={chosen.rounds} {chosen.overrides}",
            **{name: getattr(chosen, name) for name in names},
        )
    finally:
        log.setLevel(level)
    return str(told)


def _folder(path: Path) -> Path:
    """Return a folder that is there; of others say which ones are beside it."""
    if path.is_dir():
        return path
    there = [each.name for each in path.absolute().parent.glob("*/")]
    raise SettingsError(
        f"there is no folder {path}; beside it: {', '.join(sorted(there)) or 'none'}"
        + settings.meant(path.name, there)
    )


def _table(names: Iterable[str]) -> str:
    """Return a line for each preset, in the words of its file."""
    rows = [["preset", "data", "minutes", "shows"]]
    rows += [[name, *settings.about(name).values()] for name in names]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(n) for word, n in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _run(chosen: argparse.Namespace) -> int:
    from autoflip_flwr.app.launch import launch

    return launch(
        chosen.preset, chosen.overrides, output=chosen.output, resume=chosen.resume
    )


def _export(chosen: argparse.Namespace) -> str:
    with needs_extra("app", "autoflip export"):
        from autoflip_flwr.app.export import export_run  # seconds to import

    made = export_run(_folder(chosen.folder), chosen.output)
    onnx = made.onnx or "no ONNX: pip install 'autoflip-flwr[onnx]', then export again"
    return (
        f"{made.parameters} of {made.dense_parameters} parameters\n"
        f"{made.weights}\n{made.program}\n{onnx}"
    )


def _compare(chosen: argparse.Namespace) -> str:
    with needs_extra("compare", "autoflip compare"):
        import vl_convert  # noqa: F401 - the quickest of the extra's to import

        from autoflip_flwr.compare import plan, results
        from autoflip_flwr.compare.table import compared

    _check_target(chosen.target)
    planned = plan.plan(
        chosen.preset,
        output=chosen.output,
        strategies=chosen.strategies.split(","),
        seeds=plan.parse_seeds(chosen.seeds),
        vary=plan.parse_vary(chosen.vary),
        overrides=chosen.overrides,
    )
    with plan.bar() as progress:
        plan.run(planned, progress)
    runs = [results.read_run(run.directory) for run in planned]
    (experiment,) = results.experiments(runs, chosen.target)
    return compared(experiment)


def _check_target(target: float | None) -> None:
    if target is not None and not 0 <= target <= 1:
        raise SettingsError(f"--target: expected an accuracy in [0, 1], got {target}")


def _paper(chosen: argparse.Namespace) -> str:
    with needs_extra("compare", "autoflip paper"):
        from autoflip_flwr.compare import paper

    _check_target(chosen.target)
    return paper.draw(
        chosen.name,
        chosen.folders,
        output=chosen.output,
        overrides=chosen.overrides,
        target=chosen.target,
    )


def _report(chosen: argparse.Namespace) -> str:
    with needs_extra("compare", "autoflip report"):
        from autoflip_flwr.compare.report import write_report

    _check_target(chosen.target)
    for folder in chosen.folders:
        _folder(folder)
    output = chosen.output or chosen.folders[0] / "report"
    return str(write_report(chosen.folders, output, chosen.target))
