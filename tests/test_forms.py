"""Apps in the forms that Flower's users write: masks hold in each, or it is said."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from inprocess import LocalGrid, arrays_of, net, plain_net, run, samples, seeded
from torch import nn
from torch.nn import functional

from autoflip_flwr import AutoFLIP, AutoFlipMod, exploring, masked, masks_from
from autoflip_flwr.errors import ExplorationError, MaskError, ReplyError
from autoflip_flwr.pruners import SSFL, Magnitude
from autoflip_flwr.settings import ExplorationSettings, PruningSettings
from autoflip_flwr.wire.manifest import Manifest

NODES = [11, 12, 13]
MOVED = "autoflip.moved"


class Model:
    """What a form has of its own: the model, what travels of it, how it trains."""

    make = staticmethod(net)

    def load(self, model, state):
        model.load_state_dict(state)

    def state(self, model):
        return model.state_dict()

    def batches(self, context):
        x, y = samples(int(context.node_config["partition-id"]))
        return zip(x.split(8), y.split(8), strict=True)

    def train(self, model, batches, message):
        self.steps(model, batches, torch.optim.SGD(model.parameters(), 0.1, 0.9))

    def steps(self, model, batches, *optimizers):
        for x, y in batches:
            model.zero_grad()
            functional.cross_entropy(model(x).to(y.device), y).backward()
            for optimizer in optimizers:
                optimizer.step()


class DecayGroups(Model):
    """As HuggingFace's Trainer: no decay for biases and norms, which come last."""

    def train(self, model, batches, message):
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": others, "weight_decay": 0.0},
        ]
        self.steps(model, batches, torch.optim.AdamW(groups, 0.05))


class TwoOptimizers(Model):
    def train(self, model, batches, message):
        head = torch.optim.Adam(model[3].parameters(), 0.05)
        body = torch.optim.SGD(model[:2].parameters(), 0.1, 0.9)
        self.steps(model, batches, head, body)


class FrozenBackbone(Model):
    def train(self, model, batches, message):
        model[:3].requires_grad_(False)
        self.steps(model, batches, torch.optim.Adam(model[3].parameters(), 0.05))


class Backwards(Model):
    def train(self, model, batches, message):
        parameters = list(model.parameters())[::-1]
        self.steps(model, batches, torch.optim.Adam(parameters, 0.05))


class Closure(Model):
    def train(self, model, batches, message):
        optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
        for x, y in batches:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)


class Tied(Model):
    """One matrix embeds and predicts; its `state_dict` has it under two names."""

    @staticmethod
    def make():
        def build():
            body = nn.Linear(6, 16, bias=False)
            model = nn.Sequential(
                OrderedDict(
                    first=body,
                    back=nn.Linear(16, 6),
                    again=nn.Linear(6, 16, bias=False),
                    head=nn.Linear(16, 3),
                )
            )
            model.again.weight = body.weight
            return model

        return seeded(build)


class Compiled(Model):
    def train(self, model, batches, message):
        compiled = torch.compile(model, backend="eager")
        super().train(compiled, batches, message)


class CompiledMasked(Model):
    def train(self, model, batches, message):
        compiled = torch.compile(model, backend="eager")
        with masked(compiled, message):
            super().train(compiled, batches, message)


class Parallel(Model):
    def train(self, model, batches, message):
        parallel = nn.DataParallel(model)
        with masked(parallel, message):
            super().train(parallel, batches, message)


class Lightning(Model):
    """The loop is a trainer's; the module has the model inside and its optimizer."""

    class Module(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.05)

        def training_step(self, batch):
            x, y = batch
            return functional.cross_entropy(self.model(x), y)

    def train(self, model, batches, message):
        module = self.Module(model)
        optimizer = module.configure_optimizers()
        for batch in batches:

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = module.training_step(batch)
                loss.backward()
                return loss

            optimizer.step(closure)


