"""Building blocks of the command lines: one-line errors, exit codes, child processes."""

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

from utils.cli.signals import SIGNALS, Interrupts
from utils.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error in one line and exits with code 2."""

    def error(self, message: str) -> None:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def is_first_process() -> bool:
    """Return whether this is the process that prints; works before torch is imported."""
    # With an incomplete or invalid rank every process prints, so that the error is seen.
    rank = os.environ.get("RANK", "0")
    return "WORLD_SIZE" not in os.environ or not rank.isdecimal() or int(rank) == 0


def exit_code_of(
    work: Callable[[], int | None], after_interrupt: str | Callable[[], str], interrupts: Interrupts | None = None
) -> int:
    """Run a command line's work and return its exit code; only the first process prints.

    The code is the work's own (0 for None), that of a SystemExit (argparse raises it), 2 with a one-line error for
    invalid input, or 130 after an interrupt.

    Args:
        after_interrupt: the hint to print after an interrupt, or a function that returns the hint.
        interrupts: the signal handler of work that defers signals.
    """
    with _unencodable_characters_escaped(), interrupts or Interrupts() as interrupts:
        try:
            with interrupts.none_lost():
                return work() or 0
        except SystemExit as stop:
            return int(stop.code or 0)
        except UserError as problem:
            line, code = f"error: {problem}", 2
        except KeyboardInterrupt:
            interrupts.is_ending = True
            hint = after_interrupt if isinstance(after_interrupt, str) else after_interrupt()
            line, code = f"interrupted: {hint}", 130
        if is_first_process():
            print(line, file=sys.stderr)
    return code


@contextlib.contextmanager
def _unencodable_characters_escaped() -> Iterator[None]:
    """Let print() escape characters that stdout cannot encode, such as Chinese under a Western Windows."""
    # stdout is None under pythonw and another class in a notebook; an error handler set by the caller stays.
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
    """Quote a command for the shells of this system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def run_child(command: Sequence[str], folder: Path | None = None) -> int:
    """Run a command in a folder, None for the present one; after a signal, wait for it to save its state and exit.

    Returns:
        the command's exit code, or 130 after a signal.
    """
    received = []

    def stop(number: int, _frame: object) -> None:
        received.append(number)
        if number == signal.SIGTERM:  # the terminal itself sends Ctrl-C and Ctrl-Break to the child
            child.terminate()

    child = subprocess.Popen(command, cwd=folder)
    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        return 130
    return code if code >= 0 else 128 - code  # the shells' code for a process killed by a signal
