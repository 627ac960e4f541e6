"""The training loop: batches, optimiser, validation, early stopping, the best checkpoint."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from utils.cli.options import FlagGroup
from utils.cli.signals import Interrupts
from utils.errors import UserError
from utils.memory.plan import nearly_full
from utils.runs.checkpoint import Run, save_checkpoint, save_last
from utils.runs.records import History
from utils.runs.scores import Scores
from utils.system.gpu import random_kept, random_states, restore_random
from utils.system.interrupts import StopVote
from utils.training.early_stopping import EarlyStopping
from utils.training.evaluation import Split, evaluate
from utils.training.optimizers import build_optimizer, parameter_groups
from utils.training.progress import show_loss, windows_bar
from utils.training.schedules import Schedule

LOSSES = {"MSE": nn.functional.mse_loss, "MAE": nn.functional.l1_loss}

# Batches from one progress line to the next; between two lines nothing is read back from the device.
REPORT_EVERY = 100

# Validation windows that the state of the map to the prototypes is taken on.
_WATCHED_WINDOWS = 16


@dataclass(frozen=True)
class Recipe(FlagGroup):
    """How to train."""

    model: str
    loss: str
    optimizer: str
    learning_rate: float
    mapping_rate: float
    residual: str
    residual_rate: float
    lradj: str
    pct_start: float
    train_epochs: int
    max_steps: int
    patience: int
    grad_accum: int
    grad_clip: float
    eval_steps: int
    save_steps: int
    skip_epoch_test: bool


class Trainer:
    """Train a model and keep its best weights in the run folder.

    Args:
        recipe: how.
        accelerator: device, precision and processes; it has prepared the model and the loaders.
        model: (B, seq_len, 1) -> (B, pred_len, 1).
        splits: windows and loader of train, val and test.
        target: the channel of the headline metric, None for all channels.
        run: where to keep the weights.
        interrupts: says when to stop early.
        state: what `compatibility.load_last` returned, to go on from there; the model has its weights already.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model: nn.Module,
        splits: dict[str, Split],
        target: str | None,
        run: Run,
        interrupts: Interrupts,
        state: dict | None = None,
    ):
        self.recipe = recipe
        self.accelerator = accelerator
        self.model = model
        self.splits = splits
        self.target = target
        self.run = run
        self.interrupts = interrupts
        self.stop_vote = StopVote(interrupts, accelerator)
        self.loss = LOSSES[recipe.loss]
        self.has_nothing_to_train = not list(model.parameters())
        shares = {"mapping_layer": recipe.mapping_rate, "residual": recipe.residual_rate}
        groups = parameter_groups(model, recipe.learning_rate, shares)
        optimizer = build_optimizer(recipe.optimizer, groups, recipe.learning_rate)
        self.schedule = Schedule(optimizer, recipe.lradj, self._total_steps(), recipe.pct_start)
        self.optimizer = accelerator.prepare(optimizer)
        self.stopping = EarlyStopping(recipe.patience, accelerator.print)
        self.epoch = 1  # in hand
        self.batch = 0  # of the epoch, the last one trained on
        self.steps = 0  # of the optimiser
        self.validated_at = 0
        self.memory_is_watched = True
        self.started = time.perf_counter()
        self.learning_seconds = self.validating_seconds = self.step_started = 0.0
        self._forget_losses()
        self._random_to_restore: dict | None = None
        rows = self._load_state(state) if state else []
        self.was_scored = bool(rows)
        self.history = History(run.folder / "history.csv", rows) if accelerator.is_main_process else None

    def fit(self) -> None:
        """Train until the epochs, the steps or the patience are at their end.

        Raises:
            UserError: if the loss is no longer finite; the best checkpoint so far stays.
            KeyboardInterrupt: on a signal, when the state to resume from is saved.
        """
        with self.interrupts.deferred():
            try:
                self._fit()
            finally:
                if self.history:
                    self.history.finish()
        if self.stopping.should_stop:
            self.accelerator.print("Early stopping")

    def _fit(self) -> None:
        if self.has_nothing_to_train:
            self._score_untrained()
        elif self.recipe.residual == "linear" and not self.steps and not self.was_scored:
            self._restore_random()  # if this was interrupted
            self._validate()  # the line alone: weights that are worse are not kept
        # A run that was interrupted in an epoch's validation has that before it, even if it is its last.
        while not self._is_finished() or (self.batch and self.validated_at < self.steps):
            self._train_epoch()

    def _score_untrained(self) -> None:
        """Leave the files of a trained model, so that testing, forecasting and resuming need not know."""
        self.accelerator.print(f"{self.recipe.model} has nothing to train")
        if not self.was_scored:  # as all processes know, not the one that keeps the history alone
            self._validate()
        self._save_state(self._random_states())

    def _learning_clock(self) -> float:
        """Return seconds that stand still during a validation."""
        return time.perf_counter() - self.validating_seconds

    def _train_epoch(self) -> None:
        started = since = self.step_started = self._learning_clock()
        for number, batch in self._batches():
            loss = self._train_batch(batch, number)
            show_loss(self.bar, number, loss)
            if number % REPORT_EVERY == 0:
                self._report_progress(number, loss, (self._learning_clock() - since) / REPORT_EVERY)
                since = self._learning_clock()
            if not self.accelerator.sync_gradients:
                continue
            self._after_step(number)
            if self._validation_is_due():
                self._validate()
            if self._is_finished():
                break
            self._save_or_stop()
        self.accelerator.print(f"Epoch: {self.epoch} cost time: {self._learning_clock() - started:.2f}")
        is_last = self.epoch >= self.recipe.train_epochs or self._is_finished()
        if self.validated_at < self.steps and (is_last or not self.recipe.eval_steps):
            self._validate()
        # Else --max_steps or patience ended it, and more may be given.
        if self.batch >= len(self.splits["train"].loader):
            self.schedule.after_epoch()
            self.epoch += 1
            self.batch = 0
        self._save_state(self._random_states())
        self._stop_if_requested()

    def _batches(self) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
        """Yield the epoch's batches with their numbers, 1, 2, ...; those that were trained on are left out."""
        loader = self.splits["train"].loader
        loader.set_epoch(self.epoch - 1)
        if self.batch == 0:
            self._restore_random()  # saved between two epochs
        else:
            loader = self.accelerator.skip_first_batches(loader, self.batch)
        self.bar = windows_bar(loader, f"Epoch {self.epoch}", whole=self.splits["train"].loader)
        for number, batch in enumerate(self.bar, start=self.batch + 1):
            self._restore_random()  # saved within an epoch: its loader had drawn its numbers before
            if self._validation_is_due():
                self._validate()
            if self._is_finished():
                return
            yield number, batch
        self._restore_random()
        if self._validation_is_due():  # of the epoch's last batch, and was interrupted
            self._validate()

    def _after_step(self, number: int) -> None:
        """Count an optimiser step, which the epoch's batch of this number has completed."""
        self.batch = number
        self.steps += 1
        now = self._learning_clock()
        self.learning_seconds += now - self.step_started
        self.step_started = now
        self.schedule.after_step()
        if self.steps == 1:
            self._watch_memory()

    def _validation_is_due(self) -> bool:
        every = self.recipe.eval_steps
        return bool(every) and self.steps % every == 0 and self.validated_at < self.steps

    def _save_or_stop(self) -> None:
        """Save the state to resume from when it is time, or when this is to be the last step."""
        if self.recipe.save_steps and self.steps % self.recipe.save_steps == 0:
            self._save_state(self._random_states())
        self._stop_if_requested()

    def _stop_if_requested(self) -> None:
        if self.stop_vote.poll():
            self._save_state(self._random_states())
            raise KeyboardInterrupt

    def _train_batch(self, batch: tuple[torch.Tensor, ...], number: int) -> torch.Tensor:
        """Run one micro-batch, the epoch's 1st, 2nd, ...; return its loss, left on the device."""
        seq_x, seq_y, *_ = batch
        accumulated = self.recipe.grad_accum
        first_of_group = (number - 1) // accumulated * accumulated
        # accelerate divides by grad_accum; an epoch's last group may have fewer batches.
        scale = accumulated / min(accumulated, len(self.splits["train"].loader) - first_of_group)
        with self.accelerator.accumulate(self.model):
            forecast = self.model(seq_x)
            target = seq_y[:, -forecast.shape[1] :].to(forecast.device, non_blocking=True)
            loss = self._loss(forecast, target)
            self.accelerator.backward(loss * scale)
            if self.recipe.grad_clip and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.loss_sum += loss.detach()
        self.loss_count += 1
        return loss.detach()

    def _loss(self, forecast: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of the targets that are known."""
        if not self.splits["train"].windows.has_gaps:
            return self.loss(forecast, target)
        is_known = ~target.isnan()
        target = torch.where(is_known, target, forecast.detach())  # where it has no error, nor a gradient
        return self.loss(forecast, target, reduction="sum") / is_known.sum().clamp(min=1)

    def _validate(self) -> None:
        """Score, report, and keep the weights if they are the best so far."""
        train_loss = None
        if self.loss_count:
            train_loss = self.accelerator.reduce(self.loss_sum / self.loss_count, "mean").item()
            self._check_finite(train_loss, "training")
        started = time.perf_counter()
        before = self._random_states()
        try:
            vali = self._scores("val")
            self._check_finite(vali.mse, "validation")
            with random_kept(self.accelerator.device):  # a loader draws a seed
                test = None if self.recipe.skip_epoch_test else self._scores("test")
        except KeyboardInterrupt:
            self._save_state(before)  # it is validated again, from the start
            raise
        self._report(train_loss, vali, test)
        if self.stopping.update(vali.mse) and self.accelerator.is_main_process:
            self._save_best(vali)
        self._record(train_loss, vali, test)  # after the weights: it is only a record
        self.validated_at = self.steps
        self.validating_seconds += time.perf_counter() - started
        self._forget_losses()
        self._watch_memory()

    @property
    def seconds_per_step(self) -> float | None:
        """The seconds that a step of the run has taken, None before the first."""
        return self.learning_seconds / self.steps if self.steps else None

    def _save_best(self, vali: Scores) -> None:
        model = self.accelerator.unwrap_model(self.model)
        progress = {
            "epoch": self.epoch,
            "steps": self.steps,
            "vali_loss": vali.mse,
            "seconds_per_step": self.seconds_per_step,
        }
        save_checkpoint(self.run, model, progress)

    def _watch_memory(self) -> None:
        """Warn, once, if the device is nearly full."""
        warning = nearly_full(self.accelerator.device) if self.memory_is_watched else ""
        if warning:
            self.accelerator.print(warning)
            self.memory_is_watched = False

    def _scores(self, split: str) -> Scores:
        return evaluate(self.accelerator, self.model, self.splits[split], self.target, split, self._raise_if_requested)

    def _raise_if_requested(self) -> None:
        if self.stop_vote.poll():
            raise KeyboardInterrupt

    def _report_progress(self, batches: int, batch_loss: torch.Tensor, seconds: float) -> None:
        """Print the lines in the middle of an epoch; `seconds` are those of one batch."""
        loss = self.accelerator.reduce(batch_loss, "mean").item()  # of all processes: they stop together
        self._check_finite(loss, "training")
        left = (self.recipe.train_epochs - self.epoch + 1) * len(self.splits["train"].loader) - batches
        if self.recipe.max_steps:
            left = min(left, (self.recipe.max_steps - self.steps) * self.recipe.grad_accum)
        self.accelerator.print(
            f"\titers: {batches}, epoch: {self.epoch} | loss: {loss:.7f}\n"
            f"\tspeed: {seconds:.4f}s/iter; left time: {seconds * left:.4f}s"
        )

    def _report(self, train_loss: float | None, vali: Scores, test: Scores | None) -> None:
        step = f", step: {self.steps}" if self.recipe.eval_steps else ""
        trained = "" if train_loss is None else f"Train Loss: {train_loss:.7f} "
        tested = f" Test Loss: {test.mse:.7f} MAE Loss: {test.mae:.7f}" if test else ""
        self.accelerator.print(f"Epoch: {self.epoch}{step} | {trained}Vali Loss: {vali.mse:.7f}{tested}")

    def _record(self, train_loss: float | None, vali: Scores, test: Scores | None) -> None:
        if not self.accelerator.is_main_process:
            return
        row = {
            "epoch": self.epoch,
            "steps": self.steps,
            "lr": self.schedule.rate,
            "train_loss": train_loss,
            "vali_loss": vali.mse,
            "vali_mae": vali.mae,
            "test_loss": test.mse if test else None,
            "test_mae": test.mae if test else None,
            "seconds": round(time.perf_counter() - self.started, 3),
            **self._map_state(),
        }
        self.history.add(**row)
        self.accelerator.log({name: value for name, value in row.items() if value is not None}, step=self.steps)

    def _map_state(self) -> dict[str, float]:
        """Return `map_state` of some validation windows, always the same, for a model that has it."""
        model, windows = self.accelerator.unwrap_model(self.model), self.splits["val"].windows
        if not hasattr(model, "map_state"):
            return {}
        spread = range(0, len(windows), math.ceil(len(windows) / _WATCHED_WINDOWS))
        context, *_ = windows.__getitems__(spread)
        return model.map_state(context)

    def _check_finite(self, loss: float, which: str) -> None:
        """Stop the run if a loss is infinite or not a number."""
        if not math.isfinite(loss):
            kept = (
                "the best checkpoint is kept"
                if math.isfinite(self.stopping.lowest)
                else "there is no checkpoint of this run yet"
            )
            raise UserError(
                f"the {which} loss is {loss} after {self.steps} steps ({kept}): lower --learning_rate, give"
                " --grad_clip 1, or --llm_dtype bfloat16 or float32"
            )

    def _total_steps(self) -> int:
        steps = self.recipe.train_epochs * math.ceil(len(self.splits["train"].loader) / self.recipe.grad_accum)
        return min(steps, self.recipe.max_steps) if self.recipe.max_steps else steps

    def _is_finished(self) -> bool:
        reached = bool(self.recipe.max_steps) and self.steps >= self.recipe.max_steps
        is_over = reached or self.stopping.should_stop or self.epoch > self.recipe.train_epochs
        return is_over or self.has_nothing_to_train

    def _forget_losses(self) -> None:
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        self.loss_count = 0

    def _random_states(self) -> dict[str, torch.Tensor]:
        """Return the states of torch's generators; training draws from no others."""
        return random_states(self.accelerator.device)

    def _restore_random(self) -> None:
        """Put the generators where the saved state had them; once."""
        if self._random_to_restore is None:
            return
        restore_random(self._random_to_restore, self.accelerator.device)
        self._random_to_restore = None

    def _save_state(self, random_states: dict[str, torch.Tensor]) -> None:
        """Write `last`: all that `_load_state` needs."""
        random_of_processes = gather_object([random_states])
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        training = {
            "epoch": self.epoch,
            "batch": self.batch,
            "steps": self.steps,
            "validated_at": self.validated_at,
            "loss_sum": self.loss_sum.cpu(),
            "loss_count": self.loss_count,
            "seconds": time.perf_counter() - self.started,
            "learning_seconds": self.learning_seconds,
            "stopping": self.stopping.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "random": random_of_processes,
            "history": self.history.rows,
        }
        model = self.accelerator.unwrap_model(self.model)
        save_last(self.run, model, training)

    def _load_state(self, state: dict) -> list[list[str]]:
        """Take over a saved state; return the rows of its history.

        Raises:
            UserError: if it is of another schedule or other processes, or damaged.
        """
        for name in ("epoch", "batch", "steps", "validated_at", "loss_count"):
            setattr(self, name, state[name])
        self.learning_seconds = state.get("learning_seconds", 0.0)
        self.loss_sum = state["loss_sum"].to(self.accelerator.device)
        self.started -= state["seconds"]
        self.stopping.load_state_dict(state["stopping"])
        if self.schedule.total_steps != state["schedule"].get("total_steps"):
            raise UserError(
                f"--lradj {self.recipe.lradj} lays its rates out over all steps: resume with the --train_epochs and"
                " --max_steps of the run"
            )
        last = self.run.folder / "last"
        if len(state["random"]) != self.accelerator.num_processes:
            raise UserError(
                f"{last} is of {len(state['random'])} processes, here are {self.accelerator.num_processes}: resume"
                " with as many"
            )
        try:
            self._load_optimizer(state)
        except Exception as problem:  # what a stranger has put there may make torch raise anything
            raise UserError(
                f"{last} is damaged (its optimiser is another): leave out --resume to train anew"
            ) from problem
        self._random_to_restore = state["random"][self.accelerator.process_index]
        return state["history"]

    def _load_optimizer(self, state: dict) -> None:
        """Take over the states of optimiser, schedule and loss scaling.

        Raises:
            Exception: of whatever kind, if they are not such states as ours.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, own in self.optimizer.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in own and own[name].shape != parameter.shape:
                    raise ValueError(f"{name} of shape {own[name].shape}, not {parameter.shape}")
        if state["schedule"].keys() != self.schedule.state_dict().keys():
            raise ValueError("a schedule of another kind")
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
