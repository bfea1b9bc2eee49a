"""The meter around Flower's grid: bytes counted by hand, order, repeatability."""

import json
import logging
import random

import pytest
from flat import flat
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    RecordDict,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp.strategy import FedAvg
from inprocess import (
    ROOT,
    LocalGrid,
    load_script,
    net,
    only_in,
    plain_net,
    run,
    toy_app,
)
from numpy.testing import assert_array_equal

from autoflip_flwr import AutoFLIP
from autoflip_flwr.app.grid import RunGrid, stream
from autoflip_flwr.errors import SettingsError

PHASES = [(p, d) for p in ("explore", "train", "evaluate") for d in ("down", "up")]


def grid_of(inner, *, seed=0, model=net):
    return RunGrid(
        inner, seed=seed, dense_bytes=ArrayRecord(model().state_dict()).count_bytes()
    )


def parts(*partition_ids):
    """Nodes 100, 101, ... with these partition ids."""
    return {
        100 + i: {"partition-id": partition_id, "num-partitions": len(partition_ids)}
        for i, partition_id in enumerate(partition_ids)
    }


def by_hand(inner):
    """Bytes of the records that crossed the wire, by phase and direction."""
    count = dict.fromkeys(PHASES, 0)
    for direction, sent in (("down", inner.down), ("up", inner.up)):
        for each in sent:
            if each.phase != "query":
                records = [r for r in each.content.values() if len(r)]
                count[each.phase, direction] += sum(r.count_bytes() for r in records)
    return count


# --- order and sampling ---------------------------------------------------------------


def test_nodes_are_listed_by_partition_and_nodes_without_one_last():
    configs = parts(3, 0, 2, 1)
    configs[7] = {"data-path": "mine.npz"}
    configs[5] = {"data-path": "mine.npz"}
    inner = LocalGrid(toy_app(), configs, node_configs=configs)
    assert grid_of(inner).get_node_ids() == [0, 1, 2, 3, 5, 7]


def test_a_name_without_end_is_none(caplog):
    configs = {100: {"client-id": "x" * 200}, 101: {"client-id": "x" * 201}}
    app = load_script("named_client_app", ROOT / "client_app.py").app
    grid = grid_of(LocalGrid(app, configs, node_configs=configs))
    _, second = grid.get_node_ids()
    assert second == 101
    assert "node 101 has a name of 201 characters" in caplog.text


def test_the_list_does_not_depend_on_the_order_in_which_nodes_connect():
    configs = parts(3, 0, 2, 1)
    for order in (list(configs), list(configs)[::-1]):
        inner = LocalGrid(toy_app(), order, node_configs=configs)
        assert grid_of(inner).get_node_ids() == [0, 1, 2, 3]


def test_the_roll_is_called_once_for_every_node():
    configs = {**parts(1, 0), 7: {"data-path": "mine.npz"}}
    inner = LocalGrid(toy_app(), configs, node_configs=configs)
    grid = grid_of(inner)
    grid.get_node_ids()
    inner.join(9, {"partition-id": 5})
    for _ in range(3):
        grid.get_node_ids()
    assert inner.nodes("query") == [7, 100, 101, 9]


def test_a_node_that_fails_in_the_roll_call_is_named_and_listed_last(caplog):
    def tamper(message, reply):
        if message.metadata.dst_node_id == 101:
            return Message(Error(3, "no such function"), reply_to=delivered(message))
        return None if message.metadata.dst_node_id == 102 else reply

    configs = parts(3, 0, 1, 2)
    inner = LocalGrid(toy_app(), configs, node_configs=configs, tamper=tamper)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert grid_of(inner).get_node_ids() == [2, 3, 101, 102]
    assert any(
        "node 101" in r.getMessage() and "no such function" in r.getMessage()
        for r in caplog.records
    )


def delivered(message):
    copy = Message(RecordDict(), message.metadata.dst_node_id, "query")
    copy.metadata.__dict__["_message_id"] = message.metadata.message_id
    return copy


def sampled(seed, order=1, disturb=False):
    configs = parts(*range(8))
    nodes = list(configs)[::order]
    inner = LocalGrid(toy_app(), nodes, node_configs=configs)
    grid = grid_of(inner, seed=seed)
    strategy = FedAvg(fraction_train=0.4, fraction_evaluate=0.4)

    def begin(server_round, arrays):
        grid.begin(server_round + 1)
        if disturb:
            random.seed(server_round)

    random.seed(17 if disturb else 4)
    run(strategy, grid, net(), 4, after_round=begin)
    return inner.nodes("train"), inner.nodes("evaluate")


