"""Score forecasts: every window once, each with the same weight."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Subset

from layers.StandardNorm import Normalize
from utils.runs.scores import ChannelWindows, Scores
from utils.runs.watchers import Batch, Watcher
from utils.training.progress import show_loss, windows_bar


@dataclass(frozen=True)
class Split:
    """The windows of a split, and a prepared loader over all or some of them."""

    windows: ChannelWindows
    loader: DataLoader


def share_out(accelerator: Accelerator, windows: ChannelWindows, loader: DataLoader) -> Split:
    """Return a split whose batches are shared out to the processes.

    They stay on the CPU: there a model writes the prompts, without waiting for the device.
    """
    return Split(windows, accelerator.prepare_data_loader(loader, device_placement=False))


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    split: Split,
    target: str | None = None,
    title: str = "",
    before_batch: Callable[[], None] = lambda: None,
    watchers: Sequence[Watcher] = (),
) -> Scores:
    """Forecast the windows of a split's loader and score them.

    Args:
        accelerator: gathers the errors of all processes.
        model: (B, seq_len, 1) -> (B, pred_len, 1); left in the mode it came in.
        split: the windows to score.
        target: the channel of the headline, None for all channels.
        title: of the progress bar.
        before_batch: called before each batch; what it raises ends the evaluation.
        watchers: what else is to look at each batch's forecasts; for them they are read back from the device.
    """
    was_training = model.training
    model.eval()
    squared, absolute = [], []
    numbers, seen = window_numbers(split.loader), 0
    bar = windows_bar(split.loader, title)
    for number, (seq_x, seq_y, *_) in enumerate(bar):
        before_batch()
        forecast = model(seq_x)
        target_rows = seq_y[:, -forecast.shape[1] :].to(forecast.device, non_blocking=True)
        error = forecast - target_rows
        both = torch.stack([error.square().mean((1, 2)), error.abs().mean((1, 2))])
        # Windows that fill up the last batch of some process are cut off again here.
        gathered = accelerator.gather_for_metrics(both.T)
        squared.append(gathered[:, 0])
        absolute.append(gathered[:, 1])
        show_loss(bar, number, gathered[:, 0])
        if watchers:
            batch = _gathered(accelerator, seq_x, forecast, target_rows, numbers[seen:], split)
            seen += len(batch.numbers)
            for watcher in watchers:
                watcher.watch(batch)
    model.train(was_training)
    errors = np.stack([torch.cat(part).double().cpu().numpy() for part in (squared, absolute)])
    windows = split.windows
    return _score(errors, windows.channel_of(numbers), windows.channels, target)


def _gathered(
    accelerator: Accelerator,
    seq_x: torch.Tensor,
    forecast: torch.Tensor,
    target: torch.Tensor,
    numbers_to_come: np.ndarray,
    split: Split,
) -> Batch:
    """Gather what watchers look at from all processes."""
    _, statistics = Normalize()(seq_x[..., 0].to(forecast.device))
    rows = torch.cat([forecast[..., 0], target[..., 0], statistics.deviation], dim=1).float()
    rows = accelerator.gather_for_metrics(rows).cpu().numpy()
    numbers, steps = numbers_to_come[: len(rows)], forecast.shape[1]
    return Batch(
        numbers=numbers,
        channels=split.windows.channel_of(numbers),
        forecast=rows[:, :steps],
        target=rows[:, steps:-1],
        deviation=rows[:, -1],
    )


def window_numbers(loader: DataLoader) -> np.ndarray:
    """Return which windows of its dataset a loader shows, in order."""
    shown = loader.dataset
    return np.asarray(shown.indices) if isinstance(shown, Subset) else np.arange(len(shown))


def _score(errors: np.ndarray, channel_of: np.ndarray, channels: tuple[str, ...], target: str | None) -> Scores:
    """Take means over (2, windows) errors, mse first."""
    per_channel = {}
    for number, name in enumerate(channels):
        own = errors[:, channel_of == number]
        if own.size:
            per_channel[name] = {"mse": float(own[0].mean()), "mae": float(own[1].mean()), "windows": own.shape[1]}
    if target is None:
        mse, mae = errors.mean(axis=1)
        return Scores(float(mse), float(mae), errors.shape[1], per_channel)
    return Scores(**per_channel[target], per_channel=per_channel)
