"""Runs that are stopped and go on: the same bits as if nothing had happened."""

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run_main
from tests.conftest import names_in
from utils.errors import UserError
from utils.runs.run_lock import RunLock
from utils.training import experiment
from utils.training.trainer import Trainer

# Two epochs of 12 batches.
LONGER = [
    *("--train_epochs", "2", "--max_steps", "0", "--percent", "10", "--batch_size", "9"),
    *("--eval_windows", "14", "--patience", "9"),
]


def weights(folder, name="checkpoint"):
    return torch.load(folder / name, weights_only=True)["weights"]


def history(folder):
    rows = [line.split(",") for line in (folder / "history.csv").read_text(encoding="utf-8").splitlines()]
    seconds = rows[0].index("seconds")
    return [row[:seconds] + row[seconds + 1 :] for row in rows]


def outcome(folder):
    """Everything of a run that must not depend on whether it was interrupted, as one comparable value."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    last = torch.load(folder / "last", weights_only=True)["training"]
    forecast = folder / "forecast.csv"
    return {
        "weights": {name: tensor.tolist() for name, tensor in weights(folder).items()},
        "last weights": {name: tensor.tolist() for name, tensor in weights(folder, "last").items()},
        "history": history(folder),
        "metrics": {name: metrics.get(name) for name in ("mse", "mae", "windows", "per_channel", "intervals")},
        "forecast": forecast.read_text(encoding="utf-8") if forecast.exists() else None,
        "state": {name: last[name] for name in ("epoch", "batch", "steps", "validated_at", "stopping", "loss_count")},
        "files": names_in(folder),
    }


class Stop:
    """Press Ctrl-C (or send another signal) at a moment of the training."""

    def __init__(self, monkeypatch, method, count, number=signal.SIGINT):
        original = getattr(Trainer, method)
        self.calls = 0

        def counted(trainer, *arguments):
            self.calls += 1
            if self.calls == count:
                signal.raise_signal(number)
            return original(trainer, *arguments)

        monkeypatch.setattr(Trainer, method, counted)


def run_with_stop(run, monkeypatch, argv, method, count, number=signal.SIGINT):
    with monkeypatch.context() as patch:
        Stop(patch, method, count, number)
        stopped = run(*argv)
    assert stopped.code == 130, stopped.err
    assert "stopping after this step" in stopped.err
    assert stopped.err.splitlines()[-1] == (
        "interrupted: the state is saved, the same command with --resume goes on from there"
    )
    return stopped


@pytest.fixture
def undisturbed(run):
    """Return a function from flags to what an undisturbed run of them leaves; the folder is moved away."""

    def finish(*argv):
        done = run(*argv)
        assert done.code == 0, done.err
        left = outcome(done.folder)
        shutil.move(done.folder, Path("undisturbed"))
        return left

    return finish


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--lradj", "TST"],
        ["--lradj", "COS", "--eval_steps", "5"],
        ["--grad_accum", "5", "--lradj", "type3", "--eval_steps", "2"],
        ["--patience", "1", "--eval_steps", "3", "--learning_rate", "0.5", "--lradj", "constant"],
        ["--mapping", "full", "--optimizer", "adamw", "--lradj", "PEMS"],
        ["--max_steps", "17", "--no_prefix_cache", "--prompt_padding", "right"],
        ["--gradient_checkpointing", "--grad_clip", "0.1", "--llm_dtype", "bfloat16"],
    ],
    ids=" ".join,
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(run, flags, undisturbed, monkeypatch, more):
    argv = [*flags, *LONGER, *more]
    expected = undisturbed(*argv)
    run_with_stop(run, monkeypatch, argv, "_train_batch", 7)
    resumed = run(*argv, "--resume")
    assert resumed.code == 0, resumed.err
    assert "Resuming at step " in resumed.out
    assert outcome(resumed.folder) == expected


@pytest.mark.parametrize(
    ("every", "method", "count"),
    [
        *(("0", "_train_batch", count) for count in (12, 24)),
        *(("0", "_scores", count) for count in (2, 4)),
        ("4", "_train_batch", 12),
        ("4", "_scores", 6),
    ],
)
def test_wherever_it_is_stopped(run, flags, undisturbed, monkeypatch, method, count, every):
    argv = [*flags, *LONGER, "--eval_steps", every]
    expected = undisturbed(*argv)
    run_with_stop(run, monkeypatch, argv, method, count)
    # And once more on the way.
    with monkeypatch.context() as patch:
        Stop(patch, "_train_batch", 3)
        run(*argv, "--resume")
    resumed = run(*argv, "--resume")
    assert resumed.code == 0, resumed.err
    assert outcome(resumed.folder) == expected


def test_sigterm_stops_like_ctrl_c(run, flags, monkeypatch):
    stopped = run_with_stop(run, monkeypatch, [*flags, *LONGER], "_train_batch", 5, signal.SIGTERM)
    assert torch.load(stopped.folder / "last", weights_only=True)["training"]["steps"] == 5


def test_a_second_ctrl_c_leaves_at_once(run, flags, monkeypatch):
    def impatient(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_batch", impatient)
    stopped = run(*flags)
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1] == "interrupted: there is no state to resume from yet"
    assert not (stopped.folder / "last").exists()


def test_ctrl_c_in_the_middle_of_a_print_stops_all_the_same(run, flags, monkeypatch):
    class Busy(io.StringIO):
        def write(self, text):
            if "stopping" in text:
                raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")
            return super().write(text)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Busy())
        Stop(patch, "_train_batch", 5)
        stopped = run(*flags, *LONGER)
    assert stopped.code == 130
    assert torch.load(stopped.folder / "last", weights_only=True)["training"]["steps"] == 5


def test_handlers_are_put_back(run, flags):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(*flags)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_save_steps_keeps_a_state_in_between(run, flags, monkeypatch):
    saved = []
    save_state = Trainer._save_state

    def noted(trainer, *arguments):
        saved.append((trainer.state.epoch, trainer.state.steps))
        save_state(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_save_state", noted)
    assert run(*flags, *LONGER, "--save_steps", "5").code == 0
    assert saved == [(1, 5), (1, 10), (2, 12), (2, 15), (2, 20), (3, 24)]


def test_nothing_to_resume(assert_refused, run, flags):
    assert_refused([*flags, "--resume"], "no state to resume from", "--resume auto")
    assert_refused([*flags, "--resume", "--is_training", "0"], "--resume continues training")
    assert run(*flags, "--resume", "auto").code == 0


def test_a_start_without_a_step_leaves_nothing_to_keep(run, flags, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", interrupt)
        assert run(*flags).code == 130
    again = run(*flags, "--resume", "auto")
    assert again.code == 0
    assert not list(again.folder.glob("*.old"))


def test_a_finished_run_is_only_tested_again(run, flags):
    first = run(*flags)
    metrics, before = first.metrics(), weights(first.folder)
    again = run(*flags, "--resume")
    assert again.code == 0
    assert "Epoch: 1 cost time" not in again.out
    assert again.metrics()["mse"] == metrics["mse"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(again.folder).items())
    assert not list(again.folder.glob("*.old"))


def test_of_several_seeds_those_with_scores_are_left_alone(run, flags, monkeypatch):
    two = [*flags, "--itr", "2", "--resume", "auto"]
    first, second = run(*two).folders
    (second / "metrics.json").unlink()
    tested = []
    monkeypatch.setattr(experiment, "test", lambda *arguments: tested.append(arguments[3]))
    again = run(*two)
    assert tested == [second]
    assert f"Seed 2021 is done: {first}" in again.out
    run(*two, "--save_predictions")
    run(*two, "--max_steps", "5")
    assert tested == [second, first, second, first, second], "more is asked for"


def test_more_epochs_can_be_asked_for(run, flags):
    longer = [*flags, *LONGER, "--lradj", "constant"]
    whole = outcome(run(*longer, "--des", "whole").folders[0])
    for epochs in ("1", "2"):
        done = run(*longer, "--train_epochs", epochs, "--resume", "auto", "--des", "two")
    folder = next(folder for folder in done.folders if "_two_" in folder.name)
    assert outcome(folder)["last weights"] == whole["last weights"]


def test_more_steps_in_the_middle_of_an_epoch_can_be_asked_for(run, flags):
    steps = ["--eval_steps", "5", "--lradj", "type3"]
    whole = outcome(run(*flags, *LONGER, *steps, "--max_steps", "15", "--des", "whole").folders[0])
    for number in ("5", "15"):
        done = run(*flags, *LONGER, *steps, "--max_steps", number, "--resume", "auto", "--des", "two")
    folder = next(folder for folder in done.folders if "_two_" in folder.name)
    assert outcome(folder) == whole


def test_a_schedule_over_all_steps_cannot_be_made_longer(run, flags):
    run(*flags, *LONGER, "--lradj", "TST")
    refused = run(*flags, *LONGER, "--lradj", "TST", "--train_epochs", "3", "--resume")
    assert refused.code == 2 and "--lradj TST" in refused.err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--learning_rate", "0.02"], "--learning_rate 0.01, not 0.02"),
        (["--batch_size", "8"], "--batch_size 16, not 8"),
        (["--seed", "7"], "--seed 2021, not 7"),
        (["--content", "Other."], "--content"),
        (["--mapping", "full"], "--mapping compact, not full"),
    ],
)
def test_a_state_of_other_flags_is_refused_and_kept(run, flags, more, words):
    done = run(*flags)
    before = {file.name: file.read_bytes() for file in done.folder.iterdir()}
    refused = run(*flags, *more, "--resume")
    assert refused.code == 2
    assert refused.err.count("\n") == 1 and words in refused.err
    assert {file.name: file.read_bytes() for file in done.folder.iterdir()} == before


def test_a_state_of_other_data_is_refused(run, flags, csv_folder, tmp_path):
    lines = (csv_folder / "small.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "small.csv").write_text("\n".join([lines[0], *lines[2:], lines[-1]]) + "\n", encoding="utf-8")
    run(*flags)
    refused = run(*flags, "--root_path", tmp_path, "--resume")
    assert refused.code == 2 and "other data" in refused.err


def test_a_damaged_state_is_refused(run, flags):
    done = run(*flags)
    whole = (done.folder / "last").read_bytes()
    for damaged in (whole[:-100], b"", b"text"):
        (done.folder / "last").write_bytes(damaged)
        refused = run(*flags, "--resume")
        assert refused.code == 2 and refused.err.count("\n") == 1 and "damaged" in refused.err


def test_a_resumed_run_that_found_room_keeps_its_evaluation_batch(run, flags, monkeypatch):
    argv = [*flags, *LONGER, "--auto_batch_size", "--eval_batch_size", "20"]
    run_with_stop(run, monkeypatch, argv, "_train_batch", 5)
    kept = json.loads((run(*argv, "--resume").folder / "args.json").read_text())
    assert (kept["batch_size"], kept["eval_batch_size"]) == (9, 20)


def test_a_found_batch_size_is_that_of_the_resumed_run(run, flags, monkeypatch):
    import utils.training.batch_size

    argv = [*flags, *LONGER, "--auto_batch_size", "--eval_batch_size", "7"]
    monkeypatch.setattr(utils.training.batch_size, "_sizes", lambda size: iter([size // 2]))
    run_with_stop(run, monkeypatch, argv, "_train_batch", 5)
    monkeypatch.setattr("utils.training.experiment.fit_batch_size", lambda *_: pytest.fail("searched again"))
    resumed = run(*argv, "--resume")
    assert resumed.code == 0, resumed.err
    kept = json.loads((resumed.folder / "args.json").read_text())
    assert (kept["batch_size"], kept["eval_batch_size"]) == (4, 4)


# --- other processes ----------------------------------------------------------------------------------------------

# A server that has imported everything is forked for each process: a start takes no time.
FORKS = multiprocessing.get_context("forkserver") if sys.platform != "win32" else None
needs_forks = pytest.mark.skipif(FORKS is None, reason="Windows has no fork server")
PRELOADED = ("run_main", "models.TimeLLM", "utils.training.trainer", "utils.training.batch_size", "utils.memory.plan")


def run_in_process(argv, log):
    with log.open("w", encoding="utf-8", buffering=1) as file:
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        os._exit(run_main.main(argv))


def start(argv, log, target=run_in_process):
    FORKS.set_forkserver_preload([*PRELOADED, "transformers.models.qwen2.modeling_qwen2", "tests.test_resume"])
    process = FORKS.Process(target=target, args=([str(word) for word in argv], log))
    process.start()
    return process


def wait_for(process, log, words, seconds=0.0):
    """Wait until a process has printed the words, and some seconds more, or until it ends."""
    while process.is_alive() and words not in (log.read_text(encoding="utf-8") if log.exists() else ""):
        time.sleep(0.005)
    process.join(seconds)


@pytest.mark.slow
@needs_forks
def test_random_kills_lose_nothing(run, flags, undisturbed, request, monkeypatch):
    """SIGKILL at random moments, each followed by --resume, until the run is through.

    Of many, some must fall behind training: on calibration, test, pictures or forecast.
    """
    kills = request.config.getoption("--kills")
    argv = [*flags, *LONGER, "--save_steps", "1", "--eval_steps", "3", "--resume", "auto", "--level", "50", "--predict"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = undisturbed(*argv)
    torch.set_num_threads(threads)
    generator = random.Random(kills)
    killed = behind_training = rounds = 0
    log = Path("log")
    while killed < kills:
        rounds += 1
        while True:
            log.unlink(missing_ok=True)
            process = start(argv, log)
            wait_for(process, log, "Run folder", generator.uniform(0, 2.0) if killed < kills else 600)
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, log.read_text(encoding="utf-8")
            killed += 1
            behind_training += "Epoch: 2 cost time" in log.read_text(encoding="utf-8")
        (finished,) = Path("checkpoints").iterdir()
        assert outcome(finished) == expected
        shutil.rmtree("checkpoints")
    print(f"{killed} kills in {rounds} runs, {behind_training} of them behind training")
    assert behind_training or kills < 100


@pytest.mark.skipif(sys.platform != "win32", reason="Ctrl-Break is Windows'")
def test_ctrl_break_stops_like_ctrl_c(run, flags, undisturbed):
    argv = [*flags, *LONGER, "--train_epochs", "30", "--save_steps", "5"]
    expected = undisturbed(*argv)
    words = [sys.executable, run_main.__file__, *map(str, argv)]
    process = subprocess.Popen(words, creationflags=subprocess.CREATE_NEW_PROCESS_GROUP)
    try:
        while process.poll() is None and not list(Path("checkpoints").glob("*/last")):
            time.sleep(0.01)
        process.send_signal(signal.CTRL_BREAK_EVENT)
        assert process.wait(120) == 130
    finally:
        process.kill()
    resumed = run(*argv, "--resume")
    assert resumed.code == 0, resumed.err
    assert outcome(resumed.folder) == expected


@needs_forks
def test_two_runs_cannot_share_a_folder(run, flags):
    first = start([*flags, *LONGER, "--train_epochs", "1000"], Path("log"))
    wait_for(first, Path("log"), "Validation loss decreased")
    second = run(*flags, *LONGER)
    os.kill(first.pid, signal.SIGTERM)
    first.join(60)
    assert first.exitcode == 130
    assert second.code == 2
    assert second.err.count("\n") == 1
    assert f"in use by process {first.pid} on " in second.err
    assert not list(second.folder.glob("*.old"))
    assert not (second.folder / ".owner").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows refuses to open what the first owner has")
def test_who_waits_for_a_lock_and_who_comes_later_cannot_both_have_it(tmp_path):
    """In this order: A has it, B has opened the file and waits, A lets go, B has it, C comes."""
    import fcntl

    with RunLock(tmp_path):
        waiting = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path).__enter__()
    os.close(waiting)
    with RunLock(tmp_path):
        assert (tmp_path / ".owner").exists()
    assert not (tmp_path / ".owner").exists()


@needs_forks
def test_the_lock_of_a_dead_owner_is_taken_over(run, flags):
    first = start([*flags, *LONGER, "--train_epochs", "1000"], Path("log"))
    wait_for(first, Path("log"), "Run folder")
    first.kill()
    first.join()
    second = run(*flags)
    assert second.code == 0, second.err
    assert not (second.folder / ".owner").exists()
