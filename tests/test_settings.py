"""Presets load, overrides do what they say, and a mistake lists what is allowed."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from autoflip_flwr import settings as module
from autoflip_flwr.errors import SettingsError
from autoflip_flwr.settings import (
    ExplorationSettings,
    PruningSettings,
    Settings,
    WireSettings,
    load,
    presets,
    read,
)

properties = hypothesis_settings(max_examples=50)


def quoted(text):
    """One word for the shell, whatever is in it."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


# --- presets ----------------------------------------------------------------------


@pytest.mark.parametrize("preset", presets())
def test_every_preset_loads(preset):
    found = load(preset)
    assert isinstance(found, Settings)
    assert found.preset == preset


def test_the_papers_presets_leave_the_papers_choices_alone():
    for preset in presets():
        if preset.startswith("paper-"):
            pruning = load(preset).pruning
            assert (pruning.population_weight, pruning.score) == (0.0, "guidance")


def test_the_default_preset_is_there_and_presets_are_sorted():
    assert "quickstart" in presets()
    assert list(presets()) == sorted(presets())


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(SettingsError, match=r"unknown preset 'nope'; known:.*quickst"):
        load("nope")


def test_a_preset_is_a_name_and_not_a_path():
    with pytest.raises(SettingsError, match="unknown preset"):
        load("../conf/quickstart")


@pytest.mark.parametrize("preset", presets())
def test_the_resolved_settings_are_a_preset_that_means_the_same(
    preset, tmp_path, monkeypatch
):
    overrides = (
        "data.dir='my data' model.channels=[3,5] pruning.exclude=[a*,b] "
        "training.learning-rate=1e-5 strategy.server-learning-rate=0.1 "
        "data.max-samples=17 pruning.floor=0.125"
    )
    before = load(preset, overrides)
    values = yaml.safe_load(before.as_yaml())
    assert values.pop("preset") == preset
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / f"{preset}.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(module, "_conf", lambda: tmp_path / "conf")
    assert load(preset) == before


def test_the_resolved_settings_name_every_value():
    values = yaml.safe_load(load("quickstart").as_yaml())
    for name in Settings.model_fields:
        found = values[name]
        if name in ("preset", "rounds", "seed"):
            continue
        kind = type(getattr(load("quickstart"), name))
        assert set(found) == {field.replace("_", "-") for field in kind.model_fields}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds: [1", r"broken\.yaml is not YAML"),
        ("- rounds", r"broken\.yaml: expected keys and values"),
        ("preset: mine", "preset: is the name of the file"),
        ("pruning: 0.5", "pruning: expected a group of keys, got 0.5"),
        ("pruning:", "pruning: expected a group of keys, got None"),
        ("round: 3", r"unknown top-level keys \['round'\]; known: \[.*'rounds'"),
        ("3: 3", r"unknown top-level keys \['3'\]"),
    ],
)
def test_a_broken_preset_says_what_is_wrong(tmp_path, monkeypatch, text, message):
    (tmp_path / "broken.yaml").write_text(text)
    monkeypatch.setattr(module, "_conf", lambda: tmp_path)
    with pytest.raises(SettingsError, match=message):
        load("broken")


def test_an_empty_preset_is_the_defaults(tmp_path, monkeypatch):
    (tmp_path / "bare.yaml").write_text("")
    monkeypatch.setattr(module, "_conf", lambda: tmp_path)
    assert load("bare") == Settings(preset="bare")


# --- overrides --------------------------------------------------------------------


def test_overrides_are_applied_last_and_from_left_to_right():
    found = load("quickstart", "rounds=3 pruning.threshold=0.25 rounds=4")
    assert found.rounds == 4
    assert found.pruning.threshold == 0.25
    assert found.data == load("quickstart").data


