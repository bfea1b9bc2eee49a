"""digits-app: a Flower / PyTorch app."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from autoflip_flwr import AutoFLIP

from digits_app.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Main entry point for the ServerApp."""
    torch.manual_seed(context.run_config["seed"])
    arrays = ArrayRecord(Net().state_dict())

    strategy = AutoFLIP(
        FedAvg(fraction_train=context.run_config["fraction-train"]),
        units=0.8,
        model=Net(),
        example_inputs=torch.zeros(1, 1, 8, 8),
    )

    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": context.run_config["lr"]}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    last = max(result.evaluate_metrics_clientapp)
    print(f"final accuracy {result.evaluate_metrics_clientapp[last]['eval_acc']:.4f}")
