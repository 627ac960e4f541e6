"""Runs on_toy_gpu.py: the tests that need the toy GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy_device import why_not

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "tests" / "on_toy_gpu.py"


@pytest.mark.slow  # half a minute
@pytest.mark.skipif(bool(why_not()), reason=f"no toy GPU: {why_not()}")
def test_on_the_toy_gpu_all_goes_as_on_the_cpu():
    """In a process of its own: torch forgets no device, and other tests are to see none."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "--tb=short", "--override-ini", "addopts=", "-q", str(CASES)]
    not_ours = ("PYTEST_", "ACCELERATE_", "TRANSFORMERS_SDPA")  # what other tests have left in this process
    environment = {name: value for name, value in os.environ.items() if not name.startswith(not_ours)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
