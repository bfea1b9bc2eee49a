"""Replies that cannot be used are dropped and named; the round goes on."""

import copy
import logging
import math
import re
from contextlib import nullcontext
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from flat import flat
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, QFedAvg
from inprocess import (
    CHANGING,
    LocalGrid,
    arrays_of,
    assert_same_arrays,
    net,
    npy,
    only_in,
    plain_net,
    poison,
    run,
    toy_app,
    with_values,
)
from numpy.testing import assert_allclose

from autoflip_flwr import AutoFLIP, AutoFlipMod, Checkpointed
from autoflip_flwr.app.grid import RunGrid
from autoflip_flwr.errors import (
    ExplorationError,
    GuidanceError,
    MaskError,
    ReplyError,
    SettingsError,
)
from autoflip_flwr.pruners import Random
from autoflip_flwr.settings import PruningSettings

NODES = [11, 12, 13, 14, 15]


def some_of(fraction=0.4):
    """Options of a strategy that samples two of five nodes."""
    return {"fraction_train": fraction, "fraction_evaluate": 0.0}


# --- replies that cannot be used ------------------------------------------------------


def put(key, array):
    return lambda reply: reply.content["arrays"].update({key: array})


def values_as(**how):
    def change(reply):
        data = reply.content["arrays"]["autoflip.values"].data
        data = data[: how.get("length", len(data))] + how.get("more", b"")
        kind = {k: v for k, v in how.items() if k in ("dtype", "stype", "shape")}
        reply.content["arrays"] = with_values(reply, data, **kind)

    return change


def renamed(old, new):
    def change(reply):
        reply.content[new] = reply.content.pop(old)

    return change


def metric(**values):
    return lambda reply: reply.content["metrics"].update(
        {name.replace("_", "-"): value for name, value in values.items()}
    )


BAD_REPLIES = {
    "error": lambda r: Message(Error(9, "broken"), reply_to=request_of(r)),
    "NaN": poison(np.nan),
    "Inf": poison(np.inf),
    "too short": values_as(length=40),
    "odd length": values_as(length=41),
    "too long": values_as(more=b"\0\0\0\0"),
    "empty": values_as(length=0),
    "dtype": values_as(dtype="float16"),
    "stype": values_as(stype="numpy.ndarray"),
    "no values": lambda r: r.content["arrays"].pop("autoflip.values"),
    "no buffer": lambda r: r.content["arrays"].pop("1.running_mean"),
    "another array": put("2.weight", Array(np.zeros(3, np.float32))),
    "buffer NaN": put("1.running_var", Array(np.full(16, np.nan, np.float32))),
    "buffer shape": put("1.running_var", Array(np.ones(15, np.float32))),
    "buffer type": put("1.running_var", Array(np.ones(16, np.float64))),
    "buffer objects": put(
        "1.running_var",
        Array("float32", (16,), "numpy.ndarray", b"\x93NUMPY\x01\x00 garbage"),
    ),
    "buffer header cut": put(
        "1.running_var",
        Array(
            "float32",
            (16,),
            "numpy.ndarray",
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (16,"),
        ),
    ),
    "buffer header of Python 2": put(
        "1.running_var",
        Array(
            "float32",
            (16,),
            "numpy.ndarray",
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (16L,), }"),
        ),
    ),
    "two array records": lambda r: r.content.update({"more": ArrayRecord()}),
    "no array record": lambda r: r.content.pop("arrays"),
    "key of the arrays": renamed("arrays", "weights"),
    "no metrics": lambda r: r.content.pop("metrics"),
    "two metric records": lambda r: r.content.update(
        {"more": MetricRecord({"num-examples": 3})}
    ),
    "key of the metrics": renamed("metrics", "results"),
    "metric NaN in a list": metric(train_loss=[1.0, math.nan]),
    "metric a list": metric(train_loss=[1.0, 2.0]),
    "negative examples": metric(num_examples=-1),
    "examples NaN": metric(num_examples=math.nan),
    "a list of examples": metric(num_examples=[3, 4]),
    "another metric": metric(train_time=1.0),
    "a missing metric": lambda r: r.content["metrics"].pop("train-loss"),
    "no examples": lambda r: r.content["metrics"].pop("num-examples"),
    "nothing": lambda r: r.content.clear(),
}


def request_of(reply):
    return Message(RecordDict(), reply.metadata.src_node_id, "train")


