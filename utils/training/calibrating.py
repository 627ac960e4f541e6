"""Calibrate prediction intervals on the validation windows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import nn

from utils.runs.intervals import Calibration, Residuals, check_windows
from utils.training.evaluation import Split, evaluate, window_numbers


def check_levels(levels: Sequence[int], split: Split) -> None:
    """Refuse levels that the windows of a split are too few for.

    Raises:
        UserError: names the number that is needed.
    """
    channels = split.windows.channel_of(window_numbers(split.loader))
    check_windows(levels, int(np.bincount(channels, minlength=len(split.windows.channels)).min()))


def calibrate(
    accelerator: Accelerator, model: nn.Module, split: Split, checkpoint: Path, folder: Path | None
) -> Calibration:
    """Forecast the validation windows once, and keep in the run folder how far they were from it.

    Args:
        accelerator: of the run.
        model: with the best weights.
        split: the validation windows.
        checkpoint: the file of those weights.
        folder: the run folder; None if it holds the calibration of other data, which stays.
    """
    residuals = Residuals()
    evaluate(accelerator, model, split, title="calibration", watchers=[residuals])
    calibration = residuals.calibration(split.windows.channels, checkpoint)
    if folder is None:
        accelerator.print(
            "Note: this calibration is not kept, since the run folder has that of its own data: give --des"
        )
    elif accelerator.is_main_process:
        calibration.save(folder)
    return calibration
