"""Preset + overrides -> frozen settings, checked where they are made.

A preset is a YAML file in conf/, in groups and kebab-case. Unknown keys, wrong
types and impossible values are errors that list what is allowed.
"""

import dataclasses
import shlex
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from autoflip_flwr.errors import SettingsError
from autoflip_flwr.types import (
    Combination,
    MethodName,
    Mode,
    Normalization,
    ScoreName,
    ValueType,
)

G = TypeVar("G")

ServerStrategy = Literal["fedavg", "fedavgm", "fedadam", "fedprox", "fedmedian", "krum"]
PrunedWeights = Literal["zero", "keep"]
Agreement = Literal["none", "vote", "sign"]
StrategyName = Literal["fedavg", MethodName]


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategySettings:
    """Who takes part in a round, and how replies are aggregated."""

    name: StrategyName = "autoflip"  # fedavg: dense, the baseline
    server: ServerStrategy = "fedavg"  # the inner strategy of all
    fraction_train: float = 1.0  # share of the connected nodes that train
    fraction_evaluate: float = 0.0  # share that evaluates on its own held-out data
    min_nodes: int = 2  # connected nodes to wait for before each sampling
    timeout: float = 3600.0  # seconds to wait for the replies of a round
    server_learning_rate: float | None = None  # fedavgm, fedadam; None: Flower's own
    server_momentum: float | None = None  # fedavgm
    proximal_mu: float = 0.01  # fedprox
    malicious_nodes: int = 0  # krum: how many to defend against
    # Replies that moved so many times as far as the round's median, or say they stand
    # for so many times its examples, are dropped. None: none are.
    outlier: float | None = 100.0

    def __post_init__(self) -> None:
        _within("strategy.fraction-train", self.fraction_train, 0, 1, open_low=True)
        _within("strategy.fraction-evaluate", self.fraction_evaluate, 0, 1)
        _at_least("strategy.min-nodes", self.min_nodes, 1)
        _positive("strategy.timeout", self.timeout)
        _at_least("strategy.proximal-mu", self.proximal_mu, 0)
        _at_least("strategy.malicious-nodes", self.malicious_nodes, 0)
        if self.outlier is not None:
            _at_least("strategy.outlier", self.outlier, 1)
        if self.server_learning_rate is not None:
            _positive("strategy.server-learning-rate", self.server_learning_rate)
        if self.server_momentum is not None:
            _within("strategy.server-momentum", self.server_momentum, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplorationSettings:
    """How clients explore their loss landscapes (Alg. 1, lines 2-3)."""

    epochs: int = 1  # local epochs of an explorer, at most
    fraction: float = 1.0  # share of the nodes that explore
    patience: int = 5  # epochs without a lower loss before an explorer stops
    every: int = 0  # explore again every so many rounds; 0: once
    warm_start: bool = False  # begin where the explorers on average ended, not at W0
    timeout: float = 3600.0  # seconds to wait for the explorers
    # Differential privacy on the client: L2 norm that guidance is clipped to, and the
    # noise's standard deviation as a multiple of it. 0: off.
    privacy_clip: float = 0.0
    privacy_noise: float = 0.0

    def __post_init__(self) -> None:
        _check_types("exploration", self)
        _at_least("exploration.epochs", self.epochs, 1)
        _within("exploration.fraction", self.fraction, 0, 1, open_low=True)
        _at_least("exploration.patience", self.patience, 1)
        _at_least("exploration.every", self.every, 0)
        _positive("exploration.timeout", self.timeout)
        _at_least("exploration.privacy-clip", self.privacy_clip, 0)
        _at_least("exploration.privacy-noise", self.privacy_noise, 0)
        if (self.privacy_clip > 0) != (self.privacy_noise > 0):
            raise SettingsError(
                "exploration.privacy-clip and .privacy-noise go together: expected "
                f"both > 0, or both 0, got {self.privacy_clip}, {self.privacy_noise}"
            )
        if self.privacy_noise and self.warm_start:
            raise SettingsError(
                "exploration.warm-start would send the signs of the updates without "
                "noise; with exploration.privacy-noise it must be false"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningSettings:
    """From local guidance to the mask of a round (Eq. 3-4)."""

    threshold: float = 0.8  # quantile: share to prune; see mask.from_scores
    mode: Mode = "quantile"
    score: ScoreName = "guidance"
    normalization: Normalization = "client"
    population_weight: float = 0.8  # weight of all explorers; 0: the paper
    floor: float = 0.01  # least share of every tensor that is kept
    exclude: tuple[str, ...] = ()  # name patterns that are never pruned
    pruned_weights: PrunedWeights = "zero"  # at the server
    combination: Combination = "mean"  # of the explorers' matrices
    trim: float = 0.2  # trimmed-mean: share left out at either end
    agreement: Agreement = "none"  # of clients, mixed into the score
    agreement_weight: float = 0.5  # its share of the score
    # Share of a layer's kept weights that is exchanged at first: small weights for
    # such with large gradients at the sampled clients. 0: none.
    refresh: float = 0.0
    # Rounds from one exchange to the next, and the last that may. None: a tenth and
    # half of a run's rounds; where their number is not known, 10, and no end.
    refresh_every: int | None = None
    refresh_until: int | None = None
    units: float = 0.0  # share of what is pruned that falls on whole units
    min_units: int = 1  # least units of every group that are kept
    unit_multiple: int = 1  # groups are cut to multiples of this; 8 or 16 is faster

    def __post_init__(self) -> None:
        _check_types("pruning", self)
        if self.mode == "compression":
            _at_least("pruning.threshold (a ratio all/kept)", self.threshold, 1)
        else:
            _within("pruning.threshold", self.threshold, 0, 1)
        _within("pruning.population-weight", self.population_weight, 0, 1)
        _within("pruning.floor", self.floor, 0, 1)
        _within("pruning.agreement-weight", self.agreement_weight, 0, 1)
        if not 0 <= self.trim < 0.5:
            raise SettingsError(f"pruning.trim must be in [0, 0.5), got {self.trim}")
        if self.combination != "mean" and self.normalization != "client":
            raise SettingsError(
                f"pruning.combination {self.combination} needs pruning.normalization "
                f"client: with {self.normalization} one explorer sets the scale of all"
            )
        _within("pruning.refresh", self.refresh, 0, 1)
        if self.refresh_every is not None:
            _at_least("pruning.refresh-every", self.refresh_every, 1)
        if self.refresh_until is not None:
            _at_least("pruning.refresh-until", self.refresh_until, 0)
        if self.refresh and (self.population_weight < 1 or self.agreement == "sign"):
            raise SettingsError(
                "pruning.refresh exchanges weights of one mask for all rounds, so it "
                "needs pruning.population-weight 1 and an agreement other than sign, "
                f"got {self.population_weight} and {self.agreement!r}"
            )
        if self.agreement != "none" and self.mode == "value":
            raise SettingsError(
                "pruning.agreement needs a number of weights to keep: pruning.mode "
                "quantile or compression, got value"
            )
        _within("pruning.units", self.units, 0, 1)
        _at_least("pruning.min-units", self.min_units, 1)
        _at_least("pruning.unit-multiple", self.unit_multiple, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalSettings:
    """What only the methods that AutoFLIP is compared with have."""

    dense_rounds: int = 2  # before weights are judged: magnitude, l1, ..., eflprune
    # Rounds from one adjustment to the next: prunefl, feddst. None: a twentieth of a
    # run's rounds; where their number is not known, 10.
    every: int | None = None
    replaced: float = 0.5  # feddst: share of a layer's kept weights, at first
    # feddst: last round that may adjust. None: half of a run's rounds; where their
    # number is not known, all, and the share stays as it is.
    until: int | None = None

    def __post_init__(self) -> None:
        _check_types("rivals", self)
        _at_least("rivals.dense-rounds", self.dense_rounds, 0)
        if self.every is not None:
            _at_least("rivals.every", self.every, 1)
        _within("rivals.replaced", self.replaced, 0, 1)
        if self.until is not None:
            _at_least("rivals.until", self.until, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class WireSettings:
    """What travels."""

    values: ValueType = "float32"  # type of the kept values


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """What a run writes beside its own files."""

    tensorboard: bool = False  # metrics of every round, for TensorBoard


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """Local training of one round."""

    epochs: int = 2  # local epochs per round (E)
    batch_size: int = 32
    learning_rate: float = 0.02  # of the first round
    learning_rate_decay: float = 1.0  # its factor from round to round
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9  # sgd
    weight_decay: float = 0.0
    device: str = "auto"  # auto: cuda where there is one

    def __post_init__(self) -> None:
        _at_least("training.epochs", self.epochs, 1)
        _at_least("training.batch-size", self.batch_size, 1)
        _positive("training.learning-rate", self.learning_rate)
        _within(
            "training.learning-rate-decay",
            self.learning_rate_decay,
            0,
            1,
            open_low=True,
        )
        _within("training.momentum", self.momentum, 0, 1)
        _at_least("training.weight-decay", self.weight_decay, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Which data, and which client holds what."""

    name: str = "digits"
    dir: str = ""  # folder or file; empty: bundled or downloaded
    hub: str = ""  # Flower Datasets id, in place of the known one
    partition: Literal["iid", "pathological", "dirichlet", "natural"] = "iid"
    alpha: float = 0.5  # dirichlet
    classes_per_client: int = 2  # pathological
    max_samples: int | None = None  # training samples used, over all clients
    max_test_samples: int | None = None  # held-out samples of the global model
    # Share of a client's samples kept for its evaluation; None: 0.2 where nodes
    # evaluate (strategy.fraction-evaluate), else 0.
    holdout: float | None = None

    def __post_init__(self) -> None:
        _positive("data.alpha", self.alpha)
        _at_least("data.classes-per-client", self.classes_per_client, 1)
        _within("data.holdout", self.holdout or 0, 0, 0.9)
        for key in ("max_samples", "max_test_samples"):
            if getattr(self, key) is not None:
                _at_least(f"data.{_kebab(key)}", getattr(self, key), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which network; None leaves a size at the model's own default."""

    name: str = "cnn"
    channels: tuple[int, ...] | None = None  # cnn
    hidden: int | None = None  # cnn, char_lstm
    embedding: int | None = None  # char_lstm
    vocabulary: int | None = None  # char_lstm

    def options(self) -> dict[str, Any]:
        """Return the sizes that are set, as `models.build` takes them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values.pop("name")
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a run depends on but the nodes themselves."""

    preset: str
    rounds: int = 20
    seed: int = 0
    strategy: StrategySettings = field(default_factory=StrategySettings)
    exploration: ExplorationSettings = field(default_factory=ExplorationSettings)
    pruning: PruningSettings = field(default_factory=PruningSettings)
    rivals: RivalSettings = field(default_factory=RivalSettings)
    wire: WireSettings = field(default_factory=WireSettings)
    log: LogSettings = field(default_factory=LogSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)

    def __post_init__(self) -> None:
        evaluates = self.strategy.fraction_evaluate > 0
        if self.data.holdout is None:
            data = dataclasses.replace(self.data, holdout=0.2 if evaluates else 0.0)
            object.__setattr__(self, "data", data)  # frozen, but not made yet
        elif evaluates and self.data.holdout == 0:
            raise SettingsError(
                "strategy.fraction-evaluate > 0 needs data.holdout > 0: the share of a "
                "client's samples that it does not train on"
            )
        _at_least("rounds", self.rounds, 1)
        gradients = self.pruning.refresh or self.strategy.name in _ASK_FOR_GRADIENTS
        if self.exploration.privacy_noise and gradients:
            raise SettingsError(
                "exploration.privacy-noise covers guidance, not gradients: set "
                "pruning.refresh=0, and a strategy.name other than "
                f"{list(_ASK_FOR_GRADIENTS)}"
            )
        half = self.rounds // 2
        self._resolve("rivals", until=half, every=max(1, self.rounds // 20))
        self._resolve(
            "pruning", refresh_until=half, refresh_every=max(1, self.rounds // 10)
        )
        _at_least("seed", self.seed, 0)

    def _resolve(self, group: str, **defaults: int) -> None:
        """Set what was left open and follows from the number of rounds."""
        values = getattr(self, group)
        left = {k: v for k, v in defaults.items() if getattr(values, k) is None}
        # Frozen, but not made yet.
        object.__setattr__(self, group, dataclasses.replace(values, **left))

    def identity(self) -> dict[str, Any]:
        """Return the values that a run depends on, by their dotted keys.

        All that its strategy reads, but not where the data is, nor what is logged.
        """
        flat: dict[str, Any] = {}
        for group, values in _plain(self).items():
            if isinstance(values, dict):
                flat.update({f"{group}.{key}": value for key, value in values.items()})
            else:
                flat[group] = values
        return {
            key: value
            for key, value in flat.items()
            if reads(self.strategy.name, key)
            and key != "data.dir"
            and not key.startswith("log.")
        }

    def as_yaml(self) -> str:
        """Return all values, resolved, in a preset's form."""
        return yaml.safe_dump(_plain(self), sort_keys=False)


def reads(name: StrategyName, key: str) -> bool:
    """Tell whether a strategy looks at a setting, by its dotted key."""
    group, _, rest = key.partition(".")
    if name == "autoflip":
        return group != "rivals"
    if name == "fedavg":
        return group not in ("pruning", "exploration", "rivals", "wire")
    if group == "pruning":
        return rest in _PRUNING_OF_RIVALS
    if group == "rivals":
        return name in _RIVALS_READ.get(rest, ())
    return group != "exploration" or rest == "timeout"


#: Which rivals read a setting of the group `rivals`.
_RIVALS_READ: dict[str, tuple[StrategyName, ...]] = {
    "dense-rounds": ("magnitude", "l1", "l2", "similarity", "bn", "eflprune"),
    "every": ("prunefl", "feddst"),
    "replaced": ("feddst",),
    "until": ("feddst",),
}

_ASK_FOR_GRADIENTS: tuple[StrategyName, ...] = ("ssfl", "prunefl", "feddst")

_PRUNING_OF_RIVALS = (
    "threshold",
    "mode",
    "floor",
    "exclude",
    "min-units",
    "unit-multiple",
)


def presets() -> tuple[str, ...]:
    """Return the names of the presets, sorted."""
    return tuple(sorted(path.stem for path in _conf().glob("*.yaml")))


def load(preset: str, overrides: str = "") -> Settings:
    """Read a preset and apply overrides.

    Parameters
    ----------
    preset : str
        A name in conf/.
    overrides : str
        Dotted ``key=value`` pairs separated by spaces, applied last; values in
        YAML, quoted where they hold spaces: ``rounds=3 data.dir="my data"``.

    Raises
    ------
    SettingsError
        Names the key, what was expected and what is known.
    """
    if preset not in presets():
        raise SettingsError(f"unknown preset {preset!r}; known: {list(presets())}")
    path = _conf() / f"{preset}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{path.name} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path.name}: expected keys and values")
    for key, value in _parse_overrides(overrides):
        _set(values, key.split("."), value, key)
    if "preset" in values:
        raise SettingsError("preset: is the name of the file, not a key in it")
    return _build(Settings, {**values, "preset": preset}, "")


def read(path: Path) -> Settings:
    """Read the resolved settings that a run wrote.

    Raises
    ------
    SettingsError
        If there is no such file, or it holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(
            f"expected a run's folder with {path.name} in it: {error}"
        ) from error
    if not isinstance(values, dict) or not isinstance(values.get("preset"), str):
        raise SettingsError(f"{path}: expected the settings of a run, with its preset")
    return _build(Settings, values, "")


def _conf() -> Path:
    """conf/ inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def _parse_overrides(overrides: str) -> list[tuple[str, Any]]:
    try:
        words = shlex.split(overrides)
    except ValueError as error:
        raise SettingsError(f"overrides {overrides!r}: {error}") from error
    pairs = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise SettingsError(
                f"overrides: expected dotted key=value pairs, got {word!r}"
            )
        pairs.append((key, _parse_value(text)))
    return pairs


def _parse_value(text: str) -> Any:
    """Read YAML; what is none (``*bias``, ``[*bias,fc*]``) is text or a list of it."""
    try:
        return yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError):  # ValueError: a date that is none
        if text.startswith("[") and text.endswith("]"):
            return [item.strip() for item in text[1:-1].split(",")]
        return text


def _set(values: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise SettingsError(f"unknown key {key!r}: {part} is not a group")
    values[path[-1]] = value


def _build(group: type[G], values: Any, path: str) -> G:
    where = path or "top-level"
    if not isinstance(values, dict):
        raise SettingsError(f"{where}: expected a group of keys, got {values!r}")
    hints = get_type_hints(group)
    names = {_kebab(name): name for name in hints}
    unknown = sorted(str(key) for key in set(values) - set(names))
    if unknown:
        known = sorted(set(names) - {"preset"})
        raise SettingsError(f"unknown {where} keys {unknown}; known: {known}")
    arguments = {}
    for key, value in values.items():
        dotted = f"{path}.{key}" if path else key
        kind = hints[names[key]]
        arguments[names[key]] = (
            _build(kind, value, dotted)
            if dataclasses.is_dataclass(kind) and isinstance(kind, type)
            else _convert(kind, value, dotted)
        )
    return group(**arguments)


def _check_types(group: str, values: Any) -> None:
    """Check a group that may have been made in code, not from a preset."""
    for name, kind in get_type_hints(type(values)).items():
        value = getattr(values, name)
        given = list(value) if isinstance(value, tuple) else value
        _convert(kind, given, f"{group}.{_kebab(name)}")


def _convert(kind: Any, value: Any, key: str) -> Any:
    """Return `value` as the field's type, or say what was expected."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        (kind,) = (choice for choice in choices if choice is not type(None))
        return _convert(kind, value, key)
    if origin is Literal:
        if value not in choices:
            raise SettingsError(
                f"{key}: expected one of {list(choices)}, got {value!r}"
            )
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(choices[0], item, key) for item in items)
    if kind is float and isinstance(value, str):
        value = _number(value)  # YAML 1.1 reads 1e-3 as text
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise SettingsError(
            f"{key}: expected {kind.__name__}, got {type(value).__name__} {value!r}"
        )
    return value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            _kebab(f.name): _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
        }
    return list(value) if isinstance(value, tuple) else value


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _within(
    key: str, value: float, low: float, high: float, *, open_low: bool = False
) -> None:
    inside = low < value <= high if open_low else low <= value <= high
    if not inside:
        bracket = "(" if open_low else "["
        raise SettingsError(f"{key}: expected {bracket}{low}, {high}], got {value}")


def _at_least(key: str, value: float, low: float) -> None:
    if not low <= value < float("inf"):
        raise SettingsError(f"{key}: expected a value >= {low}, got {value}")


def _positive(key: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise SettingsError(f"{key}: expected a value > 0, got {value}")