def two_rounds(bad, change):
    grid = LocalGrid(toy_app(), NODES, tamper=only_in("train", [bad], change))
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), threshold=0.5)
    seen, _ = run(strategy, grid, net(), 2)
    return seen, strategy


@cache
def two_rounds_without(bad):
    return two_rounds(bad, lambda reply: "lost")[0]


@pytest.mark.parametrize("position", [0, 2], ids=["first", "third"])
@pytest.mark.parametrize("kind", BAD_REPLIES)
def test_a_bad_reply_is_named_and_the_round_goes_on_without_it(kind, position, caplog):
    """The result is the one of a round that node did not answer in."""
    bad = NODES[position]
    without = two_rounds_without(bad)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="flwr"):
        seen, strategy = two_rounds(bad, BAD_REPLIES[kind])
    lines = [r.getMessage() for r in caplog.records if "dropped" in r.getMessage()]
    assert len(lines) == 2, "one a round"
    assert all(f"node {bad}" in line for line in lines)
    assert list(strategy.rounds.dropped) == [bad]
    for ours, expected in zip(seen, without, strict=True):
        assert_same_arrays(ours, expected)


@pytest.mark.parametrize(
    "kind", ["error", "examples NaN", "another metric", "key of the metrics", "nothing"]
)
def test_a_bad_evaluation_is_left_out(kind, caplog):
    def metrics(change):
        grid = LocalGrid(toy_app(), NODES, tamper=only_in("evaluate", [12], change))
        _, result = run(AutoFLIP(threshold=0.5), grid, net(), 1)
        return dict(result.evaluate_metrics_clientapp[1])

    expected = metrics(lambda reply: "lost")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert metrics(BAD_REPLIES[kind]) == expected
    assert any("node 12 is dropped" in r.getMessage() for r in caplog.records)


def test_an_honest_explanation_says_what_was_expected_and_what_came(caplog):
    tamper = only_in("train", [13], values_as(length=40))
    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        run(AutoFLIP(threshold=0.5), grid, net(), 1)
    assert any(
        "expected 356 B (4 x 89 kept), got 40 B" in r.getMessage()
        for r in caplog.records
    )


def test_when_every_reply_is_bad_the_round_begins_again_with_the_model_it_had(caplog):
    broken = []

    def tamper(message, reply):
        train = message.metadata.message_type == "train"
        config = next(iter(message.content.config_records.values()))
        if train and config["server-round"] == 2 and len(broken) < len(NODES):
            broken.append(message.metadata.dst_node_id)
            return Message(Error(1, "out"), reply_to=message)
        return reply

    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        seen, result = run(AutoFLIP(threshold=0.5), grid, net(), 3)
    assert sorted(broken) == NODES
    sent = [s.arrays["autoflip.values"].data for s in grid.down if s.phase == "train"]
    assert set(sent[5:10]) == set(sent[10:15]), "twice the model of round 1"
    assert not np.array_equal(seen[2]["0.weight"], seen[1]["0.weight"])
    assert list(result.train_metrics_clientapp) == [1, 2, 3]
    assert any(
        "round 2: 0 valid replies" in r.getMessage()
        and "stays as it was" in r.getMessage()
        for r in caplog.records
    )


def test_a_round_that_asked_nobody_aggregates_to_nothing():
    strategy = AutoFLIP(FedAvg(fraction_train=0.0))
    grid = LocalGrid(toy_app(), NODES)
    record = ArrayRecord(net().state_dict())
    assert strategy.configure_train(1, record, ConfigRecord(), grid) == []
    assert strategy.aggregate_train(1, []) == (None, None)


@pytest.mark.parametrize(("good", "changes"), [(3, True), (2, False)])
def test_a_round_needs_as_many_valid_replies_as_it_is_told(good, changes):
    tamper = only_in("train", NODES[good:], poison(np.nan))
    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    strategy, seen = AutoFLIP(**flat(threshold=0.5, min_replies=3)), []
    untrained = nullcontext() if changes else pytest.raises(ReplyError)
    with untrained:
        run(strategy, grid, net(), 1, after_round=lambda _, arrays: seen.append(arrays))
    assert len(seen) == 1 + changes
    assert len(grid.nodes("train")) == 5 * (1 if changes else 3)


