"""Neural networks by name, with the initial weights the method starts from."""

from autoflip_flwr.app.models.initial import xavier_normal_
from autoflip_flwr.app.models.registry import build, names

__all__ = ["build", "names", "xavier_normal_"]
