"""From flags to datasets and loaders."""

import argparse
import signal

import numpy as np
from torch.utils.data import DataLoader, Subset

from data_provider.series import SPLITS, last_window, load_series, time_marks
from data_provider.windows import WindowDataset, evenly_spaced
from utils.errors import UserError
from utils.system.gpu import pins_batches


def data_provider(args: argparse.Namespace, flag: str) -> tuple[WindowDataset, DataLoader]:
    """Return the windows of a split and a loader over them.

    The training loader shuffles and drops the last partial batch, as Time-LLM's does, unless there is no
    other. The other loaders keep the order and drop nothing; with ``--eval_windows`` the `dataset` of those of
    validation and test is a Subset of evenly spaced windows.

    Args:
        args: the parsed flags.
        flag: train, val, test, or pred: the last window of each channel, whose pred_len rows to come are NaN. It
            is scaled as the training rows are, so the CSV must have those.

    Raises:
        UserError: if the CSV is wrong or too short for the split.
    """
    dataset = _windows_to_come(args) if flag == "pred" else _windows_of(args, flag)
    if flag == "train":
        batch, shown = args.batch_size, dataset
    else:
        batch = args.eval_batch_size or args.batch_size
        few = flag != "pred" and args.eval_windows and len(dataset) > args.eval_windows
        shown = Subset(dataset, evenly_spaced(len(dataset), args.eval_windows).tolist()) if few else dataset
        if few and args.features == "MS":
            _check_target_is_shown(dataset, shown, args.target)
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


def _check_target_is_shown(dataset: WindowDataset, shown: Subset, target: str) -> None:
    """Refuse an evaluation without a window of the channel that its headline metric is of."""
    if dataset.channels.index(target) not in dataset.channel_of(shown.indices):
        enough = len(dataset.channels)
        raise UserError(
            f"no window of --target {target} among so few: raise --eval_windows or --test_windows to {enough}"
        )


def _as_gathered(batch):
    """The dataset has gathered the batch already; a named function, since Windows pickles it for workers."""
    return batch


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """Let a loader's process go on at Ctrl-C: the main one finishes its step, and then ends it."""
    for name in ("SIGINT", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _windows_to_come(args: argparse.Namespace) -> WindowDataset:
    """Return the windows that end with the CSV's last row, one a channel, followed by rows that nobody knows."""
    series, to_come = load_series(args), last_window(args).dates_to_come
    unknown = np.full((args.pred_len, len(series.channels)), np.nan, np.float32)
    return WindowDataset(
        np.concatenate([series.values[-args.seq_len :], unknown]),
        np.concatenate([series.marks[-args.seq_len :], time_marks(to_come, args.data, args.embed, args.freq)]),
        series.channels,
        args.seq_len,
        args.label_len,
        args.pred_len,
    )


def _windows_of(args: argparse.Namespace, flag: str) -> WindowDataset:
    series = load_series(args)
    split = SPLITS.index(flag)
    end = series.ends[split]
    # The first forecast of a split is of its first row: the window reaches back into the split before.
    begin = series.ends[split - 1] - args.seq_len if split else 0
    if flag == "train":
        end = (end - args.seq_len) * args.percent // 100 + args.seq_len
    if begin < 0:
        raise UserError(
            f"{args.data_path}: --seq_len {args.seq_len} reaches back before the first row:"
            f" {begin + args.seq_len} rows stand before the {flag} split"
        )
    needed = args.seq_len + args.pred_len
    if end - begin < needed:
        raise UserError(
            f"{args.data_path}: the {flag} split is too short for --seq_len {args.seq_len} and --pred_len"
            f" {args.pred_len}: {needed} rows needed, {end - begin} there"
        )
    rows = slice(begin, end)
    return WindowDataset(
        series.values[rows], series.marks[rows], series.channels, args.seq_len, args.label_len, args.pred_len
    )
