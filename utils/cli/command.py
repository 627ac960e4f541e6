"""What the project's command lines share: one line for an error, exit codes, child processes."""

import argparse
import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from utils.cli.signals import Interrupts
from utils.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> None:
        """Print one line and leave with exit code 2."""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def is_first_process() -> bool:
    """Return whether this is the process that speaks; known before torch is loaded."""
    # A rank alone, or one that is no number, is a mistake that must be told.
    rank = os.environ.get("RANK", "0")
    return "WORLD_SIZE" not in os.environ or not rank.isdecimal() or int(rank) == 0


def exit_code_of(
    work: Callable[[], int | None], after_interrupt: str | Callable[[], str], interrupts: Interrupts | None = None
) -> int:
    """Do the work of a command line and return its exit code.

    0, or what the work returns; 2, with one line, if the input is wrong; 130 if it was interrupted. However many
    processes there are, one speaks.

    Args:
        work: what to do; argparse may leave in it.
        after_interrupt: what to say then of how to go on, or a function that finds that out.
        interrupts: for work that defers them.
    """
    with _missing_letters_escaped(), interrupts or Interrupts() as interrupts:
        try:
            with interrupts.none_lost():
                return work() or 0
        except SystemExit as leave:
            return int(leave.code or 0)
        except UserError as problem:
            line, code = f"error: {problem}", 2
        except KeyboardInterrupt:
            interrupts.ignore()
            hint = after_interrupt if isinstance(after_interrupt, str) else after_interrupt()
            line, code = f"interrupted: {hint}", 130
        if is_first_process():
            print(line, file=sys.stderr)
    return code


@contextlib.contextmanager
def _missing_letters_escaped() -> Iterator[None]:
    """Let print() write \\u6570 for a letter that a console or a redirected file cannot hold, as stderr does, not fail.

    Otherwise a folder with Chinese letters would end a run under a Western Windows.
    """
    # Under pythonw there is none, in a notebook another; whoever chose how it fails meant it.
    if not isinstance(sys.stdout, io.TextIOWrapper) or sys.stdout.errors != "strict":
        yield
        return
    stdout = sys.stdout
    stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stdout.reconfigure(errors="strict")


def command_line(words: Sequence[str]) -> str:
    """Return a command as the shells of this system take it."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def run_child(command: Sequence[str], folder: Path | None = None) -> int:
    """Run a command. A signal to stop is for the child: it saves its state, and is waited for.

    Args:
        command: program and words.
        folder: to run it in, None for this process's own.

    Returns:
        its exit code; 130 if this process was told to stop meanwhile.
    """
    stops = []

    def stop(number: int, _frame: object) -> None:
        stops.append(number)
        if number == signal.SIGTERM:  # Ctrl-C and Ctrl-Break reach the child by themselves
            child.terminate()

    child = subprocess.Popen(command, cwd=folder)
    names = ("SIGINT", "SIGTERM", "SIGBREAK")
    before = {number: signal.signal(number, stop) for name in names if (number := getattr(signal, name, None))}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stops:
        return 130
    return code if code >= 0 else 128 - code  # killed by a signal: what a shell makes of it
