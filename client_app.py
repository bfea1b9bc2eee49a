"""The ClientApp: read settings, compose, nothing else."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from autoflip_flwr import experiment, training, wire
from autoflip_flwr.grid import PARTITION_ID
from autoflip_flwr.mod import AutoFlipMod, exploring, masked

app = ClientApp(mods=[AutoFlipMod()])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the node's samples; exploring, for one epoch."""
    settings = experiment.settings_of(context.run_config)
    samples, _ = experiment.node_samples(settings, context.node_config)
    model = experiment.build_model(settings)
    _, arrays = wire.only_array_record(message.content)
    _, config = wire.only_config(message.content)
    training.load_arrays(model, wire.arrays_of(arrays))
    with masked(model, message, experiment.example_inputs(settings)) as net:
        loss = training.train(
            net,
            samples.x,
            samples.y,
            experiment.training_of_round(settings, config),
            epochs=1 if exploring(message) else settings.training.epochs,
            seed=experiment.call_seed(settings, config, context.node_config),
            proximal_mu=experiment.proximal_mu(config),
        )
    metrics = MetricRecord({"num-examples": len(samples), "train-loss": loss})
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": metrics,
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on the node's held-out samples."""
    settings = experiment.settings_of(context.run_config)
    _, samples = experiment.node_samples(settings, context.node_config)
    model = experiment.build_model(settings)
    _, arrays = wire.only_array_record(message.content)
    training.load_arrays(model, wire.arrays_of(arrays))
    with masked(model, message, experiment.example_inputs(settings)) as net:
        found = training.evaluate(
            net, samples.x, samples.y, device=settings.training.device
        )
    metrics = MetricRecord(
        {
            "num-examples": found.samples,
            "loss": found.loss,
            "accuracy": found.accuracy,
        }
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer the roll call."""
    partition_id = int(context.node_config.get("partition-id", -1))
    metrics = MetricRecord({PARTITION_ID: partition_id})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