def test_a_seed_samples_the_same_nodes_whatever_else_draws_random_numbers():
    assert sampled(3) == sampled(3, order=-1, disturb=True)


def test_other_seeds_rounds_and_phases_sample_other_nodes():
    train, evaluate = sampled(3)
    assert train != sampled(4)[0]
    assert len({tuple(train[i : i + 3]) for i in range(0, 12, 3)}) > 1
    assert train != evaluate


def test_autoflip_samples_the_nodes_that_the_inner_strategy_would():
    def nodes(strategy):
        inner = LocalGrid(toy_app(), range(100, 108))
        run(strategy, grid_of(inner), net(), 1)
        return inner.nodes("train")

    dense = nodes(FedAvg(fraction_train=0.4))
    assert nodes(AutoFLIP(FedAvg(fraction_train=0.4))) == dense


def test_replies_come_in_the_order_of_the_messages():
    for shuffle in (None, list.reverse, lambda replies: replies.sort(key=id)):
        inner = LocalGrid(toy_app(), [5, 3, 9, 4], shuffle=shuffle)
        messages = [
            Message(
                RecordDict(
                    {
                        "arrays": ArrayRecord(net().state_dict()),
                        "config": ConfigRecord({"server-round": 1}),
                    }
                ),
                node_id,
                "train",
            )
            for node_id in (2, 1, 3, 0)
        ]
        grid = grid_of(inner)
        assert grid.get_node_ids() == [0, 1, 2, 3]
        replies = grid.send_and_receive(messages, timeout=3.0)
        assert [r.metadata.src_node_id for r in replies] == [2, 1, 3, 0]
        assert inner.nodes("train") == [9, 3, 4, 5]


def test_nothing_is_sent_for_no_messages():
    inner = LocalGrid(toy_app(), [1, 2])
    grid = grid_of(inner)
    assert grid.send_and_receive([]) == []
    assert not inner.sent
    assert not grid.sent


# --- bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["float32", "float16"])
def test_bytes_are_those_of_the_records_that_were_sent(values):
    inner = LocalGrid(toy_app(), range(5))
    grid = grid_of(inner)
    strategy = AutoFLIP(
        FedAvg(fraction_train=0.4), **flat(threshold=0.7, values=values)
    )
    run(strategy, grid, net(), 3)
    counted = by_hand(inner)
    assert all(counted.values())
    assert {key: grid.sent[key] for key in PHASES} == counted


def test_the_roll_call_is_counted_apart():
    inner = LocalGrid(toy_app(), range(5))
    grid = grid_of(inner)
    grid.get_node_ids()
    reply = ConfigRecord({"client-id": 1}).count_bytes()
    assert dict(grid.sent) == {("roll-call", "up"): 5 * reply}
    assert not grid.dense


def test_an_error_reply_and_a_lost_one_count_nothing():
    def tamper(message, reply):
        if message.metadata.message_type == "query":
            return reply
        if message.metadata.dst_node_id == 1:
            return Message(Error(1, "out"), reply_to=Message(RecordDict(), 1, "train"))
        return None if message.metadata.dst_node_id == 2 else reply

    inner = LocalGrid(toy_app(), range(5), tamper=tamper)
    grid = grid_of(inner)
    run(AutoFLIP(), grid, net(), 1)
    assert grid.sent["train", "up"] == by_hand(inner)["train", "up"] > 0
    assert len([s for s in inner.up if s.phase == "train"]) == 3


@pytest.mark.parametrize("make", [net, plain_net])
@pytest.mark.parametrize("config", [None, {"lr": 0.1, "note": "abc"}])
def test_the_dense_equivalent_is_what_plain_fedavg_really_sends(make, config):
    """Same seed, same nodes: two real runs, one of them dense."""

    def counts(strategy, mods):
        inner = LocalGrid(toy_app(make, mods=mods), range(5))
        grid = grid_of(inner, model=make)
        given = ConfigRecord(config) if config else None
        run(strategy, grid, make(), 3, config=given)
        return grid, by_hand(inner)

    dense, sent = counts(FedAvg(fraction_train=0.4), [])
    pruned, _ = counts(AutoFLIP(FedAvg(fraction_train=0.4), threshold=0.8), None)
    expected = {k: v for k, v in sent.items() if k[0] != "explore"}
    assert {k: dense.sent[k] for k in expected} == expected
    assert dict(dense.dense) == expected, "plain FedAvg is its own equivalent"
    assert dict(pruned.dense) == expected


