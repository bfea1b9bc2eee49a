"""The adapter for Flower's older API, with NumPyClients and Flower's own Server."""

import logging
import random
import threading

import numpy as np
import pytest
import torch
from flat import flat
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import (
    FitRes,
    Parameters,
    ndarrays_to_parameters,
)
from flwr.compat.common import recorddict_compat as compat
from flwr.server import Server, SimpleClientManager
from flwr.server import strategy as older
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAdam, FedAvg, FedAvgM
from flwr.serverapp import strategy as message_api
from inprocess import (
    CHANGING,
    LocalGrid,
    adam_reference,
    assert_masks_change,
    call_seed,
    fit,
    momentum_reference,
    net,
    npy,
    plain_net,
    run,
    samples,
    state_of,
    toy_app,
    whole_mask,
)
from numpy.testing import assert_allclose, assert_array_equal

import autoflip_flwr
from autoflip_flwr import AutoFlipMod, masked, masks_from
from autoflip_flwr.errors import ExplorationError, ReplyError, SettingsError
from autoflip_flwr.server.legacy import AutoFLIP
from autoflip_flwr.settings import ExplorationSettings, PruningSettings

CIDS = ["11", "12", "13", "14", "15"]


class Client(NumPyClient):
    """As a user of the older API writes it."""

    def __init__(self, make, partition_id, use_masked, calls):
        self.model = make()
        self.partition_id = partition_id
        self.use_masked = use_masked
        self.calls = calls

    def load(self, parameters):
        pairs = zip(self.model.state_dict(), map(torch.tensor, parameters), strict=True)
        self.model.load_state_dict(dict(pairs))

    def fit(self, parameters, config):
        self.calls.append((self.partition_id, dict(config), parameters))
        self.load(parameters)
        seed = call_seed(config, self.partition_id)
        with masked(self.model, config if self.use_masked else {}):
            loss = fit(self.model, self.partition_id, seed=seed)
        count = len(samples(self.partition_id)[1])
        return list(state_of(self.model).values()), count, {"loss": loss}

    def evaluate(self, parameters, config):
        self.load(parameters)
        total = float(sum(np.abs(p).sum() for p in parameters))
        return total, len(samples(self.partition_id)[1]), {"total": total}


class InProcess(ClientProxy):
    """Carries instructions to a ClientApp as Flower's own proxy does."""

    lock = threading.Lock()  # one process, one client at a time

    def __init__(self, cid, app, partition_id, tamper=None):
        super().__init__(cid)
        self.app = app
        self.tamper = tamper
        self.context = Context(
            1, int(cid), {"partition-id": partition_id}, RecordDict(), {}
        )
        self.down, self.up = [], []
        self.masks = [b""]  # that it was sent, the last one last

    def call(self, content, kind):
        message = Message(content, int(self.cid), kind)
        with self.lock:
            reply = self.app(message, self.context)
        if reply.has_error():
            raise RuntimeError(reply.error.reason)
        return reply.content

    def note(self, ins):
        self.down.append(ins)
        content = RecordDict({"config": ConfigRecord(ins.config)})
        self.masks.append(whole_mask(content, self.masks[-1]))

    def fit(self, ins, timeout, group_id):
        self.note(ins)
        content = self.call(compat.fitins_to_recorddict(ins, True), "train")
        result = compat.recorddict_to_fitres(content, True)
        if self.tamper:
            result = self.tamper(ins, result)
        self.up.append(result)
        return result

    def evaluate(self, ins, timeout, group_id):
        self.note(ins)
        content = self.call(compat.evaluateins_to_recorddict(ins, True), "evaluate")
        return compat.recorddict_to_evaluateres(content)

    def get_properties(self, ins, timeout, group_id): ...

    def get_parameters(self, ins, timeout, group_id): ...

    def reconnect(self, ins, timeout, group_id): ...


def legacy_app(make, calls, use_masked=True, client=Client):
    def client_fn(context: Context):
        partition_id = int(context.node_config["partition-id"])
        return client(make, partition_id, use_masked, calls).to_client()

    return ClientApp(client_fn=client_fn, mods=[AutoFlipMod()])


