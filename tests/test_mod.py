"""The client's half: a mod around apps as Flower users write them."""

import numpy as np
import pytest
import torch
from flat import flat
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from inprocess import (
    LocalGrid,
    arrays_of,
    fit,
    masks_in,
    net,
    plain_net,
    run,
    state_of,
    toy_app,
)
from numpy.testing import assert_array_equal
from torch import nn

from autoflip_flwr import AutoFLIP, AutoFlipMod, exploring, masked, masks_from
from autoflip_flwr.errors import MaskError, SettingsError, WireError
from autoflip_flwr.wire import codec

NODES = [11, 12, 13]


def messages_of(phase, *, make=net, **options):
    """Messages as the strategy writes them, and the model they are of."""
    grid = LocalGrid(toy_app(make), NODES)
    model = make()
    run(AutoFLIP(**flat(threshold=0.6, **options)), grid, model, 1)
    sent = [s for s in grid.down if s.phase == phase]
    for each in sent:  # whole, for a client that holds no mask
        if each.config.pop("autoflip.mask-held", None):
            each.config["autoflip.mask"] = each.mask
    kind = "train" if phase == "explore" else phase
    return model, [Message(RecordDict(dict(s.content)), s.node_id, kind) for s in sent]


def context(node_id=11):
    return Context(
        run_id=1,
        node_id=node_id,
        node_config={"partition-id": 0, "num-partitions": 3},
        state=RecordDict(),
        run_config={},
    )


# --- exploration ----------------------------------------------------------------------


def test_the_apps_train_is_called_once_an_epoch_and_fed_its_own_weights():
    calls = []
    grid = LocalGrid(toy_app(calls=calls), [11, 12])
    model = net()
    run(
        AutoFLIP(FedAvg(fraction_evaluate=0), **flat(exploration_epochs=4)),
        grid,
        model,
        1,
    )
    explored = [c for c in calls if c["config"]["autoflip.phase"] == "explore"]
    assert [(c["node"], c["config"]["autoflip.epoch"]) for c in explored] == [
        (node, epoch) for node in (11, 12) for epoch in range(4)
    ]
    assert {c["config"]["autoflip.epochs"] for c in explored} == {4}
    alone = net()
    one = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for epoch, call in enumerate(explored[4:]):
        for name, value in state_of(alone).items():
            assert_array_equal(call["arrays"][name], value, err_msg=name)
        # The app makes its optimizer anew, the momentum goes on (Eq. 2).
        seed = 10_000 + 100 * (epoch + 1) + 1
        fit(alone, 1, seed=seed, optimizer=lambda _: one)
    assert [r.metrics["autoflip.epochs"] for r in grid.up if r.phase == "explore"] == [
        4,
        4,
    ]