@pytest.mark.parametrize("server_round", [1, 3], ids=["first", "last"])
def test_after_a_round_without_replies_the_model_still_fits_the_mask(server_round):
    """The model that is evaluated and saved is zero wherever the mask says so."""

    def tamper(message, reply):
        config = next(iter(message.content.config_records.values()))
        lost = config["autoflip.phase"] == "train"
        return None if lost and config["server-round"] == server_round else reply

    grid = LocalGrid(toy_app(), NODES, tamper=tamper)
    strategy, seen = AutoFLIP(FedAvg(**some_of()), **flat(**CHANGING)), []
    with pytest.raises(ReplyError):
        run(
            strategy,
            grid,
            net(),
            server_round,
            after_round=lambda _, arrays: seen.append(arrays),
        )
    if server_round == 1:
        assert strategy.rounds.plan is None
        assert strategy.rounds.density == 1.0
    else:
        for name, keep in strategy.rounds.plan.masks.items():
            assert not seen[-1][name][~keep].any(), name


# --- what the SuperLink says in a node's place ---------------------------------------


def test_a_node_that_is_gone_is_named_though_the_superlink_answers_for_it(caplog):
    """Such a reply carries the SuperLink's id; the message it answers tells."""
    gone = NODES[1]

    def tamper(message, reply):
        if (
            message.metadata.dst_node_id != gone
            or reply.metadata.message_type != "train"
        ):
            return reply
        answer = Message(Error(14, "Node unavailable"), reply_to=message)
        answer.metadata.__dict__["_src_node_id"] = 1
        return answer

    grid = RunGrid(LocalGrid(toy_app(), NODES, tamper=tamper), seed=0, dense_bytes=0)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        run(AutoFLIP(), grid, net(), 1)
    client = NODES.index(gone)
    assert f"exploration: node {client} is left out" in caplog.text
    assert f"the reply of node {client} is dropped" in caplog.text
    assert caplog.text.count(" is left out") == 1


def test_frozen_parameters_are_refused_before_they_are_pruned():
    def frozen():
        model = net()
        next(model.parameters()).requires_grad_(False)
        return model

    name = next(iter(dict(net().named_parameters())))
    with pytest.raises(
        GuidanceError, match=rf"{re.escape(name)}.*model=Net\(\).*exclude.*prunable"
    ):
        run(AutoFLIP(), LocalGrid(toy_app(frozen), NODES), frozen(), 1)
    run(
        AutoFLIP(**flat(exclude=[name])), LocalGrid(toy_app(frozen), NODES), frozen(), 1
    )


def test_a_floor_that_leaves_too_little_is_refused_before_anyone_explores():
    grid = LocalGrid(toy_app(), NODES)
    with pytest.raises(MaskError, match="lower the floor or prune less"):
        run(AutoFLIP(**flat(threshold=0.9, floor=0.5)), grid, net(), 1)
    assert not grid.down


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"threshold": "x"}, r"threshold: expected a number"),
        ({"exploration_epochs": 1.5}, r"epochs: expected a whole number"),
        ({"score": "magnitude"}, r"score: expected one of"),
        ({"min_replies": 0}, r"min_replies: expected a whole number >= 1"),
    ],
)
def test_an_impossible_argument_is_refused_when_the_strategy_is_made(bad, message):
    with pytest.raises(SettingsError, match=message):
        AutoFLIP(**flat(**bad))


class Idle(FedAvg):
    """Samples nobody in round 3."""

    def configure_train(self, server_round, arrays, config, grid):
        if server_round == 3:
            return []
        return super().configure_train(server_round, arrays, config, grid)


def test_a_round_without_messages_leaves_model_and_mask_together():
    grid = LocalGrid(toy_app(), NODES)
    strategy = AutoFLIP(Idle(**some_of()), **flat(**CHANGING))
    seen, _ = run(strategy, grid, net(), 3)
    for name, keep in strategy.rounds.plan.masks.items():
        assert not seen[-1][name][~keep].any(), name
    assert_same_arrays(seen[3], seen[2])
    assert_same_arrays(dict(strategy.rounds.arrays), seen[2])


