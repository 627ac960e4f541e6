import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import launch
from utils.cli.checks import check_options
from utils.cli.options import flags_of_final_test, flags_of_repetition, get_parser
from utils.cli.places import csv_path, run_folder
from utils.runs.finished import hash_of

SCRIPTS = Path(launch.__file__).parent
DATA = ("ETTh1", "ETTh2", "ETTm1", "ETTm2")
NAMES = (*DATA, "smoke")
POSIX = pytest.mark.skipif(os.name == "nt", reason="for bash and POSIX signals")
AWKWARD = ["96", "--content", "p & q; $x", "--dry_run"]


@pytest.fixture(autouse=True)
def no_llm_of_the_users(monkeypatch):
    monkeypatch.delenv(launch.LLM_VARIABLE, raising=False)


@pytest.fixture
def dry_run(capsys) -> Callable:
    """Return a function that parses, with run_main's parser, what a script would run."""

    def parse(*words: str) -> list:
        assert launch.main([*words, "--dry_run", "--again"]) == 0
        commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
        assert all(command[:2] == ["python", "run_main.py"] for command in commands)
        parsed = [get_parser().parse_args(command[2:]) for command in commands]
        for args in parsed:
            check_options(args)
        return parsed

    return parse


@pytest.fixture
def children(monkeypatch) -> list[int]:
    """Stand in for the runs: the horizons that were started; the one of 336 fails, with 5."""
    started = []

    def run_child(command: list[str], folder: Path) -> int:
        started.append(get_parser().parse_args(command[2:]).pred_len)
        return 5 if started[-1] == 336 else 0

    monkeypatch.setattr(launch, "run_child", run_child)
    return started


# --- the command lines ---


@pytest.mark.parametrize("data", DATA)
def test_each_data_set_runs_its_four_horizons_each_in_a_folder_of_its_own(data, dry_run):
    runs = dry_run(data)
    assert [args.pred_len for args in runs] == [96, 192, 336, 720]
    assert {csv_path(args).as_posix() for args in runs} == {f"dataset/{data}.csv"}
    assert len({run_folder(args, 0) for args in runs}) == 4
    assert {args.model_id for args in runs} == {f"{data}_336_{pred_len}" for pred_len in (96, 192, 336, 720)}


def test_the_recipe_is_timellms_where_it_is_of_timellm(dry_run):
    """A linear residual, and 64 windows an optimizer step."""
    (ours,), (other,) = dry_run("ETTm1", "96"), dry_run("ETTh1", "96", "--model", "DLinear")
    assert (ours.residual, ours.normalize_prototypes, ours.mapping_rate) == ("linear", True, 0.003)
    assert (other.residual, other.normalize_prototypes) == ("none", False)
    assert ours.batch_size * ours.grad_accum == 64
    assert (ours.max_steps, other.max_steps) == (1200, 400)
    assert (ours.eval_windows, ours.test_windows) == (2000, 0)


def test_horizons_can_be_named_and_further_flags_win(dry_run):
    runs = dry_run("ETTm1", "24", "96", "--seq_len", "96", "--learning_rate=0.5", "--des", "a b", "--eval_windows", "0")
    assert [args.pred_len for args in runs] == [24, 96]
    for args in runs:
        assert (args.seq_len, args.learning_rate, args.des, args.eval_windows) == (96, 0.5, "a b", 0)


@pytest.mark.parametrize(
    ("variable", "flags", "name", "path", "in_4bit", "comment"),
    [
        ("", "", "QWEN", "", True, "QWEN-nf4"),
        ("llms/My LLM/", "", "LLAMA", "llms/My LLM/", False, "My_LLM"),
        ("llms/-mine.", "", "LLAMA", "llms/-mine.", False, "mine"),
        ("llms/mine", "--load_in_4bit", "LLAMA", "llms/mine", True, "mine-nf4"),
        ("llms/mine", "--llm_model_path hub/other-1.5B", "LLAMA", "hub/other-1.5B", False, "other-1.5B"),
        ("llms/mine", "--llm_model LLAMA --llm_layers 4", "LLAMA", "", False, "LLAMA-4layers"),
        ("llms/mine", "--ablation random_llm", "LLAMA", "llms/mine", False, "mine-random_llm"),
        ("llms/mine", "--model_comment hers", "LLAMA", "llms/mine", False, "hers"),
    ],
)
def test_the_llm_is_the_flags_else_the_variables_else_the_default_and_names_the_run(
    variable, flags, name, path, in_4bit, comment, dry_run, monkeypatch
):
    monkeypatch.setenv(launch.LLM_VARIABLE, variable)
    (args,) = dry_run("ETTh1", "96", *flags.split())
    assert (args.llm_model, args.llm_model_path, args.load_in_4bit) == (name, path, in_4bit)
    assert args.model_comment == comment


