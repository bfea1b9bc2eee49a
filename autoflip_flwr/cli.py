"""The console script `autoflip`."""

import argparse
import logging
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
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
            setting = "--overrides" in options and unknown[0][0] != "-"
            raise SettingsError(
                f"unknown argument {unknown[0]!r}; {chosen.parser.prog} knows: "
                f"{options}{settings.meant(unknown[0], options)}"
                + (f'; settings: --overrides "{unknown[0]} ..."' if setting else "")
            )
        told = chosen.run(chosen)
        if isinstance(told, int):
            return told
        print(told)
    except AutoFlipError as error:
        print(f"autoflip: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("autoflip: interrupted; repeat the command to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "AutoFLIP: federated pruning for Flower."
    parser = _Parser(prog="autoflip", description=about)
    version = f"autoflip-flwr {__version__}"
    parser.add_argument("--version", action="version", version=version)
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
        help="of one sample, of zeros: 1,3,32,32 or 1,80:int64; once for each argument",
    )
    add("--clients", type=int, default=10, help="connected clients (default 10)")
    add("--rounds", type=int, default=20, help="default 20")
    add("--sampled", type=int, help="that train in a round (default: all)")
    add("--evaluated", type=int, help="that evaluate in a round (default: all)")
    add("--overrides", default="", help='dotted "key=value key=value": settings')

    add = command(_export, "write a run's final model for use without this package")
    add("folder", type=Path, help="a run's output-dir")
    add("--output", type=Path, help="default: export/ in the run's folder")

    target: dict[str, Any] = {
        "type": _accuracy,
        "help": "top-1 accuracy, in [0, 1], up to which rounds and bytes are counted "
        "(default: 0.99 times the final accuracy of the median arm)",
    }
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
    add("--target", **target)

    add = command(_report, "make one HTML page and figures of finished runs")
    add("folders", nargs="+", type=Path, metavar="DIR", help="runs or folders of runs")
    add("--output", type=Path, help="default: report/ in the first DIR")
    add("--target", **target)

    add = command(_paper, "make a figure or table of the paper from finished runs")
    add("name", help="fig2 to fig9, table1 to table3, drift")
    add("folders", nargs="*", type=Path, metavar="DIR", help="not for fig6 and fig7")
    add("--overrides", default="", help="fig6, fig7: where the data is, data.dir=PATH")
    add("--output", type=Path, default=Path("runs/paper"), help="folder of figures")
    add("--target", **target)
    return parser


def _accuracy(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected an accuracy in [0, 1], got {text}")


def _presets(chosen: argparse.Namespace) -> str:
    """List the presets in the words of their files, or show the values of one."""
    if chosen.name is None:
        rows = [["preset", "data", "minutes", "shows"]]
        rows += [[name, *settings.about(name).values()] for name in settings.presets()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (map(str.ljust, row, widths) for row in rows)
        return "\n".join("  ".join(line).rstrip() for line in lines)
    return settings.load(chosen.name, shlex.join(chosen.overrides)).as_yaml().rstrip()


def _inspect(chosen: argparse.Namespace) -> str:
    from autoflip_flwr.server.inspection import inspect  # seconds to import

    names = ("clients", "rounds", "sampled", "evaluated")
    counts = {name: vars(chosen)[name] for name in names}
    overrides = f"rounds={chosen.rounds} {chosen.overrides}"
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.ERROR)  # the table says it, too
    try:
        return str(inspect(chosen.model, chosen.input, overrides, **counts))
    finally:
        log.setLevel(level)


def _folder(path: Path) -> Path:
    """Return a folder that is there; of others say which ones are beside it."""
    if path.is_dir():
        return path
    there = [each.name for each in path.absolute().parent.glob("*/")]
    raise SettingsError(
        f"there is no folder {path}; beside it: {', '.join(sorted(there)) or 'none'}"
        + settings.meant(path.name, there)
    )


def _run(chosen: argparse.Namespace) -> int:
    from autoflip_flwr.app.launch import launch

    words = chosen.overrides
    if chosen.resume and not chosen.output:
        raise SettingsError("--resume: name the folder of the run: --output FOLDER")
    return launch(chosen.preset, words, output=chosen.output, resume=chosen.resume)


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

    planned = plan.plan(
        chosen.preset,
        output=chosen.output,
        strategies=chosen.strategies.split(","),
        seeds=plan.parse_seeds(chosen.seeds),
        vary=plan.parse_vary(chosen.vary),
        overrides=chosen.overrides,
    )
    plan.run(planned)
    runs = [results.read_run(run.directory) for run in planned]
    (experiment,) = results.experiments(runs, chosen.target)
    return compared(experiment)


def _paper(chosen: argparse.Namespace) -> str:
    with needs_extra("compare", "autoflip paper"):
        from autoflip_flwr.compare.paper import draw

    options = {name: vars(chosen)[name] for name in ("output", "overrides", "target")}
    return draw(chosen.name, chosen.folders, **options)


def _report(chosen: argparse.Namespace) -> str:
    with needs_extra("compare", "autoflip report"):
        from autoflip_flwr.compare.report import write_report

    for folder in chosen.folders:
        _folder(folder)
    output = chosen.output or chosen.folders[0] / "report"
    return str(write_report(chosen.folders, output, chosen.target))
