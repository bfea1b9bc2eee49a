"""A tied weight is one weight: one mask, sent once, under both names in the app."""

import json
import zlib

import numpy as np
import pytest
import torch
from autoflip_flwr.legacy import AutoFLIP as OlderAutoFLIP
from flat import flat
from flwr.server.strategy import FedAvg as OlderFedAvg
from flwr.serverapp.strategy import FedAdam, FedAvg
from inprocess import (
    LocalGrid,
    arrays_of,
    masks_in,
    nudging_app,
    run,
    seeded,
    toy_app,
    values_in,
)
from numpy.testing import assert_allclose, assert_array_equal
from test_checkpoint import NODES, assert_same_weights, pruning, started
from test_forms import MOVED, Noise, Tied, app_of
from test_legacy import options, serve
from torch import nn

from autoflip_flwr import AutoFLIP, AutoFlipMod
from autoflip_flwr.errors import (
    CheckpointError,
    ExplorationError,
    ReplyError,
    SettingsError,
    WireError,
)
from autoflip_flwr.pruners import SSFL
from autoflip_flwr.wire.manifest import Manifest

make = Tied.make
FIRST, SECOND = "first.weight", "again.weight"
DISTINCT = [FIRST, "back.weight", "back.bias", "head.weight", "head.bias"]
N = 96 + 96 + 6 + 48 + 3  # its parameters, the tied one once
KEPT = 100  # of them, at a threshold of 0.6


def inner(**chosen):
    return FedAvg(fraction_evaluate=0, **chosen)


def strategy_of(strategy=None, **settings):
    chosen = {"threshold": 0.6, "model": make()} | settings
    return AutoFLIP(strategy or inner(), **flat(**chosen))


def assert_tied(arrays):
    assert list(arrays) == list(make().state_dict())
    assert_array_equal(arrays[FIRST], arrays[SECOND])


# --- what travels ---------------------------------------------------------------------

