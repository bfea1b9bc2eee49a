"""What our ServerApp and ClientApp do: read settings, compose, nothing else."""

import errno
import logging

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from autoflip_flwr import costs, experiment, training, wire
from autoflip_flwr.checkpoint import Checkpointed
from autoflip_flwr.errors import CheckpointError
from autoflip_flwr.grid import CLIENT_ID, RunGrid
from autoflip_flwr.inner import build_strategy
from autoflip_flwr.mod import AutoFlipMod, exploring, masked
from autoflip_flwr.privacy import GuidancePrivacy
from autoflip_flwr.runlog import RunLog, log_summary, run_directory
from autoflip_flwr.strategy import AutoFLIP

_log = logging.getLogger("flwr")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: At which a run tells its epsilon.
_DELTA = 1e-5


def serve(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names."""
    settings = experiment.settings_of(context.run_config)
    model = experiment.build_model(settings)
    example = experiment.example_inputs(settings)
    test = experiment.held_out(settings)
    initial = wire.record_of(training.state_arrays(model))
    directory = run_directory(str(context.run_config["output-dir"]), settings)
    run_grid = RunGrid(
        grid,
        seed=settings.seed,
        dense_bytes=initial.count_bytes(),
        meter=directory / "checkpoints" / "meter.json",
    )
    strategy = build_strategy(settings, model, example, store=directory / "guidance")
    rounds = strategy.rounds if isinstance(strategy, AutoFLIP) else None
    operations = costs.Operations(model, example)
    resume = bool(context.run_config.get("resume", False))
    log = RunLog(directory, settings, run_grid, rounds, operations, resume=resume)
    run = Checkpointed(
        strategy,
        directory / "checkpoints",
        settings=settings.identity(),
        parts={"grid": run_grid, "log": log},
    )

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 0:
            log.begin()
            return None
        training.load_arrays(model, wire.arrays_of(arrays))
        found = training.evaluate(
            model, test.x, test.y, device=settings.training.device
        )
        log.round(server_round, found)
        run_grid.begin(server_round + 1)
        return MetricRecord({"accuracy": found.accuracy, "loss": found.loss})

    experiment.warn_of_few_nodes(settings, len(list(grid.get_node_ids())))
    privacy = experiment.guidance_privacy(settings)
    if privacy is not None:
        _log.info(
            "guidance leaves a client (%.3g, %g)-differentially private, each time it "
            "explores",
            privacy.epsilon(_DELTA),
            _DELTA,
        )
    try:
        result = run.start(
            run_grid,
            initial,
            num_rounds=settings.rounds,
            timeout=settings.strategy.timeout,
            evaluate_fn=evaluate,
        )
        training.load_arrays(model, wire.arrays_of(result.arrays))
        masks = rounds.plan.masks if rounds and rounds.plan else {}
        summary = log.finish(
            training.state_arrays(model),
            parameters=costs.parameters(model),
            costs=costs.summary(model, test.x, test.y, masks, settings.training),
        )
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise CheckpointError(
            f"cannot write to {directory}: {error.strerror}; make room, then go on "
            "with resume=true"
        ) from error
    log_summary(summary, directory)


def client_app() -> ClientApp:
    """Return the app of every node: train, explore, evaluate, answer the roll call."""
    app = ClientApp(mods=[AutoFlipMod(privacy=_privacy)])
    app.train()(train)
    app.evaluate()(evaluate)
    app.query()(query)
    return app


def _privacy(context: Context) -> GuidancePrivacy | None:
    return experiment.guidance_privacy(experiment.settings_of(context.run_config))


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


def query(message: Message, context: Context) -> Message:
    """Answer the roll call."""
    config = ConfigRecord({CLIENT_ID: experiment.client_id(context.node_config)})
    return Message(RecordDict({"config": config}), reply_to=message)
