"""A trained run that forecasts beyond the end of its data: for --predict and, from Python, for `load_run`."""

import argparse
import warnings
from collections.abc import Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState

from data_provider.horizon import last_window
from data_provider.reading import read_table, table_of
from data_provider.tables import Table
from models import build, weight_shapes
from models.forecaster import Forecaster
from utils.cli.checks import check_options
from utils.cli.environment import check_environment
from utils.cli.options import has_llm
from utils.cli.places import csv_path
from utils.errors import UserError
from utils.runs.checkpoint import Checkpoint, read_checkpoint
from utils.runs.compatibility import check_channels, check_flags, check_shapes, flags_to_test, load_checkpoint
from utils.runs.intervals import Calibration, load_calibration
from utils.runs.prediction import Forecast, check_columns, forecast_window
from utils.system.processes import build_accelerator

_HALF_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainedRun:
    """A run's best weights and its LLM, loaded once; `utils.runs.load_run` returns one.

    Args:
        saved: the run's checkpoint.
        args: the flags to forecast with.
        mixed_precision: as accelerate names it: no, bf16 or fp16.
        model: with the checkpoint's weights; None builds it when it is needed.

    Attributes:
        channels: the columns that it forecasts, in their order.
        seq_len: rows that it sees.
        pred_len: rows that it forecasts.
    """

    def __init__(
        self, saved: Checkpoint, args: argparse.Namespace, mixed_precision: str, model: Forecaster | None = None
    ):
        self._saved, self.args = saved, args
        self._half_precision = _HALF_PRECISION.get(mixed_precision)
        self.channels: tuple[str, ...] = tuple(saved.data.channels)
        self.seq_len: int = args.seq_len
        self.pred_len: int = args.pred_len
        if model is not None:
            self.model = model

    @cached_property
    def model(self) -> Forecaster:
        """The model with the run's weights."""
        return build_trained(self._saved, self.args)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device | None = None, **changes: object) -> "TrainedRun":
        """Load a run from its folder, see `utils.runs.load_run`."""
        if not (folder / "checkpoint").is_file():
            raise UserError(f"no checkpoint in {folder}: name the folder of a run that was trained")
        saved = read_checkpoint(folder / "checkpoint")
        args = flags_to_test(saved, changes)
        check_options(args)
        if args.model == "SeasonalNaive" and not args.season and not csv_path(args).is_file():
            raise UserError(
                f"no {csv_path(args)} to read the season off: say where it is, with root_path= and data_path="
            )
        check_environment()
        _choose_device(device)
        accelerator = build_accelerator(args.seed, 1, args.use_amp, shares_buffers=not has_llm(args))
        run = cls(saved, args, accelerator.mixed_precision)
        with torch.random.fork_rng():  # the caller has a generator of their own
            torch.manual_seed(args.seed)
            run.model.eval()  # what is wrong with it is said now
        return run

    def predict(self, frame: pd.DataFrame, level: Sequence[int] | int = ()) -> pd.DataFrame:
        """Forecast the `pred_len` rows after the last one of a frame, in its own units, as `--predict` does.

        Args:
            frame: like the run's CSV: a column `date`, or dates as index, and the run's channels; at least `seq_len`
                rows. Older rows only fill a gap at the beginning of the window. Or a long frame, with `unique_id`, `ds`
                and `y`. With covariates, `pred_len` more rows that have only these.
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
        table = table_of(frame, "the DataFrame", self.args)
        forecast = self.forecast(table, levels, self._saved.path.parent)
        for warning in forecast.warnings:
            warnings.warn(warning, stacklevel=2)
        return forecast.as_frame()

    def forecast(self, table: Table, levels: Sequence[int], calibrated: Calibration | Path | None) -> Forecast:
        """Forecast the rows after a table's last ones.

        Args:
            table: the data.
            levels: of prediction intervals, in per cent, in ascending order.
            calibrated: the calibration of the intervals, or the run folder that holds it.

        Raises:
            UserError: if the table does not fit the checkpoint, or there is no calibration.
        """
        facts = self._saved.data
        check_channels(facts, table.channels, table.is_long, table.source)
        check_columns(table.channels, table.is_long, levels)
        window = last_window(table, self.seq_len, self.pred_len)
        window.future_covariate_effect(facts)  # what is missing is said before the LLM is loaded
        if levels and isinstance(calibrated, Path):
            calibrated = load_calibration(calibrated, self._saved, table.channels, levels)
        batch_size = self.args.eval_batch_size or self.args.batch_size
        model = self.model
        with torch.autocast(model.device.type, self._half_precision, enabled=bool(self._half_precision)):
            return forecast_window(model, window, facts, batch_size, calibrated, levels)


def build_trained(saved: Checkpoint, args: argparse.Namespace) -> Forecaster:
    """Build the model of a checkpoint, with its weights.

    Args:
        saved: the checkpoint, which may be a stranger's.
        args: the flags, see `flags_to_test`.

    Raises:
        UserError: if the flags are not those of its weights, or the LLM is missing or another one.
    """
    check_flags(saved, vars(args))
    check_shapes(saved, weight_shapes(args))
    reads_season = args.model == "SeasonalNaive" and not args.season
    season = read_table(args).rows_of_a_season() if reads_season else 0
    model = build(args, basis=saved.basis, season=season)
    load_checkpoint(saved, model, vars(args), None)
    return model


def _choose_device(device: str | torch.device | None) -> None:
    """Load everything from now on onto a device, or onto the default one."""
    PartialState._reset_state()
    if device is not None:
        device = torch.device(device)
        PartialState(cpu=device.type == "cpu").device = device
