"""One registered node must not stop or steer the others: what it can send at most."""

import math
import time
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
from both import NODES, both, newer, older
from flat import flat
from flwr.app import Array, ConfigRecord, Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents as inflate,
)
from flwr.supercore.inflatable.inflatable_utils import (
    pull_objects,
)
from flwr.superlink.grid import http_grid
from inprocess import LocalGrid, net, only_in, plain_net, run, toy_app
from numpy.testing import assert_allclose, assert_array_equal
from test_replies import OwnStart

from autoflip_flwr import AutoFLIP, AutoFlipMod, Checkpointed
from autoflip_flwr.app.grid import RunGrid
from autoflip_flwr.errors import ReplyError, WireError
from autoflip_flwr.method.outliers import capped, far_off, root_mean_square
from autoflip_flwr.server import replies as checks
from autoflip_flwr.server.diagnostics import Diagnostics
from autoflip_flwr.wire.flower import (
    become_task,
    bound_replies,
    empty_run,
    set_message_id,
)
from autoflip_flwr.wire.manifest import Entry, Manifest
from autoflip_flwr.wire.records import EPOCHS, MANIFEST, MEASURE, PATIENCE, PHASE


def without_13(changed, **options):
    return changed(only_in("train", [13], lambda reply: "lost"), **options)[1]


def assert_dropped(changed, tamper, caplog, text, **options):
    """Node 13's reply is named, and the model is that of the other four."""
    expected = without_13(changed, **options)
    caplog.clear()
    _, found = changed(tamper, **options)
    for name, value in expected.items():
        assert_array_equal(found[name], value)
    assert "the reply of node 13 is dropped: expected" in caplog.text
    assert text in caplog.text


def array_as(name, change):
    """Change one array that travels beside the mask in node 13's reply."""

    def lie(reply):
        record = reply.content["arrays"]
        record[name] = Array(np.asarray(change(record[name].numpy())))

    return only_in("train", [13], lie)


def error(reason):
    """Answer with an error."""

    def change(reply):
        told = Message(Error(1, reason), reply_to=reply)
        told.metadata.__dict__["_reply_to_message_id"] = (
            reply.metadata.reply_to_message_id
        )
        return told

    return change


# --- the size of a whole reply --------------------------------------------------------


