"""The ServerApp: read settings, compose, nothing else."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from autoflip_flwr import costs, experiment, training, wire
from autoflip_flwr.grid import RunGrid
from autoflip_flwr.inner import build_strategy
from autoflip_flwr.runlog import RunLog, log_summary
from autoflip_flwr.strategy import AutoFLIP

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names."""
    settings = experiment.settings_of(context.run_config)
    model = experiment.build_model(settings)
    test = experiment.held_out(settings)
    initial = wire.record_of(training.state_arrays(model))
    run_grid = RunGrid(grid, seed=settings.seed, dense_bytes=initial.count_bytes())
    strategy = build_strategy(settings, model, experiment.example_inputs(settings))
    rounds = strategy.rounds if isinstance(strategy, AutoFLIP) else None
    log = RunLog(str(context.run_config["output-dir"]), settings, run_grid, rounds)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        run_grid.begin(server_round + 1)
        if server_round == 0:
            return None
        training.load_arrays(model, wire.arrays_of(arrays))
        found = training.evaluate(
            model, test.x, test.y, device=settings.training.device
        )
        log.round(server_round, found)
        return MetricRecord({"accuracy": found.accuracy, "loss": found.loss})

    experiment.warn_of_few_nodes(settings, len(run_grid.get_node_ids()))
    strategy.start(
        run_grid,
        initial,
        num_rounds=settings.rounds,
        timeout=settings.strategy.timeout,
        evaluate_fn=evaluate,
    )
    masks = rounds.plan.masks if rounds and rounds.plan else {}
    summary = log.finish(
        training.state_arrays(model),
        parameters=costs.parameters(model),
        costs=costs.summary(model, test.x, test.y, masks, settings.training),
    )
    log_summary(summary, log.directory)
