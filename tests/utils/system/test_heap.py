"""Freed memory stays with the process, unless glibc's own variables say otherwise."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# Page faults of the second of two equal allocations, which needs none if the memory of the first was kept.
_COUNT = """
import numpy, resource
from utils.system.heap import keep_freed_memory
keep_freed_memory()
for _ in range(3):  # the first blocks change glibc's own limits
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [numpy.ones(2**20) for _ in range(8)]
    del blocks
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
@pytest.mark.parametrize(("variables", "is_kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_for_the_next_step(variables, is_kept):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", _COUNT],
        env=kept | variables,
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert (int(done.stdout) < 100) == is_kept