class Personal(FedAvg):
    """Sends every node a model of its own, in a record that only its message holds."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for position, message in enumerate(messages):
            shifted = {
                name: value + position if value.dtype.kind == "f" else value
                for name, value in arrays_of(message.content["arrays"]).items()
            }
            record = ArrayRecord({name: Array(v) for name, v in shifted.items()})
            message.content = RecordDict(
                {"arrays": record, "config": message.content["config"]}
            )
            del record, shifted
        return messages


def test_a_model_of_ones_own_reaches_each_node():
    grid = LocalGrid(toy_app(plain_net), NODES)
    strategy = AutoFLIP(Personal(fraction_evaluate=0.0), threshold=0.5)
    run(strategy, grid, plain_net(), 1)
    sent = [
        np.frombuffer(s.arrays["autoflip.values"].data, "<f4")
        for s in grid.down
        if s.phase == "train"
    ]
    assert len(sent) == len(NODES)
    for position, values in enumerate(sent):
        assert_allclose(values, sent[0] + position, rtol=1e-4, atol=1e-5)


# --- replies as users write them ------------------------------------------------------


def replying(**changes):
    """The toy app with other records in its replies: type of message -> change."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        change = changes.get(message.metadata.message_type)
        if change:
            change(reply)
        return reply

    return toy_app(mods=[AutoFlipMod(), mod])


class Taking(FedAvg):
    """Takes what it finds, as a user's strategy may; the model is named."""

    def __init__(self, **options):
        super().__init__(fraction_evaluate=0, **options)
        self.found = []

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            self.found.append(RecordDict(dict(reply.content)))
            for key in list(reply.content):
                if key not in ("model", "metrics"):
                    del reply.content[key]
        return super().aggregate_train(server_round, replies)


def test_a_second_record_reaches_a_strategy_that_takes_it():
    """The second ArrayRecord has the names of the model, as control variates have."""

    def more(reply):
        model = reply.content.pop("arrays")
        reply.content["variates"] = ArrayRecord(dict(model))
        reply.content["model"] = model
        reply.content["more"] = MetricRecord({"energy": 1.5})

    inner = Taking(arrayrecord_key="model")
    grid = LocalGrid(replying(train=more), NODES)
    strategy = AutoFLIP(inner, threshold=0.5)
    seen, _ = run(strategy, grid, net(), 2)
    assert not strategy.rounds.dropped
    assert len(inner.found) == 2 * len(NODES)
    for content in inner.found:
        assert sorted(content) == ["metrics", "model", "more", "variates"]
        assert list(content["model"]) == list(content["variates"])
        assert content["more"]["energy"] == 1.5
    plain = AutoFLIP(FedAvg(fraction_evaluate=0), threshold=0.5)
    expected, _ = run(plain, LocalGrid(toy_app(), NODES), net(), 2)
    for ours, theirs in zip(seen, expected, strict=True):
        assert_same_arrays(ours, theirs)