@both
def test_a_whole_reply_of_more_bytes_than_the_model_needs_is_dropped(changed, caplog):
    def lie(reply):
        reply.content["extra"] = ConfigRecord({"x": bytes(2 << 20)})

    assert_dropped(
        changed, only_in("train", [13], lie), caplog, "a whole reply of at most"
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
def test_how_large_entries_are_by_hand(dtype):
    """The square of 300 is no float16, that of 100 no int8."""
    size = 100 if dtype is np.int8 else 300
    assert root_mean_square([np.full((2, 3), size, dtype)]) == size
    assert root_mean_square([]) == 0


def test_signs_by_any_number_of_examples_are_an_agreement():
    seen = Diagnostics(signs=True)
    seen.begin()
    for sign in (1, 1, -1):
        seen.observe(np.float32([sign, 1]), 3.3e38)
    np.testing.assert_allclose(seen.finish(None), [1 / 3, 1], rtol=1e-6)


def test_the_largest_reply_by_hand():
    strategy, _ = newer(None)
    # 6 x 16 + 4 x 16 + 16 x 3 + 3 float32 entries and one int64; twice, and 1 MiB
    assert strategy.rounds.manifest.dense_bytes == 4 * (96 + 64 + 48 + 3) + 8
    assert strategy.rounds.manifest.largest_message == 2 * 852 + 2**20
    checks.check_size(10, 10)
    with pytest.raises(WireError, match="at most 10 B, got 11 B"):
        checks.check_size(11, 10)


@both
def test_an_explorer_of_too_many_bytes_is_left_out(changed, caplog):
    def lie(reply):
        reply.content["extra"] = ConfigRecord({"x": bytes(2 << 20)})

    changed(only_in("explore", [13], lie))
    assert "exploration: node 13 is left out: expected a whole reply of" in caplog.text


def test_records_that_most_do_not_send_are_removed_and_named(caplog):
    seen = []

    class Looks(FedAvg):
        def aggregate_train(self, server_round, replies):
            seen.extend(sorted(reply.content) for reply in replies)
            return super().aggregate_train(server_round, replies)

    def lie(reply):
        reply.content["extra"] = ConfigRecord({"x": bytes(1 << 19)})

    _, found = newer(only_in("train", [13], lie), inner=Looks(fraction_evaluate=0))
    assert seen == [["arrays", "metrics"]] * 5
    told = "node 13 is removed what most do not send: ['extra']"
    assert told in caplog.text
    for name, value in newer(None)[1].items():
        assert_array_equal(found[name], value)
    seen.clear()
    newer(only_in("train", NODES, lie), inner=Looks(fraction_evaluate=0))
    assert seen == [["arrays", "extra", "metrics"]] * 5, "an app's own record"


@both
@pytest.mark.parametrize("value", ["", b"", []])
def test_a_value_without_a_size_stops_nobody(changed, value, caplog):
    """Flower's count of a message's bytes would fail on it."""

    def lie(reply):
        reply.content["extra"] = ConfigRecord({"x": value})

    _, found = changed(only_in("train", [13], lie))
    assert "node 13 is removed what most do not send" in caplog.text
    for name, array in changed(None)[1].items():
        assert_array_equal(found[name], array)


@pytest.mark.parametrize("phase", ["explore", "train"])
def test_what_a_node_says_is_one_line_of_a_log(phase, caplog):
    lie = error(f"\n\x1b[2JINFO: all is well {'x' * 10**6}")
    newer(only_in(phase, [13], lie))
    lines = [record.getMessage() for record in caplog.records]
    (line,) = [line for line in lines if "all is well" in line]
    assert line.isprintable()
    assert "13" in line
    assert len(line) < 2200


# --- bounds without holes -------------------------------------------------------------


def frozen_last_layer(reply):
    """An app that does not train 3.weight, which is excluded from pruning."""
    record = reply.content["arrays"]
    record["3.weight"] = Array(net().state_dict()["3.weight"].numpy())


@pytest.mark.parametrize("value", [3e38, 1.0, np.float32(1e10)])
@both
def test_a_layer_that_nobody_moves_is_moved_by_nobody(changed, value, caplog):
    """The usual movement is 0: nothing is 100 times that."""

    def frozen(lie):
        def tamper(message, reply):
            reply = only_in("train", NODES, frozen_last_layer)(message, reply)
            return lie(message, reply) if reply else reply

        return tamper

    options = {"exclude": ["3.*"]}
    lost = only_in("train", [13], lambda reply: "lost")
    _, expected = changed(frozen(lost), **options)
    lie = array_as("3.weight", lambda array: np.full_like(array, value))
    caplog.clear()
    _, found = changed(frozen(lie), **options)
    for name, array in expected.items():
        assert_array_equal(found[name], array)
    assert "since most did nothing: it moved 3.weight" in caplog.text


@both
def test_a_layer_that_few_train_may_move_as_far_as_it_is_large(changed):
    """Who trains what the others leave alone is no liar."""

    def tamper(message, reply):
        return only_in("train", [11, 12, 14], frozen_last_layer)(message, reply)

    strategy, found = changed(tamper, exclude=["3.*"])
    assert not strategy.rounds.dropped
    assert (found["3.weight"] != net().state_dict()["3.weight"].numpy()).any()


@pytest.mark.parametrize("count", [2**63 - 1, -(2**63), 10**6])
@both
def test_an_integer_far_from_the_others_is_dropped(changed, count, caplog):
    lie = array_as("1.num_batches_tracked", lambda array: np.int64(count))
    assert_dropped(changed, lie, caplog, "it moved 1.num_batches_tracked")


def test_a_truth_value_is_what_most_say():
    def make():
        model = plain_net()
        model.register_buffer("open", torch.zeros(4, dtype=torch.bool))
        return model

    lie = array_as("open", np.ones_like)
    grid = LocalGrid(toy_app(make), NODES, tamper=lie)
    seen, _ = run(AutoFLIP(FedAvg(fraction_evaluate=0), **flat()), grid, make(), 1)
    assert seen[-1]["open"].dtype == np.bool_
    assert not seen[-1]["open"].any()


def weighted(key, value):
    """An app that says its examples under another key; node 13 says `value`."""

    def tamper(message, reply):
        if reply and reply.has_content() and "metrics" in reply.content:
            metrics = reply.content["metrics"]
            metrics[key] = metrics.pop("num-examples")
            if message.metadata.dst_node_id == 13:
                metrics[key] = value
        return reply

    return tamper


@pytest.mark.parametrize("value", [-450, 10**18, float("nan")])
def test_examples_are_checked_under_the_key_that_the_strategy_weights_by(value, caplog):
    inner = FedAvg(fraction_evaluate=0, weighted_by_key="n")

    def lost(message, reply):
        gone = message.metadata.dst_node_id == 13
        return None if gone else weighted("n", 36)(message, reply)

    expected = newer(lost, inner=inner)[1]
    caplog.clear()
    strategy, found = newer(weighted("n", value), inner=inner)
    for name, array in expected.items():
        assert_array_equal(found[name], array)
    assert list(strategy.rounds.dropped) == [13]
    assert "node 13 is left out" in caplog.text, "as an explorer, too"


@pytest.mark.parametrize("value", [1.7e308, -1e39, 1e6])
@both
def test_a_metric_that_would_ruin_an_average_is_dropped(changed, value, caplog):
    def lie(reply):
        reply.content["metrics"]["train-loss"] = value

    assert_dropped(changed, only_in("train", [13], lie), caplog, "")


@both
def test_metrics_may_differ_by_ten_thousand_times_and_small_ones_as_they_like(
    changed, caplog
):
    def lie(value):
        def change(reply):
            reply.content["metrics"]["train-loss"] = value

        return only_in("train", [13], change)

    for value in (9e3, -9e3, 1e-30, 0.0):
        strategy, _ = changed(lie(value))
        assert not strategy.rounds.dropped, value


# --- a client's weight in the average -------------------------------------------------


def test_a_cap_by_hand():
    assert capped([1, 2, 3, 400], 10) == [1, 2, 3, 25]  # the median is 2.5
    assert capped([0, 0, 4, 6, 800], 10) == [0, 0, 4, 6, 60], "of those with examples"
    assert capped([1, 400], 10) == [1, 400], "of two there is no median"
    assert capped([1, 2, 3, 400], None) == [1, 2, 3, 400]
    assert far_off("moved", {1: 0.0, 2: 0.0, 3: 5.0}, limit=2.0, idle=4.0).keys() == {3}
    assert not far_off("moved", {1: 0.0, 2: 0.0, 3: 5.0}, limit=None, idle=4.0)


def told(count):
    def change(reply):
        reply.content["metrics"]["num-examples"] = count

    return change


@pytest.mark.parametrize("phase", ["train", "explore"])
@pytest.mark.parametrize("warm_start", [False, True])
@both
def test_a_reply_counts_as_ten_times_the_usual_examples_at_most(
    changed, phase, warm_start
):
    """Others have 24, 28, 36, 40; with 3,200 of 13 the median is 36, the cap 360."""
    lie = only_in(phase, [13], told(3200))
    _, found = changed(lie, warm_start=warm_start)
    _, expected = changed(only_in(phase, [13], told(360)), warm_start=warm_start)
    for name, value in expected.items():
        assert_array_equal(found[name], value)
    _, uncapped = changed(lie, warm_start=warm_start, weight_cap=None)
    differs = any((uncapped[n] != v).any() for n, v in expected.items())
    assert differs is (phase == "train" or warm_start)


# --- rounds that lose everybody -------------------------------------------------------


#: The order in which clients are sampled does not round the mask.
ONE_MASK = {"population_weight": 1.0}


def losing(times, change=lambda reply: "lost", server_round=2):
    """Lose all replies of the first tries of a round."""
    seen = []

    def tamper(message, reply):
        lost = only_in("train", NODES, change)
        config = next(iter(message.content.config_records.values()), {})
        phase = (config.get("server-round"), config.get("autoflip.phase"))
        if phase == (server_round, "train"):
            seen.append(message)
            if len(seen) <= times * len(NODES):
                return lost(message, reply)
        return reply

    return tamper


def own_start(tamper, **options):
    return newer(tamper, inner=OwnStart(fraction_evaluate=0), **options)


@pytest.mark.parametrize("changed", [newer, own_start, older])
@pytest.mark.parametrize(
    "change", [lambda reply: "lost", error("no disk")], ids=["lost", "error"]
)
def test_a_round_that_loses_everybody_begins_again(change, changed, caplog):
    strategy, found = changed(losing(2, change), rounds=3, **ONE_MASK)
    assert caplog.text.count("round 2 begins again") == 2
    assert not strategy.rounds.dropped
    for name, value in changed(None, rounds=3, **ONE_MASK)[1].items():
        assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_round_that_is_lost_three_times_ends_the_run(tmp_path):
    inner = AutoFLIP(FedAvg(fraction_evaluate=0), **flat(**ONE_MASK))
    strategy = Checkpointed(inner, tmp_path)
    grid = LocalGrid(toy_app(), NODES, tamper=losing(3))
    expected = r"round 2 was lost 3 times; the last time: 0 valid replies.*checkpoints"
    with pytest.raises(ReplyError, match=expected):
        run(strategy, grid, net(), 3)
    inner = AutoFLIP(FedAvg(fraction_evaluate=0), **flat(**ONE_MASK))
    grid = LocalGrid(toy_app(), NODES)
    seen, _ = run(Checkpointed(inner, tmp_path), grid, net(), 3)
    for name, value in newer(None, rounds=3, **ONE_MASK)[1].items():
        assert_allclose(seen[-1][name], value, rtol=1e-5, atol=1e-6)


def test_a_dense_run_that_loses_a_round_ends_and_goes_on(tmp_path):
    """The same for any strategy with checkpoints: no run ends well with less."""
    app, dense = toy_app(mods=[]), partial(FedAvg, fraction_evaluate=0)
    lost = only_in("train", NODES, lambda reply: "lost")
    calls = []

    def tamper(message, reply):
        calls.append(message)
        return lost(message, reply) if 5 < len(calls) <= 10 else reply

    grid = LocalGrid(app, NODES, tamper=tamper)
    with pytest.raises(ReplyError, match="round 2 lost all replies"):
        run(Checkpointed(dense(), tmp_path), grid, net(), 3)
    seen, _ = run(Checkpointed(dense(), tmp_path), grid, net(), 3)
    expected, _ = run(dense(), LocalGrid(app, NODES), net(), 3)
    for name, value in expected[-1].items():
        assert_allclose(seen[-1][name], value, rtol=1e-4, atol=1e-5)


def test_a_round_of_too_few_begins_again_with_the_config_it_had():
    """A strategy that lowers a learning rate each round lowers it once."""
    rates = []

    class Decays(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            config["lr"] = config.get("lr", 1.0) / 2
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round, replies):
            rates.append(sent[-1])
            return super().aggregate_train(server_round, replies)

    sent = []

    def tamper(message, reply):
        config = next(iter(message.content.config_records.values()))
        if config.get("autoflip.phase") == "train":
            sent.append(config["lr"])
        return losing(1, server_round=1)(message, reply) if len(sent) <= 5 else reply

    newer(tamper, rounds=2, inner=Decays(fraction_evaluate=0))
    assert rates == [0.5, 0.25]
    assert sent == [0.5] * 10 + [0.25] * 5


# --- replies that nobody asked for ----------------------------------------------------


class Repeats(LocalGrid):
    """Hands over the replies of the round before, and each reply twice."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.before = []

    def send_and_receive(self, messages, *, timeout=None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        handed = [*self.before, *replies, *replies]
        self.before = replies or self.before
        return handed


def test_late_and_repeated_replies_are_dropped(caplog):
    grid = Repeats(toy_app(), NODES)
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), **flat())
    seen, _ = run(strategy, grid, net(), 2)
    for name, value in newer(None, rounds=2)[1].items():
        assert_array_equal(seen[-1][name], value)
    # Each twice in two rounds; those of the round before in training and evaluation.
    assert caplog.text.count("it answers no message of the round") == 2 * 5 + 3 * 5


@pytest.fixture
def bounded(monkeypatch):
    """Flower's grid, which reads replies of at most so many bytes; bound twice."""
    become_task()
    for own in (pull_objects, inflate):
        monkeypatch.setattr(http_grid, own.__name__, own)

    def bound(superlink, largest, seconds=math.inf):
        grid = http_grid.HttpGrid(insecure=True, token="x")
        grid._client = superlink
        grid.set_run(empty_run())
        for size in (1, largest):
            bound_replies(grid, size, lambda: seconds)
        return grid

    return bound


def reply_to(message_id, **records):
    """Return a reply, and its objects as a SuperLink holds them."""
    asked = Message(RecordDict(), 11, "train")
    set_message_id(asked, message_id)
    reply = Message(RecordDict(records), reply_to=asked)
    contents = {n: o.deflate() for n, o in get_all_nested_objects(reply).items()}
    return reply, contents


@pytest.mark.parametrize("broken", ["none", "record", "records", "message", "kind"])
def test_a_reply_that_cannot_be_read_is_an_error_of_its_node(broken, bounded):
    """Flower's grid would raise: the objects that a node pushes are read here first."""
    record = ConfigRecord({"x": 1})
    reply, contents = reply_to("asked", config=record)
    objects = {
        "record": record,
        "records": reply.content,
        "message": reply,
    }
    if broken in objects:
        what = objects[broken]
        contents[what.object_id] = add_header_to_object_body(b"\xff" * 9, what)
    top = record if broken == "kind" else reply
    bounded(None, 1000)
    read = http_grid.inflate_object_from_contents(top.object_id, contents)
    assert read.has_error() == (broken != "none")
    known = broken not in ("message", "kind")  # which message it answers
    assert read.metadata.reply_to_message_id == ("asked" if known else "")
    if read.has_content():
        assert read.content["config"] == record


class SuperLink:
    """The Runtime API, as far as a ServerApp pulls replies from it."""

    def __init__(self, *replies):
        self.trees = [get_object_tree(reply) for reply, _ in replies]
        self.messages = [
            message_to_proto(remove_content_from_message(reply)) for reply, _ in replies
        ]
        for message, tree in zip(self.messages, self.trees, strict=True):
            message.metadata.message_id = tree.object_id
        self.contents = {n: c for _, own in replies for n, c in own.items()}
        self.asked = []
        self.pulled = 0
        self.confirmed = []

    def PullMessages(self, request):
        return PullAppMessagesResponse(
            messages_list=self.messages, message_object_trees=self.trees
        )

    def PullObject(self, request):
        self.asked.append(request.object_id)
        came = request.object_id in self.contents and len(self.asked) > 1
        if not came:
            return PullObjectResponse(object_found=True, object_available=False)
        content = self.contents[request.object_id]
        self.pulled += len(content)
        return PullObjectResponse(
            object_found=True, object_available=True, object_content=content
        )

    def ConfirmMessageReceived(self, request):
        self.confirmed.append(request.message_object_id)


@pytest.mark.parametrize(("size", "count"), [(100_000, 30), (1, 3000)])
def test_of_a_reply_without_end_a_part_is_pulled_and_the_rest_deleted(
    size, count, bounded
):
    """Flower would pull all of it, and wait as long as its node goes on sending."""
    largest = 1_000_000
    honest = reply_to("honest", config=ConfigRecord({"x": b"x" * 900_000}))
    large = {f"{n}": ConfigRecord({"x": b"%9d" % n * size}) for n in range(count)}
    superlink = SuperLink(reply_to("flooded", **large), honest)
    flooded, read = bounded(superlink, largest).pull_messages(["flooded", "honest"])
    assert read.content == honest[0].content
    assert read.metadata.reply_to_message_id == "honest"
    assert "expected a whole reply of at most 1000000 B" in flooded.error.reason
    assert flooded.metadata.reply_to_message_id == "flooded"
    assert superlink.confirmed == [m.metadata.message_id for m in superlink.messages]
    assert superlink.pulled < 900_000 + largest + 4 * size * 9 + 5000
    assert len(set(superlink.asked)) < largest / 1024 + 10


def test_a_reply_whose_objects_do_not_come_is_given_up_and_deleted(bounded):
    superlink = SuperLink(reply_to("slow", config=ConfigRecord({"x": 1})))
    superlink.contents = {}
    (slow,) = bounded(superlink, 1000, seconds=0.3).pull_messages(["slow"])
    assert "timeout or retry limit reached" in slow.error.reason
    assert slow.metadata.reply_to_message_id == "slow"
    assert superlink.confirmed == [superlink.messages[0].metadata.message_id]


def test_a_system_clock_that_jumps_changes_nothing(monkeypatch):
    expected = newer(None, rounds=2)[1]
    jumps = iter(range(10**9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 86_400.0)
    grid = RunGrid(LocalGrid(toy_app(), NODES), seed=0, dense_bytes=0)
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), **flat())
    seen, _ = run(strategy, grid, net(), 2)
    for name, value in expected.items():
        assert_allclose(seen[-1][name], value, rtol=1e-6)
    assert all(0 <= seconds < 600 for seconds in grid.seconds.values())


