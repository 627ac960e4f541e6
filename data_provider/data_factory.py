"""Build the datasets and data loaders of the splits."""

import argparse
import signal

import numpy as np
from torch.utils.data import DataLoader, Subset

from data_provider.fit_known_ahead import fit_known_ahead
from data_provider.reading import read_table
from data_provider.series import Series, series_of
from data_provider.windows import WindowDataset, chunks, evenly_spaced
from utils.cli.options import can_learn
from utils.errors import UserError
from utils.system.gpu import should_pin_batches


def load_series(args: argparse.Namespace) -> Series:
    """Read the run's CSV, scale it, split it, and subtract the effect of its covariates."""
    series = series_of(read_table(args), args)
    if series.table.covariates:
        known, _ = fit_known_ahead(series, args.covariate_model, can_learn(args))
        series = series.with_known_ahead(known)
    return series


def data_provider(args: argparse.Namespace, flag: str) -> tuple[WindowDataset, DataLoader]:
    """Read the run's CSV and build the dataset and the loader of a split, see `windows_and_loader`."""
    return windows_and_loader(load_series(args), args, flag)


def windows_and_loader(
    series: Series, args: argparse.Namespace, split: str, batch_size: int | None = None
) -> tuple[WindowDataset, DataLoader]:
    """Build the dataset of a split and a loader over its windows.

    As in Time-LLM, the training loader shuffles and drops the last partial batch (unless it is the only batch). The
    other loaders keep the order and drop nothing; with ``--eval_windows``, the validation and test loaders show a
    Subset of evenly spaced windows.

    `split` is train, val, test, or pred: the last window of each channel, whose pred_len rows to forecast are NaN. It
    is scaled by the training rows, so the CSV must contain them. `batch_size` is --batch_size, and --eval_batch_size
    for the other splits, unless another is given.

    Raises:
        UserError: if the CSV is too short for the split, or no target to score is known.
    """
    dataset = series.windows(split)
    is_scored = split in ("val", "test")
    is_subset = is_scored and args.eval_windows and len(dataset) > args.eval_windows
    shown = Subset(dataset, evenly_spaced(len(dataset), args.eval_windows).tolist()) if is_subset else dataset
    batch = batch_size or (args.batch_size if split == "train" else args.eval_batch_size or args.batch_size)
    loader = DataLoader(
        shown,
        batch_size=batch,
        shuffle=split == "train",
        drop_last=split == "train" and len(shown) >= batch,
        num_workers=args.num_workers,
        collate_fn=_keep_batch,
        worker_init_fn=_ignore_interrupts,
        pin_memory=should_pin_batches(),
    )
    if is_scored and (is_subset or dataset.has_gaps):
        _check_known_target(dataset, window_numbers(loader), args.target if args.features == "MS" else None)
    return dataset, loader


def window_numbers(loader: DataLoader) -> np.ndarray:
    """List the numbers of the windows that a loader shows, in order."""
    shown = loader.dataset
    return np.asarray(shown.indices) if isinstance(shown, Subset) else np.arange(len(shown))


def _check_known_target(dataset: WindowDataset, numbers: np.ndarray, target: str | None) -> None:
    """Refuse to evaluate windows without a known value of the target channel (of any channel if None)."""
    whose = ""
    if target is not None:
        whose = f" of --target {target}"
        numbers = numbers[dataset.channel_of(numbers) == dataset.channels.index(target)]
    if not any(dataset.has_known_target(chunk) for chunk in chunks(numbers)):
        raise UserError(
            f"no evaluated window{whose} has a known value to score: raise --eval_windows or --test_windows to"
            f" {len(dataset.channels)} or more, or fill the empty cells"
        )


def _keep_batch(batch):
    """Return a batch that the dataset has already collated; not a lambda, because Windows pickles it for workers."""
    return batch


def _ignore_interrupts(_worker: int) -> None:
    """Make a worker process ignore Ctrl-C: the main process finishes its step and then ends its workers."""
    for name in ("SIGINT", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
