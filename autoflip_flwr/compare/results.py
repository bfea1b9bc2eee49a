"""Finished runs, read back: arms over seeds, targets, costs.

A run's folder is what `runlog` wrote. Runs of one preset make an experiment; runs
that differ in their seed alone make an arm of it.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr import settings
from autoflip_flwr.errors import DataError, SettingsError
from autoflip_flwr.settings import Settings

Series: TypeAlias = NDArray[np.float64]

#: What a run reads from a line of metrics.jsonl; a number, null or absent.
_METRICS = (
    "accuracy",
    "bytes_down",
    "bytes_up",
    "bytes_evaluate",
    "mask_change",
    "update_variance",
    "guidance_cosine",
)

#: What every summary.json holds, as numbers.
_REQUIRED = (
    "parameters",
    "density",
    "bytes.explore_down",
    "bytes.explore_up",
    "bytes.train_down",
    "bytes.train_up",
    "bytes.evaluate_down",
    "bytes.evaluate_up",
    "bytes.total",
    "bytes.dense_equivalent",
)

_REMEDY = "run it again, or move the folder away"


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    directory: Path
    settings: Settings
    rounds: tuple[Mapping[str, Any], ...]  # the lines of metrics.jsonl
    summary: Mapping[str, Any]

    def series(self, key: str) -> Series:
        """Return a metric by round, NaN where a round has none."""
        values = (row.get(key) for row in self.rounds)
        return np.array([math.nan if v is None else v for v in values], np.float64)

    def bytes_sent(self) -> Series:
        """Return all bytes sent until each round's end, exploration included.

        Without the roll call before the first round, which no line counts.
        """
        keys = ("bytes_down", "bytes_up", "bytes_evaluate")
        return np.cumsum(np.nan_to_num([self.series(key) for key in keys]).sum(axis=0))

    def total(self, key: str) -> float | None:
        """Return a number of summary.json by its dotted key; None if it has none.

        Of a group of numbers their sum.
        """
        value = _at(self.summary, key)
        parts = value.values() if isinstance(value, dict) else [value]
        numbers = [_number(part) for part in parts]
        return None if None in numbers else sum(n for n in numbers if n is not None)


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs that differ in their seed alone, in the order of the seeds."""

    name: str
    runs: tuple[Run, ...]

    @property
    def settings(self) -> Settings:
        """Return the settings of the first seed."""
        return self.runs[0].settings


@dataclass(frozen=True, slots=True)
class Experiment:
    """The arms of one preset, and the accuracy at which their costs are compared."""

    preset: str
    arms: tuple[Arm, ...]
    target: float | None  # None: no arm knows its accuracy


class Estimate(NamedTuple):
    """A mean over seeds and its standard error, None for fewer than two seeds."""

    mean: float
    error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """What an arm costs: as papers count it, and as it was measured.

    All are means over the seeds. A value is None where a run does not know it, and
    those that depend on the target where a seed never reaches it.
    """

    name: str
    seeds: int
    accuracy: Estimate | None  # top-1 after the last round
    rounds_to_target: Estimate | None
    reached: int  # seeds that reach the target

    # From parameters and settings, as papers count.
    parameters: float  # of the whole network
    density: float  # kept / all parameters, after the last round
    compression: float  # all / kept
    communication: float | None  # kept x rounds to target x clients x sample rate
    computation: float  # kept x local epochs x sample rate, of a round
    flops_dense: float | None  # thop's, one sample through the whole network
    flops: float | None  # thop's, one sample through the network clients train

    # Measured.
    bytes_to_target: Estimate | None  # exploration and evaluation included
    bytes_total: Estimate
    bytes_explore: float
    bytes_dense: float  # what FedAvg would have sent, without an exploration
    flops_trained: Estimate | None  # of all clients' training, exploration included
    samples: Estimate | None  # trained, times epochs, exploration included
    seconds: Estimate | None  # of the whole run


def read_run(directory: Path) -> Run:
    """Read the folder of a finished run.

    Raises
    ------
    SettingsError
        If settings.yaml is missing or no settings.
    DataError
        If metrics.jsonl or summary.json is missing or torn.
    """
    try:
        chosen = settings.read(directory / "settings.yaml")
    except SettingsError as error:
        raise SettingsError(f"run folder {directory}: {error}") from error
    lines = _text(directory / "metrics.jsonl").splitlines()
    rounds = tuple(
        _line(text, f"{directory / 'metrics.jsonl'}, line {number}")
        for number, text in enumerate(lines, start=1)
    )
    if not rounds:
        raise DataError(
            f"{directory / 'metrics.jsonl'}: expected a line a round, got none; "
            f"{_REMEDY}"
        )
    path = directory / "summary.json"
    summary = _object(_text(path), str(path))
    missing = [key for key in _REQUIRED if _number(_at(summary, key)) is None]
    if missing:
        raise DataError(f"{path}: expected numbers for {missing}; {_REMEDY}")
    return Run(directory, chosen, rounds, summary)


