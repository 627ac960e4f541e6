"""The flags decide, whatever the environment says; what it says that makes no sense is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import run_main
from utils.cli.command import is_first_process

DLINEAR = ["--model", "DLinear"]


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--use_amp"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3", "--grad_accum"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "nothing is compiled"),
    ],
)
def test_the_flags_decide(run, flags, monkeypatch, name, value, flag):
    expected = run(*flags, *DLINEAR).metrics()["mse"]
    monkeypatch.setenv(name, value)
    done = run(*flags, *DLINEAR)
    assert done.metrics()["mse"] == expected
    (line,) = [line for line in done.out.splitlines() if name in line]
    assert f"Note: {name}={value} has no effect" in line and flag in line


def test_a_variable_that_says_what_the_flags_say_is_not_told(run, flags, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert "has no effect" not in run(*flags, *DLINEAR).out


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0"},
        {"RANK": "1"},
        {"RANK": "x"},
        {"LOCAL_RANK": "0"},
        {"WORLD_SIZE": "x"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        {"ACCELERATE_USE_FSDP": "true"},
        {"ACCELERATE_USE_MEGATRON_LM": "true"},
    ],
    ids=lambda variables: " ".join(variables),
)
def test_an_environment_that_makes_no_sense_is_one_line(assert_refused, flags, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert_refused([*flags, *DLINEAR], "RANK" if "RANK" in variables else next(iter(variables)))


@pytest.mark.parametrize(("name", "value"), [("ACCELERATE_USE_CPU", "banana"), ("MPLBACKEND", "nonsense")])
def test_what_a_library_does_not_start_with_is_one_line(flags, tmp_path, name, value):
    """In a process of its own: libraries keep what they once found."""
    words = [sys.executable, run_main.__file__, *map(str, flags), *DLINEAR]
    variables = {**os.environ, name: value}
    done = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ") and name.split("_")[0] in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "1"}, True),
        ({"RANK": "x", "WORLD_SIZE": "2"}, True),
    ],
)
def test_a_mistake_in_the_rank_is_told(monkeypatch, variables, speaks):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == speaks


def test_the_scores_tell_the_flags_they_were_made_with(run, flags):
    metrics = json.loads((run(*flags, *DLINEAR).folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["flags"]["model"] == "DLinear"
    assert Path(metrics["checkpoint"]).name == "checkpoint"
