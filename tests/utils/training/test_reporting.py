"""--report_to tensorboard, and progress bars."""

import io
import json
import re
import sys
from functools import partial

import pytest
import transformers
from tensorboardX.proto.event_pb2 import Event
from tqdm import tqdm

from utils.training import reporting


def scalars(folder):
    """Read what event files hold: records of a length, its checksum, an event and its checksum."""
    found = []
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[12 + length + 4 :]
    return found


def test_tensorboard_is_told_what_the_history_says(run, flags):
    flags = [*flags, "--max_steps", 6, "--eval_steps", 2]
    plain = run(*flags).metrics()["mse"]
    done = run(*flags, "--report_to", "tensorboard", "--des", "told", "--max_steps", 4)
    done = run(*flags, "--report_to", "tensorboard", "--des", "told", "--resume")
    assert done.code == 0, done.err
    (folder,) = (folder for folder in done.folders if "_told_" in folder.name)
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["mse"] == plain
    told = scalars(folder / "tensorboard")
    for row in done._replace(folders=[folder]).history():
        for name in ("lr", "train_loss", "vali_loss", "test_loss", "attention_entropy"):
            values = [value for step, tag, value in told if (step, tag) == (int(row["steps"]), name)]
            assert values == [pytest.approx(float(row[name]), rel=1e-6)]


def test_an_earlier_run_of_the_name_keeps_its_own(run, flags):
    for _ in range(2):
        folder = run(*flags, "--report_to", "tensorboard").folder
    assert len({step for step, _, _ in scalars(folder / "tensorboard")}) == 1
    assert scalars(folder / "tensorboard.old")


def test_by_default_nobody_is_told(run, flags):
    assert not (run(*flags).folder / "tensorboard").exists()


def test_a_package_that_is_missing_is_named(assert_refused, flags, monkeypatch):
    monkeypatch.setattr(reporting, "is_tensorboard_available", lambda: False)
    assert_refused([*flags, "--report_to", "tensorboard"], "--report_to tensorboard", "pip install tensorboard")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def open_terminal(monkeypatch):
    """Return a function that makes stderr a terminal, where bars draw every state, and returns it."""

    def open_now():
        transformers.logging.enable_progress_bar()
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(reporting, "tqdm", partial(tqdm, mininterval=0, miniters=1))
        return sys.stderr

    yield open_now
    transformers.logging.disable_progress_bar()


def bars(screen, title):
    """Return windows done, windows in all and the rest of each state of a bar."""
    return re.findall(rf"{title}: +\d+%[^\r]*?\| (\d+)/(\d+) \[(.*?)\]", screen)


def test_a_terminal_sees_windows_a_second_and_the_loss(run, flags, open_terminal):
    terminal = open_terminal()
    assert run(*flags, "--skip_epoch_test").code == 0
    screen = terminal.getvalue()
    assert re.search(r"Loading weights: +100%", screen)
    # 40 windows are 3 batches of 16; in training 4 of 98.
    assert [bar[:2] for bar in bars(screen, "val")] == [(str(16 * batch), "48") for batch in range(4)]
    assert [bar[:2] for bar in bars(screen, "Epoch 1")] == [(str(16 * batch), "1568") for batch in range(4)]
    assert re.search(r"[\d.]+ windows/s, loss \d\.\d{4}$", bars(screen, "test")[-1][-1])


def test_a_resumed_epoch_shows_what_is_done_already(run, flags, open_terminal):
    run(*flags)
    terminal = open_terminal()
    assert run(*flags, "--max_steps", 24, "--resume").code == 0
    states = bars(terminal.getvalue(), "Epoch 1")
    assert states[0][:2] == ("64", "1568") and states[1][:2] == ("80", "1568")
    assert "loss" in states[-1][-1]


def test_what_is_no_terminal_sees_nothing(run, flags):
    assert run(*flags).err == ""