def losing_app(losses, *, name="train-loss", mod=None, calls=None):
    """An app that reports these losses, one a call, and moves every weight by one."""
    app = ClientApp(mods=[mod or AutoFlipMod()])
    left = iter(losses)

    @app.train()
    def train(message, context):
        (key,) = message.content.array_records
        moved = {n: Array(v + 1) for n, v in arrays_of(message.content[key]).items()}
        loss = next(left)
        if calls is not None:
            calls.append(loss)
        metrics = {"num-examples": 5}
        if loss is not None:
            metrics |= {"other-loss": -float(len(moved)), name: loss}
        content = {"arrays": ArrayRecord(moved), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    return app


def explore(app, *, epochs, patience):
    _, messages = messages_of(
        "explore",
        make=plain_net,
        exploration_epochs=epochs,
        exploration_patience=patience,
    )
    return app(messages[0], context())


@pytest.mark.parametrize(
    ("losses", "patience", "epochs"),
    [
        ([5, 4, 3, 2, 1, 0], 1, 6),
        ([5, 4, 4, 9, 9, 9], 1, 3),
        ([5, 4, 6, 3, 6, 6], 2, 6),
        ([5, 4, 6, 5, 3, 3], 2, 4),
        ([5, 5, 5, 5, 5, 5], 3, 4),
        ([float("nan")] * 6, 1, 6),
        ([float("inf"), float("inf"), 1, 1, 1, 1], 2, 2),
        ([None] * 6, 1, 6),
    ],
    ids=["falls", "equal", "recovers", "too late", "flat", "NaN", "Inf", "no loss"],
)
def test_an_explorer_stops_after_so_many_epochs_without_a_lower_loss(
    losses, patience, epochs
):
    calls = []
    mod = AutoFlipMod(loss_key=None if losses[0] is None else "train-loss")
    app = losing_app(losses, mod=mod, calls=calls)
    reply = explore(app, epochs=6, patience=patience)
    assert len(calls) == epochs
    (metrics,) = reply.content.metric_records.values()
    assert metrics["autoflip.epochs"] == epochs
    frame = next(iter(reply.content.array_records.values()))["autoflip.guidance"].data
    shapes = {name: value.shape for name, value in state_of(plain_net()).items()}
    for values in codec.dequantize(frame, shapes).dense().values():
        np.testing.assert_allclose(values, epochs**2, rtol=1e-3)


def test_early_stopping_watches_the_first_loss_or_the_one_it_is_told():
    def epochs(mod):
        calls = []
        explore(losing_app([3, 2, 1, 0], mod=mod, calls=calls), epochs=4, patience=1)
        return len(calls)

    assert epochs(AutoFlipMod(loss_key="train-loss")) == 4
    assert epochs(AutoFlipMod()) == 2, "other-loss comes first and never falls"


def test_a_loss_that_the_app_does_not_report_is_an_error_that_lists_what_it_does():
    app = losing_app([1, 1, 1], mod=AutoFlipMod(loss_key="los"))
    with pytest.raises(WireError, match=r"'los'.*train-loss"):
        explore(app, epochs=3, patience=1)


def test_diverging_weights_end_the_exploration_with_an_error_that_says_so():
    app = ClientApp(mods=[AutoFlipMod()])

    @app.train()
    def train(message, context):
        (key,) = message.content.array_records
        bad = {n: Array(v * np.nan) for n, v in arrays_of(message.content[key]).items()}
        content = {"arrays": ArrayRecord(bad), "metrics": MetricRecord({"n": 1})}
        return Message(RecordDict(content), reply_to=message)

    with pytest.raises(ValueError, match="finite"):
        explore(app, epochs=1, patience=1)


def test_an_error_of_the_app_ends_the_exploration_and_goes_back_as_it_is():
    calls = []
    app = ClientApp(mods=[AutoFlipMod()])

    @app.train()
    def train(message, context):
        calls.append(1)
        return Message(Error(77, "out of memory"), reply_to=message)

    reply = explore(app, epochs=5, patience=1)
    assert reply.error.reason == "out of memory"
    assert len(calls) == 1


def test_nothing_is_pruned_while_exploring():
    seen = []

    def look(model):
        seen.append(all((p != 0).all() for n, p in model.named_parameters()))

    grid = LocalGrid(toy_app(plain_net, after_step=look), NODES)
    run(
        AutoFLIP(FedAvg(fraction_evaluate=0), threshold=0.9),
        grid,
        plain_net(),
        1,
    )
    steps = len(seen) // 2
    assert seen[:steps] == [True] * steps
    assert not any(seen[steps:])


# --- train and evaluate ---------------------------------------------------------------


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_the_app_sees_named_dense_arrays_of_the_right_types(phase):
    model, messages = messages_of(phase)
    seen = {}
    app = ClientApp(mods=[AutoFlipMod()])

    def handle(message, context):
        (record,) = message.content.array_records.values()
        seen.update(arrays_of(record))
        content = {"metrics": MetricRecord({"n": 1})}
        if phase == "train":
            content["arrays"] = record
        return Message(RecordDict(content), reply_to=message)

    getattr(app, phase)()(handle)
    app(messages[0], context())
    expected = state_of(model)
    assert {n: (v.dtype, v.shape) for n, v in seen.items()} == {
        n: (v.dtype, v.shape) for n, v in expected.items()
    }
    net().load_state_dict({n: torch.tensor(v) for n, v in seen.items()})


def test_a_reply_keeps_its_keys_and_everything_but_the_arrays():
    _, messages = messages_of("train")
    app = ClientApp(mods=[AutoFlipMod()])

    @app.train()
    def train(message, context):
        (record,) = message.content.array_records.values()
        content = {
            "my-weights": record,
            "my-metrics": MetricRecord({"num-examples": 3, "f1": 0.5}),
            "note": ConfigRecord({"text": "hello"}),
        }
        return Message(RecordDict(content), reply_to=message)

    reply = app(messages[0], context())
    assert set(reply.content) == {"my-weights", "my-metrics", "note"}
    assert dict(reply.content["my-metrics"]) == {"num-examples": 3, "f1": 0.5}
    assert dict(reply.content["note"]) == {"text": "hello"}
    assert next(iter(reply.content["my-weights"])) == "autoflip.values"


def test_an_error_of_the_app_goes_back_as_it_is():
    _, messages = messages_of("train")
    app = ClientApp(mods=[AutoFlipMod()])

    @app.train()
    def train(message, context):
        return Message(Error(5, "no data"), reply_to=message)

    assert app(messages[0], context()).error.reason == "no data"


def test_arrays_of_other_types_are_converted_and_of_other_shapes_refused():
    _, messages = messages_of("train")
    change = {"value": lambda v: v.astype(np.float64)}
    app = ClientApp(mods=[AutoFlipMod()])

    @app.train()
    def train(message, context):
        (record,) = message.content.array_records.values()
        changed = {n: Array(change["value"](v)) for n, v in arrays_of(record).items()}
        content = {
            "arrays": ArrayRecord(changed),
            "metrics": MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    def copy(message):
        return Message(RecordDict(dict(message.content)), 11, "train")

    sent = messages[0].content["arrays"]["autoflip.values"].data
    reply = app(copy(messages[0]), context())
    assert reply.content["arrays"]["autoflip.values"].data == sent
    change["value"] = lambda v: v[..., None]
    with pytest.raises(WireError, match=r"0\.weight: expected <f4\[16, 6\]"):
        app(copy(messages[0]), context())


# --- messages of others ---------------------------------------------------------------


def test_plain_fedavg_runs_the_same_with_and_without_the_mod():
    def weights(mods):
        return run(FedAvg(), LocalGrid(toy_app(mods=mods), NODES), net(), 2)[0]

    for ours, theirs in zip(weights([AutoFlipMod()]), weights([]), strict=True):
        for name, value in theirs.items():
            assert_array_equal(ours[name], value)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"arrays": ArrayRecord([np.ones(2)])},
        {"a": ConfigRecord({"lr": 1.0}), "b": ConfigRecord({"x": b"1"})},
        {"a": ArrayRecord([np.ones(2)]), "b": ArrayRecord([np.ones(2)])},
    ],
    ids=["nothing", "arrays", "configs", "two records"],
)
@pytest.mark.parametrize("kind", ["query", "train", "evaluate", "train.other"])
def test_messages_that_are_not_ours_pass_untouched(kind, content):
    LocalGrid(toy_app(), NODES)  # lets messages be made
    message = Message(RecordDict(dict(content)), 11, kind)
    seen = []

    def call_next(message, context):
        seen.append((message, dict(message.content)))
        return reply

    reply = Message(RecordDict({"m": MetricRecord({"n": 1})}), reply_to=message)
    assert AutoFlipMod()(message, context(), call_next) is reply
    assert seen == [(message, content)]
    assert dict(reply.content) == {"m": MetricRecord({"n": 1})}


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("autoflip.phase", "prune"),
        ("autoflip.mask", b""),
        ("autoflip.mask", "text"),
        ("autoflip.manifest", b"not deflated"),
        ("autoflip.manifest", None),
        ("autoflip.value-type", "float64"),
    ],
)
def test_a_broken_message_of_ours_is_an_error_that_names_the_entry(entry, value):
    _, messages = messages_of("train")
    config = dict(messages[0].content["config"])
    config.pop(entry)
    if value is not None:
        config[entry] = value
    messages[0].content["config"] = ConfigRecord(config)
    with pytest.raises(WireError, match=entry.partition(".")[2]):
        toy_app()(messages[0], context())


