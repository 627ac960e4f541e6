"""Handle Ctrl-C, Ctrl-Break and SIGTERM so that each ends a command and none is lost."""

import _thread
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, Self

# Seconds after a KeyboardInterrupt in which further signals are ignored, so that they do not disturb the shutdown.
_SHUTDOWN_SECONDS = 1.0

# Seconds until a KeyboardInterrupt that Python could not propagate is raised again.
_RAISE_AGAIN_AFTER = 0.02

# The signals that end a command, as far as the system has them.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]


def leave(main: Callable[[], int]) -> NoReturn:
    """Run a command line and exit with its code.

    Signals are ignored unless `main` handles them: during the interpreter's shutdown they would change the exit code.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(main())


class Interrupts:
    """A context in which a signal raises KeyboardInterrupt.

    Inside `deferred`, the first signal is only recorded; a second one raises.

    Attributes:
        is_requested: whether a signal has been recorded.
        is_ending: whether the command is about to end, so that further signals are ignored.
    """

    def __init__(self):
        self.is_requested = self.is_ending = self._deferring = self._has_raised = False
        self._raised_at = -_SHUTDOWN_SECONDS
        self._handlers = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only the main thread may install handlers
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._raise_again
        return self

    def __exit__(self, *problem) -> None:
        if not self._handlers:
            return
        if self._timer:
            self._timer.cancel()
        sys.unraisablehook = self._unraisable
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, *_signal) -> None:
        if self.is_ending or time.monotonic() - self._raised_at < _SHUTDOWN_SECONDS:
            return
        if self._deferring and not self.is_requested:
            self.is_requested = True
            with contextlib.suppress(RuntimeError):  # the signal interrupted a print to stderr, which is not reentrant
                print("stopping after this step; once more stops at once", file=sys.stderr, flush=True)
            return
        self._has_raised, self._raised_at = True, time.monotonic()
        raise KeyboardInterrupt

    def _raise_again(self, unraisable) -> None:
        """Raise a KeyboardInterrupt again that Python only reports, from a weakref callback or a ``__del__``."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._unraisable(unraisable)
            return
        self._raised_at = -_SHUTDOWN_SECONDS
        self._timer = threading.Timer(_RAISE_AGAIN_AFTER, _thread.interrupt_main)
        self._timer.daemon = True
        self._timer.start()

    @contextlib.contextmanager
    def none_lost(self) -> Iterator[None]:
        """End the work with KeyboardInterrupt if a signal has raised one, even if a library hid it.

        torch, for example, turns a KeyboardInterrupt during `torch.save` into a RuntimeError.
        """
        try:
            yield
        except BaseException as problem:
            if self._has_raised and not isinstance(problem, KeyboardInterrupt):
                raise KeyboardInterrupt from problem
            raise
        if self._has_raised:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Record the first signal instead of raising; raise at the end if a signal was recorded."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.is_requested:
            raise KeyboardInterrupt