def test_seconds_are_counted_by_phase():
    grid = grid_of(LocalGrid(toy_app(), range(3)))
    run(AutoFLIP(), grid, net(), 1)
    assert all(grid.seconds[phase] > 0 for phase in ("explore", "train", "evaluate"))
    assert set(grid.seconds) <= {"explore", "train", "evaluate"}


# --- clients that come back -----------------------------------------------------------


def asked(client, phase="train"):
    content = {
        "arrays": ArrayRecord(net().state_dict()),
        "config": ConfigRecord({"server-round": 1}),
    }
    return Message(RecordDict(content), client, phase)


def test_a_node_that_comes_back_with_a_new_id_is_the_client_it_was():
    inner = LocalGrid(toy_app(), parts(0, 1, 2), node_configs=parts(0, 1, 2))
    grid = grid_of(inner)
    assert grid.get_node_ids() == [0, 1, 2]
    inner.contexts.pop(101)
    assert grid.get_node_ids() == [0, 2]
    inner.join(999, {"partition-id": 1, "num-partitions": 3})
    assert grid.get_node_ids() == [0, 1, 2]
    (reply,) = grid.send_and_receive([asked(1)])
    assert inner.nodes("train") == [999]
    assert reply.metadata.src_node_id == 1


def test_of_two_nodes_that_are_one_client_the_first_is_it_until_it_is_gone(caplog):
    inner = LocalGrid(toy_app(), parts(0, 1), node_configs=parts(0, 1))
    grid = grid_of(inner)
    grid.get_node_ids()
    inner.join(50, {"partition-id": 1, "num-partitions": 2})
    assert grid.get_node_ids() == [0, 1]
    assert grid.get_node_ids() == [0, 1]
    told = "node 50 says that it is client 1, as node 101 does; it waits"
    assert caplog.text.count(told) == 1
    grid.send_and_receive([asked(1)])
    inner.contexts.pop(101)
    assert grid.get_node_ids() == [0, 1]
    grid.send_and_receive([asked(1)])
    assert inner.nodes("train") == [101, 50]


def test_a_client_that_comes_back_does_not_explore_again():
    inner = LocalGrid(toy_app(), parts(0, 1, 2), node_configs=parts(0, 1, 2))
    grid = grid_of(inner)

    def restart(server_round, arrays):
        if server_round == 1:
            inner.contexts.pop(101)
            inner.join(999, {"partition-id": 1, "num-partitions": 3})

    run(AutoFLIP(), grid, net(), 2, after_round=restart)
    assert inner.nodes("explore") == [100, 101, 102]
    trained = inner.nodes("train")
    assert [sorted(trained[:3]), sorted(trained[3:])] == [
        [100, 101, 102],
        [100, 102, 999],
    ]


def test_clients_that_do_not_answer_are_missing_until_the_next_round():
    def tamper(message, reply):
        if message.metadata.message_type == "query":
            return reply
        if message.metadata.dst_node_id == 101:
            return None
        error = Message(Error(1, "out"), reply_to=delivered(message))
        error.metadata.__dict__["_reply_to_message_id"] = message.metadata.message_id
        return error if message.metadata.dst_node_id == 102 else reply

    inner = LocalGrid(
        toy_app(), parts(0, 1, 2), node_configs=parts(0, 1, 2), tamper=tamper
    )
    grid = grid_of(inner)
    assert grid.missing == []
    grid.send_and_receive([asked(client) for client in grid.get_node_ids()], timeout=9)
    assert grid.missing == [1, 2]
    grid.begin(2)
    assert grid.missing == []


def test_replies_are_yielded_as_they_come(clock):
    """The server can keep each before the last one is there."""
    inner = LocalGrid(toy_app(), [1, 2, 3])
    ready = iter([["none"], [1], [], [3, 2]])
    pull = inner.pull_messages

    def some(message_ids):
        now = next(ready)
        ids = [
            s.metadata.message_id for s in inner.sent if s.metadata.dst_node_id in now
        ]
        return pull(set(ids) & set(message_ids))

    inner.pull_messages = some
    replies = stream(inner, [asked(n) for n in (1, 2, 3)], timeout=60)
    assert next(replies).metadata.src_node_id is not None
    assert len(inner.sent) == 3
    assert len(list(replies)) == 2
    assert next(ready, None) is None


def test_a_meter_goes_on_counting(tmp_path):
    def metered():
        inner = LocalGrid(toy_app(), range(5))
        dense = ArrayRecord(net().state_dict()).count_bytes()
        return RunGrid(inner, seed=0, dense_bytes=dense, meter=tmp_path / "meter.json")

    grid = metered()
    run(AutoFLIP(), grid, net(), 1)
    later = metered()
    for kind in ("sent", "dense", "samples", "seconds"):
        assert getattr(later, kind) == getattr(grid, kind)
    run(AutoFLIP(), later, net(), 1)
    assert later.sent["train", "down"] == 2 * grid.sent["train", "down"]


