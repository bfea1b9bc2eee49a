"""Strategies side by side, over seeds: `autoflip compare`."""

import fcntl
import itertools
import logging
import math
import os
import shlex
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from autoflip_flwr import settings as presets
from autoflip_flwr.errors import AutoFlipError, SettingsError
from autoflip_flwr.settings import Settings, StrategyName

STRATEGIES: tuple[StrategyName, ...] = ("fedavg", "autoflip")
STRATEGY_NAMES: tuple[str, ...] = get_args(StrategyName)

#: How often the progress is looked at, in seconds.
_TICK = 0.5

#: (rounds done, rounds of all runs, what is going on) -> None
Progress = Callable[[int, int, str], None]


class ComparisonError(AutoFlipError, RuntimeError):
    """Runs of a comparison failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One run of a comparison."""

    directory: Path
    preset: str
    overrides: str
    settings: Settings

    @property
    def finished(self) -> bool:
        """Whether it was run to its end."""
        return (self.directory / "summary.json").exists()

    @property
    def partial(self) -> Path:
        """Where it is run, until it is finished."""
        return self.directory.with_name(self.directory.name + ".partial")

    def rounds_done(self) -> int:
        """Count the rounds that it has logged."""
        if self.finished:
            return self.settings.rounds
        try:
            return (self.partial / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0


def plan(
    preset: str,
    *,
    output: Path,
    strategies: Sequence[str] = STRATEGIES,
    seeds: int = 3,
    vary: Mapping[str, Sequence[str]] | None = None,
    overrides: str = "",
) -> list[Planned]:
    """List the runs of a comparison: every strategy, variation and seed.

    Parameters
    ----------
    preset : str
        A name in conf/.
    output : Path
        Runs get the folders ``output/<preset>/<strategy>[,<key>=<value>...]-<seed>``.
    strategies : sequence of str
        Values of `strategy.name`.
    seeds : int
        Every arm is run with the seeds 0 to `seeds` - 1.
    vary : mapping of dotted key -> values, optional
        All combinations are run; of a strategy that does not read a key, one.
    overrides : str
        Dotted ``key=value`` pairs for all runs.

    Raises
    ------
    SettingsError
        If a strategy or value is impossible, or a folder holds a finished run of
        other settings.
    """
    if seeds < 1:
        raise SettingsError(f"expected one seed or more, got {seeds}")
    unknown = [name for name in strategies if name not in STRATEGY_NAMES]
    if unknown or not strategies:
        raise SettingsError(
            f"unknown strategies {unknown}; known: {list(STRATEGY_NAMES)}"
        )
    varied = vary or {}
    for key in varied:
        if key in ("seed", "strategy.name"):
            raise SettingsError(f"{key} is varied by --seeds or --strategies")
    names = [cast(StrategyName, name) for name in dict.fromkeys(strategies)]
    unread = [k for k in varied if not any(presets.reads(name, k) for name in names)]
    if unread:
        raise SettingsError(
            f"none of {names} reads {unread}, so there is nothing to vary; check the "
            "spelling, or add a strategy that does"
        )
    found: dict[tuple[Settings, int], Planned] = {}
    taken: dict[Path, Settings] = {}
    for name, values, seed in itertools.product(
        names, itertools.product(*varied.values()), range(seeds)
    ):
        pairs = dict(zip(varied, values, strict=True))
        pairs = {k: v for k, v in pairs.items() if presets.reads(name, k)}
        words = [f"{key}={value}" for key, value in pairs.items()]
        chosen = shlex.join([f"strategy.name={name}", *words, f"seed={seed}"])
        every = f"{overrides} {chosen}".strip()
        settings = presets.load(preset, every)
        folder = ",".join([name, *words]).replace("/", "_")
        run = Planned(
            directory=(output / preset / f"{folder}-{seed}").resolve(),
            preset=preset,
            overrides=every,
            settings=settings,
        )
        if run.finished:
            _check_settings(run, run.directory)
        elif run.directory.exists():
            raise SettingsError(
                f"{run.directory} is in the way: it holds no finished run; move it "
                "away, or name another output"
            )
        if taken.setdefault(run.directory, settings) != settings:
            raise SettingsError(
                f"two runs of other settings would share the folder {run.directory}; "
                "make two comparisons of the values that differ in a '/' alone"
            )
        found.setdefault((settings, seed), run)
    return list(found.values())


def run(planned: Sequence[Planned], progress: Progress | None = None) -> None:
    """Run what is not finished: in this process's Ray, clients on all cores.

    A run is written to a folder of its own that gets its name when it is finished;
    what an interruption left of one goes on from its last checkpoint.

    Parameters
    ----------
    planned : sequence of Planned
    progress : callable, optional
        Called a few times a second.

    Raises
    ------
    ComparisonError
        If runs failed; the others are finished first.
    """
    for folder in sorted({one.directory.parent for one in planned}):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for folder in sorted({one.directory.parent for one in planned}):
            held.enter_context(_alone_in(folder))
        _run(planned, progress)


def _run(planned: Sequence[Planned], progress: Progress | None) -> None:
    for one in planned:
        if one.finished:  # perhaps by another comparison, since this one was planned
            _check_settings(one, one.directory)
        elif (one.partial / "summary.json").exists():  # killed before it got its name
            _check_settings(one, one.partial)
            one.partial.rename(one.directory)
    left = [one for one in planned if not one.finished]
    if not left:
        return
    import ray  # seconds to import

    from autoflip_flwr.compare.simulation import simulate

    owned = not ray.is_initialized()
    if owned:
        # Clients ask for no GPU; it stays visible, as with `flwr run`, and Ray's hint
        # about it is not for users.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        _check_cluster()
        ray.init(
            include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cores = int(resources.get("CPU", os.cpu_count() or 1))
    total = sum(one.settings.rounds for one in planned)
    waiting, failed = left[::-1], []
    running: dict[Any, Planned] = {}
    try:
        while waiting or running:
            while waiting and len(running) < _runs_at_once(waiting[-1], cores):
                one = waiting.pop()
                running[_start(simulate, one)] = one
            done, _ = ray.wait(list(running), timeout=_TICK)
            for task in done:
                one = running.pop(task)
                try:
                    ray.get(task)
                    one.partial.rename(one.directory)
                except Exception as error:
                    failed.append((one, error))
            if progress:
                rounds = sum(one.rounds_done() for one in planned)
                names = ", ".join(one.directory.name for one in running.values())
                progress(rounds, total, names)
    finally:
        for task in running:
            ray.cancel(task, force=True)
        if owned:
            ray.shutdown()
    if failed:
        told = "\n".join(f"{one.partial}: {_reason(error)}" for one, error in failed)
        raise ComparisonError(
            f"{len(failed)} of {len(left)} runs failed (see their log.txt):\n{told}"
        )


def _check_cluster() -> None:
    """Refuse an address where no Ray is: Ray itself would try for many minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdecimal():
        return  # none, "auto", "local", ray://...
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, UnicodeError) as error:
        raise ComparisonError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {error}; start one with "
            "`ray start --head`, or set RAY_ADDRESS=local to run on this machine alone"
        ) from error


def _start(simulate: Any, run: Planned) -> Any:
    """Submit a run, or go on with what an interruption left of it."""
    try:
        _check_settings(run, run.partial)
    except AutoFlipError:  # of other settings, or it had not begun
        shutil.rmtree(run.partial, ignore_errors=True)
    run.partial.mkdir(parents=True, exist_ok=True)
    config = {
        "preset": run.preset,
        "overrides": run.overrides,
        "output-dir": str(run.partial),
        "resume": True,
    }
    nodes = run.settings.strategy.min_nodes
    return simulate(nodes, config, str(run.partial / "log.txt"))


def _runs_at_once(run: Planned, cores: int) -> int:
    """Return how many runs keep all cores busy.

    While one's server works, another's clients train.
    """
    chosen = run.settings.strategy
    clients = max(1, round(chosen.fraction_train * chosen.min_nodes))
    return 1 + math.ceil(cores / clients)


def _check_settings(run: Planned, folder: Path) -> None:
    """Refuse to take a run of other settings for this one."""
    found = presets.read(folder / "settings.yaml")
    same = found.data.dir == run.settings.data.dir
    if not same or found.identity() != run.settings.identity():
        raise SettingsError(
            f"{folder} holds a run of other settings; name another output, or move "
            "that folder away"
        )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, so that no other comparison writes to its runs.

    Raises
    ------
    ComparisonError
        If another one does.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ComparisonError(
                f"another comparison is at work in {folder}; wait for it, or name "
                "another output"
            ) from error
        yield


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"


@contextmanager
def bar() -> Iterator[Progress]:
    """Show a progress bar on the terminal that tells what is left."""
    columns = (
        TextColumn("{task.percentage:3.0f} %"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rounds,"),
        TimeRemainingColumn(),
        TextColumn("left; {task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("starting", total=None)

        def update(done: int, total: int, running: str) -> None:
            shown.update(task, completed=done, total=total, description=running)

        yield update


def parse_vary(words: Iterable[str]) -> dict[str, list[str]]:
    """Read ``key=value,value,...``; a value may be a list in brackets.

    Raises
    ------
    SettingsError
        If a word has another form.
    """
    found = {}
    for word in words:
        key, equals, text = word.partition("=")
        values = [value for value in _split(text) if value]
        if not (key and equals and values):
            raise SettingsError(f"--vary: expected key=value,value,..., got {word!r}")
        found[key] = values
    return found


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
