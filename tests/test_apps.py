"""Our ServerApp and ClientApp, and the examples, composed in this process."""

import difflib
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict
from inprocess import ROOT, LocalGrid, assert_same_arrays
from safetensors.numpy import load_file
from test_runlog import client_app, go, lines_of, server_app, summary_of

from autoflip_flwr.app import build as experiment
from autoflip_flwr.errors import AutoFlipError
from autoflip_flwr.settings import load

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", ["autoflip", "fedavg"])
@pytest.mark.parametrize(
    "server", ["fedavg", "fedavgm", "fedadam", "fedprox", "fedmedian", "krum"]
)
def test_every_server_strategy_runs(server, name, tmp_path):
    go(tmp_path / "run", f"strategy.server={server} strategy.name={name}")
    arrays = load_file(tmp_path / "run" / "model.safetensors")
    assert all(np.isfinite(value).all() for value in arrays.values())
    first, second = lines_of(tmp_path / "run")
    assert first["loss"] != second["loss"]
    assert summary_of(tmp_path / "run")["strategy"] == name


@pytest.mark.parametrize("name", ["autoflip", "fedavg"])
def test_momentum_at_the_server_keeps_variances_above_zero(name, tmp_path):
    go(
        tmp_path / "run",
        "model.name=cnn_bn model.channels=[4,8] strategy.server=fedavgm rounds=8 "
        f"strategy.server-momentum=0.9 strategy.name={name}",
    )
    arrays = load_file(tmp_path / "run" / "model.safetensors")
    variances = [v for n, v in arrays.items() if n.endswith("running_var")]
    assert variances
    assert all((v > 0).all() for v in variances)
    assert all(np.isfinite(line["loss"]) for line in lines_of(tmp_path / "run"))


@pytest.mark.parametrize(
    ("server", "more"),
    [
        ("fedavgm", "strategy.server-momentum=0.9"),
        ("fedavgm", "strategy.server-learning-rate=0.5"),
        ("fedadam", "strategy.server-learning-rate=0.001"),
        ("fedprox", "strategy.proximal-mu=5.0"),
    ],
)
def test_settings_of_a_server_strategy_have_an_effect(server, more, tmp_path):
    def weights(folder, extra):
        go(folder, f"strategy.server={server} training.batch-size=8 {extra}")
        return load_file(folder / "model.safetensors")["fc1.weight"]

    plain = weights(tmp_path / "plain", "")
    other = weights(tmp_path / "other", more)
    assert not np.array_equal(plain, other)


@pytest.mark.parametrize(
    "overrides",
    [
        "pruning.pruned-weights=keep pruning.population-weight=0",
        "pruning.mode=compression pruning.threshold=10",
        "pruning.score=guidance pruning.normalization=global",
        "pruning.normalization=layer exploration.epochs=2 exploration.every=1",
        "wire.values=float16 exploration.fraction=0.5",
        "pruning.exclude=[*bias,fc2*] pruning.units=0 training.optimizer=adam",
    ],
)
def test_documented_settings_run(overrides, tmp_path):
    go(tmp_path / "run", overrides)
    masks = np.load(tmp_path / "run" / "mask.npz", allow_pickle=False)
    arrays = load_file(tmp_path / "run" / "model.safetensors")
    for name in masks.files:
        assert not arrays[name][~masks[name]].any()
    expected = 0.1 if "compression" in overrides else 0.2
    assert summary_of(tmp_path / "run")["density"] == pytest.approx(expected, abs=0.005)


def test_nodes_of_our_app_build_the_start_weights_from_the_seed(tmp_path):
    explorations, models, down = [], [], []
    for own in ("false", "true"):
        grid = go(tmp_path / own, f"seed=5 exploration.own-start={own}")
        explorations.append([s for s in grid.down if s.phase == "explore"])
        models.append(load_file(tmp_path / own / "model.safetensors"))
        down.append(lines_of(tmp_path / own)[0]["bytes_down"])
    assert_same_arrays(*models)
    sent, built = explorations
    assert [s.node_id for s in built] == [s.node_id for s in sent]
    assert [len(s.arrays) for s in built] == [0] * len(sent)
    weights = sum(values.nbytes for values in models[0].values())
    assert down[0] - down[1] > len(sent) * weights


