"""Score forecasts; every window counts once and has the same weight."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from data_provider.data_factory import window_numbers, windows_and_loader
from data_provider.series import Series
from data_provider.windows import WindowDataset
from layers.StandardNorm import Normalize
from utils.cli.options import has_llm
from utils.runs.metrics import Forecasts, Metric, Scores
from utils.training.reporting import show_loss, windows_bar

# Evaluation windows of small models that are read and scored at a time.
_READ_WINDOWS = 1024


@dataclass(frozen=True)
class Split:
    """The windows of a split, and a prepared loader over all or some of them.

    `batch_size` is the number of windows that are forecast at a time; None for those of a batch of the loader.
    """

    windows: WindowDataset
    loader: DataLoader
    batch_size: int | None = None


def prepare_split(accelerator: Accelerator, series: Series, args: argparse.Namespace, name: str) -> Split:
    """Prepare the windows of a split and distribute their batches over the processes.

    Batches stay on the CPU, where the prompts are written. Several evaluation batches of a small model are read and
    scored at a time.
    """
    batch_size, read = args.eval_batch_size or args.batch_size, None
    # Several processes share out whole batches; an LLM takes longer than reading and scoring.
    if name != "train" and accelerator.num_processes == 1 and not has_llm(args) and batch_size <= _READ_WINDOWS // 2:
        read = _READ_WINDOWS // batch_size * batch_size
    windows, loader = windows_and_loader(series, args, name.removeprefix("final "), read)
    loader = accelerator.prepare_data_loader(loader, device_placement=False)
    return Split(windows, loader, batch_size if read else None)


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    split: Split,
    target: str | None = None,
    title: str = "",
    before_batch: Callable[[], None] = lambda: None,
    metrics: Sequence[Metric] = (),
) -> Scores:
    """Forecast the windows that a split's loader shows, and score the forecasts.

    Args:
        model: (B, seq_len, 1) -> (B, pred_len, 1); its training mode is restored afterwards.
        target: the channel of the headline errors, None for all channels.
        title: shown by the progress bar.
        before_batch: called before each batch; an exception from it ends the evaluation.
        metrics: further metrics to update; for these the forecasts are copied to the host.
    """
    was_training = model.training
    model.eval()
    parts = []
    windows, numbers, seen = split.windows, window_numbers(split.loader), 0
    bar = windows_bar(split.loader, title)
    for number, (seq_x, seq_y, *_) in enumerate(bar):
        before_batch()
        forecast = torch.cat([model(part) for part in seq_x.split(split.batch_size or len(seq_x))])
        target_rows = seq_y[:, -forecast.shape[1] :].to(forecast.device, non_blocking=True)
        # Gathering drops the duplicates that accelerate adds to give every process a full last batch.
        parts.append(accelerator.gather_for_metrics(_errors(forecast, target_rows, windows.has_gaps)))
        show_loss(bar, number, parts[-1][:, 0])
        if metrics:
            batch = _gather_forecasts(accelerator, seq_x, forecast, target_rows, numbers[seen:], windows)
            seen += len(batch.numbers)
            for metric in metrics:
                metric.update(batch)
    model.train(was_training)
    errors = torch.cat(parts).T.double().cpu().numpy()
    return _score(errors, windows.channel_of(numbers), windows.channels, target)


def _errors(forecast: torch.Tensor, target: torch.Tensor, has_gaps: bool) -> torch.Tensor:
    """Compute each window's mse and mae, (B, 2), and with gaps also its number of known targets, (B, 3)."""
    error = forecast - target
    if not has_gaps:
        return torch.stack([error.square().mean((1, 2)), error.abs().mean((1, 2))], dim=1)
    is_known = ~target.isnan()  # not ~error.isnan(): a NaN forecast must count
    error, count = torch.where(is_known, error, 0), is_known.sum((1, 2))
    sums = torch.stack([error.square().sum((1, 2)), error.abs().sum((1, 2))], dim=1)
    return torch.cat([sums / count.clamp(min=1)[:, None], count[:, None]], dim=1)


def _gather_forecasts(
    accelerator: Accelerator,
    seq_x: torch.Tensor,
    forecast: torch.Tensor,
    target: torch.Tensor,
    numbers: np.ndarray,
    windows: WindowDataset,
) -> Forecasts:
    """Gather a batch from all processes for the metrics; `numbers` are those of its windows and of the later ones."""
    _, statistics = Normalize()(seq_x[..., 0].to(forecast.device))
    rows = torch.cat([forecast[..., 0], target[..., 0], statistics.deviation], dim=1).float()
    rows = accelerator.gather_for_metrics(rows).cpu().numpy()
    numbers, steps = numbers[: len(rows)], forecast.shape[1]
    return Forecasts(
        numbers=numbers,
        channels=windows.channel_of(numbers),
        forecast=windows.with_covariate_effect(numbers, rows[:, :steps]),
        target=windows.with_covariate_effect(numbers, rows[:, steps:-1]),
        deviation=rows[:, -1],
    )


def _score(errors: np.ndarray, channel_of: np.ndarray, channels: tuple[str, ...], target: str | None) -> Scores:
    """Average the `_errors` of windows, (2 or 3, windows), which are ordered by channel."""
    is_scored = errors[2] > 0 if len(errors) == 3 else np.ones(len(channel_of), bool)
    errors, channel_of = errors[:, is_scored], channel_of[is_scored]
    begins = np.flatnonzero(np.diff(channel_of, prepend=-1))
    per_channel = {
        channels[channel_of[begin]]: _means(own)
        for begin, own in zip(begins, np.split(errors, begins[1:], axis=1), strict=True)
    }
    headline = _means(errors) if target is None else per_channel[target]
    return Scores(headline["mse"], headline["mae"], headline["windows"], per_channel)


def _means(errors: np.ndarray) -> dict[str, float]:
    """Average mse and mae over windows, with gaps weighted by the number of known targets."""
    weights = errors[2] if len(errors) == 3 else None
    mse, mae = np.average(errors[:2], axis=1, weights=weights)
    known = {} if weights is None else {"known": int(weights.sum())}
    return {"mse": float(mse), "mae": float(mae), "windows": errors.shape[1], **known}
