"""Test a trained model, compare it with the seasonal naive forecast, and calibrate its prediction intervals."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import nn

from data_provider.data_factory import window_numbers
from data_provider.facts import DataFacts
from models.forecaster import Forecaster
from utils.errors import UserError
from utils.runs.intervals import Calibration, IntervalScores, Residuals, check_windows
from utils.runs.metrics import KeptForecasts, Scores, UnitErrors, summary_of_series
from utils.runs.pictures import draw_errors
from utils.runs.records import cost_of, write_metrics, write_predictions, write_series
from utils.training.evaluation import Split, evaluate


@dataclass(frozen=True)
class TestSetup:
    """The data and the settings of a test.

    Attributes:
        naive_errors: see `Series.seasonal_errors`.
        target: the channel of the headline errors, None for all channels.
        naive: the seasonal naive forecaster, None if a window is shorter than a season.
        origin: see `records.origin_of`.
        calibration: the calibration of the intervals; None without levels.
        levels: the levels of the intervals, in percent.
        keeps_forecasts: whether to write forecasts and targets as arrays.
    """

    split: Split
    facts: DataFacts
    naive_errors: Mapping[str, float]
    target: str | None
    naive: Forecaster | None
    origin: dict
    calibration: Calibration | None
    levels: Sequence[int]
    keeps_forecasts: bool


def test(
    accelerator: Accelerator, model: nn.Module, setup: TestSetup, folder: Path, seconds_per_step: float | None
) -> None:
    """Score a model on the test windows, print the scores, and write metrics.json and errors.png to the run folder.

    The model has its best weights and may be wrapped. `seconds_per_step` is that of its training, None if unknown.

    Raises:
        UserError: if the error is not finite.
    """
    split, target = setup.split, setup.target
    started = time.perf_counter()
    in_units, naive_in_units = (UnitErrors(setup.facts, setup.naive_errors, target) for _ in range(2))
    kept = KeptForecasts()
    headline = None if target is None else split.windows.channels.index(target)
    intervals = IntervalScores(setup.calibration, setup.levels, headline)
    metrics = [in_units, intervals, *([kept] if setup.keeps_forecasts else [])]
    scores = evaluate(accelerator, model, split, target, "test", metrics=metrics)
    seconds = time.perf_counter() - started
    if not math.isfinite(scores.mse):
        raise UserError(f"the test MSE is {scores.mse}: give --llm_dtype float32 or bfloat16, and look at the data")
    errors = in_units.compute(scores)
    _print_scores(accelerator, errors, intervals, split, target)
    naive = _score_naive(accelerator, setup, naive_in_units) if setup.naive else None
    if not accelerator.is_main_process:
        return
    bare_model = accelerator.unwrap_model(model)
    if split.windows.is_long:
        write_series(folder, errors["per_channel"])
        errors |= summary_of_series(errors["per_channel"])
    cost = cost_of(bare_model, accelerator.device, seconds_per_step)
    write_metrics(folder, errors, intervals.compute(), naive, seconds, bare_model.llm_info, cost, setup.origin)
    naive_by_step = naive_in_units.compute(naive)["mse_by_step"] if naive else None
    draw_errors(folder / "errors.png", errors["mse_by_step"], naive_by_step)
    if setup.keeps_forecasts:
        write_predictions(folder, kept, split.windows, setup.calibration, setup.levels)


def _print_scores(
    accelerator: Accelerator, errors: dict, intervals: IntervalScores, split: Split, target: str | None
) -> None:
    which = "windows" if target is None else f"windows, those of {target},"
    accelerator.print(
        f"Test | MSE: {errors['mse']:.7f} MAE: {errors['mae']:.7f} | {errors['windows']} {which} of"
        f" {len(split.windows)}"
    )
    mase = "none (a channel that never changes by the season)" if errors["mase"] is None else f"{errors['mase']:.4f}"
    accelerator.print(f"In the CSV's units | RMSE: {errors['rmse']:.6g} MASE: {mase} sMAPE: {errors['smape']:.2f}%")
    for scores in intervals.compute():
        accelerator.print(
            f"Intervals | level: {scores['level']} coverage: {scores['coverage']:.4f} width: {scores['width']:.4f}"
            f" score: {scores['score']:.4f} | {intervals.windows} windows"
        )


def _score_naive(accelerator: Accelerator, setup: TestSetup, errors: UnitErrors) -> Scores:
    """Score the seasonal naive forecast on the same windows, print the scores and update `errors`."""
    addition = " and what the covariates explain" if setup.split.windows.has_covariates else ""
    scores = evaluate(accelerator, setup.naive, setup.split, setup.target, "seasonal naive", metrics=[errors])
    accelerator.print(
        f"Seasonal naive | MSE: {scores.mse:.7f} MAE: {scores.mae:.7f} | the last {setup.naive.season} rows again"
        f"{addition}, on the same windows"
    )
    return scores


def check_levels(levels: Sequence[int], split: Split) -> None:
    """Raise a UserError if a split has too few windows to calibrate intervals of these levels."""
    if not levels:
        return
    windows, numbers = split.windows, window_numbers(split.loader)
    known = np.zeros((len(windows.channels), windows.pred_len), np.int64)  # the number of known targets
    if windows.has_gaps:
        for some, _, targets in windows.in_chunks(numbers):
            np.add.at(known, windows.channel_of(some), ~targets.isnan().numpy())
    else:
        known += np.bincount(windows.channel_of(numbers), minlength=len(known))[:, None]
    check_windows(levels, int((known.sum(axis=0) if windows.is_long else known).min()))


def calibrate(
    accelerator: Accelerator, model: nn.Module, split: Split, checkpoint: str, folder: Path | None
) -> Calibration:
    """Calibrate prediction intervals on the residuals of the validation windows (split conformal prediction).

    Args:
        checkpoint: the SHA-256 of the file with the model's weights.
        folder: the run folder, to save the calibration in; None if it must keep a calibration on other data.
    """
    residuals = Residuals(pooled=split.windows.is_long)
    evaluate(accelerator, model, split, title="calibration", metrics=[residuals])
    calibration = residuals.calibration(split.windows.channels, checkpoint)
    if folder is None:
        accelerator.print(
            "Note: this calibration is not kept, since the run folder has that of its own data: give --des"
        )
    elif accelerator.is_main_process:
        calibration.save(folder)
    return calibration
