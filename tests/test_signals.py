"""Every signal to stop ends in exit code 130; the state stays."""

import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

import run_main
from utils.cli.command import exit_code_of
from utils.runs import checkpoint, records
from utils.training import testing

from .test_resume import LONGER

DLINEAR = ["--model", "DLinear"]


class Thing:
    """Something that can be referred to weakly."""


def swallow(number):
    """Send a signal where Python prints what it raises and goes on: in the callback of a weak reference."""
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
    del thing
    assert reference() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_swallows_stops_the_test_all_the_same(run, flags, monkeypatch, number):
    evaluate = testing.evaluate

    def interrupted(*arguments, **options):
        swallow(number)
        time.sleep(0.3)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(testing, "evaluate", interrupted)
    stopped = run(*flags, *DLINEAR)
    assert stopped.code == 130, stopped.err
    assert stopped.err.splitlines()[-1].startswith("interrupted: the state is saved")
    assert "Exception ignored" not in stopped.err
    assert (stopped.folder / "last").exists() and not (stopped.folder / "metrics.json").exists()


def test_a_signal_while_the_last_picture_is_drawn_ends_the_run(run, flags, monkeypatch):
    finish = records.History.finish

    def interrupted(history):
        signal.raise_signal(signal.SIGINT)
        finish(history)

    monkeypatch.setattr(records.History, "finish", interrupted)
    stopped = run(*flags, *DLINEAR)
    assert stopped.code == 130
    assert "Test | MSE" not in stopped.out
    assert torch.load(stopped.folder / "last", weights_only=True)["training"]["steps"] == 4


def test_a_second_signal_while_torch_writes_is_no_bug_of_ours(run, flags, monkeypatch):
    save, saves = torch.save, []

    def interrupted(contents, file):
        class Interrupting:
            def write(self, part):
                if len(saves) == 2:
                    signal.raise_signal(signal.SIGINT)
                    signal.raise_signal(signal.SIGINT)
                return file.write(part)

            def flush(self):
                file.flush()

        saves.append(contents)
        save(contents, Interrupting())

    monkeypatch.setattr(checkpoint.torch, "save", interrupted)
    stopped = run(*flags, *DLINEAR, "--eval_steps", "1", "--save_steps", "1")
    assert stopped.code == 130, stopped.err
    assert "Traceback" not in stopped.err
    assert not list(stopped.folder.glob("*.unfinished"))
    torch.load(stopped.folder / "checkpoint", weights_only=True)


def test_work_that_hides_an_interrupt_is_interrupted(capsys):
    def work():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("what a library makes of it") from None

    assert exit_code_of(work, "go on") == 130
    assert capsys.readouterr().err == "interrupted: go on\n"


def test_signals_while_a_command_ends_do_not_disturb_it(capsys):
    def hint():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        return "go on"

    def work():
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook
    assert exit_code_of(work, hint) == 130
    assert capsys.readouterr().err == "interrupted: go on\n"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM from outside")
@pytest.mark.slow
def test_four_signals_to_a_real_run_end_it_once(flags, tmp_path):
    argv = [*flags, *DLINEAR, *LONGER, "--train_epochs", "400"]
    process = subprocess.Popen(
        [sys.executable, run_main.__file__, *map(str, argv)], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        while process.poll() is None and not list(Path(tmp_path).glob("checkpoints/*/last")):
            time.sleep(0.02)
        for _ in range(4):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.03)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("interrupted: ")
