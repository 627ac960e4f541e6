"""The state of a training run, saved as `last`."""

import time

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object

from utils.errors import UserError
from utils.runs.checkpoint import Run, save_last
from utils.system.gpu import random_states, restore_random
from utils.training.optimization import EarlyStopping, Schedule

_COUNTERS = ("epoch", "batch", "steps", "validated_at", "loss_count")


class TrainState:
    """The position of a training run, and everything it needs to continue bit for bit.

    The optimizer must have been prepared by the accelerator.

    Attributes:
        epoch: the current epoch, 1, 2, ...
        batch: the number of the epoch's last trained batch, 0 before the first.
        steps: the number of optimizer steps.
        validated_at: the number of steps at the last validation.
        loss_sum, loss_count: the losses of the batches since then; the sum is on the device.
        learning_seconds: the time spent in training steps.
    """

    def __init__(
        self, accelerator: Accelerator, optimizer: AcceleratedOptimizer, schedule: Schedule, stopping: EarlyStopping
    ):
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.schedule = schedule
        self.stopping = stopping
        self.epoch = 1
        self.batch = self.steps = self.validated_at = self.loss_count = 0
        self.learning_seconds = 0.0
        self.loss_sum = torch.zeros((), device=accelerator.device)
        self._started = time.perf_counter()
        self._random_to_restore: dict[str, torch.Tensor] | None = None

    @property
    def seconds(self) -> float:
        """The duration of the run, without the pauses between an interruption and the resumption."""
        return time.perf_counter() - self._started

    @property
    def seconds_per_step(self) -> float | None:
        """The mean duration of a training step, None before the first."""
        return self.learning_seconds / self.steps if self.steps else None

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add the loss of a batch."""
        self.loss_sum += loss
        self.loss_count += 1

    def reset_losses(self) -> None:
        """Start a new mean of the training loss."""
        self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0

    def restore_random(self) -> None:
        """Restore the random generators from the loaded state; only the first call has an effect."""
        if self._random_to_restore is not None:
            restore_random(self._random_to_restore, self.accelerator.device)
            self._random_to_restore = None

    def save(self, run: Run, model: torch.nn.Module, history: list[list[str]], random: dict | None = None) -> None:
        """Write `last` on the main process; the model may be wrapped.

        A resumed run starts with the states `random` of the random generators, by default with the current ones.
        """
        random_of_processes = gather_object([random or random_states(self.accelerator.device)])
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        training = {
            **{name: getattr(self, name) for name in _COUNTERS},
            "loss_sum": self.loss_sum.cpu(),
            "seconds": self.seconds,
            "learning_seconds": self.learning_seconds,
            "stopping": self.stopping.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "random": random_of_processes,
            "history": history,
        }
        save_last(run, self.accelerator.unwrap_model(model), training)

    def load(self, training: dict, run: Run) -> list[list[str]]:
        """Restore what `save` wrote for a run, and return the rows of its history.

        Raises:
            UserError: if the schedule or the number of processes differs, or the state is damaged.
        """
        for name in _COUNTERS:
            setattr(self, name, training[name])
        self.learning_seconds = training.get("learning_seconds", 0.0)
        self.loss_sum = training["loss_sum"].to(self.accelerator.device)
        self._started -= training["seconds"]
        self.stopping.load_state_dict(training["stopping"])
        if self.schedule.scheduler.state_dict().get("total_steps") != training["schedule"].get("total_steps"):
            raise UserError(
                f"--lradj {run.flags['lradj']} lays its rates out over all steps: resume with the --train_epochs and"
                " --max_steps of the run"
            )
        last = run.folder / "last"
        if len(training["random"]) != self.accelerator.num_processes:
            raise UserError(
                f"{last} is of {len(training['random'])} processes, here are {self.accelerator.num_processes}: resume"
                " with as many"
            )
        try:
            self._load_optimizer(training)
        except Exception as problem:  # the contents of a foreign file can make torch raise anything
            raise UserError(
                f"{last} is damaged (its optimizer state does not fit): leave out --resume to train anew"
            ) from problem
        self._random_to_restore = training["random"][self.accelerator.process_index]
        return training["history"]

    def _load_optimizer(self, training: dict) -> None:
        """Restore the states of the optimizer, the schedule and the loss scaler; raise if they do not match."""
        self.optimizer.load_state_dict(training["optimizer"])
        inner = self.optimizer.optimizer
        if self.steps and type(inner) in (torch.optim.Adam, torch.optim.AdamW):  # bitsandbytes stores moments in blocks
            for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
                for name in ("exp_avg", "exp_avg_sq"):
                    shape = inner.state[parameter][name].shape
                    if shape != parameter.shape:
                        raise ValueError(f"{name} of shape {shape}, not {parameter.shape}")
        if training["schedule"].keys() != self.schedule.scheduler.state_dict().keys():
            raise ValueError("a schedule of another kind")
        self.schedule.scheduler.load_state_dict(training["schedule"])
        if training["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(training["scaler"])
