"""Preset + overrides -> frozen settings, checked by pydantic where they are made.

A preset is a YAML file in conf/, in groups and kebab-case; in code the same groups are
classes with Python's names. Unknown keys, wrong types and impossible values are errors
that say what was expected, what came and what is known.
"""

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from autoflip_flwr.errors import SettingsError
from autoflip_flwr.types import (
    Balance,
    Combination,
    MethodName,
    Mode,
    Normalization,
    ScoreName,
    ValueType,
)

ServerStrategy = Literal["fedavg", "fedavgm", "fedadam", "fedprox", "fedmedian", "krum"]
PrunedWeights = Literal["zero", "keep"]
Agreement = Literal["none", "vote", "sign"]
StrategyName = Literal["fedavg", MethodName]

#: Methods that exchange a share of the kept weights -> that share at first.
REPLACED: dict[StrategyName, float] = {"feddst": 0.5, "fedrts": 0.2, "fedtiny": 0.2}

T = TypeVar("T")

Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]

#: Several values; one alone, and a list as YAML has it, will do.
Several = Annotated[
    tuple[T, ...],
    BeforeValidator(lambda v: (v,) if isinstance(v, str | int) else v),
    Field(strict=False),
]


def kebab(name: str) -> str:
    """Return a setting's name in presets."""
    return name.replace("_", "-")


