"""Checkpoints: whole or refused; a run that goes on ends as if it never stopped."""

import random
from collections import Counter, defaultdict, namedtuple
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from flat import flat
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from inprocess import LocalGrid, OneByOne, net, only_in, plain_net, toy_app
from numpy.testing import assert_array_equal

from autoflip_flwr import AutoFLIP, PruningSettings
from autoflip_flwr.errors import CheckpointError
from autoflip_flwr.server import tree
from autoflip_flwr.server.checkpoint import Checkpointed, read, write
from autoflip_flwr.settings import BaselineSettings

NODES = [11, 12, 13, 14, 15]
ROUNDS = 5


# --- files ----------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.binary(max_size=9),
    hnp.arrays(np.float32, hnp.array_shapes(min_side=0)),
    hnp.arrays(np.bool_, hnp.array_shapes(min_dims=0, min_side=0)),
    hnp.arrays(np.int64, hnp.array_shapes(min_dims=0)),
)
TREES = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.tuples(st.text(), st.integers()), inner, max_size=3),
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@given(tree=TREES)
def test_what_is_written_is_read(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("one") / "tree.safetensors"
    write(path, tree)
    assert_same(read(path), tree)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_records_come_back_and_an_array_held_twice_is_written_once(tmp_path):
    arrays = ArrayRecord(net().state_dict())
    config = ConfigRecord({"lr": 0.1, "note": b"abc"})
    path = tmp_path / "tree.safetensors"
    write(path, {"a": arrays, "c": config})
    once = path.stat().st_size
    write(path, {"a": arrays, "c": config, "again": [arrays, dict(arrays)]})
    assert path.stat().st_size < once + 2000
    found = read(path)
    assert found["a"].object_id == arrays.object_id
    assert dict(found["c"]) == dict(config)


@pytest.mark.parametrize("value", [np.float64(0.1), np.float32(0.1), np.int8(3)])
def test_scalars_of_numpy_keep_their_type(tmp_path, value):
    write(tmp_path / "x", {"v": value, "big": np.arange(3, dtype=">i4")})
    found = read(tmp_path / "x")
    assert type(found["v"]) is type(value)
    assert found["v"] == value
    assert_array_equal(found["big"], [0, 1, 2])


@pytest.mark.parametrize("dtype", ["U3", object, complex])
def test_arrays_of_other_things_cannot_be_written(tmp_path, dtype):
    with pytest.raises(TypeError, match="cannot hold an array of"):
        write(tmp_path / "x", {"a": np.array(["1", "2"]).astype(dtype)})


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a function"):
        write(tmp_path / "x", {"f": lambda: 0})
    assert not list(tmp_path.iterdir())


def test_a_file_cut_short_anywhere_or_changed_anywhere_is_refused(tmp_path):
    path = tmp_path / "tree.safetensors"
    write(path, {"a": np.arange(40, dtype=np.float32), "b": [1, "two", None]})
    whole = path.read_bytes()
    assert_array_equal(read(path)["a"], np.arange(40))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"tree\.safetensors"):
            read(path)
    for place in range(len(whole)):
        if whole[place] in b" ":  # the header's padding says nothing
            continue
        changed = bytearray(whole)
        changed[place] ^= 0x01
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"tree\.safetensors"):
            read(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="torn"):
        read(path)


# --- runs that go on ------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run at once: nothing of ours catches it."""


def started(
    folder, make, rounds=ROUNDS, *, model=net, tamper=None, settings=None, seed=3
):
    """Run, or go on with, a strategy; return its weights and the grid."""
    grid = LocalGrid(toy_app(model), NODES, tamper=tamper)
    strategy = Checkpointed(
        make(folder), folder / "checkpoints", settings=settings or {"lr": 0.1}
    )
    torch.manual_seed(seed)  # a process that goes on has another state
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    result = strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=rounds)
    return {n: a.numpy() for n, a in result.arrays.items()}, grid, result


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_array_equal(found[name], value)


def metrics_of(result):
    """All of a result but the weights."""
    kinds = (
        result.train_metrics_clientapp,
        result.evaluate_metrics_clientapp,
        result.evaluate_metrics_serverapp,
    )
    return [{n: repr(dict(found)) for n, found in kind.items()} for kind in kinds]


