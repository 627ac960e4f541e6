"""The training loop: batches, optimiser, validation, early stopping, the best checkpoint."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from utils.cli.options import FlagGroup
from utils.cli.signals import Interrupts
from utils.errors import UserError
from utils.memory.plan import nearly_full
from utils.runs.checkpoint import Run, save_checkpoint
from utils.runs.metrics import Scores
from utils.runs.records import History
from utils.system.gpu import fork_random
from utils.system.processes import StopVote
from utils.training.early_stopping import EarlyStopping
from utils.training.evaluation import Split, evaluate
from utils.training.optimizers import build_optimizer
from utils.training.progress import show_loss, windows_bar
from utils.training.schedules import Schedule
from utils.training.state import TrainState

LOSSES = {"MSE": nn.functional.mse_loss, "MAE": nn.functional.l1_loss}

# Batches from one progress line to the next; in between nothing is read back from the device.
REPORT_EVERY = 100

# Validation windows that the diagnostics are computed on.
_DIAGNOSED_WINDOWS = 16


@dataclass(frozen=True)
class TrainConfig(FlagGroup):
    """The flags of training."""

    model: str
    loss: str
    optimizer: str
    learning_rate: float
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
        config: the flags.
        accelerator: device, precision and processes; it has prepared the model and the loaders.
        model: (B, seq_len, 1) -> (B, pred_len, 1).
        splits: windows and loader of train, val and test.
        target: the channel of the headline metric, None for all channels.
        run: where to keep the weights.
        interrupts: tells when to stop early.
        training: the trainer's own state in `last`, to continue from there; the model has its weights already.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        model: nn.Module,
        splits: dict[str, Split],
        target: str | None,
        run: Run,
        interrupts: Interrupts,
        training: dict | None = None,
    ):
        self.config = config
        self.accelerator = accelerator
        self.model = model
        self.forecaster = accelerator.unwrap_model(model)
        self.splits = splits
        self.target = target
        self.run = run
        self.interrupts = interrupts
        self.stop_vote = StopVote(interrupts, accelerator)
        self.loss = LOSSES[config.loss]
        self.has_nothing_to_train = not list(model.parameters())
        groups = self.forecaster.parameter_groups(config.learning_rate)
        optimizer = build_optimizer(config.optimizer, groups, config.learning_rate)
        schedule = Schedule(optimizer, config.lradj, self._total_steps(), config.pct_start)
        stopping = EarlyStopping(config.patience, accelerator.print)
        self.state = TrainState(accelerator, accelerator.prepare(optimizer), schedule, stopping)
        self.memory_is_watched = True
        self.validating_seconds = self.step_started = 0.0
        rows = self.state.load(training, run) if training else []
        if self.state.batch > len(splits["train"].loader):
            raise UserError(f"{run.folder / 'last'} is damaged (its batch is beyond the epoch): leave out --resume")
        self.was_scored = bool(rows)
        self.history = History(run.folder / "history.csv", rows) if accelerator.is_main_process else None

    def fit(self) -> None:
        """Train until the epochs, the steps or the patience are used up.

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
        if self.state.stopping.should_stop:
            self.accelerator.print("Early stopping")

    def _fit(self) -> None:
        state = self.state
        if self.has_nothing_to_train:
            self._score_untrained()
        elif self.forecaster.starts_fitted and not state.steps and not self.was_scored:
            state.restore_random()  # if this was interrupted
            self._validate()  # the fitted line: weights that are worse are not kept
        # A run that was interrupted in an epoch's validation resumes with that, even if it is its last.
        while not self._is_finished() or (state.batch and state.validated_at < state.steps):
            self._train_epoch()

    def _score_untrained(self) -> None:
        """Leave the files of a trained model, so that testing, forecasting and resuming need not know."""
        self.accelerator.print(f"{self.config.model} has nothing to train")
        if not self.was_scored:  # known to all processes, unlike the history
            self._validate()
        self._save_state()

    def _learning_clock(self) -> float:
        """Return seconds that stand still during a validation."""
        return time.perf_counter() - self.validating_seconds

    def _train_epoch(self) -> None:
        state = self.state
        started = since = self.step_started = self._learning_clock()
        for number, batch in self._batches():
            self._finish_resuming()
            if self._is_finished():
                break
            loss = self._train_batch(batch, number)
            show_loss(self.bar, number, loss)
            if number % REPORT_EVERY == 0:
                self._report_progress(number, loss, (self._learning_clock() - since) / REPORT_EVERY)
                since = self._learning_clock()
            if not self.accelerator.sync_gradients:
                continue
            self._after_step(number)
            self._validate_if_due()
            if self._is_finished():
                break
            self._save_or_stop()
        else:
            self._finish_resuming()  # after the epoch's last batch
        self.accelerator.print(f"Epoch: {state.epoch} cost time: {self._learning_clock() - started:.2f}")
        is_last = state.epoch >= self.config.train_epochs or self._is_finished()
        if state.validated_at < state.steps and (is_last or not self.config.eval_steps):
            self._validate()
        # Else --max_steps or patience ended it, and more may be given.
        if state.batch >= len(self.splits["train"].loader):
            state.schedule.after_epoch()
            state.epoch += 1
            state.batch = 0
        self._save_state()
        self._stop_if_requested()

    def _batches(self) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
        """Return the epoch's batches with their numbers, 1, 2, ...; those that were trained on are left out."""
        loader = self.splits["train"].loader
        loader.set_epoch(self.state.epoch - 1)
        if self.state.batch == 0:
            self.state.restore_random()  # saved between two epochs
        else:
            loader = self.accelerator.skip_first_batches(loader, self.state.batch)
        self.bar = windows_bar(loader, f"Epoch {self.state.epoch}", whole=self.splits["train"].loader)
        return enumerate(self.bar, start=self.state.batch + 1)

    def _finish_resuming(self) -> None:
        """Do what a stop within an epoch has left undone, once the epoch's loader has drawn its random numbers."""
        self.state.restore_random()
        self._validate_if_due()

    def _after_step(self, number: int) -> None:
        """Count an optimiser step, completed by the epoch's batch of this number."""
        self.state.batch = number
        self.state.steps += 1
        now = self._learning_clock()
        self.state.learning_seconds += now - self.step_started
        self.step_started = now
        self.state.schedule.after_step()
        if self.state.steps == 1:
            self._watch_memory()

    def _validate_if_due(self) -> None:
        every = self.config.eval_steps
        if every and self.state.steps % every == 0 and self.state.validated_at < self.state.steps:
            self._validate()

    def _save_or_stop(self) -> None:
        """Save the state to resume from when it is time, or when this is to be the last step."""
        if self.config.save_steps and self.state.steps % self.config.save_steps == 0:
            self._save_state()
        self._stop_if_requested()

    def _stop_if_requested(self) -> None:
        if self.stop_vote.poll():
            self._save_state()
            raise KeyboardInterrupt

    def _save_state(self, random: dict[str, torch.Tensor] | None = None) -> None:
        """Write `last`; `random` are states of the generators other than the present ones."""
        self.state.save(self.run, self.model, self.history.rows if self.history else [], random)

    def _train_batch(self, batch: tuple[torch.Tensor, ...], number: int) -> torch.Tensor:
        """Train on one micro-batch, the epoch's 1st, 2nd, ...; return its loss, left on the device."""
        seq_x, seq_y, *_ = batch
        accumulated = self.config.grad_accum
        first_of_group = (number - 1) // accumulated * accumulated
        # accelerate divides by grad_accum; an epoch's last group may have fewer batches.
        scale = accumulated / min(accumulated, len(self.splits["train"].loader) - first_of_group)
        with self.accelerator.accumulate(self.model):
            forecast = self.model(seq_x)
            target = seq_y[:, -forecast.shape[1] :].to(forecast.device, non_blocking=True)
            loss = self._loss(forecast, target)
            self.accelerator.backward(loss * scale)
            if self.config.grad_clip and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            self.state.optimizer.step()
            self.state.optimizer.zero_grad()
        self.state.add_loss(loss.detach())
        return loss.detach()

    def _loss(self, forecast: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean loss over the known targets."""
        if not self.splits["train"].windows.has_gaps:
            return self.loss(forecast, target)
        is_known = ~target.isnan()
        target = torch.where(is_known, target, forecast.detach())  # where it has no error and no gradient
        return self.loss(forecast, target, reduction="sum") / is_known.sum().clamp(min=1)

    def _validate(self) -> None:
        """Score, report, and keep the weights if they are the best so far."""
        state, train_loss = self.state, None
        if state.loss_count:
            train_loss = self.accelerator.reduce(state.loss_sum / state.loss_count, "mean").item()
            self._check_finite(train_loss, "training")
        started = time.perf_counter()
        before = state.random()
        try:
            vali = self._scores("val")
            self._check_finite(vali.mse, "validation")
            with fork_random(self.accelerator.device):  # a loader draws a seed
                test = None if self.config.skip_epoch_test else self._scores("test")
        except KeyboardInterrupt:
            self._save_state(before)  # it is validated again, from the start
            raise
        self._report(train_loss, vali, test)
        if state.stopping.update(vali.mse) and self.accelerator.is_main_process:
            self._save_best(vali)
        self._record(train_loss, vali, test)  # after the weights: it is only a record
        state.validated_at = state.steps
        self.validating_seconds += time.perf_counter() - started
        state.forget_losses()
        self._watch_memory()

    def _save_best(self, vali: Scores) -> None:
        progress = {
            "epoch": self.state.epoch,
            "steps": self.state.steps,
            "vali_loss": vali.mse,
            "seconds_per_step": self.state.seconds_per_step,
        }
        save_checkpoint(self.run, self.forecaster, progress)

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
        left = (self.config.train_epochs - self.state.epoch + 1) * len(self.splits["train"].loader) - batches
        if self.config.max_steps:
            left = min(left, (self.config.max_steps - self.state.steps) * self.config.grad_accum)
        self.accelerator.print(
            f"\titers: {batches}, epoch: {self.state.epoch} | loss: {loss:.7f}\n"
            f"\tspeed: {seconds:.4f}s/iter; left time: {seconds * left:.4f}s"
        )

    def _report(self, train_loss: float | None, vali: Scores, test: Scores | None) -> None:
        step = f", step: {self.state.steps}" if self.config.eval_steps else ""
        trained = "" if train_loss is None else f"Train Loss: {train_loss:.7f} "
        tested = f" Test Loss: {test.mse:.7f} MAE Loss: {test.mae:.7f}" if test else ""
        self.accelerator.print(f"Epoch: {self.state.epoch}{step} | {trained}Vali Loss: {vali.mse:.7f}{tested}")

    def _record(self, train_loss: float | None, vali: Scores, test: Scores | None) -> None:
        if not self.accelerator.is_main_process:
            return
        windows = self.splits["val"].windows
        spread = range(0, len(windows), math.ceil(len(windows) / _DIAGNOSED_WINDOWS))
        row = {
            "epoch": self.state.epoch,
            "steps": self.state.steps,
            "lr": self.state.schedule.rate,
            "train_loss": train_loss,
            "vali_loss": vali.mse,
            "vali_mae": vali.mae,
            "test_loss": test.mse if test else None,
            "test_mae": test.mae if test else None,
            "seconds": round(self.state.seconds, 3),
            **self.forecaster.diagnostics(windows.__getitems__(spread)[0]),
        }
        self.history.add(**row)
        self.accelerator.log({name: value for name, value in row.items() if value is not None}, step=self.state.steps)

    def _check_finite(self, loss: float, which: str) -> None:
        """Stop the run if a loss is infinite or not a number."""
        if not math.isfinite(loss):
            kept = (
                "the best checkpoint is kept"
                if math.isfinite(self.state.stopping.lowest)
                else "there is no checkpoint of this run yet"
            )
            raise UserError(
                f"the {which} loss is {loss} after {self.state.steps} steps ({kept}): lower --learning_rate, give"
                " --grad_clip 1, or --llm_dtype bfloat16 or float32"
            )

    def _total_steps(self) -> int:
        steps = self.config.train_epochs * math.ceil(len(self.splits["train"].loader) / self.config.grad_accum)
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    def _is_finished(self) -> bool:
        state, config = self.state, self.config
        reached = bool(config.max_steps) and state.steps >= config.max_steps
        is_over = reached or state.stopping.should_stop or state.epoch > config.train_epochs
        return is_over or self.has_nothing_to_train