# --- the mask in the app's hands ------------------------------------------------------


def test_masks_from_reads_the_mask_of_a_message_and_of_its_config():
    model, messages = messages_of("train")
    grid = LocalGrid(toy_app(), NODES)
    run(AutoFLIP(**flat(threshold=0.6)), grid, net(), 1)
    expected = masks_in(next(s for s in grid.down if s.phase == "train"), model)
    for source in (messages[0], dict(messages[0].content["config"])):
        masks = masks_from(source)
        assert list(masks) == list(expected)
        for name, keep in expected.items():
            assert masks[name].dtype == np.bool_
            assert_array_equal(masks[name], keep)


def test_there_is_no_mask_while_exploring_nor_without_autoflip():
    _, messages = messages_of("explore")
    assert masks_from(messages[0]) == {}
    assert masks_from({}) == {}
    assert masks_from({"lr": 0.1}) == {}
    plain = Message(RecordDict({"config": ConfigRecord({"lr": 1.0})}), 11, "train")
    assert masks_from(plain) == {}


def test_exploring_is_told_from_training():
    for phase, expected in (("explore", True), ("train", False), ("evaluate", False)):
        _, messages = messages_of(phase)
        assert exploring(messages[0]) is expected
        assert exploring(dict(messages[0].content["config"])) is expected
    assert exploring({"lr": 0.1}) is False


