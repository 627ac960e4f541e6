import shlex
from pathlib import Path

import pandas as pd
import pytest

from utils.cli import demo
from utils.cli.options import get_parser

pytestmark = pytest.mark.draws

QUICK = ["--demo", "--max_steps", "3", "--eval_windows", "14", "--batch_size", "8"]


def test_the_demo_leaves_a_forecast_and_says_what_to_type_next(run):
    done = run(*QUICK)
    assert (done.code, done.err) == (0, "")
    assert {"forecast.csv", "forecast.png", "metrics.json"} <= {file.name for file in done.folder.iterdir()}
    forecast = pd.read_csv(done.folder / "forecast.csv", parse_dates=["date"])
    assert len(forecast) == 24
    assert "Seasonal naive | MSE: " in done.out
    commands = [line.strip() for line in done.out.splitlines() if line.startswith("    python run_main.py")]
    assert len(commands) == 5
    for command in commands:
        get_parser().parse_args(shlex.split(command)[2:])  # leaves if there is a flag that is not known
    for command in commands[1:3]:  # what to type next works as it stands
        assert run(*shlex.split(command)[2:]).code == 0


def test_the_demo_says_only_what_it_makes(run, csv_folder):
    first = run(*QUICK, "--model", "LastValue").out
    assert "creates a synthetic series, dataset" in first and "tiny LLM" not in first
    assert not Path("base_models").exists()
    other = run(*QUICK, "--model", "LastValue", "--root_path", csv_folder, "--data_path", "small.csv").out
    assert other.startswith("It stands for\n")


def test_the_command_behind_the_demo_does_the_same(run, monkeypatch):
    monkeypatch.setattr(demo, "command_line", shlex.join)
    shown = run(*QUICK).out.splitlines()[1]
    words = shlex.split(shown)
    assert words[:2] == ["python", "run_main.py"]
    assert "--demo" not in words
    args, demo_args = get_parser().parse_args(words[2:]), get_parser().parse_args(QUICK)
    assert vars(args) == {**vars(demo_args), "demo": False}
    first = run(*words[2:])
    assert first.code == 0
    assert "What to type next" not in first.out


def test_a_demo_that_tests_makes_no_forecast(run):
    run(*QUICK)
    (Path("checkpoints") / run(*QUICK).folder.name / "forecast.csv").unlink()
    done = run(*QUICK, "--is_training", 0)
    assert "Test | MSE" in done.out
    assert not (done.folder / "forecast.csv").exists()
    forecast = run(*QUICK, "--is_training", 0, "--predict")
    assert "Test | MSE" not in forecast.out
    assert (done.folder / "forecast.csv").exists()


@pytest.mark.parametrize("more", [[], ["--predict"], ["--predict", "--is_training", "0"], ["--is_training=0"]], ids=str)
def test_the_hints_say_each_flag_once(more):
    _, tested, forecast, *_ = demo.farewell(["--demo", "--seq_len", "48", *more]).splitlines()
    assert shlex.split(tested) == ["python", "run_main.py", "--demo", "--seq_len", "48", "--is_training", "0"]
    assert shlex.split(forecast) == [*shlex.split(tested), "--predict"]
