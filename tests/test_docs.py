"""The documentation as a site."""

import os
import re
import subprocess
import sys

import pytest
from inprocess import ROOT, load_script

from autoflip_flwr.settings import load

site = load_script("autoflip_docs_site", ROOT / "docs" / "site.py")


def test_every_setting_is_in_the_tables_with_what_it_means():
    tables = site.settings_tables()
    rows = [line for line in tables.splitlines() if line.startswith("| `")]
    cells = [[cell.strip(" `") for cell in row.split(" | ")] for row in rows]
    keys = [key for key in load("quickstart").flat() if "." in key]
    assert sorted(row[0].lstrip("| `") for row in cells) == sorted(keys)
    for key, values, _, meaning in cells:
        assert values, key
        assert meaning.rstrip(" |"), key


def test_a_setting_is_documented_from_its_field():
    rows = {row[0]: row[1:] for row in site.documented(site.settings.PruningSettings)}
    values, default, meaning = rows["initial-density"]
    assert (values, default) == ("a number in (0, 1]", "0.6")
    assert meaning.startswith("Density of round 1. It falls")  # the comment above
    assert rows["floor"][2] == "least share of every tensor that is kept"  # beside


def test_every_test_that_a_page_names_is_there():
    files = {path.stem: path.read_text() for path in (ROOT / "tests").glob("*.py")}
    tests = {stem: set(re.findall(r"def (\w+)", text)) for stem, text in files.items()}
    there = set().union(*tests.values())
    for page in sorted(ROOT.glob("docs/**/*.md")):
        for file, name in re.findall(r"(test_\w+)\.py::(\w+)", page.read_text()):
            assert name in tests[file], f"{page.name}: {file}.py::{name}"
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert name in there, f"{page.name}: {name}"


def test_every_promise_names_its_test():
    text = (ROOT / "docs" / "security.md").read_text()
    promises = 0
    for table in text.split(" | test |\n")[1:]:
        for row in table.partition("\n\n")[0].splitlines()[1:]:
            promise, test = row.strip("| ").rsplit(" | ", 1)
            assert "test" in test, promise
            promises += 1
    assert promises > 20


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Every page is in the nav, every link leads somewhere, and the notebook runs."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "settings-reference" / "index.html").read_text()
    assert "pruning.initial-density" in page
