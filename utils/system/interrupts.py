"""Ctrl-C, Ctrl-Break and SIGTERM: finish the step first."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator

# Several processes agree on stopping about once a second, but at least every so many steps: each poll is a blocking
# collective.
AGREE_EVERY = 10


class Interrupts:
    """While it is entered, a signal raises KeyboardInterrupt, but for the time that `deferred` takes.

    Then the first signal is only remembered, and the second raises.
    """

    def __init__(self):
        self._requested = self._deferring = False
        self._next = 1
        self._agreed = (0, time.monotonic())  # when the processes last agreed, by count and by the clock
        self._before = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # no other may install handlers
            names = ("SIGINT", "SIGTERM", "SIGBREAK")
            for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *problem) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, *_signal) -> None:
        if self._requested or not self._deferring:
            raise KeyboardInterrupt
        self._requested = True
        with contextlib.suppress(RuntimeError):  # stderr was being printed to: it cannot be entered twice
            print("stopping after this step; once more stops at once", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Remember the first signal instead of raising."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def requested(self, accelerator: Accelerator, count: int) -> bool:
        """Return whether to stop; all processes get the same answer.

        Args:
            accelerator: of the run.
            count: how often all processes have polled before.
        """
        if accelerator.num_processes == 1:
            return self._requested
        if count < self._next:
            return False
        before, since = self._agreed
        seconds = (time.monotonic() - since) / max(count - before, 1)
        votes = torch.tensor([float(self._requested), seconds], device=accelerator.device)
        requests, seconds_each = accelerator.reduce(votes, "mean").tolist()
        self._next = count + min(max(round(1 / max(seconds_each, 1e-3)), 1), AGREE_EVERY)
        self._agreed = (count, time.monotonic())
        return requests > 0