def serve(
    strategy,
    make=net,
    rounds=3,
    *,
    tamper=None,
    calls=None,
    use_masked=True,
    client=Client,
):
    """Run Flower's Server; return it and the proxies."""
    LocalGrid(toy_app(), [])  # lets messages be made
    manager = SimpleClientManager()
    app = legacy_app(make, [] if calls is None else calls, use_masked, client)
    proxies = [InProcess(cid, app, i, tamper) for i, cid in enumerate(CIDS)]
    for proxy in proxies:
        manager.register(proxy)
    server = Server(client_manager=manager, strategy=strategy)
    server.set_max_workers(1)
    random.seed(0)
    server.fit(num_rounds=rounds, timeout=None)
    return server, proxies


def options(make, seen=None, **more):
    """Options of an older strategy: W0, the round's number, what it evaluates."""

    def evaluate(server_round, arrays, config):
        if seen is not None:
            seen.append([a.copy() for a in arrays])

    return {
        "initial_parameters": ndarrays_to_parameters(list(state_of(make()).values())),
        "on_fit_config_fn": lambda server_round: {"server-round": server_round},
        "fit_metrics_aggregation_fn": lambda metrics: {"clients": len(metrics)},
        "evaluate_metrics_aggregation_fn": lambda metrics: {
            "total": metrics[0][1]["total"]
        },
        "evaluate_fn": evaluate,
        **more,
    }


def names_of(make):
    return list(state_of(make()))


# --- equal to the Message API ---------------------------------------------------------


@pytest.mark.parametrize(
    ("older", "newer", "same"),
    [
        (FedAvg, message_api.FedAvg, {}),
        (FedAvgM, message_api.FedAvgM, {"server_momentum": 0.7}),
        (FedAdam, message_api.FedAdam, {"eta": 0.01, "tau": 1e-3}),
    ],
    ids=["FedAvg", "FedAvgM", "FedAdam"],
)
@pytest.mark.parametrize(
    ("population_weight", "values"), [(1.0, "int8"), (0.0, "float32")]
)
def test_the_weights_are_those_of_the_message_api(
    older, newer, same, population_weight, values
):
    # Weights break the ties that one-byte guidance has and a sum in another order cuts.
    pruning = {
        "threshold": 0.6,
        "population_weight": population_weight,
        "score": "saliency",
        "values": values,
    }
    expected, _ = run(
        autoflip_flwr.AutoFLIP(
            newer(fraction_train=0.4, fraction_evaluate=0, **same), **flat(**pruning)
        ),
        LocalGrid(toy_app(plain_net), map(int, CIDS)),
        plain_net(),
        4,
    )
    seen = []
    inner = older(
        **options(plain_net, seen, fraction_fit=0.4, fraction_evaluate=0, **same)
    )
    serve(AutoFLIP(inner, **flat(model=plain_net(), **pruning)), plain_net, 4)
    assert len(seen) == len(expected) == 5
    for ours, theirs in zip(seen, expected, strict=True):
        for value, (name, other) in zip(ours, theirs.items(), strict=True):
            assert value.dtype == other.dtype
            assert_allclose(value, other, rtol=1e-4, atol=1e-5, err_msg=name)
            assert_array_equal(value == 0, other == 0)


def test_with_nothing_pruned_the_weights_are_the_older_strategys():
    dense, pruned = [], []
    serve(FedAvg(**options(net, dense)))
    plain = flat(threshold=0.0)
    serve(AutoFLIP(FedAvg(**options(net, pruned)), model=net(), **plain))
    for ours, theirs in zip(pruned, dense, strict=True):
        for name, value, other in zip(names_of(net), ours, theirs, strict=True):
            if name.endswith("num_batches_tracked"):
                assert value.dtype == np.int64
                assert abs(float(value) - float(other)) <= 1
            else:
                assert_allclose(value, other, rtol=1e-5, atol=1e-7, err_msg=name)


