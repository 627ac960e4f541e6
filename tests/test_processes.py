import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import run_main

ROOT = Path(run_main.__file__).parent


def launch(argv, folder, *launcher):
    words = [sys.executable, "-m", "accelerate.commands.launch", *launcher, ROOT / "run_main.py", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False
    )


def losses(folder):
    rows = [line.split(",") for line in (folder / "history.csv").read_text(encoding="utf-8").splitlines()[1:]]
    return [[float(cell) for cell in row[3:8]] for row in rows]


def test_two_processes_do_what_one_does(run, flags, tmp_path):
    # 41 windows: they do not divide by two processes, nor by the batch. Dropout draws by process: off.
    shared = [*flags, "--dropout", "0", "--max_steps", "6", "--eval_steps", "3", "--eval_windows", "41"]
    done = launch([*shared, "--batch_size", "4"], tmp_path, "--num_processes", "2", "--cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Test | MSE") == 1
    (two,) = (tmp_path / "checkpoints").iterdir()
    one = run(*shared, "--batch_size", "8", "--des", "one").folders
    (one,) = [folder for folder in one if "_one_" in folder.name]
    for ours, theirs in zip(losses(two), losses(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = (json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (two, one))
    assert ours["windows"] == theirs["windows"] == 41
    assert (ours["mse"], ours["mae"]) == pytest.approx((theirs["mse"], theirs["mae"]), rel=1e-6)
    assert sorted(file.name for file in two.iterdir()) == sorted(file.name for file in one.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["SeasonalNaive", "DLinear"])
def test_a_baseline_scores_every_window_once_on_two_processes(run, flags, tmp_path, model):
    shared = [*flags, "--model", model, "--eval_windows", "41"]
    done = launch([*shared, "--batch_size", "4"], tmp_path, "--num_processes", "2", "--cpu")
    assert done.returncode == 0, done.stderr
    (two,) = (tmp_path / "checkpoints").iterdir()
    run(*shared, "--batch_size", "8", "--des", "one")
    (one,) = (tmp_path / "checkpoints").glob("*_one_*")
    ours, theirs = (json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (two, one))
    assert ours["windows"] == theirs["windows"] == 41
    assert ours["mse"] == pytest.approx(theirs["mse"], rel=1e-5)
    resumed = launch([*shared, "--batch_size", "4", "--resume"], tmp_path, "--num_processes", "2", "--cpu")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((two / "metrics.json").read_text(encoding="utf-8"))["mse"] == ours["mse"]


@pytest.mark.slow
def test_wrong_input_is_said_once(flags, tmp_path):
    done = launch([*flags, "--llm_layers", "9"], tmp_path, "--num_processes", "2", "--cpu")
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        next(line for line in done.stderr.splitlines() if "--llm_layers 9" in line)
    ]
    assert not (tmp_path / "checkpoints").exists()
