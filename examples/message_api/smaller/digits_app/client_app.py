"""digits-app: a Flower / PyTorch app."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from autoflip_flwr import AutoFlipMod, masked

from digits_app.task import Net, load_data
from digits_app.task import test as test_fn
from digits_app.task import train as train_fn

app = ClientApp(mods=[AutoFlipMod()])


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    torch.manual_seed(context.run_config["seed"])
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    trainloader, _ = load_data(
        context.node_config["partition-id"], context.node_config["num-partitions"]
    )

    with masked(model, msg, torch.zeros(1, 1, 8, 8)) as net:
        train_loss = train_fn(
            net,
            trainloader,
            context.run_config["local-epochs"],
            msg.content["config"]["lr"],
        )

    metrics = {"train_loss": train_loss, "num-examples": len(trainloader.dataset)}
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, testloader = load_data(
        context.node_config["partition-id"], context.node_config["num-partitions"]
    )

    with masked(model, msg, torch.zeros(1, 1, 8, 8)) as net:
        loss, accuracy = test_fn(net, testloader)

    metrics = {
        "eval_loss": loss,
        "eval_acc": accuracy,
        "num-examples": len(testloader.dataset),
    }
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
