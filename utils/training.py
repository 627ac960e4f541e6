"""The training loop: batches, optimiser, validation, early stopping, the best checkpoint."""

import argparse
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data_provider.series import Series
from data_provider.windows import WindowDataset
from utils.checkpoint import save_checkpoint
from utils.early_stopping import EarlyStopping
from utils.errors import UserError
from utils.evaluation import Scores, evaluate
from utils.memory import nearly_full
from utils.optimizers import build_optimizer
from utils.options import headline_target
from utils.records import History
from utils.schedules import Schedule

LOSSES = {"MSE": nn.MSELoss, "MAE": nn.L1Loss}

# Batches from one progress line to the next; between two lines nothing is read back from the device.
REPORT_EVERY = 100


class Trainer:
    """Train a model and keep its best weights in the run folder.

    Args:
        args: the parsed flags.
        accelerator: device, precision and processes; it has prepared the model and the loaders.
        model: (B, seq_len, 1) -> (B, pred_len, 1).
        datasets: the windows of each split.
        loaders: a loader for each split.
        series: the data the windows are of.
        folder: the run folder; it exists.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: nn.Module,
        datasets: dict[str, WindowDataset],
        loaders: dict[str, DataLoader],
        series: Series,
        folder: Path,
    ):
        self.args = args
        self.accelerator = accelerator
        self.model = model
        self.datasets = datasets
        self.loaders = loaders
        self.series = series
        self.folder = folder
        self.loss = LOSSES[args.loss]()
        optimizer = build_optimizer(args.optimizer, model.parameters(), args.learning_rate)
        self.schedule = Schedule(optimizer, args.lradj, self._total_steps(), args.pct_start)
        self.optimizer = accelerator.prepare(optimizer)
        self.stopping = EarlyStopping(args.patience, accelerator.print)
        self.history = History(folder / "history.csv") if accelerator.is_main_process else None
        self.epoch = 0
        self.steps = 0  # of the optimiser
        self.validated_at = 0
        self.memory_is_watched = True
        self.started = time.perf_counter()
        self._forget_losses()

    def fit(self) -> None:
        """Train until the epochs, the steps or the patience are at their end.

        Raises:
            UserError: if the loss is no longer finite; the best checkpoint so far stays.
        """
        while self.epoch < self.args.train_epochs and not self._is_finished():
            self.epoch += 1
            self._train_epoch()
        if self.stopping.should_stop:
            self.accelerator.print("Early stopping")

    def _train_epoch(self) -> None:
        started = time.perf_counter()
        since = started
        batches = tqdm(self.loaders["train"], desc=f"Epoch {self.epoch}", disable=None, leave=False)
        for number, batch in enumerate(batches, start=1):
            loss = self._train_batch(batch, number)
            if number % REPORT_EVERY == 0:
                self._report_progress(number, loss, (time.perf_counter() - since) / REPORT_EVERY)
                since = time.perf_counter()
            if not self.accelerator.sync_gradients:
                continue
            self.steps += 1
            self.schedule.after_step()
            if self.steps == 1:
                self._watch_memory()
            if self.args.eval_steps and self.steps % self.args.eval_steps == 0:
                before = time.perf_counter()
                self._validate()
                since += time.perf_counter() - before  # not part of the training's speed
            if self._is_finished():
                break
        self.accelerator.print(f"Epoch: {self.epoch} cost time: {time.perf_counter() - started:.2f}")
        is_last = self.epoch == self.args.train_epochs or self._is_finished()
        if self.validated_at < self.steps and (is_last or not self.args.eval_steps):
            self._validate()
        self.schedule.after_epoch()

    def _train_batch(self, batch: tuple[torch.Tensor, ...], number: int) -> torch.Tensor:
        """Learn from the epoch's batch of this number, 1, 2, ...; return its loss, left on the device."""
        seq_x, seq_y, *_ = batch
        accumulated = self.args.grad_accum
        first_of_group = (number - 1) // accumulated * accumulated
        # accelerate divides by grad_accum; an epoch's last group may have fewer batches.
        scale = accumulated / min(accumulated, len(self.loaders["train"]) - first_of_group)
        with self.accelerator.accumulate(self.model):
            forecast = self.model(seq_x)
            truth = seq_y[:, -forecast.shape[1] :].to(forecast.device, non_blocking=True)
            loss = self.loss(forecast, truth)
            self.accelerator.backward(loss * scale)
            if self.args.grad_clip and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.loss_sum += loss.detach()
        self.loss_count += 1
        return loss.detach()

    def _validate(self) -> None:
        """Score, report, and keep the weights if they are the best so far."""
        train_loss = self.accelerator.reduce(self.loss_sum / max(self.loss_count, 1), "mean").item()
        self._check_finite(train_loss, "training")
        vali = self._scores("val")
        self._check_finite(vali.mse, "validation")
        test = None if self.args.skip_epoch_test else self._scores("test")
        self._report(train_loss, vali, test)
        if self.stopping.update(vali.mse) and self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            progress = {"epoch": self.epoch, "steps": self.steps, "vali_loss": vali.mse}
            save_checkpoint(self.folder / "checkpoint", model, self.args, self.series, progress)
        self.validated_at = self.steps
        self._forget_losses()
        self._watch_memory()

    def _watch_memory(self) -> None:
        """Warn, once, if the device is nearly full."""
        warning = nearly_full(self.accelerator.device) if self.memory_is_watched else ""
        if warning:
            self.accelerator.print(warning)
            self.memory_is_watched = False

    def _scores(self, split: str) -> Scores:
        target = headline_target(self.args)
        return evaluate(self.accelerator, self.model, self.loaders[split], self.datasets[split], target, split)

    def _report_progress(self, batches: int, batch_loss: torch.Tensor, seconds: float) -> None:
        """Print the lines in the middle of an epoch; `seconds` are those of one batch."""
        loss = self.accelerator.reduce(batch_loss, "mean").item()  # of all processes: they stop together
        self._check_finite(loss, "training")
        left = (self.args.train_epochs - self.epoch + 1) * len(self.loaders["train"]) - batches
        if self.args.max_steps:
            left = min(left, (self.args.max_steps - self.steps) * self.args.grad_accum)
        self.accelerator.print(
            f"\titers: {batches}, epoch: {self.epoch} | loss: {loss:.7f}\n"
            f"\tspeed: {seconds:.4f}s/iter; left time: {seconds * left:.4f}s"
        )

    def _report(self, train_loss: float, vali: Scores, test: Scores | None) -> None:
        step = f", step: {self.steps}" if self.args.eval_steps else ""
        tested = f" Test Loss: {test.mse:.7f} MAE Loss: {test.mae:.7f}" if test else ""
        self.accelerator.print(
            f"Epoch: {self.epoch}{step} | Train Loss: {train_loss:.7f} Vali Loss: {vali.mse:.7f}{tested}"
        )
        if self.history:
            self.history.add(
                epoch=self.epoch,
                steps=self.steps,
                lr=self.schedule.rate,
                train_loss=train_loss,
                vali_loss=vali.mse,
                vali_mae=vali.mae,
                test_loss=test.mse if test else None,
                test_mae=test.mae if test else None,
                seconds=round(time.perf_counter() - self.started, 3),
            )

    def _check_finite(self, loss: float, which: str) -> None:
        """Stop the run if a loss is infinite or not a number."""
        if not math.isfinite(loss):
            kept = "the best checkpoint is kept" if self.validated_at else "there is no checkpoint of this run yet"
            raise UserError(
                f"the {which} loss is {loss} after {self.steps} steps ({kept}): lower --learning_rate, give"
                " --grad_clip 1, or --llm_dtype bfloat16 or float32"
            )

    def _total_steps(self) -> int:
        steps = self.args.train_epochs * math.ceil(len(self.loaders["train"]) / self.args.grad_accum)
        return min(steps, self.args.max_steps) if self.args.max_steps else steps

    def _is_finished(self) -> bool:
        reached = bool(self.args.max_steps) and self.steps >= self.args.max_steps
        return reached or self.stopping.should_stop

    def _forget_losses(self) -> None:
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        self.loss_count = 0
