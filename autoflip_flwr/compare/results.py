"""Finished runs, read back: arms over seeds, targets, costs.

A run's folder is what `runlog` wrote. Runs of one preset make an experiment; runs
that differ in their seed alone make an arm of it.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from autoflip_flwr import settings
from autoflip_flwr.errors import DataError, SettingsError
from autoflip_flwr.settings import Settings

_REMEDY = "run it again, or move the folder away"


class _Record(BaseModel):
    """JSON that a run wrote; None stands for what the run does not know."""

    model_config = ConfigDict(strict=True, frozen=True)


_R = TypeVar("_R", bound=_Record)


class Round(_Record):
    """A line of metrics.jsonl."""

    round: int
    accuracy: float | None = None
    loss: float | None = None
    density: float | None = None
    bytes_down: float | None = None
    bytes_up: float | None = None
    bytes_evaluate: float | None = None
    mask_change: float | None = None
    update_variance: float | None = None
    guidance_cosine: float | None = None
    flops: float | None = None


class Bytes(_Record):
    """All bytes of a run, by phase and direction."""

    explore_down: FiniteFloat
    explore_up: FiniteFloat
    train_down: FiniteFloat
    train_up: FiniteFloat
    evaluate_down: FiniteFloat
    evaluate_up: FiniteFloat
    total: FiniteFloat
    dense_equivalent: FiniteFloat  # what FedAvg would have sent


class Summary(_Record):
    """The file summary.json."""

    accuracy: FiniteFloat | None = None
    parameters: FiniteFloat
    kept_parameters: FiniteFloat | None = None
    density: FiniteFloat
    bytes: Bytes
    flops: Mapping[str, FiniteFloat | None] = {}
    samples: Mapping[str, FiniteFloat] = {}
    seconds: Mapping[str, FiniteFloat] = {}

    @property
    def kept(self) -> float:
        """Parameters that the last mask keeps."""
        return self.kept_parameters or self.density * self.parameters


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    directory: Path
    settings: Settings
    rounds: list[Round]
    summary: Summary

    @property
    def shared(self) -> bool:
        """Whether other runs were on the machine: `compare` leaves Flower's log."""
        return (self.directory / "log.txt").exists()

    def series(self, key: str) -> NDArray[np.float64]:
        """Return a metric by round, NaN where a round has none.

        Besides the keys of a line: ``bytes`` and ``megabytes`` sent, and ``operations``
        trained, until the round's end, exploration included but not the roll call,
        which no line counts; and ``variance_of_all`` parameters' updates, of which
        those of pruned ones do not vary.
        """
        if key == "bytes":
            ways = [self.series(f"bytes_{way}") for way in ("down", "up", "evaluate")]
            return np.cumsum(np.nan_to_num(ways).sum(axis=0))
        if key == "megabytes":
            return self.series("bytes") / 1e6
        if key == "operations":
            return np.cumsum(self.series("flops"))
        if key == "variance_of_all":
            return self.series("update_variance") * self.series("density")
        return np.array([getattr(row, key) for row in self.rounds], np.float64)

    def late(self, key: str) -> float:
        """Return a metric's mean over the last tenth of the rounds, one at least."""
        return float(self.series(key)[-math.ceil(len(self.rounds) / 10) :].mean())

    def first_with(self, accuracy: float) -> int | None:
        """Return the place of the first round that is at least so accurate."""
        hits = np.flatnonzero(self.series("accuracy") >= accuracy)
        return int(hits[0]) if len(hits) else None


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
    arms: list[Arm]
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
    density: float  # kept / all parameters, after the last round
    communication: float | None  # kept x rounds to target x clients x sample rate
    computation: float | None  # parameters that a client processes, see `_processed`
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
    """Read the folder of a finished run; whatever is missing or torn is an error."""
    metrics, summary = directory / "metrics.jsonl", directory / "summary.json"
    try:
        chosen = settings.read(directory / "settings.yaml")
    except SettingsError as error:
        raise SettingsError(f"run folder {directory}: {error}") from error
    lines, whole = _text(metrics).splitlines(), _text(summary)
    if not lines:
        raise DataError(f"{metrics}: expected a line a round, got none; {_REMEDY}")
    rounds = [
        _parsed(Round, each, f"{metrics}, line {n}") for n, each in enumerate(lines, 1)
    ]
    return Run(directory, chosen, rounds, _parsed(Summary, whole, str(summary)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"run folder {path.parent}: {path}: {error}; {_REMEDY}"
        ) from error


def _parsed(record: type[_R], text: str, where: str) -> _R:
    try:
        return record.model_validate_json(text)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'text'} {str(each['input'])[:40]!r} "
            f"({each['msg']})"
            for each in error.errors()
        )
        raise DataError(
            f"{where}: expected the {record.__name__.lower()} of a finished run, "
            f"got {wrong}; {_REMEDY}"
        ) from error


