"""Whether to stop, asked of all processes."""

import time

import torch
from accelerate import Accelerator

from utils.cli.signals import Interrupts

# Several processes agree on stopping about once a second, but at least every so many steps: each poll is a blocking
# collective.
AGREE_EVERY = 10


class StopVote:
    """Tells when to stop; all processes get the same answer, if all ask equally often.

    Args:
        interrupts: of this process.
        accelerator: of the run.
    """

    def __init__(self, interrupts: Interrupts, accelerator: Accelerator):
        self._interrupts = interrupts
        self._accelerator = accelerator
        self._polls = 0
        self._next = 1
        self._agreed = (0, time.monotonic())  # when the processes last agreed, by polls and by the clock

    def poll(self) -> bool:
        """Return whether to stop."""
        if self._accelerator.num_processes == 1:
            return self._interrupts.is_requested
        self._polls += 1
        if self._polls < self._next:
            return False
        before, since = self._agreed
        seconds = (time.monotonic() - since) / max(self._polls - before, 1)
        votes = torch.tensor([float(self._interrupts.is_requested), seconds], device=self._accelerator.device)
        requests, seconds_each = self._accelerator.reduce(votes, "mean").tolist()
        self._next = self._polls + min(max(round(1 / max(seconds_each, 1e-3)), 1), AGREE_EVERY)
        self._agreed = (self._polls, time.monotonic())
        return requests > 0