def test_clients_are_missing_under_the_names_they_gave():
    def tamper(message, reply):
        return reply if message.metadata.message_type == "query" else None

    configs = {7: {"client-id": "ward 3"}, 8: {"partition-id": 1}, 9: {}}
    app = load_script("named_client_app", ROOT / "client_app.py").app
    inner = LocalGrid(app, configs, node_configs=configs, tamper=tamper)
    grid = grid_of(inner)
    clients = grid.get_node_ids()
    assert clients[0] == 1
    assert clients[1] > 2**32
    assert clients[2] == 9
    grid.send_and_receive([asked(client) for client in clients], timeout=1)
    assert grid.missing == [1, 9, "ward 3"]


def test_a_reply_that_comes_a_round_too_late_is_nobodys():
    """Whoever hands it over with the replies of the next round."""

    class Belated(LocalGrid):
        late = None

        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            if replies and self.late and self.sent[-1].metadata.message_type == "train":
                config = self.sent[-1].content["config"]
                if config["server-round"] == 2:
                    replies.append(self.late)
                    self.late = None
                    self.handed_over = True
            return replies

    def weights(kind):
        def tamper(message, reply):
            config = message.content.config_records.get("config", {})
            phase = (config.get("server-round"), config.get("autoflip.phase"))
            if phase == (1, "train") and message.metadata.dst_node_id == 2:
                inner.late = reply
                return None
            return reply

        inner = kind(toy_app(), range(4), tamper=tamper)
        arrays, _ = run(AutoFLIP(seed=0), grid_of(inner), net(), 3)
        return inner, arrays[-1]

    lost, expected = weights(LocalGrid)
    inner, arrays = weights(Belated)
    assert lost.late is not None
    assert inner.handed_over
    for name, value in expected.items():
        assert_array_equal(arrays[name], value)


@pytest.mark.parametrize(("factor", "waits"), [(3.0, 30), (None, 100)])
def test_who_takes_much_longer_than_the_faster_half_is_missing(factor, waits, clock):
    """Of five replies, two come after 5 s, one after 10, one after 29, one never."""

    seconds = (5, 5, 10, 29, 1000, 0)

    class Slow(LocalGrid):
        def push_messages(self, messages):
            self.began = clock.monotonic()
            return super().push_messages(messages)

        def pull_messages(self, message_ids):
            took = clock.monotonic() - self.began
            nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in self.sent}
            there = [n for n in message_ids if seconds[nodes[n]] <= took]
            return super().pull_messages(there)

    def answer(message, context):
        return Message(message.content, reply_to=message)

    inner = Slow(answer, range(5))
    grid = RunGrid(inner, seed=0, dense_bytes=0, straggler_factor=factor)
    batch = [Message(RecordDict(), node, "train") for node in range(5)]
    began = clock.monotonic()
    replies = grid.send_and_receive(batch, timeout=100)
    assert clock.monotonic() - began == pytest.approx(waits, abs=4)
    assert [r.metadata.src_node_id for r in replies] == list(range(5 if factor else 4))
    assert grid.missing == [4]
    inner.join(5, {"partition-id": 5})
    inner.began, waited = clock.monotonic(), []
    pull = inner.pull_messages
    inner.pull_messages = lambda ids: waited.append(grid.seconds_left()) or pull(ids)
    grid.get_node_ids()
    assert waited, "there is a roll call of the node that came"
    assert min(waited) > 60, "which has its own time"
    if factor:
        assert "more than 3.0 times as long as the faster half" in (
            replies[4].error.reason
        )


def test_a_node_that_misses_a_roll_call_is_asked_again():
    deaf = {101}

    def tamper(message, reply):
        query = message.metadata.message_type == "query"
        return None if query and message.metadata.dst_node_id in deaf else reply

    inner = LocalGrid(
        toy_app(), parts(0, 1, 2), node_configs=parts(0, 1, 2), tamper=tamper
    )
    grid = grid_of(inner)
    assert grid.get_node_ids() == [0, 2, 101]
    assert grid.get_node_ids() == [0, 2, 101]
    assert grid.get_node_ids() == [0, 2, 101]
    assert inner.nodes("query").count(101) == 2, "ever more seldom"
    deaf.clear()
    assert grid.get_node_ids() == [0, 1, 2]
    assert inner.nodes("query").count(100) == 1


