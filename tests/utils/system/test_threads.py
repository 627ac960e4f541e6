"""Waiting threads of OpenMP."""

import subprocess
import sys
from pathlib import Path

import pytest

from utils.system.threads import let_waiting_threads_sleep

# Records the limit at the moment when torch is first imported.
PROGRAM = """
import os, sys
import run_main

class Watch:
    limits = []

    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            self.limits.append(os.environ.get("GOMP_SPINCOUNT"))

assert "GOMP_SPINCOUNT" not in os.environ and "torch" not in sys.modules, "importing changes nothing"
sys.meta_path.insert(0, Watch())
assert run_main.main(["--demo", "--plan", "--model", "LastValue"]) == 0
assert Watch.limits == ["10000"], Watch.limits
"""


def test_a_run_sets_the_limit_before_torch_is_imported(monkeypatch, tmp_path):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{PROGRAM}"],
        cwd=tmp_path, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_a_choice_of_the_user_stays(monkeypatch, name):
    environment = {name: "its own value"}
    monkeypatch.setattr("os.environ", environment)
    let_waiting_threads_sleep()
    assert environment == {name: "its own value"}