def test_nodes_evaluate_the_global_model_on_data_they_do_not_train_on(tmp_path):
    grid = go(tmp_path / "run", "data.holdout=0.25 strategy.fraction-evaluate=1")
    trained = {s.node_id: s.metrics for s in grid.up if s.phase == "train"}
    evaluated = {s.node_id: s.metrics for s in grid.up if s.phase == "evaluate"}
    assert set(trained) == set(evaluated) == {1, 2, 3, 4}
    for node_id, metrics in evaluated.items():
        total = metrics["num-examples"] + trained[node_id]["num-examples"]
        assert metrics["num-examples"] == round(0.25 * total)
        assert 0 <= metrics["accuracy"] <= 1
        assert metrics["loss"] > 0


def test_a_nodes_held_out_samples_are_none_of_its_training_samples():
    settings = load("quickstart", "data.holdout=0.3")
    train, held = experiment.node_samples(
        settings, {"partition-id": 1, "num-partitions": 5}
    )
    whole, none = experiment.node_samples(
        load("quickstart"), {"partition-id": 1, "num-partitions": 5}
    )
    assert len(train) + len(held) == len(whole)
    assert len(none) == 0
    rows = sorted(x.tobytes() for x in (*train.x, *held.x))
    assert rows == sorted(x.tobytes() for x in whole.x)


def write_node_data(path, count, label):
    rng = np.random.default_rng(label)
    np.savez(
        path,
        x_train=rng.integers(0, 17, (count, 8, 8), dtype=np.uint8),
        y_train=np.full(count, label, np.int64),
    )


def test_a_node_with_data_of_its_own_trains_on_them(tmp_path):
    configs = {}
    for node_id, count in ((31, 40), (32, 24), (33, 33)):
        path = tmp_path / f"{node_id}.npz"
        write_node_data(path, count, node_id % 10)
        configs[node_id] = {"data-path": str(path)}
    configs[34] = {"partition-id": 0, "num-partitions": 4}
    grid = go(tmp_path / "run", nodes=configs, node_configs=configs)
    counts = {
        s.node_id: s.metrics["num-examples"] for s in grid.up if s.phase == "train"
    }
    assert counts == {31: 40, 32: 24, 33: 33, 34: 30}
    assert lines_of(tmp_path / "run")[-1]["dropped"] == 0


def test_nodes_with_data_of_their_own_draw_batches_of_their_own(tmp_path):
    """Two nodes with the same file are two clients, not one twice."""
    path = tmp_path / "same.npz"
    write_node_data(path, 64, 3)
    configs = {i: {"data-path": str(path)} for i in (1, 2, 3, 4)}
    again = go(tmp_path / "run", nodes=configs, node_configs=configs)
    frames = {s.arrays["autoflip.values"].data for s in again.up if s.phase == "train"}
    assert len(frames) >= 2


@pytest.mark.parametrize("config", [{}, {"partition-id": 1}], ids=["nothing", "half"])
def test_a_node_that_says_nothing_of_its_data_is_told_what_to_say(config):
    with pytest.raises(AutoFlipError, match="data-path"):
        experiment.node_samples(load("quickstart"), config)


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("quikstart", "", "quikstart.*quickstart"),
        ("quickstart", "pruning.treshold=0.5", "treshold.*threshold"),
        ("quickstart", "prunning.threshold=0.5", "prunning.*pruning"),
        ("quickstart", "rounds=many", "rounds"),
        ("quickstart", "pruning.threshold=2", "threshold"),
        ("quickstart", "model.name=cnm", "cnm.*cnn"),
        ("quickstart", "data.name=digit", "digit.*digits"),
        ("quickstart", "data.partition=iidd", "iidd"),
        ("quickstart", "strategy.server=fedsgd", "fedavg.*fedsgd"),
        ("quickstart", "strategy.name=flip", "autoflip.*'flip'"),
        ("quickstart", "model.hidden=0", "hidden"),
        ("quickstart", "model.embedding=5", "embedding"),
        ("quickstart", "rounds", "key=value"),
    ],
)
def test_a_mistake_in_the_settings_ends_the_run_before_any_client_hears_of_it(
    preset, overrides, message, tmp_path
):
    config = {
        "preset": preset,
        "overrides": overrides,
        "output-dir": str(tmp_path / "run"),
    }
    grid = LocalGrid(client_app.app, [1, 2, 3], run_config=config)
    with pytest.raises(AutoFlipError, match=f"(?s){message}"):
        server_app.app(grid, Context(1, 1, {}, RecordDict(), config))
    assert not grid.sent
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", r"train-images-idx3-ubyte\[.gz\].*from https://ossci"),
        ("cifar10", r"cifar-10-batches-py/, from https://www.cs.toronto.edu"),
        ("cifar100", r"cifar-100-python/, from https://www.cs.toronto.edu"),
        ("femnist", r"LEAF's JSON files of femnist.*train/ and test/.*TalwalkarLab"),
        ("shakespeare", r"LEAF's JSON files of shakespeare.*TalwalkarLab"),
    ],
)
def test_a_paper_preset_without_its_data_names_the_files_before_any_client_starts(
    name, message, tmp_path
):
    (tmp_path / "empty").mkdir()
    overrides = f"data.dir={tmp_path / 'empty'}"
    test_a_mistake_in_the_settings_ends_the_run_before_any_client_hears_of_it(
        f"paper-{name}", overrides, message, tmp_path
    )


