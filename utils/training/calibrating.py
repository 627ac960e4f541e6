"""Calibrate prediction intervals on the validation windows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import nn

from utils.runs.intervals import Calibration, Residuals, check_windows
from utils.training.evaluation import Split, evaluate, window_numbers

# Windows that are looked at together.
_AT_ONCE = 4096


def check_levels(levels: Sequence[int], split: Split) -> None:
    """Refuse levels that the windows of a split are too few for.

    Raises:
        UserError: names the number that is needed.
    """
    if not levels:
        return
    windows, numbers = split.windows, window_numbers(split.loader)
    known = np.zeros((len(windows.channels), 1), np.int64)  # or by step, with gaps
    if windows.has_gaps:
        for some in np.array_split(numbers, -(-len(numbers) // _AT_ONCE)):
            _, targets, *_ = windows.__getitems__(some)
            is_known = ~targets[:, -windows.pred_len :, 0].isnan().numpy()
            known = known + np.zeros((1, is_known.shape[1]), np.int64)
            np.add.at(known, windows.channel_of(some), is_known)
    else:
        np.add.at(known, windows.channel_of(numbers), 1)
    check_windows(levels, int((known.sum(axis=0) if windows.is_long else known).min()))


def calibrate(
    accelerator: Accelerator, model: nn.Module, split: Split, checkpoint: str, folder: Path | None
) -> Calibration:
    """Forecast the validation windows once, and keep in the run folder how far they were from it.

    Args:
        accelerator: of the run.
        model: with the best weights.
        split: the validation windows.
        checkpoint: the SHA-256 of the file that they were read from.
        folder: the run folder; None if it holds the calibration of other data, which stays.
    """
    residuals = Residuals(pooled=split.windows.is_long)
    evaluate(accelerator, model, split, title="calibration", watchers=[residuals])
    calibration = residuals.calibration(split.windows.channels, checkpoint)
    if folder is None:
        accelerator.print(
            "Note: this calibration is not kept, since the run folder has that of its own data: give --des"
        )
    elif accelerator.is_main_process:
        calibration.save(folder)
    return calibration
