"""The README's commands are the ones that are checked."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    lines = (ROOT / "README.md").read_text().splitlines()
    return [line for line in lines if line.startswith("python3 -m venv")]


def test_one_command_runs_and_one_tests():
    run, test = commands()
    assert "flwr run . --stream" in run
    assert test.endswith("-m pytest")


def test_ci_runs_the_test_command_to_the_letter():
    assert commands()[1] in (ROOT / ".ci" / "run").read_text().splitlines()
