"""The README's commands are the ones that are checked."""

import re
from pathlib import Path

from autoflip_flwr import settings

ROOT = Path(__file__).parents[1]


def test_the_tests_that_docs_name_exist():
    """A promise is worth the test behind it."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for page in (ROOT / "docs").rglob("*.md"):
        for name in re.findall(r"\btest_\w+\b(?!\.py)", page.read_text()):
            assert f"def {name}(" in tests, f"{page.name}: {name}"
        for name in re.findall(r"\btest_\w+\.py\b", page.read_text()):
            assert (ROOT / "tests" / name).exists(), f"{page.name}: {name}"


def commands() -> list[str]:
    lines = (ROOT / "README.md").read_text().splitlines()
    return [line for line in lines if line.startswith("python3 -m venv")]


def test_one_command_runs_and_one_tests():
    run, test = commands()
    assert "flwr run . --stream" in run
    assert test.endswith("-m pytest")


def test_ci_runs_the_test_command_to_the_letter():
    assert commands()[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def paper_map() -> list[list[str]]:
    page = (ROOT / "docs" / "paper-map.md").read_text()
    functions, _, _ = page.partition("\n## ")
    lines = functions.splitlines()
    return [line.split("|")[2:4] for line in lines if line.startswith("|")][2:]


def test_the_functions_in_the_map_of_the_paper_exist():
    package = ROOT / "autoflip_flwr"
    code = "".join(path.read_text() for path in package.rglob("*.py"))
    for functions, _ in paper_map():
        for name in re.findall(r"`([^`]+)`", functions):
            last = name.rpartition(".")[2]
            defined = re.search(rf"^ *(def|class) {last}\b", code, re.MULTILINE)
            assert defined or (package / name).is_file(), name


def test_the_settings_in_the_map_of_the_paper_exist():
    """As in `group.key .another-key`; in brackets are values."""
    chosen = settings.load("quickstart")
    for _, keys in paper_map():
        for told in re.findall(r"`([^`]+)`", re.sub(r"\(.*?\)", "", keys)):
            group, *names = re.findall(r"[\w-]+", told.replace("-", "_"))
            for name in names:
                assert hasattr(getattr(chosen, group), name), told
