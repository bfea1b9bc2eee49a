"""Federated datasets by name: read, normalise, divide among the clients."""

from autoflip_flwr.app.data.base import Dataset, Samples
from autoflip_flwr.app.data.federated import Federated, load, load_node, names, spec

__all__ = ["Dataset", "Federated", "Samples", "load", "load_node", "names", "spec"]