def test_a_share_of_the_training_labels_is_drawn_anew():
    node = {"partition-id": 1, "num-partitions": 5}
    clean, held = experiment.node_samples(load("quickstart", "data.holdout=0.5"), node)
    overrides = "data.holdout=0.5 data.label-noise=0.4"
    noisy, same = experiment.node_samples(load("quickstart", overrides), node)
    np.testing.assert_array_equal(noisy.x, clean.x)
    np.testing.assert_array_equal(same.y, held.y)
    # A tenth of the classes drawn is the true one: 0.4 x 0.9 are wrong.
    assert 0.25 < np.mean(noisy.y != clean.y) <= 0.4


def test_nodes_draw_wrong_labels_apart(tmp_path):
    write_node_data(tmp_path / "same.npz", 50, label=3)
    noisy = load("quickstart", "data.label-noise=1")
    one, other, again = (
        experiment.node_samples(
            noisy, {"data-path": str(tmp_path / "same.npz"), "client-id": name}
        )[0].y
        for name in ("ward 1", "ward 2", "ward 1")
    )
    assert 0 < np.mean(one == other) < 0.5
    np.testing.assert_array_equal(one, again)


@pytest.mark.parametrize(
    ("weighted", "weights"), [("true", [40, 24]), ("false", [1, 1])]
)
def test_an_unweighted_mean_gives_every_client_the_same_weight(
    weighted, weights, tmp_path
):
    """Line 14 of Algorithm 1 beside FedAvg's mean."""
    configs = {}
    for node_id, count in ((31, 40), (32, 24)):
        path = tmp_path / f"{node_id}.npz"
        write_node_data(path, count, node_id % 10)
        configs[node_id] = {"data-path": str(path)}
    overrides = (
        f"strategy.name=fedavg strategy.weighted={weighted} strategy.min-nodes=2 "
        "strategy.fraction-train=1 rounds=1"
    )
    grid = go(tmp_path / "run", overrides, nodes=configs, node_configs=configs)
    trained = [s for s in grid.up if s.phase == "train"]
    replies = sorted(trained, key=lambda s: s.node_id)
    assert [s.metrics["num-examples"] for s in replies] == [40, 24]
    expected = np.average(
        [s.arrays["fc2.bias"].numpy() for s in replies], axis=0, weights=weights
    )
    found = load_file(tmp_path / "run" / "model.safetensors")["fc2.bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_client_answers_the_roll_call():
    for config, expected in (
        ({"partition-id": 4, "num-partitions": 9}, 4),
        ({"data-path": "/data", "client-id": "ward 3"}, "ward 3"),
        ({"data-path": "/data"}, -1),
        ({}, -1),
    ):
        grid = LocalGrid(client_app.app, [8], node_configs={8: config})
        (reply,) = grid.send_and_receive([Message(RecordDict(), 8, "query")])
        assert dict(reply.content["config"]) == {"client-id": expected}


def test_every_call_of_the_client_has_a_seed_of_its_own():
    settings = load("quickstart")
    calls = [
        (ConfigRecord({"server-round": r, "autoflip.epoch": e}), {"partition-id": p})
        for r in (1, 2, 3)
        for e in (0, 1, 2)
        for p in (0, 1, 2)
    ]
    calls += [({"server-round": r}, {"partition-id": 0}) for r in (1, 2, 3)]
    data = {"data-path": "/data/train.npz"}  # the same in every container
    calls += [({}, data), ({}, data | {"client-id": "a"})]
    calls += [({}, data | {"client-id": "b"})]
    seeds = [experiment.call_seed(settings, *call) for call in calls]
    assert len(set(seeds)) == len(seeds) == 33
    assert seeds == [experiment.call_seed(settings, *call) for call in calls]
    other = load("quickstart", "seed=1")
    assert not set(seeds) & {experiment.call_seed(other, *call) for call in calls}


# --- the examples ---------------------------------------------------------------------


def files_below(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def changed_lines(before: str, after: str) -> int:
    """Lines added, removed or replaced; a replaced line is one."""
    matcher = difflib.SequenceMatcher(
        None, before.splitlines(), after.splitlines(), autojunk=False
    )
    return sum(
        max(i2 - i1, j2 - j1)
        for tag, i1, i2, j1, j2 in matcher.get_opcodes()
        if tag != "equal"
    )


@pytest.mark.parametrize("example", ["message_api", "legacy_api"])
def test_an_existing_app_takes_part_with_four_changed_lines_at_most(example):
    before = files_below(EXAMPLES / example / "before")
    after = files_below(EXAMPLES / example / "after")
    assert set(before) == set(after)
    assert {"pyproject.toml", "digits_app/task.py"} <= set(before)
    changes = {name: changed_lines(before[name], after[name]) for name in before}
    assert 2 <= sum(changes.values()) <= 4, changes
    assert not any("autoflip" in text for text in before.values())


@pytest.fixture
def digits_app(monkeypatch):
    """Import an example's two apps, and forget them again."""

    def forget():
        for name in [n for n in sys.modules if n.partition(".")[0] == "digits_app"]:
            monkeypatch.delitem(sys.modules, name)

    def load_version(version):
        monkeypatch.syspath_prepend(str(EXAMPLES / "message_api" / version))
        forget()
        from digits_app import client_app, server_app

        assert f"/{version}/" in str(client_app.__file__)
        return client_app, server_app

    yield load_version
    forget()


def run_example(client, server, rounds):
    config = {
        "num-server-rounds": rounds,
        "fraction-train": 1.0,
        "local-epochs": 1,
        "lr": 0.05,
        "seed": 0,
    }
    grid = LocalGrid(client.app, range(1, 5), run_config=config)
    server.app(grid, Context(1, 1, {}, RecordDict(), config))
    return grid


@pytest.mark.parametrize("version", ["before", "after", "smaller"])
def test_the_example_runs_before_and_after(version, digits_app, capsys):
    grid = run_example(*digits_app(version), rounds=2)
    said = capsys.readouterr().out
    accuracy = float(said.rpartition("final accuracy ")[2])
    assert accuracy > 0.2, "better than guessing among ten"
    assert len(grid.nodes("explore")) == (0 if version == "before" else 4)
    down = [s.content["arrays"].count_bytes() for s in grid.down if s.phase == "train"]
    dense = max(down) > 200_000
    assert dense is (version == "before")


def test_the_smaller_example_trains_a_smaller_network(digits_app, monkeypatch):
    client, server = digits_app("smaller")
    widths = []
    train = client.train_fn

    def seen(net, *arguments):
        widths.append((net.conv2.out_channels, net.fc1.out_features))
        return train(net, *arguments)

    monkeypatch.setattr(client, "train_fn", seen)
    run_example(client, server, rounds=1)
    assert widths[:4] == [(64, 128)] * 4  # exploring
    assert len(widths) == 8
    assert all(conv < 64 and hidden < 128 for conv, hidden in widths[4:])


def test_our_own_client_app_needs_no_more_than_the_mod_and_masked():
    """What the examples show is what our own app does."""
    text = (ROOT / "autoflip_flwr" / "app" / "client.py").read_text()
    assert "mods=[AutoFlipMod(privacy=_privacy, start=_start)]" in text
    assert "with masked(model, message, " in text


def test_every_preset_composes_a_strategy_for_its_model():
    for path in sorted((ROOT / "conf").glob("*.yaml")):
        settings = load(path.stem)
        assert yaml.safe_load(settings.as_yaml())["preset"] == path.stem