@pytest.mark.parametrize("source", ["message", "masks", "config"])
def test_masked_keeps_pruned_weights_at_zero_whatever_it_is_given(source):
    model, messages = messages_of("train")
    masks = masks_from(messages[0])
    given = {
        "message": messages[0],
        "masks": masks,
        "config": dict(messages[0].content["config"]),
    }[source]

    def check(model):
        for name, parameter in model.named_parameters():
            assert not parameter.detach().numpy()[~masks[name]].any()

    with masked(model, given) as same:
        assert same is model
        fit(
            model,
            0,
            seed=1,
            optimizer=lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
            after_step=check,
        )
    check(model)
    assert all(p.detach().numpy()[masks[n]].any() for n, p in model.named_parameters())


@pytest.mark.parametrize("given", [{}, {"lr": 0.1}], ids=["empty", "plain config"])
def test_masked_without_a_mask_is_plain_training(given):
    alone, inside = net(), net()
    fit(alone, 0, seed=1)
    with masked(inside, given):
        fit(inside, 0, seed=1)
    for name, value in state_of(alone).items():
        assert_array_equal(state_of(inside)[name], value)


def test_masked_refuses_the_mask_of_another_model():
    _, messages = messages_of("train")
    with (
        pytest.raises(MaskError, match="no parameter"),
        masked(nn.Linear(6, 16), messages[0]),
    ):
        pass


def unaware(**training):
    """Pruned weights after every step of an app that has never heard of masks."""
    left = []
    _, messages = messages_of("train", score="saliency")
    masks = masks_from(messages[0])

    def look(model):
        parameters = dict(model.named_parameters())
        left.append(
            max(
                float(np.abs(parameters[name].detach().numpy()[~keep]).max(initial=0))
                for name, keep in masks.items()
            )
        )

    toy_app(use_masked=False, after_step=look, **training)(messages[0], context())
    assert len(left) == 3
    return left


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(list(p), lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "backwards": lambda p: torch.optim.SGD(list(p)[::-1], lr=0.1),
    "groups": lambda p: torch.optim.SGD([{"params": each} for each in p], lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_app_without_masked_has_pruned_weights_at_zero_after_every_step(optimizer):
    assert unaware(optimizer=OPTIMIZERS[optimizer]) == [0.0, 0.0, 0.0]


def test_another_model_inside_the_app_trains_as_if_alone():
    _, messages = messages_of("train")
    other, alone = plain_net(), plain_net()
    fit(alone, 2, seed=3)

    def train_other(model):
        if not done:
            done.append(1)
            fit(other, 2, seed=3)

    done = []
    toy_app(use_masked=False, after_step=train_other)(messages[0], context())
    for name, value in state_of(alone).items():
        assert_array_equal(state_of(other)[name], value)


def test_after_the_message_the_mask_is_forgotten():
    _, messages = messages_of("train")
    toy_app(use_masked=False)(messages[0], context())
    model = net()
    fit(model, 0, seed=1)
    assert all((p != 0).all() for n, p in model.named_parameters() if n != "3.bias")


def test_training_with_masked_and_with_the_mod_alone_are_the_same():
    def weights(use_masked):
        grid = LocalGrid(toy_app(use_masked=use_masked), NODES)
        return run(AutoFLIP(threshold=0.6), grid, net(), 3)[0]

    for ours, theirs in zip(weights(True), weights(False), strict=True):
        for name, value in theirs.items():
            assert_array_equal(ours[name], value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((net(), None), r"got None: with masked\(model, message\)"),
        ((net(), [1]), "expected the message, its config or masks by name"),
        ((net, {}), "expected an nn.Module first"),
    ],
)
def test_masked_refuses_other_types(arguments, message):
    with pytest.raises(SettingsError, match=message), masked(*arguments):
        pass
