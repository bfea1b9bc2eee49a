"""Keywords of `AutoFLIP` from settings side by side, whichever group they are in."""

from typing import Any

from autoflip_flwr import pruners
from autoflip_flwr.settings import (
    BaselineSettings,
    ExplorationSettings,
    PruningSettings,
    WireSettings,
)

_NATIVE = ("threshold", "units", "model", "example_inputs", "pruner", "store", "seed")
_GROUPS = {
    "pruning": PruningSettings,
    "exploration": ExplorationSettings,
    "wire": WireSettings,
}


#: The scores are the guidance alone, and all rounds have the final density: what can be
#: worked out by hand. Tests that say nothing about these get them.
PLAIN = {
    "score": "guidance",
    "balance": "global",
    "gradual_rounds": 0,
    "vectors": True,
    "population_weight": 0.8,
}


def flat(
    *,
    method: str = "autoflip",
    baselines: BaselineSettings | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`flat(values="float16", exploration_epochs=2, method="ssfl")`."""
    found: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {name: {} for name in _GROUPS}
    for key, value in (PLAIN | {"warm_start": False} | settings).items():
        own = key.removeprefix("exploration_")
        if key in _NATIVE or key in _GROUPS:
            found[key] = value
        elif key in PruningSettings.model_fields:
            groups["pruning"][key] = value
        elif key in WireSettings.model_fields:
            groups["wire"][key] = value
        else:
            groups["exploration"][own] = value
    if method != "autoflip":
        found["pruner"] = pruners.build(method, baselines)
    return found | {n: _GROUPS[n](**own) for n, own in groups.items() if own}