def test_a_forecaster_without_an_llm_is_given_none(dry_run, monkeypatch):
    monkeypatch.setenv(launch.LLM_VARIABLE, "llms/mine")
    (args,) = dry_run("ETTh1", "96", "--model", "DLinear")
    assert (args.model, args.llm_model_path, args.load_in_4bit, args.model_comment) == ("DLinear", "", False, "none")


def test_the_smoke_test_is_a_short_demo_with_a_forecast(dry_run):
    (args,) = dry_run("smoke", "--max_steps", "2")
    assert args.demo and args.predict and args.is_training and args.max_steps == 2


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("ETTh1 96x", "96x is not a horizon of ETTh1"),
        ("ETTh1 0", "0"),
        ("ETTh1 96 -5", "-5 is not a horizon of ETTh1"),
        ("ETTh1 96 --seq_lenn 5", "did you mean --seq_len?"),
        ("ETTh1 96 --seq_len 5", "--seq_len 5"),
        ("ETTh1 --pred_len=24", "--pred_len"),
        ("ETTh1 --data ETTh2", "--data"),
        ("ETTh3", "ETTh3"),
        ("smoke 96", "96 is not a horizon of smoke"),
        ("", "--data"),
    ],
)
def test_a_wrong_line_is_refused_before_anything_runs(line, named, children, capsys):
    assert launch.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert not children


