"""The console script `autoflip`."""

import argparse
import shlex
import sys
from collections.abc import Sequence

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
