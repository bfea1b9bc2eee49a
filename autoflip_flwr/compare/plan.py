"""Strategies compared over seeds: `autoflip compare`."""

import fcntl
import itertools
import logging
import math
import os
import re
import shlex
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeRemainingColumn,
)

from autoflip_flwr import settings as presets
from autoflip_flwr.app.folder import is_finished
from autoflip_flwr.app.launch import RAY_TIMED_OUT
from autoflip_flwr.errors import AutoFlipError, SettingsError
from autoflip_flwr.settings import Settings, StrategyName

STRATEGY_NAMES: tuple[str, ...] = get_args(StrategyName)

#: Seconds between two updates of the progress.
_TICK = 0.5


class ComparisonError(AutoFlipError, RuntimeError):
    """Runs of a comparison failed."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One run of a comparison."""

    directory: Path
    overrides: str
    settings: Settings

    @property
    def finished(self) -> bool:
        """Whether the run has ended."""
        return is_finished(self.directory)

    @property
    def partial(self) -> Path:
        """The folder of the run until it is finished."""
        return self.directory.with_name(self.directory.name + ".partial")

    def rounds_done(self) -> int:
        """Count the rounds in the run's log."""
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
    strategies: Sequence[str] = ("fedavg", "autoflip"),
    seeds: int | Sequence[int] = 3,
    vary: Mapping[str, Sequence[str]] | None = None,
    overrides: str = "",
) -> list[Planned]:
    """List the runs of a comparison: every strategy, variation and seed.

    A run's folder is ``output/<preset>/<strategy>[,<key>=<value>...]-<seed>``. A number
    of `seeds` stands for 0 to that less 1. All combinations of the values that `vary`
    has for dotted keys are run; a strategy skips the keys that it does not read.
    `overrides` are of all runs. A folder that holds a finished run of other settings is
    an error, as are unknown names and impossible values.
    """
    every_seed = range(seeds) if isinstance(seeds, int) else dict.fromkeys(seeds)
    if not every_seed:
        raise SettingsError(f"expected one seed or more, got {seeds}")
    unknown = [name for name in strategies if name not in STRATEGY_NAMES]
    if unknown or not strategies:
        raise SettingsError(
            f"unknown strategies {unknown}; known: {list(STRATEGY_NAMES)}"
            + presets.meant("".join(unknown[:1]), STRATEGY_NAMES)
        )
    varied = vary or {}
    given = {*varied, *dict(presets.parse_overrides(overrides))}
    for key in given & {"seed", "strategy.name"}:
        raise SettingsError(
            f"{key} is given by {'--seeds' if key == 'seed' else '--strategies'}"
        )
    names = [cast(StrategyName, name) for name in dict.fromkeys(strategies)]
    unread = [k for k in varied if not any(presets.reads(name, k) for name in names)]
    if unread:
        raise SettingsError(
            f"none of {names} reads {unread}; check the spelling, or add a strategy "
            f"that reads it{presets.meant(unread[0], presets.load(preset).flat())}"
        )
    runs: dict[Settings, Planned] = {}
    for name, values, seed in itertools.product(
        names, itertools.product(*varied.values()), every_seed
    ):
        words = [
            f"{key}={value}"
            for key, value in zip(varied, values, strict=True)
            if presets.reads(name, key)
        ]
        chosen = shlex.join([f"strategy.name={name}", *words, f"seed={seed}"])
        every = f"{overrides} {chosen}".strip()
        settings = presets.load(preset, every)
        if settings in runs:
            continue
        folder = ",".join([name, *words]).replace("/", "_")
        directory = (output / preset / f"{folder}-{seed}").resolve()
        if any(directory == one.directory for one in runs.values()):
            raise SettingsError(
                f"two runs of different settings would share the folder {directory}; "
                "put values that differ only in a '/' into two comparisons"
            )
        runs[settings] = run = Planned(directory, every, settings)
        if run.finished:
            _check_settings(run, run.directory)
        elif run.directory.exists():
            raise SettingsError(
                f"{run.directory} is in the way: it holds no finished run; move it, or "
                "name another output"
            )
    return list(runs.values())


def run(planned: Sequence[Planned]) -> None:
    """Do the runs that are not finished, in this process's Ray, on all cores and GPUs.

    A run is written to a ``.partial`` folder, which gets its final name at the end. An
    interrupted run goes on from its last checkpoint. The terminal shows how far all
    are. Runs that fail are an error after all others are finished.
    """
    with ExitStack() as locks:
        for folder in sorted({one.directory.parent for one in planned}):
            locks.enter_context(_locked(folder))
        for one in planned:
            if one.finished:  # perhaps by another comparison since it was planned
                _check_settings(one, one.directory)
            elif is_finished(one.partial):  # killed before the rename
                _check_settings(one, one.partial)
                one.partial.rename(one.directory)
        left = [one for one in planned if not one.finished]
        if not left:
            return
        with _ray() as clients, _bar() as bar:
            failed = _run_all(planned, left, clients, bar)
    if failed:
        reasons = "\n".join(f"{one.partial}: {_reason(error)}" for one, error in failed)
        raise ComparisonError(
            f"{len(failed)} of {len(left)} runs failed (see their log.txt):\n{reasons}"
        )


