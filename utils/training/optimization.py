"""Optimizers, Time-LLM's learning rate schedules, and early stopping."""

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from utils.errors import UserError
from utils.system.gpu import has_fused_8bit_optimizers

# The learning rates of type2, whatever --learning_rate is, by the first epoch (1, 2, ...) that uses them.
_TYPE2_RATES = {3: 5e-5, 5: 1e-5, 7: 5e-6, 9: 1e-6, 11: 5e-7, 16: 1e-7, 21: 5e-8}


def check_optimizer(name: str, device: torch.device) -> None:
    """Raise a UserError if an optimizer needs a package or a device that is missing."""
    if name in ("adam", "adamw"):
        return
    if not has_fused_8bit_optimizers(device):
        raise UserError(f"--optimizer {name} saves memory on a CUDA device only, and there is none: give adamw")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--optimizer {name} needs the package bitsandbytes: pip install bitsandbytes")


def build_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter] | list[dict], learning_rate: float
) -> Optimizer:
    """Build the optimizer that `--optimizer` names, for parameters or for groups of parameters.

    `learning_rate` is the initial rate of all parameters whose group has no rate of its own.
    """
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        # The fused kernel reads the weights once instead of a dozen times, which matters for --mapping full.
        return kind(parameters, lr=learning_rate, fused=True)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit  # only used on CUDA devices

    return (AdamW8bit if name == "adamw8bit" else PagedAdamW8bit)(parameters, lr=learning_rate)


def rate_of_epoch(name: str, rate: float, epoch: int) -> float:
    """Compute the learning rate of an epoch (1, 2, ...) under type1, type2, type3, PEMS or constant.

    `rate` is the rate of the first epoch. Time-LLM adjusts the rate after an epoch by that epoch's number, so the first
    two epochs of `type1` and the first three of `type3` run at the full rate.
    """
    completed = epoch - 1
    if completed == 0 or name == "constant":
        return rate
    if name == "type1":
        return rate * 0.5 ** (completed - 1)
    if name == "type2":
        return next((value for first, value in reversed(_TYPE2_RATES.items()) if epoch >= first), rate)
    if name == "type3":
        return rate * 0.9 ** max(completed - 3, 0)
    if name == "PEMS":
        return rate * 0.95**completed
    raise ValueError(f"no schedule {name!r}")


class Schedule:
    """The learning rate schedule of a run; the first epoch uses the rate of the flag.

    Only TST, PyTorch's OneCycleLR, starts lower and reaches that rate after a share `pct_start` of all steps.

    Args:
        optimizer: the optimizer with its initial rates; its parameter groups keep the ratio of their rates.
        name: one of the choices of `--lradj`.
        total_steps: the number of optimizer steps of the run, for TST.
    """

    def __init__(self, optimizer: Optimizer, name: str, total_steps: int, pct_start: float):
        rates = [group["lr"] for group in optimizer.param_groups]
        self.is_per_step = name == "TST"
        self.scheduler: LRScheduler
        if self.is_per_step:
            if pct_start * total_steps == 1:  # PyTorch would divide by the length of the warm-up, which would be 0
                pct_start *= 1 - 1e-9
            self.scheduler = OneCycleLR(optimizer, max_lr=rates, total_steps=total_steps, pct_start=pct_start)
        elif name == "COS":
            self.scheduler = CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-8)
        else:
            rate = rates[0]
            self.scheduler = LambdaLR(optimizer, lambda completed: rate_of_epoch(name, rate, completed + 1) / rate)

    def after_step(self) -> None:
        """Update the rate after an optimizer step."""
        # OneCycleLR refuses a step past its last one.
        if self.is_per_step and self.scheduler.last_epoch < self.scheduler.total_steps - 1:
            self.scheduler.step()

    def after_epoch(self) -> None:
        """Update the rate after an epoch."""
        if not self.is_per_step:
            with warnings.catch_warnings():
                # PyTorch warns if no optimizer step came first, as in a run that is resumed at the end of an epoch.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self.scheduler.step()

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.scheduler.get_last_lr()[0]


class EarlyStopping:
    """Counter of consecutive validations without an improvement; after `patience` of them training should stop."""

    def __init__(self, patience: int, report: Callable[[str], None] = print):
        self.patience = patience
        self.report = report
        self.lowest = math.inf
        self.counter = 0

    def update(self, loss: float) -> bool:
        """Record a validation loss and return whether it is the lowest so far."""
        if loss < self.lowest:
            self.report(f"Validation loss decreased ({self.lowest:.6f} --> {loss:.6f}).  Saving model ...")
            self.lowest, self.counter = loss, 0
            return True
        self.counter += 1
        self.report(f"EarlyStopping counter: {self.counter} out of {self.patience}")
        return False

    def state_dict(self) -> dict[str, float]:
        """Return the lowest loss and the counter."""
        return {"lowest": self.lowest, "counter": self.counter}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the lowest loss and the counter."""
        self.lowest, self.counter = state["lowest"], state["counter"]

    @property
    def should_stop(self) -> bool:
        """Whether the patience is used up."""
        return self.counter >= self.patience
