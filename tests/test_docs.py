"""The documentation as a site."""

import os
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


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Every page is in the nav, every link leads somewhere; the notebook: `.ci/run`."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "DOCS_EXECUTE": "false", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "settings-reference" / "index.html").read_text()
    assert "pruning.initial-density" in page