def find_runs(directories: Iterable[Path]) -> list[Run]:
    """Read every finished run at or below the directories, sorted by folder.

    Folders whose name ends in ``.partial`` are runs in the making and are left out.

    Raises
    ------
    SettingsError, DataError
        If a folder is torn, or a directory holds no finished run.
    """
    found: set[Path] = set()
    for directory in directories:
        folders = {
            path.parent
            for path in directory.rglob("summary.json")
            if not any(
                part.endswith(".partial")
                for part in path.relative_to(directory.parent).parts
            )
        }
        if not folders:
            raise DataError(
                f"{directory}: expected the folders of finished runs (with a "
                "summary.json), got none; name a run's output-dir or a folder of them"
            )
        found |= folders
    unique = {folder.resolve(): folder for folder in sorted(found)}
    return [read_run(folder) for folder in unique.values()]


def experiments(runs: Iterable[Run], target: float | None = None) -> list[Experiment]:
    """Group runs by preset, sorted, and each preset's runs into arms.

    Parameters
    ----------
    runs : iterable of Run
    target : float, optional
        Accuracy at which costs are compared; None: `default_target` of each preset.
    """
    ordered = sorted(runs, key=lambda run: run.settings.preset)
    found = []
    for preset, group in groupby(ordered, key=lambda run: run.settings.preset):
        members = arms(group)
        goal = default_target(members) if target is None else target
        found.append(Experiment(preset, tuple(members), goal))
    return found


def arms(runs: Iterable[Run]) -> list[Arm]:
    """Group the runs of one preset by all settings but seed, ``data.dir`` and log.

    An arm is named by its strategy and the settings in which the arms of that strategy
    differ: ``autoflip pruning.threshold=0.3``. FedAvg comes first; how to explore and
    prune means nothing to it. Of several runs with the same settings and seed the last
    one counts: a repetition is no further sample.
    """
    seeds: dict[str, dict[int, Run]] = {}
    values: dict[str, dict[str, Any]] = {}
    for run in runs:
        own = telling(run.settings)
        key = json.dumps(own)
        values[key] = own
        seeds.setdefault(key, {})[run.settings.seed] = run
    strategies = {own["strategy.name"] for own in values.values()}
    found = []
    for strategy in sorted(strategies, key=lambda name: (name != "fedavg", name)):
        same = {k: own for k, own in values.items() if own["strategy.name"] == strategy}
        differ = differing(same.values())
        for key, own in sorted(
            same.items(), key=lambda item: [_sortable(item[1][n]) for n in differ]
        ):
            name = " ".join([strategy, *(f"{n}={as_override(own[n])}" for n in differ)])
            found.append(Arm(name, tuple(run for _, run in sorted(seeds[key].items()))))
    return found


