"""What `pip install autoflip-flwr` brings, out of what is installed here."""

from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(requirements: list[str]) -> dict[str, Distribution]:
    """Return the distributions that requirements need, by name."""
    left = [Requirement(text) for text in requirements]
    done: set[tuple[str, frozenset[str]]] = set()
    result: dict[str, Distribution] = {}
    while left:
        wanted = left.pop()
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key in done:
            continue
        done.add(key)
        try:
            result[key[0]] = distribution(wanted.name)
        except PackageNotFoundError:  # for another platform, or not needed here
            continue
        for text in result[key[0]].requires or []:
            needed = Requirement(text)
            extras = ["", *wanted.extras]
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in extras
            ):
                left.append(needed)
    return result


def megabytes(distributions: dict[str, Distribution]) -> float:
    total = 0
    for each in distributions.values():
        for file in each.files or []:
            path = Path(str(each.locate_file(file)))
            if path.is_file():
                total += path.stat().st_size
    return total / 1e6


def linked(distributions: dict[str, Distribution], folder: Path) -> None:
    """Make a folder for sys.path that has these distributions and no other."""
    for each in distributions.values():
        for file in each.files or []:
            top = file.parts[0]
            source = Path(str(each.locate_file(top)))
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(source)
