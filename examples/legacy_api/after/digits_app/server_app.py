"""digits-app: a Flower / PyTorch app on the older API."""

import torch
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from autoflip_flwr.legacy import AutoFLIP

from digits_app.task import Net, get_weights


def weighted_average(metrics):
    """Aggregate the nodes' accuracies."""
    total = sum(count for count, _ in metrics)
    accuracy = sum(count * m["accuracy"] for count, m in metrics) / total
    print(f"final accuracy {accuracy:.4f}")
    return {"accuracy": accuracy}


def server_fn(context: Context):
    torch.manual_seed(context.run_config["seed"])
    net = Net()
    strategy = FedAvg(
        fraction_fit=context.run_config["fraction-train"],
        initial_parameters=ndarrays_to_parameters(get_weights(net)),
        on_fit_config_fn=lambda server_round: {"lr": context.run_config["lr"]},
        fit_metrics_aggregation_fn=lambda metrics: {"clients": len(metrics)},
        evaluate_metrics_aggregation_fn=weighted_average,
    )
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    strategy = AutoFLIP(strategy, model=net)
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
