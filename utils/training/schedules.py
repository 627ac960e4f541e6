"""Time-LLM's learning rate schedules, on torch's schedulers."""

import warnings

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

# type2 gives rates, whatever --learning_rate: from which epoch on (the first is 1), which rate.
_TYPE2_RATES = {3: 5e-5, 5: 1e-5, 7: 5e-6, 9: 1e-6, 11: 5e-7, 16: 1e-7, 21: 5e-8}


def rate_of_epoch(name: str, rate: float, epoch: int) -> float:
    """Return the learning rate of an epoch, the first being 1, under one of the stepwise schedules.

    Time-LLM adjusts the rate after an epoch by that epoch's number, so the first two epochs of `type1` and
    the first three of `type3` run at the full rate.

    Args:
        name: type1, type2, type3, PEMS or constant.
        rate: the rate of the first epoch.
        epoch: 1, 2, ...
    """
    done = epoch - 1
    if done == 0 or name == "constant":
        return rate
    if name == "type1":
        return rate * 0.5 ** (done - 1)
    if name == "type2":
        return next((value for since, value in reversed(_TYPE2_RATES.items()) if epoch >= since), rate)
    if name == "type3":
        return rate * 0.9 ** max(done - 3, 0)
    if name == "PEMS":
        return rate * 0.95**done
    raise ValueError(f"no schedule {name!r}")


class Schedule:
    """The learning rate over a run; the rate of the flag is the rate of the first epoch.

    Only TST, torch's OneCycleLR, starts lower and reaches it after `pct_start` of the steps.

    Args:
        optimizer: with the rate of the first epoch; groups of parameters keep the ratio of their rates.
        name: as in `--lradj`.
        total_steps: optimiser steps of the run, for TST.
        pct_start: share of them until the peak, for TST.
    """

    def __init__(self, optimizer: Optimizer, name: str, total_steps: int, pct_start: float):
        rates = [group["lr"] for group in optimizer.param_groups]
        rate = rates[0]
        self.is_per_step = name == "TST"
        self.scheduler: LRScheduler
        if self.is_per_step:
            if pct_start * total_steps == 1:  # torch would divide by the length of the way up, which is 0 then
                pct_start *= 1 - 1e-9
            self.scheduler = OneCycleLR(optimizer, max_lr=rates, total_steps=total_steps, pct_start=pct_start)
        elif name == "COS":
            self.scheduler = CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-8)
        else:
            self.scheduler = LambdaLR(optimizer, lambda done: rate_of_epoch(name, rate, done + 1) / rate)

    def after_step(self) -> None:
        """Go on after an optimiser step."""
        # OneCycleLR refuses a step past its last one.
        if self.is_per_step and self.scheduler.last_epoch < self.scheduler.total_steps - 1:
            self.scheduler.step()

    def after_epoch(self) -> None:
        """Go on after an epoch."""
        if not self.is_per_step:
            with warnings.catch_warnings():
                # A run that is resumed at an epoch's end has no step before this; torch takes that for a mistake.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self.scheduler.step()

    def state_dict(self) -> dict:
        """Return the state for `load_state_dict`."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on from where another was."""
        self.scheduler.load_state_dict(state)

    @property
    def total_steps(self) -> int | None:
        """The steps that the rates are laid out over, None if they are not."""
        return getattr(self.scheduler, "total_steps", None)

    @property
    def rate(self) -> float:
        """The rate of the next step."""
        return self.scheduler.get_last_lr()[0]