def differing(values: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values are not the same in all mappings."""
    first, *others = values
    return [key for key in first if any(other[key] != first[key] for other in others)]


def flat(chosen: Settings) -> dict[str, Any]:
    """Return the settings by their dotted names, without the preset's name."""
    values = chosen.flat()
    del values["preset"]
    return values


def telling(chosen: Settings) -> dict[str, Any]:
    """Return the settings that tell one arm from another."""
    unread = ("seed", "data.dir", "log.")
    name = chosen.strategy.name
    return {
        key: value
        for key, value in flat(chosen).items()
        if not key.startswith(unread) and settings.reads(name, key)
    }


def as_override(value: Any) -> str:
    """Return a setting's value as an override writes it: ``0.3``, ``[4,8]``."""
    if isinstance(value, list):
        return f"[{','.join(map(as_override, value))}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def mean_and_error(values: Sequence[float]) -> Estimate:
    """Return the mean and its standard error, s / sqrt(n) with s over n - 1.

    Parameters
    ----------
    values : sequence of float
        One a seed, at least one; of a single one the error is unknown, None.
    """
    count = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else None
    return Estimate(float(np.mean(values)), error)


def default_target(members: Iterable[Arm]) -> float | None:
    """Return 0.99 of the median arm's late accuracy, so that half of them reach it.

    An arm that has failed does not drag it down to where all are equal. The late
    accuracy of an arm is the mean over the last tenth of the rounds (one at least) and
    over the seeds. A single seed may still miss the target. None if no arm knows its
    accuracy.
    """
    late = [
        float(np.mean([np.mean(_last_tenth(run.series("accuracy"))) for run in a.runs]))
        for a in members
    ]
    known = [value for value in late if not math.isnan(value)]
    return 0.99 * statistics.median_low(known) if known else None


def rounds_to(run: Run, target: float) -> int | None:
    """Return the first round whose accuracy is at least the target; None if none is."""
    index = _index_of(run, target)
    return None if index is None else int(run.rounds[index]["round"])


def bytes_to(run: Run, target: float) -> int | None:
    """Return all bytes sent until the end of that round, exploration included."""
    index = _index_of(run, target)
    return None if index is None else int(run.bytes_sent()[index])


def cost_row(arm: Arm, target: float | None) -> CostRow:
    """Return what an arm costs, as papers count it and as it was measured."""
    runs, strategy = arm.runs, arm.settings.strategy
    rate, epochs = strategy.fraction_train, arm.settings.training.epochs
    goal = math.inf if target is None else target
    rounds = [rounds_to(run, goal) for run in runs]
    whole = [run.summary["parameters"] for run in runs]
    kept = [
        run.summary.get("kept_parameters", run.summary["density"] * size)
        for run, size in zip(runs, whole, strict=True)
    ]
    communication = [
        None if n is None else k * n * strategy.min_nodes * rate
        for k, n in zip(kept, rounds, strict=True)
    ]
    density = _mean_of(k / size for k, size in zip(kept, whole, strict=True))
    sent = [run.summary["bytes"] for run in runs]
    return CostRow(
        name=arm.name,
        seeds=len(runs),
        accuracy=_estimate(run.total("accuracy") for run in runs),
        rounds_to_target=_estimate(rounds),
        reached=sum(n is not None for n in rounds),
        parameters=_mean_of(run.summary["parameters"] for run in runs),
        density=density,
        compression=1 / density if density else math.inf,
        communication=_mean(communication),
        computation=_mean_of(kept) * epochs * rate,
        flops_dense=_mean(run.total("flops.dense") for run in runs),
        flops=_mean(run.total("flops.pruned") for run in runs),
        bytes_to_target=_estimate(bytes_to(run, goal) for run in runs),
        bytes_total=mean_and_error([b["total"] for b in sent]),
        bytes_explore=_mean_of(b["explore_down"] + b["explore_up"] for b in sent),
        bytes_dense=_mean_of(b["dense_equivalent"] for b in sent),
        flops_trained=_estimate(run.total("flops.trained") for run in runs),
        samples=_estimate(run.total("samples") for run in runs),
        seconds=_estimate(run.total("seconds.total") for run in runs),
    )


def _mean_of(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _estimate(values: Iterable[float | None]) -> Estimate | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return mean_and_error(known) if len(known) == len(found) else None


def _mean(values: Iterable[float | None]) -> float | None:
    found = _estimate(values)
    return None if found is None else found.mean


def _index_of(run: Run, target: float) -> int | None:
    hits = np.flatnonzero(run.series("accuracy") >= target)
    return int(hits[0]) if len(hits) else None


def _last_tenth(values: Series) -> Series:
    return values[-math.ceil(len(values) / 10) :]


def _sortable(value: Any) -> tuple[bool, float, str]:
    """Order numbers by value and before texts."""
    number = _number(value)
    return number is None, number or 0.0, as_override(value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"expected {path}, got {error}; {_REMEDY}") from error


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: expected JSON, got {error}; {_REMEDY}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {text[:40]}; {_REMEDY}")
    return value


def _line(text: str, where: str) -> dict[str, Any]:
    row = _object(text, where)
    wrong = [
        key
        for key in _METRICS
        if row.get(key) is not None and not isinstance(row[key], int | float)
    ]
    if not isinstance(row.get("round"), int):
        wrong.insert(0, "round")
    if wrong:
        raise DataError(f"{where}: expected numbers for {wrong}; {_REMEDY}")
    return row


def _at(values: Mapping[str, Any], dotted: str) -> Any:
    found: Any = values
    for key in dotted.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _number(value: Any) -> float | None:
    """Return a finite number as it is; None for all else."""
    fits = isinstance(value, int | float) and math.isfinite(value)
    return value if fits else None
