import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import run_main
from utils.system.processes import start_processes

ROOT = Path(run_main.__file__).parent


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launch(argv, folder):
    """Run the command line on two processes, on the CPU."""
    # A port of its own: tests run side by side.
    launcher = ("--nproc_per_node", 2, "--master_port", free_port())
    words = [sys.executable, "-m", "torch.distributed.run", *launcher, ROOT / "run_main.py", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False
    )


def losses(folder):
    rows = [line.split(",") for line in (folder / "history.csv").read_text(encoding="utf-8").splitlines()[1:]]
    return [[float(cell) for cell in row[3:8]] for row in rows]


@pytest.mark.slow
def test_two_processes_do_what_one_does(run, flags, tmp_path):
    # 41 windows: they do not divide by two processes, nor by the batch. Dropout draws by process: off.
    shared = [*flags, "--dropout", "0", "--max_steps", "6", "--eval_steps", "3", "--eval_windows", "41"]
    shared += ["--level", "50"]
    done = launch([*shared, "--batch_size", "4"], tmp_path)
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
    for name in ("coverage_by_step", "width_by_step", "score_by_step"):
        assert ours["intervals"][0][name] == pytest.approx(theirs["intervals"][0][name], rel=1e-5)
    assert sorted(file.name for file in two.iterdir()) == sorted(file.name for file in one.iterdir())
    first, second = torch.load(two / "last", weights_only=True)["training"]["random"]
    assert not torch.equal(first["cpu"], second["cpu"]), "each draws dropout of its own"


def test_accelerate_is_told_to_give_data_parallelism_no_device_and_no_buffers():
    """All that can be seen without GPUs."""
    accelerator = start_processes(seed=1, grad_accum=1, use_amp=False, deterministic=False, shares_buffers=False)
    assert os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] == "true"
    assert not accelerator.ddp_handler.broadcast_buffers


@pytest.mark.slow
def test_two_processes_with_dropout_go_on_where_they_stopped(flags, tmp_path):
    argv = [
        *flags,
        "--dropout",
        "0.3",
        "--max_steps",
        "0",
        "--percent",
        "20",
        "--eval_windows",
        "14",
        "--batch_size",
        "8",
    ]
    for folder, epochs in (("whole", ["2"]), ("parts", ["1", "2"])):
        (tmp_path / folder).mkdir()
        for number in epochs:
            words = [*argv, "--lradj", "constant", "--train_epochs", number, "--resume", "auto"]
            done = launch(words, tmp_path / folder)
            assert done.returncode == 0, done.stderr
    whole, parts = (next((tmp_path / folder / "checkpoints").iterdir()) for folder in ("whole", "parts"))
    assert losses(whole) == losses(parts)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["SeasonalNaive", "DLinear"])
def test_a_baseline_scores_every_window_once_on_two_processes(run, flags, tmp_path, model):
    shared = [*flags, "--model", model, "--eval_windows", "41"]
    done = launch([*shared, "--batch_size", "4"], tmp_path)
    assert done.returncode == 0, done.stderr
    (two,) = (tmp_path / "checkpoints").iterdir()
    run(*shared, "--batch_size", "8", "--des", "one")
    (one,) = (tmp_path / "checkpoints").glob("*_one_*")
    ours, theirs = (json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (two, one))
    assert ours["windows"] == theirs["windows"] == 41
    assert ours["mse"] == pytest.approx(theirs["mse"], rel=1e-5)
    resumed = launch([*shared, "--batch_size", "4", "--resume"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((two / "metrics.json").read_text(encoding="utf-8"))["mse"] == ours["mse"]


@pytest.mark.slow
def test_two_processes_test_with_the_statistics_that_are_kept(run, flags, tmp_path):
    """PatchTST's means of its batches: each process sees batches of its own."""
    words = [*flags, "--model", "PatchTST", "--eval_windows", "41"]
    done = launch(words, tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "checkpoints").iterdir()
    two = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["mse"]
    assert run(*words, "--is_training", "0").metrics()["mse"] == pytest.approx(two, rel=1e-5)


@pytest.mark.slow
def test_wrong_input_is_said_once(flags, tmp_path):
    done = launch([*flags, "--llm_layers", "9"], tmp_path)
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        next(line for line in done.stderr.splitlines() if "--llm_layers 9" in line)
    ]
    assert not (tmp_path / "checkpoints").exists()


def test_a_launcher_that_starts_one_process_of_several_is_told(assert_refused, flags, monkeypatch):
    for name, value in (("ACCELERATE_USE_CPU", "true"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert_refused(flags, "accelerate launch --cpu starts one process", "torchrun")


@pytest.mark.slow
def test_one_process_reads_notes_and_fits_trees_for_all(run, flags, tmp_path, monkeypatch):
    monkeypatch.setattr("data_provider.boosting._TREES_OF_ROUND", 50)  # as in the other processes
    drawn, rows = np.random.default_rng(0), 600
    sale, heat = np.repeat(drawn.random(rows // 6) < 0.3, 6), drawn.normal(size=rows)
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=rows, freq="h"), "heat": heat})
    frame["sold"] = 20 + 8 * sale + np.abs(2 * heat) + drawn.normal(size=rows)
    frame.assign(note=np.where(sale, "A big sale.", "An ordinary day.")).to_csv(tmp_path / "shop.csv", index=False)
    shared = [*flags, "--dropout", "0", "--root_path", tmp_path, "--data_path", "shop.csv", "--enc_in", "1"]
    shared += ["--covariates", "heat", "--notes", "note", "--covariate_model", "boosted", "--model", "DLinear"]
    done = launch([*shared, "--batch_size", "4"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Known in advance | sold: boosted") == 1
    (two,) = (tmp_path / "checkpoints").glob("long_*")
    run(*shared, "--batch_size", "8", "--des", "one")
    (one,) = (tmp_path / "checkpoints").glob("*_one_*")
    ours, theirs = (json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (two, one))
    assert ours["mse"] == pytest.approx(theirs["mse"], rel=1e-5)
    for name in ("covariates.csv", "notes.csv"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
