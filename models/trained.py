"""A trained run, ready to forecast from Python."""

import argparse
import warnings
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from torch import nn

from data_provider.reading import table_of
from data_provider.to_come import last_window
from models import build_model, weight_shapes
from utils.cli.checks import check_options
from utils.cli.environment import check_environment
from utils.cli.options import has_llm
from utils.cli.places import csv_path
from utils.errors import UserError
from utils.runs.checkpoint import Checkpoint, read_checkpoint
from utils.runs.compatibility import check_channels, check_shapes, flags_to_test, load_checkpoint
from utils.runs.intervals import load_calibration
from utils.runs.prediction import check_columns, forecast_beyond
from utils.system.processes import build_accelerator


class TrainedRun:
    """A run's best weights and its LLM, loaded once. `utils.runs.load_run` makes it.

    Attributes:
        channels: the columns that it forecasts, in their order.
        seq_len: rows that it looks at.
        pred_len: rows that it forecasts.
    """

    def __init__(self, folder: Path, device: str | torch.device | None = None, **changes: object):
        if not (folder / "checkpoint").is_file():
            raise UserError(f"no checkpoint in {folder}: name the folder of a run that was trained")
        self._saved = read_checkpoint(folder / "checkpoint")
        self._args = args = flags_to_test(self._saved, changes)
        check_options(args)
        if args.model == "SeasonalNaive" and not args.season and not csv_path(args).is_file():
            raise UserError(
                f"no {csv_path(args)} to read the season off: say where it is, with root_path= and data_path="
            )
        self.channels: tuple[str, ...] = tuple(self._saved.contents["channels"])
        self.seq_len: int = args.seq_len
        self.pred_len: int = args.pred_len
        check_environment()
        _choose_device(device)
        accelerator = build_accelerator(args.seed, 1, args.use_amp, shares_buffers=not has_llm(args))
        # Of this run alone: accelerate's own follows whatever was loaded last.
        self._half_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        with torch.random.fork_rng():  # whoever calls has a generator of their own
            torch.manual_seed(args.seed)
            self.model = build_trained(self._saved, args)

    def predict(self, frame: pd.DataFrame, level: Sequence[int] | int = ()) -> pd.DataFrame:
        """Forecast the `pred_len` rows after the last one of a frame, in its own units, as `--predict` does.

        Args:
            frame: like the CSV of the run: a column `date`, or dates for its index, and the run's channels; at least
                `seq_len` rows. Older rows change nothing but what fills a gap at the window's beginning. Or a long one,
                with `unique_id`, `ds` and `y`. With covariates, `pred_len` rows more that have these alone.
            level: of prediction intervals, in per cent, such as `[80, 95]`. The run must have been tested with --level.

        Returns:
            The columns of forecast.csv: `date`, and each channel `x`, followed by `x-lo-95`, `x-lo-80`, `x-hi-80`,
            `x-hi-95`; of a long frame `unique_id`, `ds`, `y` and its bounds.

        Raises:
            UserError: if the frame has other channels, too few rows or cells that are no numbers, or a level is wrong.
        """
        levels = [level] if np.ndim(level) == 0 else list(level)
        if not all(isinstance(one, Integral) for one in levels):
            raise UserError(f"level={level!r}: levels are whole per cents from 1 to 99")
        levels = sorted(map(int, levels))
        check_options(flags_to_test(self._saved, {"level": levels}))
        table = table_of(frame, "the DataFrame", self._args)
        check_channels(self._saved.contents, table.channels, table.is_long, table.source)
        check_columns(table.channels, table.is_long, levels)
        window = last_window(table, self.seq_len, self.pred_len)
        folder = self._saved.path.parent
        calibration = load_calibration(folder, self._saved, self.channels, levels) if levels else None
        batch_size = self._args.eval_batch_size or self._args.batch_size
        with torch.autocast(self.model.device.type, self._half_precision, enabled=bool(self._half_precision)):
            made = forecast_beyond(self.model, window, self._saved.contents, batch_size, calibration, levels)
        for warning in made.warnings:
            warnings.warn(warning, stacklevel=2)
        return made.as_frame()


def build_trained(saved: Checkpoint, args: argparse.Namespace) -> nn.Module:
    """Return the model of a checkpoint with its weights.

    Args:
        saved: the checkpoint, which may be a stranger's.
        args: its flags, see `flags_to_test`.

    Raises:
        UserError: if the flags are not those of its weights, or the LLM is not there or another.
    """
    check_shapes(saved, weight_shapes(args))
    model = build_model(args, saved.basis)
    load_checkpoint(saved, model, vars(args), None)
    return model


def _choose_device(device: str | torch.device | None) -> None:
    """Let everything that is loaded from here on go to a device, or to the usual one."""
    PartialState._reset_state()
    if device is not None:
        device = torch.device(device)
        PartialState(cpu=device.type == "cpu").device = device
