import io
import os
import sys

import pytest

from utils.cli.command import OneLineParser, command_line, exit_code_of
from utils.errors import UserError


def raising(problem):
    def work():
        raise problem

    return work


@pytest.mark.parametrize(
    ("work", "code", "printed"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (raising(UserError("no file x: name another")), 2, "error: no file x: name another\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted: do it again\n"),
        (raising(SystemExit(2)), 2, ""),
        (lambda: OneLineParser().parse_args(["--gone"]), 2, "error: unrecognized arguments: --gone\n"),
    ],
)
def test_every_end_has_its_exit_code_and_its_line(capsys, work, code, printed):
    assert exit_code_of(work, "do it again") == code
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "\\u6570 \\xb1"), ("cp1252", "\\u6570 ±"), ("cp936", "数 ±"), ("utf-8", "数 ±")]
)
def test_a_console_without_a_letter_shows_its_number(monkeypatch, encoding, shown):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True))
    assert exit_code_of(lambda: print("数 ±", end=""), "") == 0
    assert sys.stdout.buffer.getvalue().decode(encoding) == shown


def test_without_a_console_there_is_nothing_to_set(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw
    assert exit_code_of(lambda: print("heard by nobody"), "") == 0


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 / 0, "")


@pytest.mark.parametrize(("system", "quoted"), [("posix", "'b c'"), ("nt", '"b c"')])
def test_commands_are_quoted_for_the_shells_of_the_system(monkeypatch, system, quoted):
    monkeypatch.setattr(os, "name", system)
    assert command_line(["a", "b c"]) == f"a {quoted}"
