"""Federated datasets by name: read, normalise, divide among the clients."""

from autoflip_flwr.app.data.base import Samples
from autoflip_flwr.app.data.federated import (
    divided,
    held_out,
    load,
    load_node,
    names,
    spec,
)

__all__ = ["Samples", "divided", "held_out", "load", "load_node", "names", "spec"]
