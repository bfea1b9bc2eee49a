"""The README's commands are the ones that are checked."""

import re
import tomllib
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


def test_the_first_screen_takes_thirty_seconds():
    """At most 150 words, commands and code included, one figure, the four lines."""
    first, _, _ = (ROOT / "README.md").read_text().partition("\n## ")
    text = re.sub(r"\[!\[.*", "", first)  # badges
    figures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(figures) == 1
    assert (ROOT / figures[0]).is_file()
    shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)
    assert len(shown.split()) <= 150
    assert "pip install ." in first
    code = first.split("```python")[1].split("```")[0]
    lines = [x for x in code.splitlines() if x and not x.startswith("#")]
    assert [line.split()[0] for line in lines] == ["from", "strategy", "from", "app"]


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_four_lines_are_those_of_an_example_that_runs():
    """`test_an_existing_app_runs_before_and_after` runs it."""
    code = (ROOT / "README.md").read_text().split("```python")[1].split("```")[0]
    apps = ROOT / "examples" / "message_api" / "after" / "digits_app"
    example = (apps / "server_app.py").read_text() + (
        apps / "client_app.py"
    ).read_text()
    for line in code.splitlines():
        assert line.partition("(fraction")[0] in example or line.startswith("#")


def test_badges_and_versions_are_those_of_the_package():
    text = (ROOT / "README.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    classifiers = " ".join(project["classifiers"])
    pythons = re.findall(r"Python :: (3\.\d+)", classifiers)
    assert f"python-{'%20%7C%20'.join(pythons)}-" in text
    (flower,) = (d for d in project["dependencies"] if d.startswith("flwr"))
    low, high = re.findall(r"\d+\.(\d+)", flower)
    assert f"flower-1.{low}%20to%201.{int(high) - 1}-" in text
    assert f"1.{low} to 1.{int(high) - 1}" in text


def test_ci_runs_the_test_command_to_the_letter():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert f"{commands()[1]} || exit 1" in lines


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