def find_runs(directories: Iterable[Path]) -> list[Run]:
    """Read every finished run at or below the directories, sorted by folder.

    Folders whose name ends in ``.partial`` hold unfinished runs and are left out. A
    directory without any finished run is a `DataError`.
    """
    folders: dict[Path, Path] = {}
    for directory in directories:
        finished = [
            path.parent
            for path in directory.rglob("summary.json")
            if ".partial/" not in path.relative_to(directory.parent).as_posix()
        ]
        if not finished:
            raise DataError(
                f"{directory}: expected the folders of finished runs (with a "
                "summary.json), got none; name a run's output-dir or a folder of them"
            )
        folders |= {folder.resolve(): folder for folder in finished}
    return [read_run(folder) for folder in sorted(folders.values())]


def experiments(runs: Iterable[Run], target: float | None = None) -> list[Experiment]:
    """Group runs by preset, sorted, and each preset's runs into arms.

    Costs are compared at the target accuracy, in [0, 1]; None: `default_target` of each
    preset.
    """
    if target is not None and not 0 <= target <= 1:
        raise SettingsError(f"target: expected an accuracy in [0, 1], got {target}")
    by_preset: dict[str, list[Run]] = {}
    for run in runs:
        by_preset.setdefault(run.settings.preset, []).append(run)
    result = []
    for preset in sorted(by_preset):
        members = arms(by_preset[preset])
        goal = default_target(members) if target is None else target
        result.append(Experiment(preset, members, goal))
    return result


def arms(runs: Iterable[Run]) -> list[Arm]:
    """Group the runs of one preset by the settings that they read, but the seed.

    An arm is named by its strategy and the settings in which the arms of that strategy
    differ: ``autoflip pruning.threshold=0.3``. FedAvg comes first. Of several runs with
    the same settings and seed the last one counts: a repetition is no further sample.
    """
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        own = run.settings.identity()
        del own["preset"], own["seed"]
        groups.setdefault(json.dumps(own), {})[run.settings.seed] = run
    every = [(json.loads(key), seeds) for key, seeds in groups.items()]
    strategies = {own["strategy.name"] for own, _ in every}
    result = []
    for strategy in sorted(strategies, key=lambda name: (name != "fedavg", name)):
        members = [each for each in every if each[0]["strategy.name"] == strategy]
        keys = differing(own for own, _ in members)
        members.sort(key=lambda member: [_sortable(member[0][key]) for key in keys])
        for own, seeds in members:
            name = " ".join([strategy, *(f"{k}={as_override(own[k])}" for k in keys)])
            result.append(Arm(name, tuple(seeds[seed] for seed in sorted(seeds))))
    return result


def _sortable(value: Any) -> tuple[bool, float, str]:
    """Order numbers by value and before texts."""
    number = isinstance(value, int | float)
    return not number, value if number else 0.0, as_override(value)