class Group(BaseModel):
    """Settings that belong together; wrong ones are a `SettingsError`."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=kebab,
        validate_by_name=True,
        validate_by_alias=True,
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _explained(type(self), error, code=True) from None

    # Groups inside a group are checked with it, and named by their place in it.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class StrategySettings(Group):
    """Who takes part in a round, and how replies are aggregated."""

    name: StrategyName = "autoflip"  # fedavg: dense
    server: ServerStrategy = "fedavg"  # the inner strategy of all
    weighted: bool = True  # mean by samples; false: the paper's, Alg. 1, line 14
    fraction_train: PositiveShare = 1.0  # of the connected nodes that train
    fraction_evaluate: Share = 0.0  # share that evaluates on its own held-out data
    min_nodes: AtLeastOne = 2  # connected nodes to wait for before each sampling
    wait: Positive = 60.0  # seconds to wait for `min-nodes` before the first round
    timeout: Positive = 3600.0  # seconds to wait for the replies of a round
    # How many times as long as for the first half of the replies to wait for the rest;
    # null: `timeout` alone. Who comes too late is missing in that round.
    straggler_factor: Annotated[float, Field(gt=1)] | None = None
    # A file of the server that binds clients' names to their nodes' keys, for all runs
    # that name it. Empty: a name belongs to the node that gives it first.
    names: str = ""
    server_learning_rate: Positive | None = None  # fedavgm, fedadam; None: Flower's own
    server_momentum: Share | None = None  # fedavgm
    proximal_mu: NotNegative = 0.01  # fedprox
    malicious_nodes: Count = 0  # krum: how many to defend against


class ExplorationSettings(Group):
    """How clients explore their loss landscapes (Alg. 1, lines 2-3)."""

    epochs: AtLeastOne = 1  # local epochs of an explorer, at most
    fraction: PositiveShare = 1.0  # share of the nodes that explore
    patience: AtLeastOne = 5  # epochs without a lower loss before an explorer stops
    every: Count = 0  # explore again every so many rounds; 0: once
    # Begin where the explorers on average ended, not at W0. None: yes if they explore
    # for the mask; no if the inner strategy is robust or private, or guidance noisy.
    warm_start: bool | None = None
    # Clients build W0, from a seed or a checkpoint (`AutoFlipMod(start=...)`); a digest
    # travels. Who builds other weights gets the server's.
    own_start: bool = False
    timeout: Positive = 3600.0  # seconds to wait for the explorers
    # Differential privacy on the client: L2 norm that guidance is clipped to, and the
    # noise's standard deviation as a multiple of it. 0: off.
    privacy_clip: NotNegative = 0.0
    privacy_noise: NotNegative = 0.0  # see privacy-clip

    @model_validator(mode="after")
    def _check(self) -> "ExplorationSettings":
        if (self.privacy_clip > 0) != (self.privacy_noise > 0):
            raise ValueError(
                "`privacy_clip` and `privacy_noise` go together: expected both > 0, or "
                f"both 0, got {self.privacy_clip} and {self.privacy_noise}"
            )
        if self.privacy_noise and self.warm_start:
            raise ValueError(
                "`warm_start` sends the signs of the updates without noise; with "
                "`privacy_noise` it must be false"
            )
        return self


class PruningSettings(Group):
    """From local guidance to the mask of a round (Eq. 3-4)."""

    threshold: NotNegative = 0.8  # quantile: share to prune; see mask.from_scores
    # Density of round 1. It falls to that of the threshold in `gradual_rounds` rounds.
    initial_density: PositiveShare = 0.6
    # None: half of a run's rounds; 20 of 27 to 39, three quarters of fewer. 0, at once,
    # where their number is not known.
    gradual_rounds: Count | None = None
    balance: Balance = "lamp"  # how layers share what is kept; global: the paper
    # Whether biases and scales of normalization are pruned, too. If not, they are kept
    # where they are at most half of what is kept.
    vectors: bool = False
    mode: Mode = "quantile"  # what the threshold is; see mask.from_scores
    # guidance: the paper; saliency: weight x movement; staged: saliency in the first
    # mask; in later ones the size of the weights as they are then, or their growth
    # where they began large, as embeddings do.
    score: ScoreName = "staged"
    normalization: Normalization = "client"  # global: the paper's Eq. 3
    population_weight: Share = 1.0  # weight of all explorers; 0: the paper
    floor: Share = 0.01  # least share of every tensor that is kept
    exclude: Several[str] = ()  # name patterns that are never pruned
    # Names of the trainable parameters. None: those of the model, if it is given; else
    # every floating array but those named like BatchNorm's buffers.
    prunable: Several[str] | None = None
    # At the server: zero (Alg. 1), or remember the last value and offer it again.
    pruned_weights: PrunedWeights = "zero"
    combination: Combination = "mean"  # of the explorers' matrices
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2  # trimmed-mean: share at each end
    agreement: Agreement = "none"  # of clients, mixed into the score
    agreement_weight: Share = 0.5  # its share of the score
    units: Share = 0.0  # share of what is pruned that falls on whole units
    # Share of the dense multiply-accumulates that the clients' network may need. Units
    # go by score per cost until it is reached, in place of `units`. None: no target.
    operations: PositiveShare | None = None
    min_units: AtLeastOne = 1  # least units of every group that are kept
    unit_multiple: AtLeastOne = 1  # groups are cut to multiples of this; 8 is faster

    @model_validator(mode="after")
    def _check(self) -> "PruningSettings":
        if self.mode == "compression" and self.threshold < 1:
            raise ValueError(
                "`threshold`: with `mode` compression expected a ratio all/kept >= 1, "
                f"got {self.threshold}"
            )
        if self.mode != "compression" and self.threshold > 1:
            raise ValueError(
                f"`threshold`: expected a number in [0, 1], got {self.threshold}"
            )
        if self.combination != "mean" and self.normalization != "client":
            raise ValueError(
                f"`combination` {self.combination} needs `normalization` client: with "
                f"{self.normalization} one explorer sets the scale of all"
            )
        if self.agreement != "none" and self.mode == "value":
            raise ValueError(
                "`agreement` needs a number of weights to keep: `mode` quantile or "
                "compression, got value"
            )
        return self

    def falling_rounds(self, rounds: int | None) -> int:
        """Return in how many of a run's `rounds` the density falls.

        Where `gradual_rounds` is None it is half of them, but 20 of 27 to 39 rounds and
        three quarters of fewer: the number of denser rounds matters, not their share. 0
        where `rounds` is not known, since the run may end before any schedule.
        """
        if self.gradual_rounds is not None:
            return self.gradual_rounds
        if rounds is None:
            return 0
        return min(rounds * 3 // 4, max(rounds // 2, 20))


class BaselineSettings(Group):
    """What only the methods that AutoFLIP is compared with have."""

    dense_rounds: Count = 2  # before weights are judged: magnitude, l1, ..., eflprune
    # random, magnitude, l1, l2, similarity, bn: choose anew before every round; pruned
    # weights keep their values at the server. eflprune always does.
    reselect: bool = False
    # Rounds from one adjustment to the next: prunefl, feddst, fedrts, fedtiny. None: a
    # twentieth of a run's rounds; where their number is not known, 10.
    every: AtLeastOne | None = None
    # feddst, fedrts, fedtiny: share of a layer's kept weights that is exchanged, at
    # first. None: 0.5 with feddst, else the authors' 0.2.
    replaced: Share | None = None
    # feddst, fedrts, fedtiny: last round that may adjust. None: half of a run's rounds;
    # where their number is not known, all, and the share stays as it is.
    until: Count | None = None


class WireSettings(Group):
    """What travels, and which replies are taken."""

    values: ValueType = "float32"  # type of the kept values
    min_replies: AtLeastOne = 1  # with fewer valid ones the round changes nothing
    # Replies and explorers that moved so many times as far as their median, or say they
    # stand for so many times its examples, are dropped. None: none are.
    outlier: Annotated[float, Field(ge=1)] | None = 100.0
    # The examples of a reply or explorer count in averages as at most so many times
    # their median. None: as many as it says, up to the outlier.
    weight_cap: Annotated[float, Field(ge=1)] | None = 10.0


class LogSettings(Group):
    """What a run writes beside its own files."""

    tensorboard: bool = False  # metrics of every round, for TensorBoard
    guidance: bool = False  # the last guidance of all explorers, as guidance.npz
    verbose: bool = False  # Flower's own log lines, too, and the history at the end


class TrainingSettings(Group):
    """Local training of one round."""

    epochs: AtLeastOne = 2  # local epochs per round (E)
    batch_size: AtLeastOne = 32  # samples of a step
    learning_rate: Positive = 0.02  # of the first round
    learning_rate_decay: PositiveShare = 1.0  # its factor from round to round
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"  # a new one in each round
    momentum: Share = 0.9  # sgd
    weight_decay: NotNegative = 0.0  # of the optimizer
    scale_penalty: NotNegative = 0.0  # times the sum of BatchNorm's absolute scales
    device: str = "auto"  # auto: cuda where there is one


class DataSettings(Group):
    """Which data, and which client holds what."""

    name: str = "digits"  # one of data.names()
    dir: str = ""  # folder or file; empty: bundled or downloaded
    hub: str = ""  # Flower Datasets id, in place of the known one
    # pathological: a few classes each; natural: the dataset's own users.
    partition: Literal["iid", "pathological", "dirichlet", "natural"] = "iid"
    alpha: Positive = 0.5  # dirichlet
    classes_per_client: AtLeastOne = 2  # pathological
    max_samples: AtLeastOne | None = None  # training samples, over all clients
    max_test_samples: AtLeastOne | None = None  # held-out ones of the global model
    label_noise: Share = 0.0  # share of the training labels that are drawn anew
    # Share of a client's samples kept for its evaluation; None: 0.2 where nodes
    # evaluate (strategy.fraction-evaluate), else 0.
    holdout: Annotated[float, Field(ge=0, le=0.9)] | None = None


class ModelSettings(Group):
    """Which network; None leaves a size at the model's own default."""

    name: str = "cnn"  # one of models.names()
    channels: Several[int] | None = None  # cnn
    hidden: int | None = None  # cnn, char_lstm
    embedding: int | None = None  # char_lstm
    vocabulary: int | None = None  # char_lstm

    def options(self) -> dict[str, Any]:
        """Return the sizes that are set, as `models.build` takes them."""
        return self.model_dump(exclude={"name"}, exclude_none=True)


