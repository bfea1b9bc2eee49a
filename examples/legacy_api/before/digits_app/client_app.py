"""digits-app: a Flower / PyTorch app on the older API."""

import torch
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context

from digits_app.task import Net, get_weights, load_data, set_weights, test, train


class FlowerClient(NumPyClient):
    def __init__(self, net, trainloader, testloader, local_epochs):
        self.net = net
        self.trainloader = trainloader
        self.testloader = testloader
        self.local_epochs = local_epochs

    def fit(self, parameters, config):
        set_weights(self.net, parameters)
        loss = train(self.net, self.trainloader, self.local_epochs, config["lr"])
        return get_weights(self.net), len(self.trainloader.dataset), {"loss": loss}

    def evaluate(self, parameters, config):
        set_weights(self.net, parameters)
        loss, accuracy = test(self.net, self.testloader)
        return loss, len(self.testloader.dataset), {"accuracy": accuracy}


def client_fn(context: Context):
    torch.manual_seed(context.run_config["seed"])
    trainloader, testloader = load_data(
        context.node_config["partition-id"], context.node_config["num-partitions"]
    )
    local_epochs = context.run_config["local-epochs"]
    return FlowerClient(Net(), trainloader, testloader, local_epochs).to_client()


app = ClientApp(client_fn=client_fn)
