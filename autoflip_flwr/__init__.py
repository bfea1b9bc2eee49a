"""AutoFLIP for Flower: federated pruning from the clients' exploration.

Folders are the layers; imports go down only:

    compare    strategies side by side, reports            (extra `compare`)
    app        our own ServerApp and ClientApp             (extra `app`)
    server     AutoFLIP, the strategy     client  AutoFlipMod and masked
    pruners    what makes masks           units   what needs a torch model
    wire       bytes and Flower's records
    method     the paper, NumPy alone
    settings, types, errors

Names are imported when they are first used, so that a client does not import what only
a server needs.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import spec_from_loader
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoflip_flwr import units
    from autoflip_flwr.app import data, models
    from autoflip_flwr.client.masked import exploring, masked, masks_from
    from autoflip_flwr.client.mod import AutoFlipMod
    from autoflip_flwr.errors import AutoFlipError
    from autoflip_flwr.method import guidance, mask
    from autoflip_flwr.method.privacy import GuidancePrivacy
    from autoflip_flwr.pruners import L1, L2, SSFL, BatchNormScale, EFLPrune, FedDST
    from autoflip_flwr.pruners import FedRTS, FedTiny, Magnitude, PruneFL, Pruner
    from autoflip_flwr.pruners import Random, Similarity
    from autoflip_flwr.server.checkpoint import Checkpointed
    from autoflip_flwr.server.strategy import AutoFLIP
    from autoflip_flwr.settings import ExplorationSettings, PruningSettings
    from autoflip_flwr.settings import WireSettings
    from autoflip_flwr.units import compact, expand
    from autoflip_flwr.wire import codec

try:
    __version__ = version("autoflip-flwr")
except PackageNotFoundError:  # a source tree on the path
    __version__ = "unknown"

#: Module -> the public names in it.
_PUBLIC = {
    "client.masked": ("exploring", "masked", "masks_from"),
    "client.mod": ("AutoFlipMod",),
    "errors": ("AutoFlipError",),
    "method.privacy": ("GuidancePrivacy",),
    "pruners": (
        *("Pruner", "Random", "Magnitude", "L1", "L2", "Similarity"),
        *("BatchNormScale", "EFLPrune", "SSFL", "PruneFL", "FedDST"),
        *("FedRTS", "FedTiny"),
    ),
    "server.checkpoint": ("Checkpointed",),
    "server.strategy": ("AutoFLIP",),
    "settings": ("ExplorationSettings", "PruningSettings", "WireSettings"),
    "units": ("compact", "expand"),
}
_NAMES = {name: module for module, names in _PUBLIC.items() for name in names}

#: Short name of a module -> where it is: `autoflip_flwr.guidance` and so on.
_MODULES = {
    "codec": "wire.codec",
    "data": "app.data",
    "guidance": "method.guidance",
    "legacy": "server.legacy",
    "mask": "method.mask",
    "models": "app.models",
    "units": "units",
}

__all__ = [*_NAMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    if name in _NAMES:
        return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _ShortNames(MetaPathFinder, Loader):
    """Lets ``import autoflip_flwr.guidance`` give `autoflip_flwr.method.guidance`."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        del path, target
        package, _, name = fullname.rpartition(".")
        known = package == __name__ and _MODULES.get(name, name) != name
        return spec_from_loader(fullname, self) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"{__name__}.{_MODULES[spec.name.rpartition('.')[2]]}")
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        module.__spec__ = self._specs[spec.name]  # it stays what it was


sys.meta_path.append(_ShortNames())
