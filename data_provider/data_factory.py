"""From the flags and the run's data to datasets and loaders."""

import argparse
import signal

import numpy as np
from torch.utils.data import DataLoader, Subset

from data_provider.series import Series, load_series
from data_provider.windows import WindowDataset, chunks, evenly_spaced
from utils.errors import UserError
from utils.system.gpu import pins_batches


def data_provider(args: argparse.Namespace, flag: str) -> tuple[WindowDataset, DataLoader]:
    """Read the run's CSV and return the windows of a split and a loader over them, see `windows_and_loader`."""
    return windows_and_loader(load_series(args), args, flag)


def windows_and_loader(series: Series, args: argparse.Namespace, flag: str) -> tuple[WindowDataset, DataLoader]:
    """Return the windows of a split and a loader over them.

    The training loader shuffles and drops the last partial batch, as Time-LLM's does, unless there is no
    other. The other loaders keep the order and drop nothing; with ``--eval_windows`` the `dataset` of those of
    validation and test is a Subset of evenly spaced windows.

    Args:
        series: the run's data.
        args: the parsed flags.
        flag: train, val, test, or pred: the last window of each channel, whose pred_len rows to forecast are NaN. It
            is scaled as the training rows are, so the CSV must have those.

    Raises:
        UserError: if the CSV is too short for the split.
    """
    dataset = series.windows(flag)
    if flag == "train":
        batch, shown = args.batch_size, dataset
    else:
        batch = args.eval_batch_size or args.batch_size
        few = flag != "pred" and args.eval_windows and len(dataset) > args.eval_windows
        shown = Subset(dataset, evenly_spaced(len(dataset), args.eval_windows).tolist()) if few else dataset
        if flag != "pred" and (few or dataset.has_gaps):
            _check_something_is_known(dataset, shown, args.target if args.features == "MS" else None)
    loader = DataLoader(
        shown,
        batch_size=batch,
        shuffle=flag == "train",
        drop_last=flag == "train" and len(shown) >= batch,
        num_workers=args.num_workers,
        collate_fn=_as_gathered,
        worker_init_fn=_leave_signals_to_the_main_process,
        pin_memory=pins_batches(),
    )
    return dataset, loader


def window_numbers(loader: DataLoader) -> np.ndarray:
    """Return the numbers of the windows that a loader shows, in order."""
    shown = loader.dataset
    return np.asarray(shown.indices) if isinstance(shown, Subset) else np.arange(len(shown))


def _check_something_is_known(dataset: WindowDataset, shown: WindowDataset | Subset, target: str | None) -> None:
    """Refuse an evaluation with nothing to score: no window of the headline's channel, or all its targets empty.

    Args:
        dataset: all windows of the split.
        shown: those that are evaluated.
        target: the channel of the headline metric, None for all.
    """
    numbers = np.asarray(shown.indices) if isinstance(shown, Subset) else np.arange(len(dataset))
    whose = ""
    if target is not None:
        whose = f" of --target {target}"
        numbers = numbers[dataset.channel_of(numbers) == dataset.channels.index(target)]
    if not any(dataset.knows_a_target(some) for some in chunks(numbers)):
        enough = len(dataset.channels)
        raise UserError(
            f"no window{whose} with a known target among so few: raise --eval_windows or --test_windows to {enough} or"
            " more, or fill the empty cells"
        )


def _as_gathered(batch):
    """Return a batch that the dataset has gathered already; a named function, since Windows pickles it for workers."""
    return batch


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """Let a loader's process continue at Ctrl-C: the main one finishes its step, and then ends it."""
    for name in ("SIGINT", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
