"""The state of a training run, as `last` keeps it."""

import time

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object

from utils.errors import UserError
from utils.runs.checkpoint import Run, save_last
from utils.system.gpu import random_states, restore_random
from utils.training.early_stopping import EarlyStopping
from utils.training.schedules import Schedule

_COUNTERS = ("epoch", "batch", "steps", "validated_at", "loss_count")


class TrainState:
    """Where a training run is, and everything that it needs to continue from there to the bit.

    Args:
        accelerator: device and processes.
        optimizer: prepared by it.
        schedule: of the learning rate.
        stopping: early stopping.

    Attributes:
        epoch: the current one, 1, 2, ...
        batch: the last one of the epoch that was trained on, 0 before the first.
        steps: of the optimiser.
        validated_at: the steps at the last validation.
        loss_sum, loss_count: of the batches since then; the sum is on the device.
        learning_seconds: spent in training steps.
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
        """Seconds since the run started, without those between a stop and its resumption."""
        return time.perf_counter() - self._started

    @property
    def seconds_per_step(self) -> float | None:
        """The mean seconds of a training step, None before the first."""
        return self.learning_seconds / self.steps if self.steps else None

    def add_loss(self, loss: torch.Tensor) -> None:
        """Take in the loss of a batch."""
        self.loss_sum += loss
        self.loss_count += 1

    def forget_losses(self) -> None:
        """Start a new mean of the training loss."""
        self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0

    def random(self) -> dict[str, torch.Tensor]:
        """Return the states of torch's generators; training draws from no others."""
        return random_states(self.accelerator.device)

    def restore_random(self) -> None:
        """Set the generators to where the loaded state had them; once."""
        if self._random_to_restore is not None:
            restore_random(self._random_to_restore, self.accelerator.device)
            self._random_to_restore = None

    def save(self, run: Run, model: torch.nn.Module, history: list[list[str]], random: dict | None = None) -> None:
        """Write `last`, on the main process.

        Args:
            run: where to.
            model: possibly wrapped.
            history: the rows of history.csv.
            random: states of the generators to continue from, None for the present ones.
        """
        random_of_processes = gather_object([random or self.random()])
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
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "random": random_of_processes,
            "history": history,
        }
        save_last(run, self.accelerator.unwrap_model(model), training)

    def load(self, training: dict, run: Run) -> list[list[str]]:
        """Continue from a saved state; return the rows of its history.

        Args:
            training: see `save`.
            run: that it is of.

        Raises:
            UserError: if it is of another schedule or number of processes, or damaged.
        """
        for name in _COUNTERS:
            setattr(self, name, training[name])
        self.learning_seconds = training.get("learning_seconds", 0.0)
        self.loss_sum = training["loss_sum"].to(self.accelerator.device)
        self._started -= training["seconds"]
        self.stopping.load_state_dict(training["stopping"])
        if self.schedule.total_steps != training["schedule"].get("total_steps"):
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
        except Exception as problem:  # the contents of a stranger's file may make torch raise anything
            raise UserError(
                f"{last} is damaged (its optimiser is another): leave out --resume to train anew"
            ) from problem
        self._random_to_restore = training["random"][self.accelerator.process_index]
        return training["history"]

    def _load_optimizer(self, training: dict) -> None:
        """Load the states of optimiser, schedule and loss scaling.

        Raises:
            Exception: of any kind, if they are of other ones.
        """
        self.optimizer.load_state_dict(training["optimizer"])
        inner = self.optimizer.optimizer
        trained = [parameter for group in inner.param_groups for parameter in group["params"]]
        for parameter in trained if self.steps else ():
            own = inner.state[parameter]
            # bitsandbytes keeps the moments in blocks of another shape.
            for name in ("exp_avg", "exp_avg_sq") if type(inner) in (torch.optim.Adam, torch.optim.AdamW) else ():
                if own[name].shape != parameter.shape:
                    raise ValueError(f"{name} of shape {own[name].shape}, not {parameter.shape}")
        if training["schedule"].keys() != self.schedule.state_dict().keys():
            raise ValueError("a schedule of another kind")
        self.schedule.load_state_dict(training["schedule"])
        if training["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(training["scaler"])
