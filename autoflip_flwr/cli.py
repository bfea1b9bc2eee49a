"""The console script `autoflip`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from autoflip_flwr import settings
from autoflip_flwr.errors import AutoFlipError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="autoflip", description="AutoFLIP: federated pruning for Flower."
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
    chosen = parser.parse_args(arguments)
    try:
        print(chosen.run(chosen))
    except AutoFlipError as error:
        print(f"autoflip: {error}", file=sys.stderr)
        return 2
    return 0


def _presets(chosen: argparse.Namespace) -> str:
    if chosen.name is None:
        return "\n".join(settings.presets())
    return settings.load(chosen.name, shlex.join(chosen.overrides)).as_yaml().rstrip()


def _export(chosen: argparse.Namespace) -> str:
    from autoflip_flwr.export import export_run  # torch takes a second to import

    found = export_run(chosen.folder, chosen.output)
    onnx = found.onnx or "no ONNX: pip install 'autoflip-flwr[onnx]', and export again"
    return (
        f"{found.parameters} of {found.dense_parameters} parameters\n"
        f"{found.weights}\n{found.program}\n{onnx}"
    )