class Sending(Taking):
    """Sends a second ArrayRecord with the names of the model, as SCAFFOLD does."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            content = RecordDict({"control": ArrayRecord(dict(arrays))})
            message.content = RecordDict({**content, **message.content})
        return messages


@pytest.mark.parametrize("key", ["arrays", "model"])
def test_of_several_records_the_one_with_the_strategys_key_is_the_model(key):
    controls = []
    app = ClientApp(mods=[AutoFlipMod()])

    @app.train()
    def train(message, context):
        assert list(message.content["control"]) == list(message.content[key])
        controls.append(message.content["control"]["0.weight"].numpy())
        content = {
            "control": message.content["control"],
            key: message.content[key],
            "metrics": MetricRecord({"num-examples": 1}),
        }
        moved = Array(message.content[key]["0.weight"].numpy() + 1)
        content[key] = ArrayRecord({**message.content[key], "0.weight": moved})
        return Message(RecordDict(content), reply_to=message)

    class Inner(Sending):
        def aggregate_train(self, server_round, replies):
            for reply in (replies := list(replies)):
                reply.content["model"] = reply.content.pop(key)
            return super().aggregate_train(server_round, replies)

    strategy = AutoFLIP(
        Inner(arrayrecord_key=key), pruning=PruningSettings(prunable=["0.weight"])
    )
    run(strategy, LocalGrid(app, NODES), net(), 2)
    assert not strategy.rounds.dropped
    assert len(controls) == 3 * len(NODES), "exploration and two rounds"
    plain = ClientApp()
    plain.train()(train)
    dense = LocalGrid(plain, NODES)
    run(Inner(arrayrecord_key=key), dense, net(), 1)
    run(strategy, LocalGrid(app, NODES), net(), 1)
    assert strategy.savings.dense == sum(
        record.count_bytes()
        for sent in dense.down + dense.up
        for record in sent.content.values()
        if len(record)
    ), "what travels beside the model travels in both"


def test_a_second_record_without_a_key_is_an_error_that_names_the_cure():
    def more(reply):
        reply.content["more"] = reply.content["arrays"]
        reply.content["others"] = reply.content.pop("arrays")

    with pytest.raises(ExplorationError, match=r"the model's under 'arrays' \(arrayr"):
        run(AutoFLIP(), LocalGrid(replying(train=more), NODES), net(), 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, [1.0, math.nan]])
def test_a_metric_that_is_not_finite_is_passed_on(value):
    def change(reply):
        reply.content["metrics"]["perplexity"] = value

    def metrics(strategy):
        app = replying(train=change, evaluate=change)
        _, result = run(strategy, LocalGrid(app, NODES), net(), 1)
        both = result.train_metrics_clientapp, result.evaluate_metrics_clientapp
        return [each[1]["perplexity"] for each in both]

    np.testing.assert_equal(metrics(AutoFLIP(threshold=0.5)), metrics(FedAvg()))


def test_a_metric_that_the_strategy_weights_by_must_be_finite(caplog):
    """FedAvg's weight and QFedAvg's loss decide the model; each has its own name."""
    for inner in (
        FedAvg(fraction_evaluate=0, weighted_by_key="train-loss"),
        QFedAvg(0.1, fraction_evaluate=0, train_loss_key="train-loss"),
    ):
        strategy = AutoFLIP(inner, threshold=0.5)
        tamper = only_in("train", [12], metric(train_loss=math.nan))
        caplog.clear()
        grid = LocalGrid(toy_app(plain_net), NODES, tamper=tamper)
        run(strategy, grid, plain_net(), 1)
        assert "expected a finite metric 'train-loss', got nan" in caplog.text
        assert list(strategy.rounds.dropped) == [12]


def test_a_model_that_an_evaluation_sends_back_is_packed_on_the_way():
    """As in Flower's example of HuggingFace; the strategy gets it whole."""
    found = []

    class Reading(FedAvg):
        def aggregate_evaluate(self, server_round, replies):
            replies = list(replies)
            found.extend(arrays_of(r.content["arrays"]) for r in replies)
            return super().aggregate_evaluate(server_round, replies)

    def back(message, context, call_next):
        arrays = message.content["arrays"]
        reply = call_next(message, context)
        if message.metadata.message_type == "evaluate":
            reply.content["arrays"] = arrays
            reply.content["other"] = ArrayRecord([np.eye(3)])
        return reply

    grid = LocalGrid(toy_app(mods=[AutoFlipMod(), back]), NODES)
    seen, _ = run(AutoFLIP(Reading(), threshold=0.5), grid, net(), 2)
    replies = [sent for sent in grid.up if sent.phase == "evaluate"]
    assert len(replies) == 2 * len(NODES)
    for sent in replies:
        sizes = {n: len(a.data) for n, a in sent.content["arrays"].items()}
        assert "0.weight" not in sizes
        assert sizes["autoflip.values"] <= 4 * 0.6 * (6 * 16 + 2 * 16 + 16 * 3 + 3) + 4
        assert_allclose(sent.content["other"].to_numpy_ndarrays()[0], np.eye(3))
    for position, arrays in enumerate(found):
        assert_same_arrays(arrays, seen[1 + position // len(NODES)])


# --- a run that trains nothing --------------------------------------------------------


class OwnStart(FedAvg):
    def start(self, *args, **named):
        return super().start(*args, **named)


@pytest.mark.parametrize("inner", [FedAvg, OwnStart])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_run_in_which_no_reply_was_ever_valid_is_an_error(
    checkpointed, inner, tmp_path
):
    grid = LocalGrid(
        toy_app(), NODES, tamper=only_in("train", NODES, lambda reply: "lost")
    )
    strategy = AutoFLIP(inner(fraction_evaluate=0))
    whole = Checkpointed(strategy, tmp_path) if checkpointed else strategy
    with pytest.raises(
        ReplyError, match=r"untrained: none of 2 rounds changed it; the last"
    ):
        run(whole, grid, net(), 2)


def test_a_run_that_asks_nobody_to_train_is_none():
    strategy = AutoFLIP(FedAvg(fraction_train=0.0, fraction_evaluate=1.0))
    grid = LocalGrid(toy_app(), NODES)
    run(strategy, grid, net(), 2)
    assert not grid.nodes("train")


def test_a_round_that_asks_nobody_is_no_failure(caplog):
    class EverySecond(FedAvg):
        def configure_train(self, server_round, *args):
            messages = super().configure_train(server_round, *args)
            return messages if server_round % 2 == 0 else []

    grid = LocalGrid(toy_app(), NODES)
    seen, _ = run(AutoFLIP(EverySecond()), grid, net(), 4)
    changed = [(a["3.weight"] != b["3.weight"]).any() for a, b in pairwise(seen)]
    assert changed == [False, True, False, True]
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_late_reply_through_a_grid_that_sends_copies_ends_no_run():
    """Such a grid does not tell which messages a reply may answer."""

    class Copying(LocalGrid):
        late = None

        def send_and_receive(self, messages, *, timeout=None):
            copies = [
                Message(
                    RecordDict(dict(message.content)),
                    message.metadata.dst_node_id,
                    message.metadata.message_type,
                )
                for message in messages
            ]
            asked = {message.metadata.dst_node_id for message in copies}
            replies = list(super().send_and_receive(copies, timeout=timeout))
            if not replies:  # nobody evaluates
                return []
            late, self.late = self.late, copy.deepcopy(replies[0])
            strange = late and late.metadata.src_node_id not in asked
            self.seen = getattr(self, "seen", 0) + bool(strange)
            return [*replies, late] if strange else replies

    grid = Copying(toy_app(), NODES)
    inner = FedAvg(fraction_train=0.4, fraction_evaluate=0, min_available_nodes=5)
    run(AutoFLIP(inner, pruner=Random(), seed=0), grid, net(), 6)
    assert grid.seen, "no node was left out of the round after"


def test_where_most_clients_have_no_samples_the_others_train(caplog):
    def no_samples(message, reply):
        if message.metadata.dst_node_id != NODES[0] and reply.has_content():
            reply.content["metrics"]["num-examples"] = 0
            if "autoflip.values" in reply.content["arrays"]:  # as they came
                sent = message.content["arrays"]
                reply.content["arrays"] = ArrayRecord(dict(sent))
        return reply

    grid = LocalGrid(toy_app(), NODES, tamper=no_samples)
    seen, _ = run(AutoFLIP(FedAvg(fraction_evaluate=0)), grid, net(), 2)
    assert (seen[-1]["3.weight"] != seen[1]["3.weight"]).any()
    assert "is dropped" not in caplog.text


def test_an_evaluation_without_the_mod_is_named(caplog):
    app = toy_app(mods=[])
    trained = toy_app()

    def called(message, context):
        training = message.metadata.message_type == "train"
        return (trained if training else app)(message, context)

    run(AutoFLIP(), LocalGrid(called, NODES), net(), 1)
    assert "is dropped: the client's app does not answer as AutoFlipMod" in caplog.text


def test_a_forgotten_mod_is_named():
    grid = LocalGrid(toy_app(mods=[]), NODES)
    cure = (
        r"does not answer as AutoFlipMod does: .*ClientApp\(mods=\[AutoFlipMod\(\)\]\)"
    )
    with pytest.raises(ExplorationError, match=cure):
        run(AutoFLIP(), grid, net(), 2)
    assert not grid.nodes("train"), "it stops before any training"


def test_the_mods_class_in_place_of_a_mod_is_named():
    cure = (
        r"does not answer as AutoFlipMod does: .*ClientApp\(mods=\[AutoFlipMod\(\)\]\)"
    )
    with pytest.raises(ExplorationError, match=cure):
        run(AutoFLIP(), LocalGrid(toy_app(mods=[AutoFlipMod]), NODES), net(), 2)


def test_updates_are_from_the_weights_that_each_client_got():
    """Nobody moves them, and each client has others, as in personalized learning."""

    class Own(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            messages = list(super().configure_train(server_round, arrays, config, grid))
            for message in messages:
                own = {
                    name: Array(
                        np.asarray(array.numpy() + message.metadata.dst_node_id)
                    )
                    for name, array in arrays.items()
                }
                message.content = RecordDict(
                    {**message.content, "arrays": ArrayRecord(own)}
                )
            return messages

    app = ClientApp(mods=[AutoFlipMod()])

    @app.train()
    def train(message, context):
        record = message.content["arrays"]
        if "autoflip.epoch" in message.content["config"]:
            moved = {n: Array(np.asarray(a.numpy() + 1)) for n, a in record.items()}
            record = ArrayRecord(moved)
        metrics = MetricRecord({"num-examples": 1})
        return Message(
            RecordDict({"arrays": record, "metrics": metrics}), reply_to=message
        )

    strategy = AutoFLIP(Own(fraction_evaluate=0), model=net(), threshold=0.5)
    run(strategy, LocalGrid(app, [1, 2, 3]), net(), 1)
    assert strategy.rounds.diagnostics.update_variance == 0