def test_help_explains_the_scripts(children, capsys):
    assert launch.main(["ETTh1", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("--again", "--dry_run", launch.LLM_VARIABLE, "--resume auto"))
    assert not children


# --- running them ---


def leave_scores(args, repetition=0):
    """Leave in a run folder what tells that a run is done."""
    folder = run_folder(args, repetition)
    folder.mkdir(parents=True)
    for name in ("checkpoint", "last"):
        (folder / name).write_text(name, encoding="utf-8")
    flags = vars(flags_of_repetition(args, repetition))
    trained = {**flags, "data_sha256": hash_of(csv_path(args))}
    (folder / "args.json").write_text(json.dumps(trained), encoding="utf-8")
    metrics = {
        "flags": flags,
        "eval_windows": flags_of_final_test(args).eval_windows,
        "data_sha256": hash_of(csv_path(args)),
        "prompt_file_sha256": "",
        "checkpoint_sha256": hash_of(folder / "checkpoint"),
        "ended_state_sha256": hash_of(folder / "last"),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


def test_what_has_its_metrics_is_skipped_unless_told_otherwise(children, tmp_path, capsys):
    line = ["ETTh1", "96", "192", "--model", "DLinear", "--itr", "2", "--checkpoints", str(tmp_path)]
    _, args = (run.args for run in launch.plan_runs("ETTh1", line[1:]))
    for repetition in range(2):
        assert (launch.main(line), children) == (0, [96, 192])
        children.clear()
        leave_scores(args, repetition)
    capsys.readouterr()
    assert (launch.main(line), children) == (0, [96])
    error = capsys.readouterr().err
    assert "ETTh1 192: skipped" in error and "--again" in error
    assert (launch.main([*line, "--again"]), children) == (0, [96, 96, 192])


def test_what_was_run_with_other_flags_is_not_skipped(children, run, csv_folder, tmp_path):
    data = csv_folder / "small.csv"
    shared = ["--root_path", str(csv_folder), "--data_path", data.name, "--checkpoints", str(tmp_path / "runs")]
    line = ["ETTh1", "8", *shared, "--model", "DLinear", "--season", "7"]
    (planned,) = launch.plan_runs("ETTh1", line[1:])
    folder = leave_scores(planned.args)
    assert (launch.main(line), children) == (0, [])
    for more in (["--learning_rate", "0.5"], ["--is_training", "0"], ["--plan"]):
        children.clear()
        assert (launch.main([*line, *more]), children) == (0, [8]), more
    for name in ("checkpoint", "last"):  # trained on since
        (folder / name).write_text("another", encoding="utf-8")
        children.clear()
        assert (launch.main(line), children) == (0, [8])
        (folder / name).write_text(name, encoding="utf-8")


def test_the_smoke_test_runs_every_time(children, tmp_path):
    line = ["--checkpoints", str(tmp_path)]
    (run,) = launch.plan_runs("smoke", line)
    folder = run_folder(run.args, 0)
    folder.mkdir()
    (folder / "metrics.json").touch()
    assert (launch.main(["smoke", *line]), len(children)) == (0, 1)


def test_the_first_failure_ends_the_script_with_its_exit_code(children, tmp_path, capsys):
    assert launch.main(["ETTh2", "--checkpoints", str(tmp_path)]) == 5
    assert children == [96, 192, 336]
    error = capsys.readouterr().err
    assert "ETTh2 336" in error and "exit code 5" in error and "not started: ETTh2 720" in error


def test_an_interrupted_run_ends_the_script_and_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(launch, "run_child", lambda command, folder: 130)
    assert launch.main(["ETTh2", "--checkpoints", str(tmp_path)]) == 130
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert printed.err.startswith("interrupted: at ETTh2 96") and "--resume auto" in printed.err


@POSIX
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_lets_the_child_end_in_peace(name, tmp_path):
    """Ctrl-C goes to the child, too, SIGTERM to the script alone."""
    saved = tmp_path / "saved"
    child = f"""
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(0.4)
    pathlib.Path({str(saved)!r}).touch()
    sys.exit(0)
signal.signal(signal.{name}, save)
os.kill(os.getppid(), signal.{name})
if "{name}" == "SIGINT":
    os.kill(os.getpid(), signal.SIGINT)
time.sleep(5)
sys.exit(3)
"""
    before = signal.getsignal(signal.SIGTERM)
    assert launch.run_child([sys.executable, "-c", child]) == 130
    assert saved.exists()
    assert signal.getsignal(signal.SIGTERM) is before


@POSIX
def test_a_killed_child_is_a_failure():
    assert launch.run_child(["bash", "-c", "kill -9 $$"]) == 137


# --- the scripts themselves ---


def test_there_is_a_pair_for_each_and_no_other_script():
    assert {path.name for path in SCRIPTS.glob("*.bat")} == {f"{name}.bat" for name in NAMES}
    assert {path.name for path in SCRIPTS.glob("*.sh")} == {f"{name}.sh" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_bat_files_have_lines_for_windows_and_sh_files_for_the_others(name):
    windows, others = ((SCRIPTS / f"{name}.{ending}").read_bytes() for ending in ("bat", "sh"))
    assert windows.endswith(b"\r\n")
    assert windows.count(b"\r") == windows.count(b"\n") == windows.count(b"\r\n")
    assert b"\r" not in others and others.startswith(b"#!/usr/bin/env bash\n")


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A copy of the scripts in a folder with a space in its name."""
    folder = tmp_path / "a b" / "scripts"
    folder.mkdir(parents=True)
    for path in (*SCRIPTS.glob("*.bat"), *SCRIPTS.glob("*.sh")):
        shutil.copy(path, folder)
    return folder


def run_sh(script: Path, words: list[str], python: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a script by its own first line, in an empty folder, with a `python` that is this bash line."""
    stand_in = folder / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!/bin/bash\n{python}\n", encoding="utf-8")
    stand_in.chmod(0o755)
    work = folder / "work"
    work.mkdir()
    path = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [script, *words], cwd=work, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
    )


def read_bat(script: Path, words: list[str]) -> list[str]:
    """Return the command that a .bat runs and whose exit code it ends with; nothing but these lines is known here."""
    echo, *comments, command, leave, end = script.read_bytes().decode("ascii").split("\r\n")
    assert (echo, leave, end) == ("@echo off", "exit /b %errorlevel%", "")
    for comment in comments:
        assert comment.startswith("rem ") and not set(comment) & set("%<>|&^")
    assert command.startswith('python "%~dp0') and command.endswith(" %*")
    folder = f"{script.parent}{os.sep}"
    read = [*shlex.split(command.replace("%~dp0", shlex.quote(folder)[1:-1]).removesuffix(" %*")), *words]
    assert not any("%" in word for word in read)
    return read


@POSIX
@pytest.mark.parametrize("name", NAMES)
def test_both_scripts_hand_their_words_to_the_launcher_and_its_exit_code_back(name, elsewhere, tmp_path):
    done = run_sh(elsewhere / f"{name}.sh", AWKWARD, 'printf "%s\\n" "$@"; exit 7', tmp_path)
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines() == [str(elsewhere / "launch.py"), name, *AWKWARD]
    assert read_bat(elsewhere / f"{name}.bat", AWKWARD) == ["python", *done.stdout.splitlines()]


@POSIX
def test_a_script_started_elsewhere_runs_the_real_thing_and_stops_where_it_fails(tmp_path, monkeypatch):
    monkeypatch.setenv(launch.LLM_VARIABLE, str(tmp_path))
    words = ["96", "192", "--root_path", str(tmp_path), "--checkpoints", str(tmp_path / "checkpoints")]
    done = run_sh(SCRIPTS / "ETTh1.sh", words, f'exec {shlex.quote(sys.executable)} "$@"', tmp_path)
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    (run, _) = launch.plan_runs("ETTh1", words)
    assert shlex.split(line) == ["python", "run_main.py", *run.flags]
    missing, failed = done.stderr.splitlines()
    assert missing.startswith("error: no data file") and "ETTh1.csv" in missing
    assert failed == "error: ETTh1 96 failed with exit code 2; not started: ETTh1 192"
    assert not (tmp_path / "checkpoints").exists() and not list((tmp_path / "work").iterdir())


@POSIX
@pytest.mark.slow
def test_the_smoke_test_trains_tests_and_forecasts(tmp_path):
    python = f'exec {shlex.quote(sys.executable)} "$@"'
    done = run_sh(SCRIPTS / "smoke.sh", ["--checkpoints", str(tmp_path / "checkpoints")], python, tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert {"checkpoint", "metrics.json", "forecast.csv"} <= {file.name for file in folder.iterdir()}


# --- under wine's cmd ---

WINE, COMPILER = shutil.which("wine"), shutil.which("x86_64-w64-mingw32-gcc")
NO_WINE = pytest.mark.skipif(not (WINE and COMPILER), reason="no wine, or no MinGW to make it a python.exe")
PYTHON_EXE = """
#include <stdio.h>
int main(int count, char **words) {
    for (int place = 1; place < count; place++) puts(words[place]);
    return 7;
}
"""


@pytest.fixture(scope="module")
def cmd(tmp_path_factory) -> Callable:
    """Return a function that runs words in wine's cmd; python.exe is one that prints its words and returns 7."""
    folder = tmp_path_factory.mktemp("wine")
    (folder / "python.c").write_text(PYTHON_EXE, encoding="utf-8")
    subprocess.run([COMPILER, folder / "python.c", "-o", folder / "python.exe"], check=True)
    environment = {
        **os.environ,
        "WINEPREFIX": str(folder / "prefix"),
        "WINEPATH": in_wine(folder),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",  # else it asks whether to download them
    }

    def run(*words: str, cwd: Path) -> subprocess.CompletedProcess:
        # The server that the first command starts would keep a pipe of its errors open for seconds.
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        return subprocess.run([WINE, "cmd", "/c", *words], cwd=cwd, env=environment, timeout=120, **streams)

    yield run
    subprocess.run(["wineserver", "--kill"], env=environment, timeout=60)
    shutil.rmtree(folder)  # a prefix is large


def in_wine(path: Path) -> str:
    """Return what wine calls a path."""
    return "Z:" + str(path).replace("/", "\\")


@NO_WINE
@pytest.mark.parametrize("name", NAMES)
def test_a_bat_file_does_under_wine_what_was_read_from_it(name, cmd, elsewhere, tmp_path):
    _, launcher, *words = read_bat(elsewhere / f"{name}.bat", AWKWARD)
    (tmp_path / "far.bat").write_bytes(f'@"{in_wine(elsewhere / name)}.bat" %*\r\n'.encode())
    near = cmd(f"scripts\\{name}.bat", *AWKWARD, cwd=elsewhere.parent)
    far = cmd("far.bat", *AWKWARD, cwd=tmp_path)
    for done in (near, far):
        assert done.stdout.splitlines() == [in_wine(Path(launcher)), *words]
        assert done.returncode == 7