class LightningMasked(Lightning):
    """Given the whole module, whose names have a prefix."""

    def train(self, model, batches, message):
        with masked(self.Module(model), message):
            super().train(model, batches, message)


class ByHand(Model):
    """Weights are copied, not loaded; the optimizer is still torch's."""

    def load(self, model, state):
        for name, parameter in model.named_parameters():
            parameter.data = state[name].clone()


class HalfPrecision(Model):
    make = staticmethod(plain_net)

    def train(self, model, batches, message):
        model.to(torch.bfloat16)
        batches = [(x.to(torch.bfloat16), y) for x, y in batches]
        super().train(model, batches, message)

    def state(self, model):
        return {name: value.float() for name, value in model.state_dict().items()}


class Adapter(nn.Module):
    """A frozen layer with a low-rank one beside it, named as PEFT names them."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base.out_features, False)})
        nn.init.normal_(self.lora_B["default"].weight, std=0.1)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Peft(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def forward(self, x):
        return self.base_model["model"](x)


class Lora(Model):
    """Adapters alone travel, under names without the adapter's, as with PEFT."""

    @staticmethod
    def make():
        return seeded(
            lambda: Peft(
                nn.Sequential(
                    Adapter(nn.Linear(6, 16)), nn.Tanh(), Adapter(nn.Linear(16, 3))
                )
            )
        )

    def state(self, model):
        return {
            name.replace(".default", ""): value
            for name, value in model.state_dict().items()
            if "lora_" in name
        }

    def load(self, model, state):
        named = {n.replace(".weight", ".default.weight"): v for n, v in state.items()}
        assert not model.load_state_dict(named, strict=False).unexpected_keys

    def train(self, model, batches, message):
        trained = [p for p in model.parameters() if p.requires_grad]
        self.steps(model, batches, torch.optim.AdamW(trained, 0.05))


class LoraMasked(Lora):
    def train(self, model, batches, message):
        with masked(model, message):
            super().train(model, batches, message)


class FedPer(Model):
    """The head stays with the client; the optimizer holds both."""

    def state(self, model):
        return model[:3].state_dict()

    def load(self, model, state):
        model[:3].load_state_dict(state)


class PartMasked(FedPer):
    def train(self, model, batches, message):
        with masked(model[:3], message):
            super().train(model, batches, message)


