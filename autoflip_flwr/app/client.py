"""Our ClientApp: train, explore, evaluate, identify the node."""

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from autoflip_flwr.app import build, training
from autoflip_flwr.client.masked import exploring, masked
from autoflip_flwr.client.mod import AutoFlipMod, check_epochs
from autoflip_flwr.method.privacy import GuidancePrivacy
from autoflip_flwr.settings import Settings
from autoflip_flwr.wire import records


def client_app() -> ClientApp:
    """Return the app of every node: train, explore, evaluate, answer the roll call."""
    app = ClientApp(mods=[AutoFlipMod(privacy=_privacy, start=_start)])
    app.train()(train)
    app.evaluate()(evaluate)
    app.query()(query)
    return app


def _privacy(context: Context) -> GuidancePrivacy | None:
    return build.guidance_privacy(build.settings_of(context.run_config))


def _start(context: Context) -> ArrayRecord:
    model = build.build_model(build.settings_of(context.run_config))
    return ArrayRecord(model.state_dict())


def train(message: Message, context: Context) -> Message:
    """Train on the node's samples; in an exploration, for one epoch."""
    settings = build.settings_of(context.run_config)
    check_epochs(settings.training.epochs, context)
    samples, _ = build.node_samples(settings, context.node_config)
    model = _global_model(settings, message)
    _, config = records.only_config(message.content)
    mu: Any = config.get("proximal-mu", 0.0)  # of FedProx
    with masked(model, message, build.example_inputs(settings)) as net:
        loss = training.train(
            net,
            samples.x,
            samples.y,
            build.training_of_round(settings, config),
            epochs=1 if exploring(message) else settings.training.epochs,
            seed=build.call_seed(settings, config, context.node_config),
            proximal_mu=float(mu),
        )
    metrics = build.metrics_of(settings, len(samples), **{"train-loss": loss})
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
    )
    return Message(content, reply_to=message)


def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on the node's held-out samples."""
    settings = build.settings_of(context.run_config)
    _, samples = build.node_samples(settings, context.node_config)
    device = settings.training.device
    model = _global_model(settings, message)
    with masked(model, message, build.example_inputs(settings)) as net:
        result = training.evaluate(net, samples.x, samples.y, device=device)
    metrics = build.metrics_of(
        settings, result.samples, loss=result.loss, accuracy=result.accuracy
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _global_model(settings: Settings, message: Message) -> nn.Module:
    model = build.build_model(settings)
    _, arrays = records.model_record(message.content)
    training.load_arrays(model, records.arrays_of(arrays))
    return model


def query(message: Message, context: Context) -> Message:
    """Answer the roll call."""
    config = ConfigRecord({records.CLIENT_ID: build.client_id(context.node_config)})
    return Message(RecordDict({"config": config}), reply_to=message)
