"""A server killed with SIGKILL: at random, in a write, while it samples or sums up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.e2e
def test_killed_at_random_moments_a_run_ends_with_the_weights_of_one_never_killed():
    done = subprocess.run(
        [sys.executable, "kills.py", "--kills", "5"],
        cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == found["equal"] == 5
    assert found["resumed"] > 0
    assert found["in a write"] > 0
    assert found["in a step"] > 0
    assert found["explored twice"] == 0