def _run_all(
    planned: Sequence[Planned], left: Sequence[Planned], clients: int, bar: Progress
) -> list[tuple[Planned, Exception]]:
    """Do the runs that are left; return the failed ones."""
    import ray

    shown = bar.add_task("", total=sum(one.settings.rounds for one in planned))
    waiting = list(left)[::-1]
    failed: list[tuple[Planned, Exception]] = []
    running: dict[Any, Planned] = {}
    try:
        while waiting or running:
            while waiting and len(running) < _runs_at_once(waiting[-1], clients):
                one = waiting.pop()
                running[_start(one)] = one
            done, _ = ray.wait(list(running), timeout=_TICK)
            for task in done:
                one = running.pop(task)
                try:
                    ray.get(task)
                    one.partial.rename(one.directory)
                except Exception as error:
                    failed.append((one, error))
            rounds = sum(one.rounds_done() for one in planned)
            names = ", ".join(one.directory.name for one in running.values())
            bar.update(shown, completed=rounds, description=names)
    finally:
        for task in running:
            ray.cancel(task, force=True)
    return failed


@contextmanager
def _ray() -> Iterator[int]:
    """Start Ray unless it runs already; yield how many clients run at once."""
    import ray  # takes seconds

    owned = not ray.is_initialized()
    if owned:
        # A ServerApp asks for no GPU. It stays visible, as with `flwr run`, and the
        # variable turns off Ray's hint about it.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        _check_cluster()
        _begin(ray)
    try:
        from autoflip_flwr.compare.simulation import clients_at_once

        yield clients_at_once()
    finally:
        if owned:
            ray.shutdown()


def _begin(ray: Any) -> None:
    """Start Ray, again where its own processes were late, twice at most."""
    for attempts_left in (2, 1, 0):
        try:
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray has no type of its own for it
            if RAY_TIMED_OUT not in str(error):
                raise
            ray.shutdown()
            if not attempts_left:
                raise ComparisonError(
                    "Ray did not start in 15 s, three times: the machine is busy; "
                    "close other programs and repeat the command, which goes on from "
                    "what is finished"
                ) from error


def _check_cluster() -> None:
    """Refuse an address without a Ray cluster: Ray would try it for many minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdecimal():
        return  # none, "auto", "local", ray://...
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, UnicodeError) as error:
        raise ComparisonError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {error}; start one with "
            "`ray start --head`, or set RAY_ADDRESS=local to use only this machine"
        ) from error


def _start(run: Planned) -> Any:
    """Start a run, or resume an interrupted one; return its Ray task."""
    from autoflip_flwr.compare.simulation import simulate

    try:
        _check_settings(run, run.partial)
    except AutoFlipError:  # a run of other settings, or none
        shutil.rmtree(run.partial, ignore_errors=True)
    run.partial.mkdir(parents=True, exist_ok=True)
    config = {
        "preset": run.settings.preset,
        "overrides": run.overrides,
        "output-dir": str(run.partial),
        "resume": True,
    }
    nodes = run.settings.strategy.min_nodes
    return simulate(nodes, config, str(run.partial / "log.txt"))


def _runs_at_once(run: Planned, clients: int) -> int:
    """Return how many runs keep so many clients busy, while servers work, too."""
    chosen = run.settings.strategy
    sampled = max(1, round(chosen.fraction_train * chosen.min_nodes))
    return 1 + math.ceil(clients / sampled)


def _check_settings(run: Planned, folder: Path) -> None:
    """Refuse a folder that holds a run of other settings."""
    settings = presets.read(folder / "settings.yaml")
    same = settings.data.dir == run.settings.data.dir
    if not same or settings.identity() != run.settings.identity():
        raise SettingsError(
            f"{folder} holds a run of other settings; name another output, or move "
            "that folder"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create and lock a folder; refuse one that another comparison has locked."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ComparisonError(
                f"another comparison is running in {folder}; wait for it, or name "
                "another output"
            ) from error
        yield


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"


def _bar() -> Progress:
    return Progress(
        "{task.percentage:3.0f} %",
        BarColumn(),
        MofNCompleteColumn(),
        "rounds,",
        TimeRemainingColumn(),
        "left; {task.description}",
        console=Console(stderr=True),
    )


def parse_seeds(text: str) -> int | list[int]:
    """Read how many seeds, ``3``, or which, ``11,12,13``."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise SettingsError(
            "--seeds: expected how many, such as 3, or which, such as 11,12,13, "
            f"got {text!r}"
        )
    seeds = [int(word) for word in words]
    return seeds if len(seeds) > 1 else seeds[0]


def parse_vary(words: Iterable[str]) -> dict[str, list[str]]:
    """Read ``key=value,value,...``; a value may be a list, with brackets in it."""
    varied: dict[str, list[str]] = {}
    for word in words:
        key, _, text = word.partition("=")
        values = re.findall(r"(?:\[(?:\[[^]]*\]|[^]])*\]|[^,])+", text)
        if not (key and values):
            raise SettingsError(f"--vary: expected key=value,value,..., got {word!r}")
        varied.setdefault(key, []).extend(values)
    return varied
