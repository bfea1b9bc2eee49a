"""The console script `autoflip`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoflip_flwr import __version__, settings
from autoflip_flwr.errors import AutoFlipError, SettingsError, needs_extra


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="autoflip", description="AutoFLIP: federated pruning for Flower."
    )
    parser.add_argument(
        "--version", action="version", version=f"autoflip-flwr {__version__}"
    )
    commands = parser.add_subparsers(required=True)
    presets = commands.add_parser("presets", help="list the presets, or show one whole")
    presets.add_argument("name", nargs="?", help="show all of this preset's values")
    presets.add_argument(
        "overrides", nargs="*", help="dotted key=value, applied as in a run"
    )
    presets.set_defaults(run=_presets)
    export = commands.add_parser(
        "export", help="write a run's final model compact, for use without this package"
    )
    export.add_argument("folder", type=Path, help="a run's output-dir")
    export.add_argument(
        "--output", type=Path, help="folder to write to (default: export/ in the run's)"
    )
    export.set_defaults(run=_export)
    _add_compare(commands)
    _add_report(commands)
    chosen = parser.parse_args(arguments)
    try:
        print(chosen.run(chosen))
    except AutoFlipError as error:
        print(f"autoflip: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "autoflip: interrupted; the same command goes on with what is left",
            file=sys.stderr,
        )
        return 130
    return 0


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare", help="run strategies side by side, over seeds, in simulation"
    )
    compare.add_argument("preset", help="see `autoflip presets`")
    compare.add_argument(
        "--strategies", default="fedavg,autoflip", help="values of strategy.name: a,b,c"
    )
    compare.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    compare.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="a setting to run with several values; may be given more than once",
    )
    compare.add_argument(
        "--overrides", default="", help='dotted "key=value key=value" for all runs'
    )
    compare.add_argument(
        "--output", type=Path, default=Path("runs/compare"), help="folder of the runs"
    )
    _add_target(compare)
    compare.set_defaults(run=_compare)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report", help="make one HTML page and pictures of finished runs"
    )
    report.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="runs, or folders of them"
    )
    report.add_argument(
        "--output",
        type=Path,
        help="folder to write to (default: report/ in the first DIR)",
    )
    _add_target(report)
    report.set_defaults(run=_report)


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--target",
        type=float,
        help="top-1 accuracy up to which rounds and bytes are counted, in [0, 1] "
        "(default: 0.99 of what the median arm ends with)",
    )


def _presets(chosen: argparse.Namespace) -> str:
    if chosen.name is None:
        return "\n".join(settings.presets())
    return settings.load(chosen.name, shlex.join(chosen.overrides)).as_yaml().rstrip()


def _export(chosen: argparse.Namespace) -> str:
    with needs_extra("app", "autoflip export"):
        from autoflip_flwr.app.export import export_run  # seconds to import

    found = export_run(chosen.folder, chosen.output)
    onnx = found.onnx or "no ONNX: pip install 'autoflip-flwr[onnx]', and export again"
    return (
        f"{found.parameters} of {found.dense_parameters} parameters\n"
        f"{found.weights}\n{found.program}\n{onnx}"
    )


def _compare(chosen: argparse.Namespace) -> str:
    with needs_extra("compare", "autoflip compare"):
        from autoflip_flwr.compare import plan, results
        from autoflip_flwr.compare.report.table import compared

    _check_target(chosen.target)
    planned = plan.plan(
        chosen.preset,
        output=chosen.output,
        strategies=chosen.strategies.split(","),
        seeds=chosen.seeds,
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


def _report(chosen: argparse.Namespace) -> str:
    with needs_extra("compare", "autoflip report"):
        from autoflip_flwr.compare.report import write_report

    _check_target(chosen.target)
    output = chosen.output or chosen.folders[0] / "report"
    return str(write_report(chosen.folders, output, chosen.target))