def test_a_node_that_goes_during_a_roll_call_is_not_listed():
    """Flower's FedAvg waits without end for nodes that it has seen in the list."""

    def tamper(message, reply):
        inner.contexts.pop(101, None)
        return reply

    configs = parts(0, 1, 2)
    inner = LocalGrid(toy_app(), configs, node_configs=configs)
    grid = grid_of(inner)
    grid.get_node_ids()
    inner.tamper = tamper
    inner.join(103, {"partition-id": 3})
    assert grid.get_node_ids() == [0, 2, 3]


def test_samples_that_nobody_has_are_not_counted():
    def lie(reply):
        reply.content["metrics"]["num-examples"] = 1e308

    inner = LocalGrid(toy_app(), range(3), tamper=only_in("train", [1], lie))
    grid = grid_of(inner)
    run(AutoFLIP(), grid, net(), 1)
    assert grid.samples["train"] == 24 + 32


def test_a_torn_meter_is_named_and_counts_anew(tmp_path, caplog):
    (tmp_path / "meter.json").write_text('{"sent": [["tra')
    grid = RunGrid(
        LocalGrid(toy_app(), [1]), seed=0, dense_bytes=1, meter=tmp_path / "meter.json"
    )
    assert not grid.sent
    assert "meter.json is torn" in caplog.text


# --- whose a name is ------------------------------------------------------------------


class Keyed(LocalGrid):
    """Nodes with keys, as the SuperLink tells them: the node's number."""

    def get_nodes(self):
        return [NodeInfo(node_id=n, public_key=b"%d" % n) for n in self.get_node_ids()]


def named(*names, start=100):
    return {start + i: {"client-id": name} for i, name in enumerate(names)}


def listed(inner, configs, **options):
    """Which node is each client, by the names they gave."""
    dense = ArrayRecord(net().state_dict()).count_bytes()
    grid = RunGrid(inner, seed=0, dense_bytes=dense, **options)
    clients = grid.get_node_ids()
    return grid, {grid._names.get(c, c): grid._nodes[c] for c in clients}


def keyed(configs):
    app = load_script("named_client_app", ROOT / "client_app.py").app
    return Keyed(app, configs, node_configs=configs)


def test_a_name_stays_with_the_node_in_a_run_that_goes_on(caplog):
    """A node with a lower id, which the next roll call would begin with."""
    honest = named("ward 3", "ward 4")
    grid, _ = listed(keyed(honest), honest)
    state = grid.state()
    both = {**named("ward 3", start=50), **honest}
    later = RunGrid(keyed(both), seed=0, dense_bytes=0)
    later.restore(json.loads(json.dumps(state)))
    later.get_node_ids()
    assert {later._names[c]: n for c, n in later._nodes.items()} == {
        "ward 3": 100,
        "ward 4": 101,
    }
    assert "node 50 says that it is client 'ward 3', as node 100 does" in caplog.text
    later.restore({"stage": "train-1"})  # as version 0.1 wrote it


def test_a_name_belongs_to_a_key_in_all_runs_that_name_the_file(caplog, tmp_path):
    register, honest = tmp_path / "names.json", named("ward 3", "ward 4")
    listed(keyed(honest), honest, names=register)
    thief = named("ward 3", start=50)
    for configs in ({**thief, **honest}, {**thief, 101: honest[101]}):
        caplog.clear()
        grid, found = listed(keyed(configs), configs, names=register)
        assert 50 not in found.values(), "also while the honest node is away"
        assert len(found) == len(configs) - 1
        assert "node 50 says that it is client 'ward 3', a name that belongs to" in (
            caplog.text
        )
        for _ in range(9):
            assert 50 not in grid.get_node_ids()
    back = named("ward 3", "ward 4")
    assert listed(keyed(back), back, names=register)[1]["ward 3"] == 100


def test_a_number_that_is_the_digest_of_a_name_is_that_name(tmp_path, caplog):
    register, honest = tmp_path / "names.json", named("ward 3")
    grid, _ = listed(keyed(honest), honest, names=register)
    (client,) = grid._nodes
    thief = {50: {"partition-id": client}}
    _, found = listed(keyed(thief), thief, names=register)
    assert not found
    assert "it takes no part" in caplog.text


@pytest.mark.parametrize("text", ["{", "[1]", '{"1": 2}', '{"1": {"key": ""}}'])
def test_a_register_that_is_none_is_refused(text, tmp_path):
    register, honest = tmp_path / "names.json", named("ward 3")
    register.write_text(text)
    with pytest.raises(SettingsError, match=r"names and keys in .*names\.json"):
        listed(keyed(honest), honest, names=register)
    assert register.read_text() == text