def reference_inputs(proxies, rounds):
    """Masks and weighted means of the kept values, read from what travelled."""
    masks, averages = [], []
    shapes = {name: v.shape for name, v in state_of(plain_net()).items()}
    for server_round in range(1, rounds + 1):
        pairs = [
            (mask, result)
            for proxy in proxies
            for ins, mask, result in zip(
                proxy.down, proxy.masks[1:], proxy.up, strict=True
            )
            if ins.config["server-round"] == server_round
            and ins.config["autoflip.phase"] == "train"
        ]
        bits = np.unpackbits(np.frombuffer(pairs[0][0], np.uint8))
        flats = [np.frombuffer(r.parameters.tensors[0], np.float32) for _, r in pairs]
        counts = [result.num_examples for _, result in pairs]
        mean = np.average(np.asarray(flats, float), axis=0, weights=counts)
        mask, average, start, taken = {}, {}, 0, 0
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            mask[name] = bits[start : start + size].astype(bool).reshape(shape)
            average[name] = np.zeros(shape)
            kept = int(mask[name].sum())
            average[name][mask[name]] = mean[taken : taken + kept]
            start, taken = start + size, taken + kept
        assert taken == len(mean)
        masks.append(mask)
        averages.append(average)
    return masks, averages


@pytest.mark.parametrize(
    ("older", "same", "reference"),
    [
        (
            FedAvgM,
            {"server_learning_rate": 0.7, "server_momentum": 0.8},
            lambda *a: momentum_reference(*a, lr=0.7, beta=0.8),
        ),
        (
            FedAvgM,
            {"server_learning_rate": 0.5},
            lambda *a: momentum_reference(*a, lr=0.5, beta=0.0),
        ),
        (
            FedAdam,
            {"eta": 0.05, "tau": 1e-3},
            lambda *a: adam_reference(*a, eta=0.05, tau=1e-3),
        ),
    ],
    ids=["FedAvgM", "FedAvgM without momentum", "FedAdam"],
)
def test_an_optimizer_on_the_server_sees_no_gradient_where_a_round_pruned(
    older, same, reference
):
    seen = []
    inner = older(
        **options(plain_net, seen, fraction_fit=0.4, fraction_evaluate=0, **same)
    )
    strategy = AutoFLIP(inner, **flat(model=plain_net(), **CHANGING))
    _, proxies = serve(strategy, plain_net, 8)
    masks, averages = reference_inputs(proxies, 8)
    assert_masks_change(masks)
    expected = reference(state_of(plain_net()), masks, averages)
    for arrays, weights in zip(seen[1:], expected, strict=True):
        for value, (name, other) in zip(arrays, weights.items(), strict=True):
            assert_allclose(value, other, rtol=1e-4, atol=2e-6, err_msg=name)


# --- what travels ---------------------------------------------------------------------


def test_the_mask_travels_as_bytes_in_the_config_and_values_as_one_tensor():
    plain = flat(threshold=0.5)
    strategy = AutoFLIP(FedAvg(**options(net)), model=net(), **plain)
    _, proxies = serve(strategy, rounds=2)
    for proxy in proxies:
        explore, train, evaluate, *_ = proxy.down
        assert explore.config["autoflip.phase"] == "explore"
        assert len(explore.parameters.tensors) == len(names_of(net))
        assert isinstance(train.config["autoflip.mask"], bytes)
        assert len(train.config["autoflip.mask"]) == 23
        assert "autoflip.mask" not in evaluate.config  # the same, named
        for ins in (train, evaluate):
            values, *buffers = ins.parameters.tensors
            assert len(values) == 4 * 89
            assert len(buffers) == 3
        assert train.config["autoflip.phase"] == "train"
        assert evaluate.config["autoflip.phase"] == "evaluate"
        explored, trained, _ = proxy.up
        assert len(explored.parameters.tensors) == 1
        assert len(explored.parameters.tensors[0]) < 179 + 8 * 5 + 1
        assert next(len(t) for t in trained.parameters.tensors) == 4 * 89


def test_the_initial_parameters_are_explored_from_once_by_all():
    calls = []
    strategy = AutoFLIP(
        FedAvg(**options(net, fraction_fit=0.4)),
        model=net(),
        exploration=ExplorationSettings(epochs=2),
    )
    serve(strategy, calls=calls)
    explored = [c for c in calls if c[1]["autoflip.phase"] == "explore"]
    assert sorted((p, c["autoflip.epoch"]) for p, c, _ in explored) == [
        (i, epoch) for i in range(5) for epoch in range(2)
    ]
    for _, config, arrays in explored:
        if config["autoflip.epoch"] == 0:
            for value, (name, start) in zip(
                arrays, state_of(net()).items(), strict=True
            ):
                assert_array_equal(value, start, err_msg=name)


