"""AutoFLIP for Flower: federated pruning from the clients' exploration."""

from autoflip_flwr import codec, guidance, mask, units
from autoflip_flwr.checkpoint import Checkpointed
from autoflip_flwr.errors import AutoFlipError
from autoflip_flwr.mod import AutoFlipMod, masked, masks_from
from autoflip_flwr.privacy import GuidancePrivacy
from autoflip_flwr.settings import ExplorationSettings, RivalSettings
from autoflip_flwr.strategy import AutoFLIP
from autoflip_flwr.units import compact, expand

__all__ = [
    "AutoFLIP",
    "AutoFlipError",
    "AutoFlipMod",
    "Checkpointed",
    "ExplorationSettings",
    "GuidancePrivacy",
    "RivalSettings",
    "codec",
    "compact",
    "expand",
    "guidance",
    "mask",
    "masked",
    "masks_from",
    "units",
]
