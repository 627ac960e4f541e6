"""Forecast with a trained run, for --predict and for `load_run` from Python."""

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
from utils.cli.checks import check_environment, check_options
from utils.cli.options import has_llm, reads_notes
from utils.cli.places import csv_path
from utils.errors import UserError
from utils.runs.checkpoint import Checkpoint, read_checkpoint
from utils.runs.compatibility import check_channels, check_flags, check_shapes, flags_to_test, load_checkpoint
from utils.runs.intervals import Calibration, load_calibration
from utils.runs.prediction import Forecast, check_columns, forecast_window
from utils.system.gpu import fork_random
from utils.system.processes import build_accelerator

_HALF_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainedRun:
    """A run with its best weights and its LLM, loaded once, as `utils.runs.load_run` returns it.

    Args:
        args: the flags to forecast with.
        mixed_precision: no, bf16 or fp16, as in accelerate.
        model: the model with the checkpoint's weights; None to build the model on first use.

    Attributes:
        channels: the columns to forecast, in order.
        seq_len, pred_len: the numbers of rows of the context and of the forecast.
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
        """Load a run from its folder; see `utils.runs.load_run`."""
        if not (folder / "checkpoint").is_file():
            raise UserError(f"no checkpoint in {folder}: name the folder of a run that was trained")
        saved = read_checkpoint(folder / "checkpoint")
        args = flags_to_test(saved, changes)
        check_options(args)
        if args.model == "SeasonalNaive" and not args.season and not csv_path(args).is_file():
            raise UserError(f"no {csv_path(args)} to find the season in: give its place with root_path= and data_path=")
        check_environment()
        _choose_device(device)
        accelerator = build_accelerator(args.seed, 1, args.use_amp, shares_buffers=not has_llm(args))
        run = cls(saved, args, accelerator.mixed_precision)
        with torch.random.fork_rng():  # keeps the caller's random state
            torch.manual_seed(args.seed)
            run.model.eval()  # builds the model now, so that errors appear on loading
        return run

    def predict(self, frame: pd.DataFrame, level: Sequence[int] | int = ()) -> pd.DataFrame:
        """Forecast the `pred_len` rows after the last row of a frame, in its own units, as `--predict` does.

        Args:
            frame: at least `seq_len` rows with the columns of the run's CSV: `date` (or dates as the index) and the
                run's channels, or `unique_id`, `ds` and `y` for a long frame. Rows before the context only fill gaps
                at its start. Covariates need `pred_len` more rows in which only they have values.
            level: the levels of prediction intervals, in percent, such as `[80, 95]`, if the run was tested with
                --level.

        Returns:
            The columns of forecast.csv: `date`, and each channel `x` followed by `x-lo-95`, `x-lo-80`, `x-hi-80` and
            `x-hi-95`; for a long frame `unique_id`, `ds`, `y` and its bounds.

        Raises:
            UserError: if the frame has other channels, too few rows or invalid cells, or a level is invalid.
        """
        levels = [level] if np.ndim(level) == 0 else list(level)
        if not all(isinstance(one, Integral) for one in levels):
            raise UserError(f"level={level!r}: levels are whole percentages from 1 to 99")
        levels = sorted(map(int, levels))
        check_options(flags_to_test(self._saved, {"level": levels}))
        forecast = self.forecast(table_of(frame, "the DataFrame", self.args), levels, self._saved.path.parent)
        for warning in forecast.warnings:
            warnings.warn(warning, stacklevel=2)
        return forecast.as_frame()

    def forecast(self, table: Table, levels: Sequence[int], calibrated: Calibration | Path | None) -> Forecast:
        """Forecast the rows after the last rows of a table, with intervals of the levels in ascending order.

        `calibrated` is the calibration of the intervals, or the run folder that holds it.

        Raises:
            UserError: if the table does not fit the checkpoint, or the calibration is missing.
        """
        facts = self._saved.data
        check_channels(facts, table.channels, table.is_long, table.source)
        check_columns(table.channels, table.is_long, levels)
        if reads_notes(self.args) and not table.covariates.states:
            table = with_read_notes(table, self.args, self._saved.path.parent.parent)
        window = last_window(table, self.seq_len, self.pred_len)
        window.covariate_effect(facts)  # finds missing covariates before the LLM is loaded
        if levels and isinstance(calibrated, Path):
            calibrated = load_calibration(calibrated, self._saved, table.channels, levels)
        batch_size = self.args.eval_batch_size or self.args.batch_size
        with torch.autocast(self.model.device.type, self._half_precision, enabled=bool(self._half_precision)):
            return forecast_window(self.model, window, facts, batch_size, calibrated, levels)


def with_read_notes(table: Table, args: argparse.Namespace, store: Path) -> Table:
    """Let the LLM of the flags read a table's notes; `store` is the folder that keeps what was read."""
    from utils.llm.choice import LLMFlags  # these two import transformers, which a run without an LLM does not need
    from utils.llm.notes import read_notes

    with fork_random(PartialState().device):
        return table.with_states(read_notes(table.covariates.texts(), LLMFlags.of(args), store))


def build_trained(saved: Checkpoint, args: argparse.Namespace) -> Forecaster:
    """Build the model of a checkpoint, which need not be trusted, with flags of `flags_to_test`; load its weights.

    Raises:
        UserError: if the weights do not fit the flags, or the LLM is missing or not the run's.
    """
    check_flags(saved, vars(args))
    check_shapes(saved, weight_shapes(args))
    is_season_unknown = args.model == "SeasonalNaive" and not args.season
    model = build(args, basis=saved.basis, season=read_table(args).rows_of_a_season() if is_season_unknown else 0)
    load_checkpoint(saved, model, vars(args), None)
    return model


def _choose_device(device: str | torch.device | None) -> None:
    """Set the device for everything that is loaded from now on; None for the default device."""
    PartialState._reset_state()
    if device is not None:
        device = torch.device(device)
        PartialState(cpu=device.type == "cpu").device = device