def test_evaluating_clients_get_the_masked_model():
    seen = []
    inner = FedAvg(**options(plain_net, seen, fraction_fit=0.4))
    strategy = AutoFLIP(
        inner, **flat(model=plain_net(), **CHANGING, pruned_weights="keep")
    )
    _, proxies = serve(strategy, plain_net, 1)
    content = proxies[0].call(
        compat.evaluateins_to_recorddict(proxies[0].down[-1], True), "evaluate"
    )
    total = compat.recorddict_to_evaluateres(content).loss
    assert total == pytest.approx(
        float(sum(np.abs(a).sum() for a in seen[1])), rel=1e-6
    )
    assert sum((a == 0).sum() for a in seen[1]) >= 80


def test_a_config_hands_the_mask_to_the_client():
    calls = []
    serve(
        AutoFLIP(FedAvg(**options(net)), model=net(), **flat(threshold=0.5)),
        rounds=1,
        calls=calls,
    )
    for _, config, arrays in calls:
        masks = masks_from(config)
        if config["autoflip.phase"] == "explore":
            assert masks == {}
        else:
            assert sum(int(keep.sum()) for keep in masks.values()) == 89
            by_name = dict(zip(names_of(net), arrays, strict=True))
            for name, keep in masks.items():
                assert not by_name[name][~keep].any()


@pytest.mark.parametrize("use_masked", [True, False])
def test_without_names_arrays_are_numbered(use_masked):
    seen = []
    strategy = AutoFLIP(
        FedAvg(**options(plain_net, seen)), **flat(threshold=0.7, exclude=["3"])
    )
    serve(strategy, plain_net, 2, use_masked=use_masked)
    assert set(strategy.rounds.plan.masks) == {"0", "1", "2"}
    assert (seen[-1][3] != 0).all()
    assert sum((a == 0).sum() for a in seen[-1]) == round(0.7 * 160)


@pytest.mark.parametrize("use_masked", [True, False])
def test_without_names_statistics_of_a_norm_are_not_pruned(use_masked, caplog):
    seen = []
    inner = FedAvg(**options(net, seen))
    strategy = AutoFLIP(inner, threshold=0.5, pruning=PruningSettings(vectors=True))
    serve(strategy, net, 3, use_masked=use_masked)
    names = list(state_of(net()))
    trained = {str(i) for i, n in enumerate(names) if n.endswith(("weight", "bias"))}
    assert set(strategy.rounds.plan.masks) == trained
    assert (seen[-1][names.index("1.running_var")] > 0).all()
    assert "pruned weights" not in caplog.text


def test_names_of_another_model_are_an_error_that_counts():
    strategy = AutoFLIP(FedAvg(**options(net)), model=torch.nn.Linear(2, 1))
    with pytest.raises(SettingsError, match="expected 2 arrays"):
        serve(strategy, rounds=1)


def test_buffers_keep_their_type():
    seen = []
    serve(
        AutoFLIP(FedAvg(**options(net, seen)), model=net(), threshold=0.5),
        rounds=2,
    )
    assert [a.dtype for a in seen[-1]] == [a.dtype for a in state_of(net()).values()]


# --- results that cannot be used ------------------------------------------------------


def broken(change, cids=("13",)):
    """Change the results of some clients' training, not of their exploration."""

    def tamper(ins, result):
        partition_ids = {str(24 + 4 * i): cid for i, cid in enumerate(CIDS)}
        train = ins.config.get("autoflip.phase") == "train"
        if not train or partition_ids[str(result.num_examples)] not in cids:
            return result
        tensors = list(result.parameters.tensors)
        count = change(tensors)
        parameters = Parameters(tensors, result.parameters.tensor_type)
        examples = result.num_examples if count is None else count
        return FitRes(result.status, parameters, examples, result.metrics)

    return tamper


def nan_in(tensors):
    values = np.frombuffer(tensors[0], np.float32).copy()
    values[3] = np.nan
    tensors[0] = values.tobytes()