@pytest.mark.parametrize(
    ("override", "group", "name", "expected"),
    [
        ('data.dir="my data/x y"', "data", "dir", "my data/x y"),
        ("'data.dir=my data'", "data", "dir", "my data"),
        ("data.dir=", "data", "dir", ""),
        ("data.dir=a=b", "data", "dir", "a=b"),
        ("data.max-samples=null", "data", "max_samples", None),
        ("data.max-samples=100", "data", "max_samples", 100),
        ("training.learning-rate=1e-3", "training", "learning_rate", 0.001),
        ("training.learning-rate=1", "training", "learning_rate", 1.0),
        ("pruning.exclude=[bias,fc.*]", "pruning", "exclude", ("bias", "fc.*")),
        ("pruning.exclude='[bias, fc.*]'", "pruning", "exclude", ("bias", "fc.*")),
        ("pruning.exclude=bias", "pruning", "exclude", ("bias",)),
        ("pruning.exclude=[]", "pruning", "exclude", ()),
        ("model.channels=[8,16]", "model", "channels", (8, 16)),
        ("model.channels=null", "model", "channels", None),
        ("wire.values=float16", "wire", "values", "float16"),
        ("strategy.server=fedadam", "strategy", "server", "fedadam"),
    ],
)
def test_an_override_becomes_the_settings_type(override, group, name, expected):
    found = getattr(getattr(load("quickstart", override), group), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruning.treshold=0.5", r"unknown pruning keys \['treshold'\].*'threshold'"),
        ("prunning.threshold=0.5", r"unknown top-level keys \['prunning'\].*'pruning'"),
        ("rounds.x=3", "unknown key 'rounds.x': rounds is not a group"),
        ("training.epochs.x=3", "epochs"),
        ("pruning=3", "pruning: expected a group of keys, got 3"),
        ("pruning.mode=median", r"pruning\.mode: .*'quantile', 'value', 'compression'"),
        ("strategy.name=fedfoo", r"strategy\.name: expected .*'fedavg', 'autoflip', "),
        ("wire.values=[float16]", r"wire\.values: expected one of \['float32'"),
        ("rounds=true", "rounds: expected a whole number >= 1, got True"),
        ("pruning.threshold=true", r"pruning\.threshold: expected a number .*got True"),
        ("rounds=3.0", "rounds: expected a whole number >= 1, got 3.0"),
        ("rounds=many", "rounds: expected a whole number >= 1, got 'many'"),
        ("rounds=null", "rounds: expected a whole number >= 1, got None"),
        ("data.name=3", r"data\.name: expected a text, got 3"),
        ("data.name=no", r"data\.name: expected a text, got False"),
        (
            "pruning.exclude=[1]",
            r"pruning\.exclude: expected a list, each a text, got 1",
        ),
        (
            "model.channels=[8,x]",
            r"model\.channels: expected a list, each a whole number.*got 'x'",
        ),
        (
            "training.learning-rate=fast",
            r"learning-rate: expected a number > 0, got 'fast'",
        ),
        ("rounds", "expected dotted key=value pairs, got 'rounds'"),
        ("=3", "expected dotted key=value pairs, got '=3'"),
        ("data.dir='open", "overrides .*quotation"),
        ("preset=mnist", "preset: is the name of the file"),
    ],
)
def test_a_mistaken_override_says_what_is_allowed(override, message):
    with pytest.raises(SettingsError, match=message):
        load("quickstart", override)


