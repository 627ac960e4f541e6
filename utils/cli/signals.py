"""Ctrl-C, Ctrl-Break and SIGTERM: each ends a command, none is lost. Nothing here imports torch."""

import _thread
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

# Seconds in which a further signal does not disturb the end that the first one has begun.
_SETTLING = 1.0

# Seconds until a KeyboardInterrupt that Python could only print is raised again.
_AGAIN_AFTER = 0.02


_NAMES = ("SIGINT", "SIGTERM", "SIGBREAK")  # those of every system; each has some
_NUMBERS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


def leave(main: Callable[[], int]) -> NoReturn:
    """Run a command line and leave the process with its exit code; only while it is at work does it hear signals.

    One that comes later, when Python is about to end, would change the exit code.
    """
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(main())


class Interrupts:
    """While it is entered, a signal raises KeyboardInterrupt, but for the time that `deferred` takes.

    Then the first signal is only remembered, and the second raises.

    Attributes:
        is_requested: whether a signal is remembered.
    """

    def __init__(self):
        self.is_requested = self._deferring = self._ignoring = self._has_raised = False
        self._raised_at = -_SETTLING
        self._handlers = {}
        self._again: threading.Timer | None = None
        self._unraisable = sys.unraisablehook

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # no other may install handlers
            for number in _NUMBERS:
                self._handlers[number] = signal.signal(number, self._handle)
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._raise_again
        return self

    def __exit__(self, *problem) -> None:
        if not self._handlers:
            return
        if self._again:
            self._again.cancel()
        sys.unraisablehook = self._unraisable
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, *_signal) -> None:
        if self._ignoring or time.monotonic() - self._raised_at < _SETTLING:
            return
        if self._deferring and not self.is_requested:
            self.is_requested = True
            with contextlib.suppress(RuntimeError):  # stderr was being printed to: it cannot be entered twice
                print("stopping after this step; once more stops at once", file=sys.stderr, flush=True)
            return
        self._has_raised, self._raised_at = True, time.monotonic()
        raise KeyboardInterrupt

    def _raise_again(self, unraisable) -> None:
        """Raise a KeyboardInterrupt again, soon: of one in a weakref's callback or a `__del__` Python only tells."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._unraisable(unraisable)
            return
        self._raised_at = -_SETTLING
        self._again = threading.Timer(_AGAIN_AFTER, _thread.interrupt_main)
        self._again.daemon = True
        self._again.start()

    @contextlib.contextmanager
    def none_lost(self) -> Iterator[None]:
        """Let the work end with KeyboardInterrupt if a signal has raised one, whatever became of that on its way.

        Torch makes a RuntimeError of one that comes in the middle of its writing; others are swallowed.
        """
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as problem:
            if self._has_raised:
                raise KeyboardInterrupt from problem
            raise
        if self._has_raised:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Remember the first signal instead of raising; raise at the end if nobody has asked for it meanwhile."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.is_requested:
            raise KeyboardInterrupt

    def ignore(self) -> None:
        """Let further signals do nothing: the command is about to end."""
        self._ignoring = True