def set_to(index, data):
    def change(tensors):
        tensors[index] = data

    return change


def clear(tensors):
    tensors.clear()


def less(tensors):
    del tensors[-1]


def negative(tensors):
    return -5


BAD = {
    "NaN": nan_in,
    "too short": set_to(0, b"\0" * 8),
    "buffer garbage": set_to(1, b"garbage"),
    "buffer cut": set_to(1, npy("{'descr': '<f4', 'shape': (16,")),
    "none": clear,
    "one less": less,
    "negative examples": negative,
}


class Recording(FedAvg):
    """Notes what it is given to aggregate."""

    def aggregate_fit(self, server_round, results, failures):
        self.given = ([c.cid for c, _ in results], failures)
        return super().aggregate_fit(server_round, results, failures)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_result_is_dropped_into_the_failures_and_named(kind, caplog):
    inner = Recording(**options(net))
    strategy = AutoFLIP(inner, model=net(), threshold=0.5)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        serve(strategy, rounds=1, tamper=broken(BAD[kind]))
    results, failures = inner.given
    assert sorted(results) == ["11", "12", "14", "15"]
    assert [client.cid for client, _ in failures] == ["13"]
    assert list(strategy.rounds.dropped) == [13]
    assert any("node 13 is dropped" in r.getMessage() for r in caplog.records)


def test_when_every_result_is_bad_the_model_stays_as_it_was(caplog):
    seen = []
    strategy = AutoFLIP(FedAvg(**options(net, seen, fraction_evaluate=0)), model=net())
    ends = pytest.raises(ReplyError, match="the model is untrained")
    with caplog.at_level(logging.WARNING, logger="flwr"), ends:
        serve(strategy, rounds=2, tamper=broken(nan_in, CIDS))
    for ours, start in zip(seen[-1], state_of(net()).values(), strict=True):
        assert_array_equal(ours, start)
    assert any("0 valid replies" in r.getMessage() for r in caplog.records)


def test_a_client_that_cannot_explore_is_named_and_takes_part(caplog):
    def tamper(ins, result):
        if ins.config["autoflip.phase"] == "explore" and result.num_examples == 28:
            raise OSError("no disk")
        return result

    inner = Recording(**options(net))
    with caplog.at_level(logging.WARNING, logger="flwr"):
        serve(AutoFLIP(inner, model=net()), rounds=1, tamper=tamper)
    assert sorted(inner.given[0]) == CIDS
    assert any("node 12 is left out: no disk" in r.getMessage() for r in caplog.records)


def test_without_any_explorer_the_error_names_every_reason():
    def tamper(ins, result):
        raise OSError(f"disk {result.num_examples}")

    strategy = AutoFLIP(FedAvg(**options(net)), model=net())
    with pytest.raises(ExplorationError, match=r"none of 5.*disk 24.*disk 40"):
        serve(strategy, rounds=1, tamper=tamper)


def test_client_ids_that_are_no_numbers_are_an_error():
    LocalGrid(toy_app(), [])
    manager = SimpleClientManager()
    for i in range(2):
        manager.register(InProcess(str(i), legacy_app(net, []), i))
        manager.clients[str(i)].cid = f"client-{i}"
    strategy = AutoFLIP(FedAvg(**options(net)), model=net())
    parameters = strategy.initialize_parameters(manager)
    with pytest.raises(SettingsError, match="client-"):
        strategy.configure_fit(1, parameters, manager)


def test_the_callers_parameters_are_left_alone():
    given = options(net)
    parameters = given["initial_parameters"]
    before = list(parameters.tensors)
    serve(AutoFLIP(FedAvgM(**given, server_momentum=0.9), model=net()))
    assert parameters.tensors == before


@pytest.mark.parametrize(
    "inner",
    [
        older.Krum(num_malicious_clients=1),
        older.DifferentialPrivacyServerSideFixedClipping(older.FedAvg(), 1.0, 1.0, 5),
    ],
)
def test_a_warm_start_does_not_go_around_what_the_inner_strategy_guards(inner):
    with pytest.raises(SettingsError, match=rf"warm_start.*{type(inner).__name__}"):
        AutoFLIP(inner, exploration=ExplorationSettings(warm_start=True))
