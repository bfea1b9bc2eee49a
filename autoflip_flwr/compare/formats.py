"""Numbers as people read them."""

import math

from autoflip_flwr.compare.results import Estimate

#: Stands for a value that is not known.
NONE = "–"  # noqa: RUF001

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float | Estimate | None, unit: str = "") -> str:
    """Return three digits and a prefix: ``248 k``, ``1.25 ± 0.31 MB``."""
    mean, error = value if isinstance(value, Estimate) else (value, None)
    if mean is None or not math.isfinite(mean):
        return NONE
    # 999.5 and more is written with the next prefix, not as 1e+03.
    prefixes = (each for each in _PREFIXES if abs(mean) >= 0.9995 * each[0])
    scale, prefix = next(prefixes, (1.0, ""))
    spread = "" if error is None else f" ± {error / scale:.2g}"
    return f"{mean / scale:.3g}{spread} {prefix}{unit}".rstrip()


def ratio(part: float | None, whole: float | None = 1.0) -> str:
    """Return how much of the whole the part is, with three digits."""
    if part is None or not whole or not math.isfinite(part):
        return NONE
    return f"{part / whole:.3g}"


def accuracy(value: Estimate | None) -> str:
    """Return a mean with its standard error, four decimals."""
    if value is None:
        return NONE
    error = "" if value.error is None else f" ± {value.error:.4f}"
    return f"{value.mean:.4f}{error}"