class Settings(Group):
    """Everything a run depends on but the nodes themselves."""

    preset: str
    rounds: AtLeastOne = 20
    seed: Count = 0
    strategy: StrategySettings = StrategySettings()
    exploration: ExplorationSettings = ExplorationSettings()
    pruning: PruningSettings = PruningSettings()
    baselines: BaselineSettings = BaselineSettings()
    wire: WireSettings = WireSettings()
    log: LogSettings = LogSettings()
    training: TrainingSettings = TrainingSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        evaluates = self.strategy.fraction_evaluate > 0
        if evaluates and self.data.holdout == 0:
            raise ValueError(
                "strategy.fraction-evaluate > 0 needs data.holdout > 0: the share of a "
                "client's samples that it does not train on"
            )
        gradients = self.strategy.name in _ASK_FOR_GRADIENTS
        if self.exploration.privacy_noise and gradients:
            raise ValueError(
                "exploration.privacy-noise covers guidance, not gradients: set a "
                f"strategy.name other than {list(_ASK_FOR_GRADIENTS)}"
            )
        half, twentieth = self.rounds // 2, max(1, self.rounds // 20)
        self._resolve("data", holdout=0.2 if evaluates else 0.0)
        replaced = REPLACED.get(self.strategy.name, REPLACED["feddst"])
        self._resolve("baselines", until=half, every=twentieth, replaced=replaced)
        falling = self.pruning.falling_rounds(self.rounds)
        self._resolve("pruning", gradual_rounds=falling)
        return self

    def _resolve(self, group: str, **defaults: float) -> None:
        """Set what was left open and follows from other groups."""
        values = getattr(self, group)
        left = {k: v for k, v in defaults.items() if getattr(values, k) is None}
        # Frozen, but not made yet.
        object.__setattr__(self, group, values.model_copy(update=left))

    def flat(self) -> dict[str, Any]:
        """Return plain values by their dotted keys, the preset's name first."""
        found: dict[str, Any] = {}
        for key, value in self._plain().items():
            if isinstance(value, dict):
                found.update({f"{key}.{name}": inner for name, inner in value.items()})
            else:
                found[key] = value
        return found

    def identity(self) -> dict[str, Any]:
        """Return the values that a run depends on, by their dotted keys.

        All that its strategy reads, but not where files are, nor what is logged.
        """
        return {
            key: value
            for key, value in self.flat().items()
            if reads(self.strategy.name, key)
            and key not in ("data.dir", "strategy.names")
            and not key.startswith("log.")
        }

    def as_yaml(self) -> str:
        """Return all values, resolved, in a preset's form."""
        return yaml.safe_dump(self._plain(), sort_keys=False)

    def _plain(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


def reads(name: StrategyName, key: str) -> bool:
    """Tell whether a strategy looks at a setting, by its dotted key."""
    group, _, rest = key.partition(".")
    if name == "autoflip":
        return group != "baselines"
    if name == "fedavg":
        return group not in ("pruning", "exploration", "baselines", "wire")
    if group == "pruning":
        return rest in _PRUNING_OF_BASELINES
    if group == "baselines":
        return name in _BASELINES_READ.get(rest, ())
    return group != "exploration" or rest == "timeout"


#: Which methods read a setting of the group `baselines`.
_BASELINES_READ: dict[str, tuple[StrategyName, ...]] = {
    "dense-rounds": ("magnitude", "l1", "l2", "similarity", "bn", "eflprune"),
    "reselect": ("random", "magnitude", "l1", "l2", "similarity", "bn"),
    "every": ("prunefl", *REPLACED),
    "replaced": (*REPLACED,),
    "until": (*REPLACED,),
}

_ASK_FOR_GRADIENTS: tuple[StrategyName, ...] = ("ssfl", "prunefl", *REPLACED)

_PRUNING_OF_BASELINES = (
    "threshold",
    "mode",
    "floor",
    "exclude",
    "prunable",
    "min-units",
    "unit-multiple",
)


# --- presets and overrides -------------------------------------------------------


def presets() -> tuple[str, ...]:
    """Return the names of the presets, sorted."""
    return tuple(sorted(path.stem for path in _conf().glob("*.yaml")))


def about(preset: str) -> dict[str, str]:
    """Return what a preset's first lines say: `data`, `minutes` and what it `shows`.

    Minutes are those of a run on two cores.
    """
    text = (_conf() / f"{preset}.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"^# (data|minutes|shows): (.*)$", text, re.MULTILINE))


def load(preset: str, overrides: str = "") -> Settings:
    """Read a preset, a name in conf/, and apply overrides.

    These are dotted ``key=value`` pairs separated by spaces; values in YAML, quoted
    where they hold spaces: ``rounds=3 data.dir="my data"``. A SettingsError names the
    key, what was expected and what is known.
    """
    if preset not in presets():
        raise SettingsError(
            f"unknown preset {preset!r}; known: {list(presets())}"
            + meant(preset, presets())
        )
    path = _conf() / f"{preset}.yaml"
    try:
        values = _yaml(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{path.name} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path.name}: expected keys and values")
    return _overridden(values, preset, overrides)


def defaults(overrides: str = "") -> Settings:
    """Return the defaults of the library, with overrides as in `load`."""
    return _overridden({}, "", overrides)


def _overridden(values: dict[str, Any], preset: str, overrides: str) -> Settings:
    for key, value in parse_overrides(overrides):
        _set(values, key.split("."), value, key)
    if "preset" in values:
        raise SettingsError("preset: is the name of the file, not a key in it")
    return _checked({**values, "preset": preset})


def read(path: Path) -> Settings:
    """Read the resolved settings that a run wrote, else raise a SettingsError."""
    try:
        values = _yaml(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(
            f"expected a run's folder with {path.name} in it: {error}"
        ) from error
    if not isinstance(values, dict) or not isinstance(values.get("preset"), str):
        raise SettingsError(f"{path}: expected the settings of a run, with its preset")
    return _checked(_as_now(values))


def _as_now(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings that version 0.1 wrote under the names of today."""
    strategy = values.get("strategy")
    if "rivals" in values and isinstance(strategy, dict) and "outlier" in strategy:
        strategy = dict(strategy)
        wire = {**(values.get("wire") or {}), "outlier": strategy.pop("outlier")}
        values = {**values, "strategy": strategy, "wire": wire}
        values["baselines"] = values.pop("rivals")
    return values


def _checked(values: dict[str, Any]) -> Settings:
    try:
        return Settings.model_validate({str(key): v for key, v in values.items()})
    except ValidationError as error:
        raise _explained(Settings, error, code=False) from None


def _conf() -> Path:
    """conf/ inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does; no aliases, of which bombs are made."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None


def parse_overrides(overrides: str) -> Iterator[tuple[str, Any]]:
    """Yield key and value of each override, unchecked."""
    try:
        words = shlex.split(overrides)
    except ValueError as error:
        raise SettingsError(f"overrides {overrides!r}: {error}") from error
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise SettingsError(
                f"overrides: expected dotted key=value pairs, got {word!r}"
            )
        yield key, _parse_value(text)


def _parse_value(text: str) -> Any:
    """Read YAML; what is none (``*bias``, ``[*bias,fc*]``) is text or a list of it."""
    try:
        return _yaml(text) if text else ""
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


# --- errors ----------------------------------------------------------------------


def _explained(
    group: type[Group], error: ValidationError, *, code: bool
) -> SettingsError:
    """Say what was wrong: with Python's names in code, else with a preset's keys."""
    whole = group.model_json_schema()

    def written(prefix: str, name: str) -> str:
        return name.replace("-", "_") if code else f"{prefix}{kebab(name)}"

    unknown: dict[str, list[str]] = {}
    texts = []
    for each in error.errors():
        path = [kebab(part) for part in each["loc"] if isinstance(part, str)]
        schema, prefix = whole, ""
        while path and "$ref" in (inner := schema["properties"].get(path[0], {})):
            schema = whole["$defs"][inner["$ref"].rpartition("/")[2]]
            prefix += f"{path.pop(0)}."
        if each["type"] == "value_error":  # a check of ours, with names in backticks
            text = str(each["ctx"]["error"])
            for name in re.findall(r"`(\w+)`", text):
                text = text.replace(f"`{name}`", written(prefix, name))
            texts.append(text)
        elif not path:
            group_name = prefix.rstrip(".")
            texts.append(f"{group_name}: expected a group of keys, got {each['input']}")
        elif each["type"] == "extra_forbidden":
            known = sorted({written("", key) for key in schema["properties"]} - _OWN)
            key = str(each["loc"][-1])
            similar = meant(key, known) or _in_groups(key, whole)
            told = f"; known: {known}{similar}"
            place = "" if code else f"{prefix.rstrip('.') or 'top-level'} "
            unknown.setdefault(f"unknown {place}keys {{}}{told}", []).append(key)
        else:
            asked, got = schema["properties"][path[0]], each["input"]
            kind = f" ({type(got).__name__})" if isinstance(got, str | list) else ""
            texts.append(
                f"{written(prefix, path[0])}: expected {_expected(asked)}, "
                f"got {got!r}{kind}{meant(got, asked.get('enum', ()))}"
            )
    texts += [text.format(keys) for text, keys in unknown.items()]
    return SettingsError((f"{group.__name__}: " if code else "") + "; ".join(texts))


#: What stands in the settings of a run and in no preset.
_OWN = {"preset"}

_WORDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "null": "null",
}


def _expected(schema: dict[str, Any]) -> str:
    """Describe a JSON schema's values: ``a number in [0, 1], or null``."""
    if "anyOf" in schema:
        return ", or ".join(map(_expected, schema["anyOf"]))
    if "enum" in schema:
        return f"one of {schema['enum']}"
    if schema["type"] == "array":
        return f"a list, each {_expected(schema['items'])}"
    text = _WORDS[schema["type"]]
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if high is not None:
        left = "[" if "minimum" in schema else "("
        right = "]" if "maximum" in schema else ")"
        return f"{text} in {left}{low:g}, {high:g}{right}"
    if low is not None:
        return f"{text} {'>=' if 'minimum' in schema else '>'} {low:g}"
    return text


def _in_groups(key: str, schema: dict[str, Any]) -> str:
    """Return a hint at the groups that have a key, where their name was left out."""
    groups = {
        group: schema["$defs"][inner["$ref"].rpartition("/")[2]]["properties"]
        for group, inner in schema["properties"].items()
        if "$ref" in inner
    }
    close = difflib.get_close_matches(key, {k for g in groups.values() for k in g}, n=1)
    found = [f"{g}.{k}" for g, keys in groups.items() for k in keys if k in close]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def meant(word: Any, known: Iterable[str]) -> str:
    """Return a hint at the most similar of the known words; empty: none is similar."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