#: Bytes of all values, of the kept ones to a client, and from it. Each of the 5 tensors
#: is less than a block, so it has one scale.
BYTES = {
    "float32": (None, 4 * KEPT, 4 * KEPT),
    "float16": (2 * N, 2 * KEPT, 2 * KEPT),
    "int8": (20 + N, 20 + KEPT, 20 + KEPT),
    "int4": (20 + N, 20 + KEPT, 20 + KEPT // 2),
}


@pytest.mark.parametrize("values", BYTES)
def test_it_travels_once_both_ways_and_has_one_mask(values):
    calls, seen_inside = [], []

    class Watching(FedAvg):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            seen_inside.extend(arrays_of(r.content["arrays"]) for r in replies)
            return super().aggregate_train(server_round, replies)

    strategy = strategy_of(Watching(fraction_evaluate=0), values=values)
    grid = LocalGrid(toy_app(make, calls=calls, use_masked=False), NODES)
    seen, result = run(strategy, grid, make(), rounds=3)
    everything, down, up = BYTES[values]
    for sent in grid.down:
        if sent.phase == "explore" and everything is None:
            assert list(sent.arrays) == DISTINCT
        else:
            size = everything if sent.phase == "explore" else down
            assert {n: len(a.data) for n, a in sent.arrays.items()} == {
                "autoflip.values": size
            }
            assert len(sent.mask) == -(-N // 8)
    for sent in grid.up:
        explored = sent.phase == "explore"
        assert {n: len(a.data) for n, a in sent.arrays.items()} == (
            {"autoflip.guidance": 8 * 5 + N} if explored else {"autoflip.values": up}
        )
    assert list(strategy.rounds.plan.masks) == DISTINCT
    assert strategy.rounds.density == KEPT / N
    assert (result.savings.kept, result.savings.parameters) == (KEPT, N)
    assert len(calls) == 4 * len(NODES), "an epoch of exploration, three rounds"
    assert len(seen_inside) == 3 * len(NODES)
    for arrays in [*seen, *seen_inside, *(call["arrays"] for call in calls)]:
        assert_tied(arrays)
    for name, keep in strategy.rounds.plan.masks.items():
        assert not seen[-1][name][~keep].any()
    assert (seen[-1][FIRST] != seen[1][FIRST]).any(), "it has learned"


def test_the_values_of_a_message_by_hand():
    grid = LocalGrid(toy_app(make), NODES)
    seen, _ = run(strategy_of(), grid, make(), rounds=1)
    sent = next(sent for sent in grid.down if sent.phase == "train")
    masks = masks_in(sent, make())
    assert list(masks) == DISTINCT
    for name, value in values_in(sent, masks).items():
        assert_array_equal(value, seen[0][name] * masks[name])


def test_frames_and_names_on_the_older_api():
    seen, calls = [], []
    older = OlderFedAvg(**options(make, seen, fraction_evaluate=0))
    strategy = OlderAutoFLIP(older, **flat(threshold=0.6, model=make()))
    _, proxies = serve(strategy, make, 2, calls=calls)
    for proxy in proxies:
        explored, *trained = proxy.down
        sizes = [len(tensor) for tensor in explored.parameters.tensors]
        assert sizes == [128 + 4 * size for size in (96, 96, 6, 48, 3)]
        for ins in trained:
            assert [len(t) for t in ins.parameters.tensors] == [4 * KEPT]
        guidance, *replies = ([len(t) for t in r.parameters.tensors] for r in proxy.up)
        assert guidance == [8 * 5 + N]
        assert replies == [[4 * KEPT]] * 2
    names = list(make().state_dict())
    given = [parameters for _, _, parameters in calls]
    for arrays in [*seen, *given]:
        assert_tied(dict(zip(names, arrays, strict=True)))
    expected, _ = run(strategy_of(), LocalGrid(toy_app(make), NODES), make(), 2)
    for ours, theirs in zip(seen, expected, strict=True):
        for value, other in zip(ours, theirs.values(), strict=True):
            assert_allclose(value, other, rtol=1e-4, atol=1e-5)


def test_where_nothing_is_pruned_the_model_is_that_of_fedavg():
    grid = LocalGrid(toy_app(make, mods=[]), NODES)
    expected, _ = run(inner(), grid, make(), rounds=3)
    strategy = strategy_of(threshold=0.0)
    found, _ = run(strategy, LocalGrid(toy_app(make), NODES), make(), rounds=3)
    assert_same_weights(found[-1], expected[-1])


@pytest.mark.parametrize("warm_start", [True, False])
def test_a_server_optimizer_and_a_warm_start_keep_it_tied(warm_start):
    strategy = strategy_of(
        FedAdam(fraction_evaluate=0, eta=0.01), warm_start=warm_start
    )
    seen, _ = run(strategy, LocalGrid(toy_app(make), NODES), make(), rounds=3)
    for arrays in seen:
        assert_tied(arrays)


def test_without_the_model_it_is_two_weights_to_the_server():
    strategy = strategy_of(model=None)
    grid = LocalGrid(toy_app(make), NODES)
    seen, result = run(strategy, grid, make(), rounds=2)
    assert result.savings.parameters == N + 96
    assert {FIRST, SECOND} < set(strategy.rounds.plan.masks)
    assert not [sent for sent in grid.up if MOVED in sent.arrays]
    assert_tied(seen[-1])


# --- units, gradients, previews -------------------------------------------------------


class Hidden(nn.Module):
    """A layer that can lose units beside two that are tied."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.one = nn.Linear(8, 8, bias=False)
        self.two = nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight
        self.inner = nn.Linear(8, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        x = self.two(self.one(self.enter(x).relu()).relu())
        return self.head(self.inner(x).relu())


def test_a_smaller_model_with_a_tied_weight_learns_what_the_masked_one_learns():
    def model():
        return seeded(Hidden)

    def end(example_inputs):
        trained = []

        def noted(optimized):
            if optimized.inner.out_features < 64:
                trained.append(optimized.two.weight is optimized.one.weight)

        strategy = strategy_of(
            model=model(), example_inputs=torch.zeros(1, 6), units=0.9
        )
        app = toy_app(model, example_inputs=example_inputs, after_step=noted)
        seen, _ = run(strategy, LocalGrid(app, NODES), model(), rounds=2)
        assert bool(trained) is (example_inputs is not None)
        assert all(trained)
        return seen[-1]

    small, whole = end(torch.zeros(1, 6)), end(None)
    for name, value in whole.items():
        assert_allclose(small[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert_array_equal(small["one.weight"], small["two.weight"])


def test_gradients_of_a_tied_weight_are_measured_where_the_model_is_known():
    strategy = strategy_of(pruner=SSFL(), vectors=False)
    grid = LocalGrid(app_of(Tied()), NODES)
    seen, _ = run(strategy, grid, make(), rounds=2)
    assert_tied(seen[-1])
    assert strategy.rounds.density == KEPT / N
    unknown = strategy_of(model=None, pruner=SSFL())
    with pytest.raises(ExplorationError, match=r"ties weights, give .* model=Net\(\)"):
        run(unknown, LocalGrid(app_of(Tied()), NODES), make(), rounds=1)


def test_a_preview_counts_what_a_run_sends():
    strategy = AutoFLIP(inner(), model=make(), example_inputs=torch.zeros(1, 6))
    told = strategy.preview(clients=5, rounds=3)
    _, result = run(strategy, LocalGrid(nudging_app(), NODES), make(), rounds=3)
    assert told.sent == pytest.approx(result.savings.sent, rel=0.02)
    assert (told.parameters, told.kept) == (N, result.savings.kept)


# --- checkpoints ----------------------------------------------------------------------


def test_a_run_that_goes_on_ends_as_one_that_never_stopped(tmp_path):
    def built(folder, **chosen):
        return pruning(model=make(), **chosen)(folder)

    whole, _, _ = started(tmp_path / "whole", built, 4, model=make)
    started(tmp_path / "parts", built, 2, model=make)
    parts, grid, _ = started(tmp_path / "parts", built, 4, model=make)
    assert "explore" not in {sent.phase for sent in grid.down}
    assert_same_weights(parts, whole)
    assert_tied(parts)
    unknown = pruning(model=None)
    with pytest.raises(CheckpointError, match="knew the model, or its tied weights"):
        started(tmp_path / "parts", unknown, 5, model=make)


# --- models that do not fit -----------------------------------------------------------


def untied():
    model = make()
    model.again.weight = nn.Parameter(model.first.weight.detach().clone())
    return model


def test_an_app_that_trains_two_stops_the_run_unless_it_is_a_mods_noise():
    cure = r"again.weight is first.weight in the server's model.*tie them in the app's"
    with pytest.raises(ReplyError, match=cure):
        run(strategy_of(), LocalGrid(toy_app(untied), NODES), make(), rounds=3)

    class Uneven(Noise):
        def __call__(self, message, context, call_next):
            reply = super().__call__(message, context, call_next)
            record = reply.content["arrays"]
            record[SECOND] = type(record[SECOND])(2 * record[SECOND].numpy())
            return reply

    app = toy_app(make, mods=[AutoFlipMod(), Uneven()])
    seen, _ = run(strategy_of(), LocalGrid(app, NODES), make(), rounds=2)
    assert_tied(seen[-1])


def test_initial_weights_that_are_two_are_refused():
    grid, model = LocalGrid(toy_app(make), NODES), untied()
    with torch.no_grad():
        model.again.weight[0, 0] += 1
    text = r"again.weight is first.weight in the model .*from a model that ties them"
    with pytest.raises(SettingsError, match=text):
        run(strategy_of(), grid, model, rounds=1)


# --- manifests ------------------------------------------------------------------------

TIES = {"b": "a"}


def two():
    both = np.ones((2, 3), np.float32)
    return {"a": both, "b": both, "c": np.zeros(2, np.float32)}


def test_a_manifest_with_a_tie_comes_back():
    manifest = Manifest.of(two(), ties=TIES)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert list(manifest.shapes) == ["a", "c"]
    assert json.loads(zlib.decompress(manifest.to_bytes())) == [
        ["a", [2, 3], "<f4", 1, 1],
        ["b", [2, 3], "<f4", 0, 0, "a"],
        ["c", [2], "<f4", 1, 1],
    ]


def test_a_rule_for_one_of_its_names_is_one_for_the_weight():
    for name in "ab":
        manifest = Manifest.of(two(), ties=TIES, exclude=[name])
        assert list(manifest.shapes) == ["c"]
        assert [entry.name for entry in manifest.whole] == ["a"]
        assert list(Manifest.of(two(), ties=TIES, prunable=[name]).shapes) == ["a"]


def test_a_tie_of_what_does_not_travel_is_none():
    arrays = two()
    del arrays["a"]
    assert list(Manifest.of(arrays, ties=TIES).shapes) == ["b", "c"]


def rows(*second):
    first = ["a", [2, 3], "<f4", 1, 1]
    return zlib.compress(json.dumps([first, list(second)]).encode())


HOSTILE = {
    "unknown": (rows("b", [2, 3], "<f4", 0, 0, "x"), "got 'x': no such array"),
    "itself": (rows("b", [2, 3], "<f4", 0, 0, "b"), "got 'b': no such array"),
    "a shape": (rows("b", [3, 2], "<f4", 0, 0, "a"), r"<f4\[3, 2\], got 'a': \(\("),
    "a type": (rows("b", [2, 3], "<f8", 0, 0, "a"), r"<f8\[2, 3\], got 'a': \(\("),
    "a mask": (rows("b", [2, 3], "<f4", 1, 0, "a"), "got masked True, trainable False"),
    "trained": (
        rows("b", [2, 3], "<f4", 0, 1, "a"),
        "got masked False, trainable True",
    ),
    "a number": (rows("b", [2, 3], "<f4", 0, 0, 7), "names and a type as text"),
    "a list": (rows("b", [2, 3], "<f4", 0, 0, ["a"]), "names and a type as text"),
    "two": (rows("b", [2, 3], "<f4", 0, 0, "a", "a"), "manifest: "),
}


@pytest.mark.parametrize(("frame", "text"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tie_is_a_wire_error(frame, text):
    with pytest.raises(WireError, match=text):
        Manifest.from_bytes(frame)


def test_a_chain_of_second_names_is_refused():
    entries = json.loads(zlib.decompress(Manifest.of(two(), ties=TIES).to_bytes()))
    entries[2] = ["c", [2, 3], "<f4", 0, 0, "b"]
    with pytest.raises(WireError, match=r"c: expected the second name .* got 'b'"):
        Manifest.from_bytes(zlib.compress(json.dumps(entries).encode()))
