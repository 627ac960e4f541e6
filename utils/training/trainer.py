"""The training loop, with validation, early stopping and checkpoints."""

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
from utils.memory.plan import memory_warning
from utils.runs.checkpoint import Run, save_checkpoint
from utils.runs.metrics import Scores
from utils.runs.records import History
from utils.system.gpu import fork_random, random_states
from utils.system.processes import StopVote
from utils.training.evaluation import Split, evaluate
from utils.training.optimization import EarlyStopping, Schedule, build_optimizer
from utils.training.reporting import show_loss, windows_bar
from utils.training.state import TrainState

LOSSES = {"MSE": nn.functional.mse_loss, "MAE": nn.functional.l1_loss}

# The number of batches per progress line; between two lines nothing is read from the device.
REPORT_EVERY = 100

# The approximate number of validation windows for the diagnostics.
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
    """Train a model and save its best weights in the run folder.

    Args:
        accelerator: has prepared the model and the loaders.
        model: (B, seq_len, 1) -> (B, pred_len, 1).
        splits: train, val and test.
        target: the channel of the headline errors, None for all channels.
        interrupts: requests an early stop.
        training: the trainer's state in `last`, to resume from; the model's weights are already loaded.
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
        self.has_parameters = bool(list(model.parameters()))
        groups = self.forecaster.parameter_groups(config.learning_rate)
        optimizer = build_optimizer(config.optimizer, groups, config.learning_rate)
        schedule = Schedule(optimizer, config.lradj, self._total_steps(), config.pct_start)
        stopping = EarlyStopping(config.patience, accelerator.print)
        self.state = TrainState(accelerator, accelerator.prepare(optimizer), schedule, stopping)
        self.has_warned_of_memory = False
        self.validation_seconds = self.step_started = 0.0
        rows = self.state.load(training, run) if training else []
        if self.state.batch > len(splits["train"].loader):
            raise UserError(f"{run.folder / 'last'} is damaged (its batch is beyond the epoch): leave out --resume")
        self.was_validated = bool(rows)  # the same on all processes, unlike the history
        self.history = History(run.folder / "history.csv", rows) if accelerator.is_main_process else None

    def fit(self) -> None:
        """Train until the epochs, the steps or the patience are used up.

        Raises:
            UserError: if the loss is not finite; the best checkpoint so far is kept.
            KeyboardInterrupt: on a signal, after the state to resume from was saved.
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
        if not self.has_parameters:
            # Write the files of a trained model, so that testing, forecasting and resuming need no special case.
            self.accelerator.print(f"{self.config.model} has nothing to train")
            if not self.was_validated:
                self._validate()
            self._save_state()
        elif self.forecaster.starts_fitted and not state.steps and not self.was_validated:
            state.restore_random()  # if an interrupted run resumes with this validation
            self._validate()  # so that weights that are worse than the linear fit are never saved
        # A run that was interrupted during an epoch's validation resumes with it, even in the last epoch.
        while not self._is_finished() or (state.batch and state.validated_at < state.steps):
            self._train_epoch()

    def _training_clock(self) -> float:
        """Return the time in seconds; the clock stops during validations."""
        return time.perf_counter() - self.validation_seconds

    def _train_epoch(self) -> None:
        state = self.state
        started = since = self.step_started = self._training_clock()
        for number, batch in self._batches():
            self._finish_resuming()
            if self._is_finished():
                break
            loss = self._train_batch(batch, number)
            show_loss(self.bar, number, loss)
            if number % REPORT_EVERY == 0:
                self._report_progress(number, loss, (self._training_clock() - since) / REPORT_EVERY)
                since = self._training_clock()
            if not self.accelerator.sync_gradients:
                continue
            self._after_step(number)
            self._validate_if_due()
            if self._is_finished():
                break
            if self.config.save_steps and state.steps % self.config.save_steps == 0:
                self._save_state()
            self._stop_if_requested()
        else:
            self._finish_resuming()  # if all batches were trained on before
        self.accelerator.print(f"Epoch: {state.epoch} cost time: {self._training_clock() - started:.2f}")
        is_last = state.epoch >= self.config.train_epochs or self._is_finished()
        if state.validated_at < state.steps and (is_last or not self.config.eval_steps):
            self._validate()
        # Otherwise --max_steps or the patience ended the epoch, and a resumed run may be given more of them.
        if state.batch >= len(self.splits["train"].loader):
            state.schedule.after_epoch()
            state.epoch += 1
            state.batch = 0
        self._save_state()
        self._stop_if_requested()

    def _batches(self) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
        """Number the epoch's batches 1, 2, ..., skipping those that were trained on before."""
        loader = whole = self.splits["train"].loader
        loader.set_epoch(self.state.epoch - 1)
        if self.state.batch == 0:
            self.state.restore_random()  # the state was saved between two epochs
        else:
            loader = self.accelerator.skip_first_batches(loader, self.state.batch)
        self.bar = windows_bar(loader, f"Epoch {self.state.epoch}", whole)
        return enumerate(self.bar, start=self.state.batch + 1)

    def _finish_resuming(self) -> None:
        """Complete an interrupted epoch's resumption, after the loader has drawn its random numbers."""
        self.state.restore_random()
        self._validate_if_due()

    def _after_step(self, number: int) -> None:
        """Count an optimizer step, which batch `number` of the epoch completed."""
        self.state.batch = number
        self.state.steps += 1
        now = self._training_clock()
        self.state.learning_seconds += now - self.step_started
        self.step_started = now
        self.state.schedule.after_step()
        if self.state.steps == 1:
            self._warn_of_memory()

    def _validate_if_due(self) -> None:
        every = self.config.eval_steps
        if every and self.state.steps % every == 0 and self.state.validated_at < self.state.steps:
            self._validate()

    def _stop_if_requested(self) -> None:
        if self.stop_vote.poll():
            self._save_state()
            raise KeyboardInterrupt

    def _save_state(self, random: dict[str, torch.Tensor] | None = None) -> None:
        """Write `last`; see `TrainState.save` for `random`."""
        self.state.save(self.run, self.model, self.history.rows if self.history else [], random)

    def _train_batch(self, batch: tuple[torch.Tensor, ...], number: int) -> torch.Tensor:
        """Train on micro-batch `number` (1, 2, ...) of the epoch and return its loss, which stays on the device."""
        seq_x, seq_y, *_ = batch
        accumulated = self.config.grad_accum
        first_of_group = (number - 1) // accumulated * accumulated
        # accelerate divides by grad_accum, but the last group of an epoch may have fewer batches.
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
        """Compute the mean loss over the known targets."""
        if not self.splits["train"].windows.has_gaps:
            return self.loss(forecast, target)
        is_known = ~target.isnan()
        target = torch.where(is_known, target, forecast.detach())  # no error and no gradient where unknown
        return self.loss(forecast, target, reduction="sum") / is_known.sum().clamp(min=1)

    def _validate(self) -> None:
        """Score the model, report the scores, and save the weights if they are the best so far."""
        state, train_loss = self.state, None
        if state.loss_count:
            train_loss = self.accelerator.reduce(state.loss_sum / state.loss_count, "mean").item()
            self._check_finite(train_loss, "training")
        started = time.perf_counter()
        random = random_states(self.accelerator.device)
        try:
            vali = self._scores("val")
            self._check_finite(vali.mse, "validation")
            with fork_random(self.accelerator.device):  # the loader draws a seed
                test = None if self.config.skip_epoch_test else self._scores("test")
        except KeyboardInterrupt:
            self._save_state(random)  # a resumed run repeats the whole validation
            raise
        self._report(train_loss, vali, test)
        if state.stopping.update(vali.mse) and self.accelerator.is_main_process:
            progress = {"epoch": state.epoch, "steps": state.steps, "vali_loss": vali.mse}
            save_checkpoint(self.run, self.forecaster, {**progress, "seconds_per_step": state.seconds_per_step})
        self._record(train_loss, vali, test)  # after the weights, which matter more
        state.validated_at = state.steps
        self.validation_seconds += time.perf_counter() - started
        state.reset_losses()
        self._warn_of_memory()

    def _warn_of_memory(self) -> None:
        """Print a warning if the device is nearly full, at most once."""
        warning = "" if self.has_warned_of_memory else memory_warning(self.accelerator.device)
        if warning:
            self.accelerator.print(warning)
            self.has_warned_of_memory = True

    def _scores(self, split: str) -> Scores:
        return evaluate(self.accelerator, self.model, self.splits[split], self.target, split, self._raise_if_requested)

    def _raise_if_requested(self) -> None:
        if self.stop_vote.poll():
            raise KeyboardInterrupt

    def _report_progress(self, batches: int, batch_loss: torch.Tensor, seconds: float) -> None:
        """Print the progress within an epoch; `seconds` is the duration of a batch."""
        loss = self.accelerator.reduce(batch_loss, "mean").item()  # the mean, so that all processes stop together
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
        train_part = "" if train_loss is None else f"Train Loss: {train_loss:.7f} "
        test_part = f" Test Loss: {test.mse:.7f} MAE Loss: {test.mae:.7f}" if test else ""
        self.accelerator.print(f"Epoch: {self.state.epoch}{step} | {train_part}Vali Loss: {vali.mse:.7f}{test_part}")

    def _record(self, train_loss: float | None, vali: Scores, test: Scores | None) -> None:
        if not self.accelerator.is_main_process:
            return
        windows = self.splits["val"].windows
        diagnosed = range(0, len(windows), math.ceil(len(windows) / _DIAGNOSED_WINDOWS))
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
            **self.forecaster.diagnostics(windows.__getitems__(diagnosed)[0]),
        }
        self.history.add(**row)
        self.accelerator.log({name: value for name, value in row.items() if value is not None}, step=self.state.steps)

    def _check_finite(self, loss: float, which: str) -> None:
        """Stop the run if a loss is infinite or NaN."""
        if math.isfinite(loss):
            return
        has_checkpoint = math.isfinite(self.state.stopping.lowest)
        kept = "the best checkpoint is kept" if has_checkpoint else "there is no checkpoint of this run yet"
        raise UserError(
            f"the {which} loss is {loss} after {self.state.steps} steps ({kept}): lower --learning_rate, give"
            " --grad_clip 1, or --llm_dtype bfloat16 or float32"
        )

    def _total_steps(self) -> int:
        steps = self.config.train_epochs * math.ceil(len(self.splits["train"].loader) / self.config.grad_accum)
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    def _is_finished(self) -> bool:
        state, config = self.state, self.config
        has_all_steps = bool(config.max_steps) and state.steps >= config.max_steps
        is_over = has_all_steps or state.stopping.should_stop or state.epoch > config.train_epochs
        return is_over or not self.has_parameters