def differing(values: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values are not the same in all mappings."""
    first, *others = values
    return [key for key in first if any(other[key] != first[key] for other in others)]


def as_override(value: Any) -> str:
    """Return a setting's value as an override writes it: ``0.3``, ``[4,8]``."""
    if isinstance(value, list):
        return f"[{','.join(map(as_override, value))}]"
    if isinstance(value, str):
        try:
            plain = not value or yaml.safe_load(value) == value
        except (yaml.YAMLError, ValueError):  # `*bias`: overrides take it for a text
            plain = True
        if plain:
            return value
    return json.dumps(value, ensure_ascii=False)


def mean_and_error(values: Sequence[float]) -> Estimate:
    """Return the mean over seeds and its standard error, s / sqrt(n), s over n - 1.

    The error of a single value is unknown, None.
    """
    count = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else None
    return Estimate(float(np.mean(values)), error)


def default_target(members: Iterable[Arm]) -> float | None:
    """Return 0.99 of the median arm's late accuracy, so that half of them reach it.

    The median keeps the target up when one arm fails. The late accuracy of an arm is
    the mean over the last tenth of the rounds (one at least) and over the seeds. A
    single seed may still miss the target. None if no arm knows its accuracy.
    """
    late = [statistics.fmean(r.late("accuracy") for r in arm.runs) for arm in members]
    known = [value for value in late if not math.isnan(value)]
    return 0.99 * statistics.median_low(known) if known else None


def cost_row(arm: Arm, target: float | None) -> CostRow:
    """Return what an arm costs, as papers count it and as it was measured."""
    runs, chosen = arm.runs, arm.settings
    summaries = [run.summary for run in runs]
    sent = [summary.bytes for summary in summaries]
    goal = math.inf if target is None else target
    places = [(run, run.first_with(goal)) for run in runs]
    rounds = [None if at is None else run.rounds[at].round for run, at in places]
    clients = chosen.strategy.min_nodes * chosen.strategy.fraction_train
    return CostRow(
        name=arm.name,
        seeds=len(runs),
        accuracy=_estimate(s.accuracy for s in summaries),
        rounds_to_target=_estimate(rounds),
        reached=sum(n is not None for n in rounds),
        density=statistics.fmean(s.kept / s.parameters for s in summaries),
        communication=_mean(
            n and s.kept * n * clients for s, n in zip(summaries, rounds, strict=True)
        ),
        computation=_mean(
            n and _processed(chosen, s, n)
            for s, n in zip(summaries, rounds, strict=True)
        ),
        flops_dense=_mean(s.flops.get("dense") for s in summaries),
        flops=_mean(s.flops.get("pruned") for s in summaries),
        bytes_to_target=_estimate(
            None if at is None else run.series("bytes")[at] for run, at in places
        ),
        bytes_total=mean_and_error([b.total for b in sent]),
        bytes_explore=statistics.fmean(b.explore_down + b.explore_up for b in sent),
        bytes_dense=statistics.fmean(b.dense_equivalent for b in sent),
        flops_trained=_estimate(s.flops.get("trained") for s in summaries),
        samples=_estimate(sum(s.samples.values()) or None for s in summaries),
        seconds=_estimate(s.seconds.get("total") for s in summaries),
    )


def _processed(settings: Settings, summary: Summary, rounds: int) -> float:
    """Count what a client processes up to a round, as the paper's Appendix F does.

    Parameters x epochs x sample rate: all parameters in each epoch of an exploration,
    at most `exploration.epochs`, and the kept ones in the local epochs of the rounds.
    """
    strategy, exploration = settings.strategy, settings.exploration
    explored = 0
    if strategy.name == "autoflip":
        explored = 1 + ((rounds - 1) // exploration.every if exploration.every else 0)
    share = exploration.epochs * exploration.fraction * explored
    trained = settings.training.epochs * rounds * strategy.fraction_train
    return summary.parameters * share + summary.kept * trained


def _estimate(values: Iterable[float | None]) -> Estimate | None:
    """Return mean and error; None if a seed has no value."""
    several = list(values)
    known = [value for value in several if value is not None]
    return mean_and_error(known) if len(known) == len(several) else None


def _mean(values: Iterable[float | None]) -> float | None:
    estimate = _estimate(values)
    return None if estimate is None else estimate.mean