class Spectral(Model):
    """Weights of Fourier modes are complex: they train, and travel whole."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.modes = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(x) * self.modes, n=6)

    @classmethod
    def make(cls):
        return seeded(lambda: nn.Sequential(cls.Layer(), *net()))


FORMS = [
    Model,
    Backwards,
    ByHand,
    Closure,
    Compiled,
    CompiledMasked,
    DecayGroups,
    FedPer,
    HalfPrecision,
    Lightning,
    LightningMasked,
    Lora,
    LoraMasked,
    Parallel,
    PartMasked,
    Spectral,
    Tied,
    TwoOptimizers,
]


def app_of(form, *, mods=None):
    """A ClientApp as a user writes it, of one form."""
    app = ClientApp(mods=[AutoFlipMod()] if mods is None else mods)

    @app.train()
    def train(message, context):
        model = form.make()
        form.load(model, message.content["arrays"].to_torch_state_dict())
        form.train(model, form.batches(context), message)
        metrics = MetricRecord({"num-examples": 24 + context.node_id, "loss": 1.0})
        content = {"arrays": ArrayRecord(form.state(model)), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    return app


def start(form, strategy=None, rounds=2, *, app=None):
    """Run a form; return what travelled, and the models of the rounds."""
    grid = LocalGrid(app or app_of(form), NODES)
    if strategy is None:
        strategy = AutoFLIP(FedAvg(fraction_evaluate=0), threshold=0.6)

    class Initial:
        @staticmethod
        def state_dict():
            return form.state(form.make())

    seen, _ = run(strategy, grid, Initial(), rounds)
    return grid, seen, strategy


@pytest.mark.parametrize("form", FORMS)
def test_masks_hold_in_every_form(form, caplog):
    grid, seen, strategy = start(form())
    replies = [sent for sent in grid.up if sent.phase == "train"]
    assert len(replies) == 2 * len(NODES)
    assert not [sent for sent in replies if MOVED in sent.arrays]
    assert "training moved" not in caplog.text
    assert 0.1 < strategy.rounds.density < 0.9
    assert any((seen[-1][n] != seen[1][n]).any() for n in seen[1]), "it has learned"


def test_gradients_are_measured_beside_complex_parameters():
    inner, model = FedAvg(fraction_evaluate=0), Spectral.make()
    strategy = AutoFLIP(inner, threshold=0.6, pruner=SSFL(), model=model)
    _, _, strategy = start(Spectral(), strategy)
    assert strategy.rounds.density == pytest.approx(0.4, abs=0.01)


class Normed(Model):
    """A weight is a length times a row over its norm."""

    @staticmethod
    def make():
        def build():
            wrapped = nn.utils.parametrizations.weight_norm(nn.Linear(2, 16))
            return nn.Sequential(nn.Linear(6, 2), wrapped, nn.Tanh(), nn.Linear(16, 3))

        return seeded(build)


def test_of_weight_norm_the_directions_are_excluded_as_a_row_of_zeros_has_none():
    def strategy(*exclude):
        pruning = PruningSettings(threshold=0.8, exclude=exclude)
        return AutoFLIP(FedAvg(fraction_evaluate=0), pruning=pruning)

    with pytest.raises(ReplyError, match="got NaN or Inf"):
        start(Normed(), strategy())
    _, seen, ended = start(Normed(), strategy("*original1"))
    assert ended.rounds.density == pytest.approx(0.2, abs=0.01)
    assert all(np.isfinite(value).all() for value in seen[-1].values())


def test_actions_of_the_apps_own_with_mods_of_their_own():
    class Chosen(FedAvg):
        def configure_train(self, *args):
            for i, message in enumerate(super().configure_train(*args)):
                action = ("train.fast", "train.slow")[i % 2]
                yield Message(message.content, message.metadata.dst_node_id, action)

    app, plain, called = ClientApp(), app_of(Model(), mods=[]), set()
    for name in ("fast", "slow"):

        @app.train(name, mods=[AutoFlipMod()])
        def train(message, context, name=name):
            called.add(name)
            dense = Message(message.content, message.metadata.dst_node_id, "train")
            content = plain(dense, context).content
            return Message(content, reply_to=message)

    strategy = AutoFLIP(Chosen(fraction_evaluate=0), threshold=0.6)
    _, seen, strategy = start(Model(), strategy, app=app)
    assert called == {"fast", "slow"}
    assert 0.1 < strategy.rounds.density < 0.9
    assert (seen[-1]["3.weight"] != seen[1]["3.weight"]).any()


class Rates(Model):
    """No optimizer: nothing tells the mod when a step is done."""

    def train(self, model, batches, message):
        for x, y in batches:
            model.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad


class RatesMasked(Rates):
    def train(self, model, batches, message):
        with masked(model, message):
            super().train(model, batches, message)


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if "moved up to" in r.getMessage()]


def test_what_moved_pruned_weights_is_told_once_with_the_cure(caplog):
    grid, seen, strategy = start(Rates(), rounds=3)
    (warning,) = warnings_in(caplog)
    shares = [
        float(np.frombuffer(sent.arrays[MOVED].data, "<f4")[0])
        for sent in grid.up
        if sent.phase == "train"
    ][: len(NODES)]
    assert max(shares) > 0.9
    assert warning.startswith(
        f"round 1: training moved up to {100 * max(shares):.3g} % of the pruned weights"
    )
    assert "`with masked(model, message): train(...)`" in warning
    for name, keep in strategy.rounds.plan.masks.items():
        assert not seen[-1][name][~keep].any(), name


def test_the_cure_cures(caplog):
    grid, _, _ = start(RatesMasked())
    assert not warnings_in(caplog)
    assert not [sent for sent in grid.up if MOVED in sent.arrays]


def test_a_frozen_backbone_that_is_named_stays_whole_and_the_head_is_masked(caplog):
    pruning = PruningSettings(exclude=["0.*", "1.*"])
    inner = FedAvg(fraction_evaluate=0)
    strategy = AutoFLIP(inner, threshold=0.6, pruning=pruning)
    grid, seen, _ = start(FrozenBackbone(), strategy)
    assert not [sent for sent in grid.up if MOVED in sent.arrays]
    assert list(strategy.rounds.plan.masks) == ["3.weight", "3.bias"]
    np.testing.assert_allclose(seen[-1]["0.weight"], seen[0]["0.weight"], rtol=1e-6)


def test_of_lora_the_adapters_alone_travel():
    grid, _, _ = start(Lora())
    names = {n for sent in grid.down if sent.phase == "explore" for n in sent.arrays}
    assert names == {
        f"base_model.model.{layer}.lora_{side}.weight"
        for layer in (0, 2)
        for side in "AB"
    }
    assert {n for s in grid.down if s.phase == "train" for n in s.arrays} == {
        "autoflip.values"
    }


class OtherModel(Model):
    """Masks a model that the server does not know."""

    def train(self, model, batches, message):
        with masked(nn.Linear(6, 3), message):
            super().train(model, batches, message)


@pytest.mark.parametrize(
    ("pruner", "error"), [(None, ExplorationError), (Magnitude(), ReplyError)]
)
def test_a_model_that_no_mask_fits_stops_the_run_at_the_first_message(pruner, error):
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), pruner=pruner)
    grid = LocalGrid(app_of(OtherModel()), NODES)
    cure = r"MaskError.*'0.weight', which is no parameter.*hand over the module whose"
    with pytest.raises(error, match=cure):
        run(strategy, grid, net(), 5)
    assert len(grid.down) == len(NODES), "one message a node"


def test_a_number_is_no_name_where_the_counts_differ():
    """As on the older API, which numbers arrays: those of a part have other numbers."""
    numbered = [Array(v) for v in arrays_of(ArrayRecord(net().state_dict())).values()]
    record = ArrayRecord({str(i): array for i, array in enumerate(numbered)})
    manifest = Manifest.of(arrays_of(record))
    config = {"autoflip.phase": "explore", "autoflip.manifest": manifest.to_bytes()}
    with (
        pytest.raises(MaskError, match=r"of 8 arrays, .* got Linear with 2: hand over"),
        masked(nn.Linear(16, 3), config),
    ):
        pass


@pytest.mark.parametrize("pruner", [None, Magnitude()])
def test_a_forgotten_mod_stops_the_run_at_the_first_message(pruner):
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), pruner=pruner)
    grid = LocalGrid(app_of(Model(), mods=[]), NODES)
    cure = r"as AutoFlipMod does: ClientApp\(mods=\[AutoFlipMod\(\)\]\)"
    with pytest.raises((ExplorationError, ReplyError), match=cure) as caught:
        run(strategy, grid, net(), 5)
    assert len(grid.down) == len(NODES), "one message a node"
    assert str(caught.value).count("AutoFlipMod does") == 1


class Noise:
    """A mod behind ours, as LocalDpMod: what it adds is no fault of the training."""

    def __call__(self, message, context, call_next):
        reply = call_next(message, context)
        noisy = {n: a.numpy() for n, a in reply.content["arrays"].items()}
        reply.content["arrays"] = ArrayRecord(
            {
                n: Array(v + np.float32(0.01) if v.dtype.kind == "f" else v)
                for n, v in noisy.items()
            }
        )
        return reply


@pytest.mark.parametrize("form", [Model, CompiledMasked, RatesMasked, Rates])
def test_noise_of_a_mod_is_not_taken_for_training(form, caplog):
    start(form(), app=app_of(form(), mods=[AutoFlipMod(), Noise()]))
    assert bool(warnings_in(caplog)) is (form is Rates)


class Late(Model):
    """Moves pruned weights by hand after the optimizer's steps."""

    def train(self, model, batches, message):
        super().train(model, batches, message)
        with torch.no_grad():
            model[0].weight += 0.1


