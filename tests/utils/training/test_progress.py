import io
import re
import sys
from functools import partial

import pytest
import transformers
from tqdm import tqdm

import utils.training.progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def open_terminal(monkeypatch):
    """Return a function that makes stderr a terminal, where bars draw every state, and returns it."""

    def open_now():
        transformers.logging.enable_progress_bar()
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(utils.training.progress, "tqdm", partial(tqdm, mininterval=0, miniters=1))
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