@pytest.mark.parametrize("text", ["*bias", "[a", "2024-13-45", "0x_", "!!int;x"])
def test_what_yaml_cannot_read_is_text(text):
    assert load("quickstart", f"data.dir={text}").data.dir == text
    with pytest.raises(
        SettingsError, match="rounds: expected a whole number >= 1, got"
    ):
        load("quickstart", f"rounds={text}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=0", "rounds: expected a whole number >= 1, got 0"),
        ("seed=-1", "seed: expected a whole number >= 0, got -1"),
        (
            "strategy.fraction-train=0",
            r"fraction-train: expected a number in \(0, 1\], got 0",
        ),
        (
            "strategy.fraction-evaluate=1.5",
            r"fraction-evaluate: expected a number in \[0, 1\]",
        ),
        ("strategy.min-nodes=0", "min-nodes: expected a whole number >= 1"),
        ("strategy.timeout=0", "timeout: expected a number > 0"),
        ("strategy.timeout=.inf", "timeout: expected a number > 0, got inf"),
        ("strategy.server-learning-rate=0", "server-learning-rate: .* > 0"),
        (
            "strategy.server-momentum=2",
            r"server-momentum: expected a number in \[0, 1\]",
        ),
        ("strategy.malicious-nodes=-1", "malicious-nodes: .* >= 0"),
        ("exploration.epochs=0", r"exploration\.epochs: .* >= 1"),
        (
            "exploration.fraction=0",
            r"exploration\.fraction: expected a number in \(0, 1\]",
        ),
        ("exploration.patience=0", r"exploration\.patience: .* >= 1"),
        ("exploration.every=-1", r"exploration\.every: .* >= 0"),
        (
            "pruning.threshold=1.5",
            r"pruning\.threshold: expected a number in \[0, 1\], got 1.5",
        ),
        (
            "pruning.threshold=nan",
            r"pruning\.threshold: expected a number >= 0, got 'nan'",
        ),
        ("pruning.mode=compression pruning.threshold=0.5", r"ratio all/kept.* >= 1"),
        (
            "pruning.population-weight=-0.1",
            r"population-weight: expected a number in \[0, 1\]",
        ),
        ("pruning.floor=2", r"pruning\.floor: expected a number in \[0, 1\]"),
        ("training.epochs=0", r"training\.epochs: .* >= 1"),
        ("training.batch-size=0", r"training\.batch-size: .* >= 1"),
        ("training.learning-rate=-1", r"training\.learning-rate: .* > 0"),
        ("training.learning-rate=nan", r"training\.learning-rate: .* > 0, got 'nan'"),
        ("training.momentum=1.1", r"training\.momentum: expected a number in \[0, 1\]"),
        ("training.weight-decay=-1", r"training\.weight-decay: .* >= 0"),
        ("data.alpha=0", r"data\.alpha: .* > 0"),
        ("data.classes-per-client=0", r"data\.classes-per-client: .* >= 1"),
        ("data.max-samples=0", r"data\.max-samples: .* >= 1"),
        ("data.max-test-samples=0", r"data\.max-test-samples: .* >= 1"),
        ("data.holdout=0.95", r"data\.holdout: expected a number in \[0, 0.9\]"),
    ],
)
def test_impossible_values_are_refused_with_their_range(override, message):
    with pytest.raises(SettingsError, match=message):
        load("quickstart", override)


def test_compression_takes_a_ratio():
    found = load("quickstart", "pruning.mode=compression pruning.threshold=10")
    assert found.pruning.threshold == 10.0


def test_settings_made_in_code_are_checked_too():
    with pytest.raises(SettingsError, match=r"PruningSettings: mode: expected one of"):
        PruningSettings(mode="median")
    with pytest.raises(
        SettingsError, match=r"PruningSettings: pruned_weights: expected one"
    ):
        PruningSettings(pruned_weights="lost")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("pruning.treshold=0.5", "did you mean 'threshold'"),
        ("prunning.threshold=0.5", "did you mean 'pruning'"),
        ("pruning.mode=quantil", "did you mean 'quantile'"),
    ],
)
def test_a_typo_is_answered_with_what_may_have_been_meant(word, meant):
    with pytest.raises(SettingsError, match=meant):
        load("quickstart", word)
    with pytest.raises(SettingsError, match="did you mean 'quickstart'"):
        load("quickstar")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruningSettings(threshold="0.8"), "threshold: expected a number"),
        (lambda: PruningSettings(min_unit=1), r"\['min_unit'\].*mean 'min_units'"),
        (lambda: WireSettings(min_replies=0), "min_replies: expected a whole number"),
        (
            lambda: ExplorationSettings(privacy_clip=1.0),
            "privacy_clip and privacy_noise go together",
        ),
    ],
)
def test_in_code_the_names_are_pythons(make, message):
    with pytest.raises(SettingsError, match=message) as raised:
        make()
    assert "privacy-clip" not in str(raised.value)