class Drawing(FedAvg):
    """Adds noise from torch's generator."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        for name, array in arrays.items():
            noise = torch.randn(array.shape).numpy()
            arrays[name] = Array(np.asarray(array.numpy() + noise, np.float32))
        return arrays, metrics


def inner(**options):
    return FedAvg(fraction_train=0.4, fraction_evaluate=0.4, **options)


def private():
    return DifferentialPrivacyServerSideAdaptiveClipping(
        inner(),
        noise_multiplier=0.5,
        num_sampled_clients=2,
        clipped_count_stddev=1.0,
    )


def pruning(make=inner, **options):
    def built(folder):
        chosen = {"seed": 0, "threshold": 0.6, "store": folder / "guidance"} | options
        return AutoFLIP(make(), **flat(**chosen))

    return built


MAKES = {
    "FedAvg": lambda folder: inner(),
    "FedAvgM": lambda folder: FedAvgM(fraction_train=0.4, server_momentum=0.9),
    "FedAdam": lambda folder: FedAdam(fraction_train=0.4, eta=0.01),
    "DP": lambda folder: private(),
    "torch": lambda folder: Drawing(fraction_train=0.4),
    "AutoFLIP": pruning(),
    "paper": pruning(population_weight=0.0, normalization="global"),
    "AutoFLIP(FedAvgM)": pruning(lambda: FedAvgM(fraction_train=0.4)),
    "AutoFLIP(FedAdam)": pruning(lambda: FedAdam(fraction_train=0.4, eta=0.01)),
    "AutoFLIP(DP)": pruning(private),
    "keep": pruning(pruned_weights="keep", population_weight=0.0),
    "vote": pruning(agreement="vote"),
    "sign": pruning(agreement="sign"),
    "some explore": pruning(exploration_fraction=0.5),
    "every": pruning(exploration_every=2),
    "default": lambda folder: AutoFLIP(
        inner(),
        pruning=PruningSettings(gradual_rounds=4),
        store=folder / "guidance",
        seed=0,
    ),
    "saliency": pruning(score="saliency", normalization="layer"),
    "float16": pruning(values="float16"),
    "int8": pruning(values="int8"),
    "int4": pruning(values="int4"),
    "a start to build": pruning(exploration_own_start=True, exploration_every=2),
    **{
        method: pruning(method=method)
        for method in ("random", "magnitude", "ssfl", "prunefl", "feddst")
    },
    **{
        method: pruning(method=method, baselines=BaselineSettings(every=2))
        for method in ("fedrts", "fedtiny")
    },
    "drawn anew": pruning(method="random", baselines=BaselineSettings(reselect=True)),
}


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """Return the end of a run of a name; each is made once."""

    @cache
    def end(name, rounds=ROUNDS):
        return started(tmp_path_factory.mktemp("one"), MAKES[name], rounds)

    return end


@pytest.mark.parametrize("name", MAKES)
def test_a_run_that_goes_on_ends_with_the_weights_of_one_that_never_stopped(
    name, tmp_path, never_stopped
):
    make = MAKES[name]
    expected, one, whole = never_stopped(name)
    _, first, _ = started(tmp_path / "two", make, rounds=3)
    found, later, result = started(tmp_path / "two", make, seed=99)
    assert_same_weights(found, expected)
    assert first.nodes("train") + later.nodes("train") == one.nodes("train")
    assert first.nodes("explore") + later.nodes("explore") == one.nodes("explore")
    assert metrics_of(result) == metrics_of(whole)
    assert list(result.train_metrics_clientapp) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["AutoFLIP", "default", "ssfl", "some explore"])
@pytest.mark.parametrize("answers", range(1, 6))
def test_killed_while_clients_explore_only_the_others_are_asked_again(
    name, answers, tmp_path, never_stopped
):
    make = MAKES[name]
    expected, one, _ = never_stopped(name, 2)
    told = []

    def tamper(message, reply):
        phase = message.content["config"].get("autoflip.phase")
        if phase == "explore":
            told.append(message.metadata.dst_node_id)
            if len(told) > answers:
                raise Killed
        elif phase == "train" and len(told) <= answers:
            raise Killed
        return reply

    grid = OneByOne(toy_app(), NODES, tamper=tamper)
    strategy = Checkpointed(make(tmp_path / "two"), tmp_path / "two" / "checkpoints")
    random.seed(3)
    with pytest.raises(Killed):
        strategy.start(grid, ArrayRecord(net().state_dict()), num_rounds=2)
    done = grid.nodes("explore")[:answers]

    grid = LocalGrid(toy_app(), NODES)
    strategy = Checkpointed(make(tmp_path / "two"), tmp_path / "two" / "checkpoints")
    random.seed(99)
    result = strategy.start(grid, ArrayRecord(net().state_dict()), num_rounds=2)
    assert_same_weights({n: a.numpy() for n, a in result.arrays.items()}, expected)
    everybody = one.nodes("explore")
    again = [n for n in everybody[: len(set(everybody))] if n not in done]
    assert grid.nodes("explore")[: len(again)] == again
    assert sorted(done + grid.nodes("explore")) == sorted(everybody)


@pytest.mark.parametrize("phase", ["train", "evaluate"])
@pytest.mark.parametrize("server_round", [1, 3])
def test_killed_in_the_middle_of_a_round_it_is_run_again(
    phase, server_round, tmp_path, never_stopped
):
    make = MAKES["AutoFLIP(FedAvgM)"]
    expected, _, _ = never_stopped("AutoFLIP(FedAvgM)")

    def tamper(message, reply):
        config = message.content["config"]
        if (config["server-round"], config.get("autoflip.phase")) == (
            server_round,
            phase,
        ):
            raise Killed
        return reply

    with pytest.raises(Killed):
        started(tmp_path / "two", make, tamper=tamper)
    found, _, _ = started(tmp_path / "two", make, seed=99)
    assert_same_weights(found, expected)


@pytest.mark.parametrize("step", ["configure_train", "aggregate_train"])
@pytest.mark.parametrize("server_round", [1, 3])
def test_killed_while_the_server_samples_or_aggregates(
    step, server_round, tmp_path, monkeypatch, never_stopped
):
    make = MAKES["AutoFLIP(FedAvgM)"]
    expected, _, _ = never_stopped("AutoFLIP(FedAvgM)")
    done = getattr(FedAvgM, step)

    def killed(self, current, *arguments):
        found = done(self, current, *arguments)
        if current == server_round:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(FedAvgM, step, killed)
        with pytest.raises(Killed):
            started(tmp_path / "two", make)
    found, _, _ = started(tmp_path / "two", make, seed=99)
    assert_same_weights(found, expected)


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize("name", ["AutoFLIP", "every", "FedAdam"])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_taken(
    name, tmp_path, caplog, never_stopped
):
    make = MAKES[name]
    expected, _, _ = never_stopped(name)
    started(tmp_path / "two", make, rounds=4)
    torn = newest(tmp_path / "two")
    torn.write_bytes(torn.read_bytes()[:-1])
    found, _, _ = started(tmp_path / "two", make, seed=99)
    assert f"{torn} is torn" in caplog.text
    assert "going on after round 3" in caplog.text
    assert_same_weights(found, expected)


def test_without_a_whole_checkpoint_nothing_is_begun(tmp_path):
    started(tmp_path, MAKES["AutoFLIP"], rounds=2)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint is left.*another"):
        started(tmp_path, MAKES["AutoFLIP"])


def test_a_checkpoint_of_another_format_is_refused_by_name(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(tree, "_FORMAT", "autoflip-checkpoint-3")
        started(tmp_path, MAKES["FedAvg"], rounds=1)
    expected = "expected the format autoflip-checkpoint-4, got 'autoflip-checkpoint-3'"
    with pytest.raises(CheckpointError, match=expected):
        started(tmp_path, MAKES["FedAvg"], rounds=2)


def test_two_checkpoints_are_kept(tmp_path):
    started(tmp_path, MAKES["FedAvg"], rounds=4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "round-000003.safetensors",
        "round-000004.safetensors",
    ]


def test_a_finished_run_is_not_run_again(tmp_path):
    expected, _, _ = started(tmp_path, MAKES["AutoFLIP"], rounds=2)
    found, grid, _ = started(tmp_path, MAKES["AutoFLIP"], rounds=2)
    assert_same_weights(found, expected)
    assert not grid.sent


def test_a_checkpoint_of_other_settings_is_refused_and_stays(tmp_path):
    make = MAKES["AutoFLIP"]
    started(tmp_path, make, rounds=2, settings={"pruning": {"threshold": 0.6}})
    before = newest(tmp_path).read_bytes()
    with pytest.raises(
        CheckpointError, match=r"other settings \(pruning.threshold: 0.6 there, 0.7"
    ):
        started(tmp_path, make, settings={"pruning": {"threshold": 0.7}})
    with pytest.raises(CheckpointError, match=r"seed: nothing there, 4 here"):
        started(tmp_path, make, settings={"pruning": {"threshold": 0.6}, "seed": 4})
    assert newest(tmp_path).read_bytes() == before


def test_a_checkpoint_of_another_model_or_strategy_is_refused(tmp_path):
    started(tmp_path, MAKES["AutoFLIP"], rounds=2)
    with pytest.raises(CheckpointError, match=r"another model \(0.bias: nothing there"):
        started(tmp_path, MAKES["AutoFLIP"], model=plain_net)
    with pytest.raises(CheckpointError, match=r"\['AutoFLIP', 'FedAvg'\] there"):
        started(tmp_path, MAKES["FedAvg"])


def test_a_strategy_may_begin_to_count_late(tmp_path):
    class Late(FedAvg):
        def aggregate_train(self, server_round, replies):
            self.last_round = getattr(self, "last_round", 0) + 1
            return super().aggregate_train(server_round, replies)

    kept = []

    def make(folder):
        kept.append(Late(fraction_train=0.4))
        return kept[-1]

    started(tmp_path, make, rounds=2)
    started(tmp_path, make, rounds=5)
    assert [one.last_round for one in kept] == [2, 5]


def test_who_failed_to_explore_is_not_asked_again_after_a_kill(tmp_path):
    make = MAKES["AutoFLIP"]
    lost = only_in("explore", [13], lambda reply: "lost")

    def deadly(message, reply):
        if message.content["config"].get("autoflip.phase") == "train":
            raise Killed
        return lost(message, reply)

    expected, _, _ = started(tmp_path / "one", make, rounds=2, tamper=lost)
    with pytest.raises(Killed):
        started(tmp_path / "two", make, rounds=2, tamper=deadly)
    found, grid, _ = started(tmp_path / "two", make, rounds=2)
    assert not grid.nodes("explore")
    assert_same_weights(found, expected)


def test_the_checkpoint_before_is_taken_though_its_round_explored_again(tmp_path):
    """Killed in round 4 after all had explored for a fourth time, round 3 torn."""
    make = pruning(exploration_every=1)
    expected, _, _ = started(tmp_path / "one", make)

    def tamper(message, reply):
        config = message.content["config"]
        if (config["server-round"], config.get("autoflip.phase")) == (4, "train"):
            raise Killed
        return reply

    with pytest.raises(Killed):
        started(tmp_path / "two", make, tamper=tamper)
    torn = newest(tmp_path / "two")
    torn.write_bytes(torn.read_bytes()[:-1])
    found, grid, _ = started(tmp_path / "two", make, seed=99)
    assert_same_weights(found, expected)
    asked = [sent.config["server-round"] for sent in grid.down]
    assert min(asked) == 3
    explored = [s.config["server-round"] for s in grid.down if s.phase == "explore"]
    assert set(explored) == {4, 5}, "the answers of round 3 are there still"


def test_the_checkpoint_before_is_taken_where_guidance_of_the_last_is_torn(
    tmp_path, caplog, never_stopped
):
    make = MAKES["every"]  # explores in rounds 1, 3 and 5
    expected, _, _ = never_stopped("every")
    started(tmp_path / "two", make, rounds=3)
    for path in (tmp_path / "two" / "guidance").glob("*.1.guidance"):
        path.write_bytes(b"")  # what round 3 wrote
    found, _, _ = started(tmp_path / "two", make, seed=99)
    assert "trying the checkpoint before it" in caplog.text
    assert "going on after round 2" in caplog.text
    assert_same_weights(found, expected)


def test_of_a_checkpoint_that_cannot_be_gone_on_with_nothing_stays(tmp_path):
    first = ArrayRecord(net().state_dict())
    moved = ArrayRecord({n: Array(np.asarray(a.numpy() + 1)) for n, a in first.items()})
    old, new = (AutoFLIP(seed=0).state(arrays) for arrays in (first, moved))
    strategy = AutoFLIP(seed=0, store=tmp_path)
    store = new["rounds"]["pruner"]["store"]
    store |= {"nodes": np.array([7], np.uint64), "crcs": np.zeros(1, np.uint32)}
    store |= {"written": np.array([7], np.uint64), "slots": np.zeros(1, np.uint8)}
    with pytest.raises(CheckpointError, match=r"the guidance in .*7\.0\.guidance"):
        strategy.restore(new, moved)
    strategy.restore(old, first)
    for name, array in first.items():
        assert_array_equal(strategy.rounds.initial[name], array.numpy())
        assert_array_equal(strategy.rounds.arrays[name], array.numpy())


def test_without_a_store_guidance_lies_beside_the_checkpoints(tmp_path):
    """Also in a process that made its strategy anew, as after a crash."""
    folder = tmp_path / "checkpoints"
    whole, _, _ = started(tmp_path / "whole", lambda _: AutoFLIP(inner(), seed=0))
    started(tmp_path, lambda _: AutoFLIP(inner(), seed=0), rounds=2)
    assert len(list((folder / "guidance").glob("*.guidance"))) == len(NODES)
    gone, _, _ = started(tmp_path, lambda _: AutoFLIP(inner(), seed=0))
    assert gone.keys() == whole.keys()


def test_another_setting_of_autoflip_is_refused_by_name(tmp_path):
    def go(threshold):
        strategy = AutoFLIP(inner(), threshold=threshold)
        start = ArrayRecord(net().state_dict())
        return Checkpointed(strategy, tmp_path).start(
            LocalGrid(toy_app(), NODES), start, num_rounds=1
        )

    go(0.6)
    text = r"other settings \(pruning.threshold: 0.6 there, 0.5 here\)"
    with pytest.raises(CheckpointError, match=text):
        go(0.5)
    go(0.6)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_guidance_that_a_checkpoint_needs_must_be_there(damage, tmp_path):
    started(tmp_path, MAKES["AutoFLIP"], rounds=2)
    path = min((tmp_path / "guidance").glob("*.guidance"))
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\xfe")
    with pytest.raises(CheckpointError, match=r"guidance"):
        started(tmp_path, MAKES["AutoFLIP"])


def test_what_a_new_strategy_is_made_with_counts_not_what_the_old_one_was(tmp_path):
    started(tmp_path, lambda folder: FedAvg(fraction_train=0.4), rounds=2)
    _, grid, _ = started(tmp_path, lambda folder: FedAvg(fraction_train=1.0), rounds=3)
    assert len(grid.nodes("train")) == 5


def test_a_checkpoint_that_is_passed_over_leaves_nothing_behind(tmp_path):
    """A number as it was configured is in no checkpoint."""

    class Outer(FedAvg):
        def __init__(self, strategy):
            super().__init__()
            self.strategy, self.late = strategy, 0
            self.configure_train = strategy.configure_train
            self.configure_evaluate = strategy.configure_evaluate
            self.aggregate_evaluate = strategy.aggregate_evaluate

        def aggregate_train(self, server_round, replies):
            self.late = int(server_round == 3)
            return self.strategy.aggregate_train(server_round, replies)

    def make(folder):
        return Outer(pruning(exploration_every=2)(folder))

    made = []
    started(tmp_path, make, rounds=3)
    min((tmp_path / "guidance").glob("*.1.guidance")).unlink()
    started(tmp_path, lambda folder: made.append(make(folder)) or made[0], rounds=2)
    assert made[0].late == 0


def test_a_counter_goes_on_as_a_counter(tmp_path):
    class Counting(FedAvg):
        def __init__(self):
            super().__init__(fraction_evaluate=0)
            self.asked, self.replies = Counter(), defaultdict(list)

        def aggregate_train(self, server_round, replies):
            for reply in replies:
                self.asked[reply.metadata.src_node_id] += 1
                self.replies[server_round].append(reply.metadata.src_node_id)
            return super().aggregate_train(server_round, replies)

    for rounds in (2, 3):
        strategy = Counting()
        started(tmp_path, lambda _, made=strategy: made, rounds=rounds)
    assert strategy.asked == dict.fromkeys(NODES, 3)
    assert {n: sorted(who) for n, who in strategy.replies.items()} == dict.fromkeys(
        (1, 2, 3), NODES
    )
    assert strategy.replies[99] == []


Pair = namedtuple("Pair", "loss accuracy")


@pytest.mark.parametrize("value", [Pair(1.0, 0.5), [Counter()], {1: defaultdict(int)}])
def test_what_would_come_back_as_another_type_is_not_written(value):
    assert not tree.storable(value)


def test_what_no_checkpoint_can_hold_is_named_once(tmp_path, caplog):
    class Odd(FedAvg):
        def __init__(self):
            super().__init__(fraction_train=0.4)
            self.handle = object()

    started(tmp_path, lambda folder: Odd(), rounds=2)
    assert caplog.text.count("checkpoints leave out Odd.handle, a object") == 1
