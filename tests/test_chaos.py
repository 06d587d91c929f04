"""`make chaos` itself: some of its rounds."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "chaos" / "chaos.py"


@pytest.mark.slow
def test_some_rounds_lose_nothing():
    done = subprocess.run([sys.executable, SCRIPT, "--rounds", "4", "--seed", "1"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "4 rounds, 4 bit-exact, 0 lost", done.stdout + done.stderr[-2000:]