def test_settings_cannot_be_changed_after_the_check():
    with pytest.raises(ValidationError, match="frozen"):
        PruningSettings().threshold = 2.0


def test_options_are_the_models_sizes_that_are_set():
    assert load("quickstart", "model.hidden=7 model.name=cnn").model.options() == {
        "hidden": 7
    }


NUMBERS = {
    ("", "rounds"): st.integers(1, 10**9),
    ("", "seed"): st.integers(0, 2**31),
    ("pruning", "threshold"): st.floats(0, 1),
    ("pruning", "floor"): st.floats(0, 1),
    ("pruning", "population-weight"): st.floats(0, 1),
    ("training", "learning-rate"): st.floats(0, exclude_min=True, allow_infinity=False),
    ("training", "batch-size"): st.integers(1, 10**6),
    ("data", "alpha"): st.floats(0, exclude_min=True, allow_infinity=False),
    ("data", "max-samples"): st.none() | st.integers(1, 10**9),
    ("data", "holdout"): st.floats(0, 0.9),
}


@properties
@given(values=st.fixed_dictionaries({}, optional=NUMBERS))
def test_every_possible_number_survives_the_way_through_an_override(values):
    words = [
        f"{group}.{key}={'null' if value is None else value!r}".lstrip(".")
        for (group, key), value in values.items()
    ]
    found = load("quickstart", " ".join(words))
    for (group, key), value in values.items():
        where = getattr(found, group) if group else found
        stored = getattr(where, key.replace("-", "_"))
        assert stored == value
        assert type(stored) is type(value)
        assert value is None or math.copysign(1, stored) == math.copysign(1, value)


@properties
@given(
    text=st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12
    )
)
def test_any_folder_survives_as_yaml_and_as_an_override(text):
    written = yaml.safe_dump(text, default_style='"', allow_unicode=True, width=10**6)
    found = load("quickstart", "data.dir=" + quoted(written.strip()))
    assert found.data.dir == text
    assert yaml.safe_load(found.as_yaml())["data"]["dir"] == text


def test_nodes_that_evaluate_hold_samples_out():
    assert load("quickstart").data.holdout == 0
    assert load("quickstart", "strategy.fraction-evaluate=0.5").data.holdout == 0.2
    chosen = "strategy.fraction-evaluate=0.5 data.holdout=0.1"
    assert load("quickstart", chosen).data.holdout == 0.1
    with pytest.raises(SettingsError, match=r"needs data\.holdout > 0"):
        load("quickstart", "strategy.fraction-evaluate=0.5 data.holdout=0")


def test_a_run_is_what_its_strategy_reads():
    one = load("quickstart", "strategy.name=l1 pruning.units=0.5 data.dir=/a")
    other = load("quickstart", "strategy.name=l1 log.tensorboard=true data.dir=/b")
    assert one.identity() == other.identity()
    assert one.identity()["pruning.threshold"] == 0.8
    assert "pruning.units" not in one.identity()
    for change in ("pruning.threshold=0.5", "seed=1", "model.hidden=9", "rounds=3"):
        assert load("quickstart", f"strategy.name=l1 {change}").identity() != (
            one.identity()
        )
    assert load("quickstart", "pruning.units=0.5").identity() != (
        load("quickstart").identity()
    )


def test_the_settings_of_a_run_of_version_0_1_are_read(tmp_path):
    values = yaml.safe_load(load("quickstart", "seed=3").as_yaml())
    values["rivals"] = values.pop("baselines") | {"replaced": 0.25}
    values["strategy"]["outlier"] = 7.0
    del values["wire"]["outlier"], values["wire"]["min-replies"]
    del values["pruning"]["prunable"]
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    found = read(tmp_path / "settings.yaml")
    assert (found.seed, found.wire.outlier, found.baselines.replaced) == (3, 7.0, 0.25)