# --- what a server may ask of a client ------------------------------------------------


def asked(manifest, epochs=1, **node_config):
    """Let the mod handle an exploration; return the error and the peak of memory."""
    config = {
        PHASE: "explore",
        MANIFEST: manifest.to_bytes(),
        EPOCHS: epochs,
        PATIENCE: 5,
        MEASURE: "deviation",
    }
    LocalGrid(toy_app(), [])  # lets messages be made
    message = Message(RecordDict({"config": ConfigRecord(config)}), 11, "train")
    context = Context(1, 11, node_config, RecordDict(), {})
    tracemalloc.start()
    try:
        AutoFlipMod()(message, context, lambda *args: pytest.fail("it went on"))
    except WireError as error:
        return str(error), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def manifest_of(entries, dtype="<f4"):
    return Manifest((Entry("w", (entries,), dtype, masked=True),))


@pytest.mark.parametrize("epochs", [2**62, 1001])
def test_a_client_refuses_epochs_without_end(epochs):
    error, _ = asked(manifest_of(8), epochs)
    expected = f"expected at most 1000 local epochs, the server asks for {epochs}"
    assert expected in error
    assert "max-epochs in its node config" in error


def test_a_client_refuses_a_model_that_would_fill_its_memory():
    error, peak = asked(manifest_of(2**26, "<f8"))
    assert "at most 512 MB, the server describes one of 537 MB" in error
    assert peak < 1e6


def test_a_nodes_own_limits_go_before_the_apps():
    error, _ = asked(manifest_of(8), 21, **{"max-epochs": 20})
    assert "at most 20 local epochs" in error
    error, _ = asked(manifest_of(10**6), **{"max-megabytes": 3})
    assert "at most 3 MB, the server describes one of 4 MB" in error
    error, _ = asked(manifest_of(8), 2000, **{"max-epochs": 3000})
    assert "exactly one ArrayRecord" in error, "it goes on"


def test_an_app_may_set_limits(caplog):
    app = toy_app(plain_net, mods=[AutoFlipMod(max_epochs=2)])
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), **flat(exploration_epochs=3))
    with pytest.raises(Exception, match="at most 2 local epochs"):
        run(strategy, LocalGrid(app, NODES), plain_net(), 1)