def test_what_moves_after_the_last_step_is_told(caplog):
    start(Late())
    assert len(warnings_in(caplog)) == 1


# --- what an app keeps ----------------------------------------------------------------


def counting_app():
    """Counts its calls in `context.state`, and keeps a history there."""
    app = ClientApp(mods=[AutoFlipMod()])

    @app.train()
    def train(message, context):
        count = context.state.config_records.setdefault("calls", ConfigRecord())
        count["train"] = count.get("train", 0) + 1
        history = context.state.metric_records.setdefault("history", MetricRecord())
        history["losses"] = [*history.get("losses", []), 1.0]
        record = message.content["arrays"]
        moved = {n: Array(np.asarray(v + 1)) for n, v in arrays_of(record).items()}
        seen.append((exploring(message), count["train"]))
        metrics = MetricRecord({"num-examples": 8})
        content = {"arrays": ArrayRecord(moved), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    seen = []
    return app, seen


def test_an_exploration_leaves_no_trace_in_the_state():
    app, seen = counting_app()
    strategy = AutoFLIP(
        FedAvg(fraction_evaluate=0),
        threshold=0.5,
        exploration=ExplorationSettings(epochs=5),
    )
    grid, _, _ = start(Model(), strategy, app=app)
    assert [n for explored, n in seen if explored] == 3 * [1, 2, 3, 4, 5]
    for context in grid.contexts.values():
        assert context.state["calls"]["train"] == 2, "7 calls in 2 rounds"
        assert context.state["history"]["losses"] == [1.0, 1.0]


# --- models that are not torch's ------------------------------------------------------


def logistic_app(knows_masks):
    """Softmax regression in NumPy, as with scikit-learn: a list of two arrays."""
    app = ClientApp(mods=[AutoFlipMod()])

    @app.train()
    def train(message, context):
        weight, bias = message.content["arrays"].to_numpy_ndarrays()
        x, y = (v.numpy() for v in samples(int(context.node_config["partition-id"])))
        keeps = list(masks_from(message).values()) if knows_masks else []
        keeps = keeps or [True, True]
        for _ in range(20):
            odds = np.exp(x @ weight.T + bias)
            error = odds / odds.sum(1, keepdims=True) - np.eye(3)[y]
            weight = (weight - 0.1 * error.T @ x / len(y)) * keeps[0]
            bias = (bias - 0.1 * error.mean(0)) * keeps[1]
        metrics = MetricRecord({"num-examples": len(y)})
        content = {"arrays": ArrayRecord([weight, bias]), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    return app


@pytest.mark.parametrize("knows_masks", [True, False])
def test_a_model_of_numpy_arrays_learns_under_a_mask(knows_masks, caplog):
    grid = LocalGrid(logistic_app(knows_masks), NODES)
    initial = ArrayRecord([np.zeros((3, 6)), np.zeros(3)])
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), threshold=0.4)
    result = strategy.start(grid, initial, num_rounds=3)
    weight, bias = result.arrays.to_numpy_ndarrays()
    pruned = np.count_nonzero(weight == 0) + np.count_nonzero(bias == 0)
    assert pruned == round(0.4 * 21)
    x, y = (v.numpy() for v in samples(0))
    assert np.mean(np.argmax(x @ weight.T + bias, 1) == y) > 0.7
    assert knows_masks is not any("masks_from" in w for w in warnings_in(caplog))
