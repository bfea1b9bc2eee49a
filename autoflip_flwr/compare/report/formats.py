"""Numbers as people read them."""

import math
import re
from collections import Counter
from collections.abc import Sequence

from autoflip_flwr.compare.results import Estimate

#: What stands for a value that is not known.
NONE = "–"  # noqa: RUF001

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float | None, unit: str = "") -> str:
    """Return three digits and a prefix: ``248 k``, ``1.25 MB``."""
    if value is None or not math.isfinite(value):
        return NONE
    scale, prefix = _prefix(value)
    return f"{value / scale:.3g} {prefix}{unit}".rstrip()


def measured(value: Estimate | None, unit: str = "") -> str:
    """Return a mean with its standard error: ``1.25 ± 0.31 MB``."""
    if value is None or value.error is None:
        return number(None if value is None else value.mean, unit)
    scale, prefix = _prefix(value.mean)
    mean, error = value.mean / scale, value.error / scale
    return f"{mean:.3g} ± {error:.2g} {prefix}{unit}".rstrip()


def _prefix(value: float) -> tuple[float, str]:
    # 999.5 and more is written with the next prefix, not as 1e+03.
    return next((p for p in _PREFIXES if abs(value) >= 0.9995 * p[0]), (1.0, ""))


def share(value: float | None) -> str:
    """Return a share or ratio with three digits."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.3g}"


def ratio(part: float | None, whole: float | None) -> str:
    """Return how much of the whole the part is."""
    return NONE if part is None or not whole else share(part / whole)


def accuracy(value: Estimate | None) -> str:
    """Return a mean with its standard error, four decimals."""
    if value is None:
        return NONE
    error = "" if value.error is None else f" ± {value.error:.4f}"
    return f"{value.mean:.4f}{error}"


def short_names(names: Sequence[str]) -> list[str]:
    """Write ``threshold=0.3`` for ``pruning.threshold=0.3`` where no other is meant."""
    keys = {key for name in names for key in re.findall(r" ([\w.-]+)=", name)}
    last = Counter(key.rpartition(".")[2] for key in keys)

    def short(found: re.Match[str]) -> str:
        end = found[1].rpartition(".")[2]
        return f" {end}=" if last[end] == 1 else found[0]

    return [re.sub(r" ([\w.-]+)=", short, name) for name in names]
