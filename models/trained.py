"""A trained run, ready to forecast from Python."""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState

from data_provider.to_come import last_window_of
from models import build_model
from utils.cli.checks import check_options
from utils.cli.options import defaults, has_llm
from utils.cli.places import csv_path
from utils.errors import UserError
from utils.runs.checkpoint import check_channels, flags_to_test, load_checkpoint, read_checkpoint, saved_basis
from utils.runs.intervals import load_calibration
from utils.runs.prediction import forecast_beyond
from utils.system.processes import build_accelerator


class TrainedRun:
    """A run's best weights and its LLM, loaded once. `utils.runs.load_run` makes it.

    Attributes:
        channels: the columns that it forecasts, in their order.
        seq_len: rows that it looks at.
        pred_len: rows that it forecasts.
    """

    def __init__(self, folder: Path, device: str | torch.device | None = None, **changes: object):
        checkpoint = folder / "checkpoint"
        if not checkpoint.is_file():
            raise UserError(f"no checkpoint in {folder}: name the folder of a run that was trained")
        self._contents = read_checkpoint(checkpoint, {"progress"})
        self._args = args = flags_to_test(folder, self._contents, changes)
        check_options(args)
        if unknown := sorted(changes.keys() - defaults().keys()):
            raise UserError(f"{', '.join(unknown)} is no flag of run_main.py: load_run takes those of the run")
        if args.model == "SeasonalNaive" and not args.season and not csv_path(args).is_file():
            raise UserError(
                f"no {csv_path(args)} to read the season off: say where it is, with root_path= and data_path="
            )
        self._checkpoint = checkpoint
        self.channels: tuple[str, ...] = tuple(self._contents["channels"])
        self.seq_len: int = args.seq_len
        self.pred_len: int = args.pred_len
        _choose_device(device)
        accelerator = build_accelerator(args.seed, 1, args.use_amp, shares_buffers=not has_llm(args))
        # Of this run alone: accelerate's own follows whatever was loaded last.
        self._half_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        with torch.random.fork_rng():  # whoever calls has a generator of their own
            torch.manual_seed(args.seed)
            self.model = build_model(args, saved_basis(checkpoint, vars(args)))
        load_checkpoint(checkpoint, self.model, vars(args), None)

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
        check_options(flags_to_test(self._checkpoint.parent, self._contents, {"level": levels}))
        window = last_window_of(frame, self._args)
        check_channels(self._contents, window.channels, window.is_long, Path("the DataFrame"))
        calibration = (
            load_calibration(self._checkpoint.parent, self._checkpoint, self.channels, levels) if levels else None
        )
        batch_size = self._args.eval_batch_size or self._args.batch_size
        with torch.autocast(self.model.device.type, self._half_precision, enabled=bool(self._half_precision)):
            made = forecast_beyond(self.model, window, self._contents, batch_size, calibration, levels)
        return made.as_frame()


def _choose_device(device: str | torch.device | None) -> None:
    """Let everything that is loaded from here on go to a device, or to the usual one."""
    PartialState._reset_state()
    if device is not None:
        device = torch.device(device)
        PartialState(cpu=device.type == "cpu").device = device
