"""Our ServerApp: read the settings, build the parts, run."""

import errno
import logging
from contextlib import nullcontext
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid

from autoflip_flwr.app import build, costs, data, training
from autoflip_flwr.app.folder import run_directory
from autoflip_flwr.app.grid import RunGrid
from autoflip_flwr.app.runlog import DELTA, RunLog, log_summary, quiet
from autoflip_flwr.app.strategies import build_strategy
from autoflip_flwr.errors import CheckpointError
from autoflip_flwr.server.checkpoint import Checkpointed
from autoflip_flwr.server.strategy import AutoFLIP
from autoflip_flwr.settings import Settings
from autoflip_flwr.wire import flower, records
from autoflip_flwr.wire.manifest import largest_message

_log = logging.getLogger("flwr")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def serve(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names."""
    settings = build.settings_of(context.run_config)
    with nullcontext() if settings.log.verbose else quiet():
        _serve(grid, context, settings)


def _serve(grid: Grid, context: Context, settings: Settings) -> None:
    model = build.build_model(settings)
    example = build.example_inputs(settings)
    test = data.held_out(settings.data, seed=settings.seed)
    initial = records.record_of(training.state_arrays(model))
    directory = run_directory(str(context.run_config["output-dir"]), settings)
    run_grid = RunGrid(
        grid,
        seed=settings.seed,
        dense_bytes=initial.count_bytes(),
        names=Path(settings.strategy.names) if settings.strategy.names else None,
        meter=directory / "checkpoints" / "meter.json",
        straggler_factor=settings.strategy.straggler_factor,
    )
    largest = largest_message(initial.count_bytes())
    flower.bound_replies(grid, largest, run_grid.seconds_left)
    strategy = build_strategy(settings, model, example, directory / "guidance")
    rounds = strategy.rounds if isinstance(strategy, AutoFLIP) else None
    if isinstance(strategy, AutoFLIP):
        strategy.traffic = None  # the grid counts, and remembers what a kill would lose
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
        training.load_arrays(model, records.arrays_of(arrays))
        device = settings.training.device
        result = training.evaluate(model, test.x, test.y, device=device)
        log.round(server_round, result)
        run_grid.begin(server_round + 1)
        return MetricRecord({"accuracy": result.accuracy, "loss": result.loss})

    chosen = settings.strategy
    connected = run_grid.wait_for(chosen.min_nodes, seconds=chosen.wait)
    build.check_nodes(settings, connected)
    if privacy := build.guidance_privacy(settings):
        every = settings.exploration.every
        count = 1 + (settings.rounds - 1) // every if every else 1
        one, together = (privacy.epsilon(DELTA, releases=n) for n in (1, count))
        _log.info(
            f"each exploration sends guidance that is ({one:.3g}, {DELTA:g})-"
            f"differentially private; a client's {count} together: ({together:.3g}, "
            f"{DELTA:g})"
        )
    try:
        result = run.start(
            run_grid,
            initial,
            num_rounds=settings.rounds,
            timeout=settings.strategy.timeout,
            evaluate_fn=evaluate,
        )
        training.load_arrays(model, records.arrays_of(result.arrays))
        summary = log.finish(
            training.state_arrays(model),
            costs.summary(model, test.x, test.y, log.masks, settings.training),
        )
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise CheckpointError(
            f"cannot write to {directory}: {error.strerror}; make room, then go on "
            "with resume=true"
        ) from error
    log_summary(summary, directory)
