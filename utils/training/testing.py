"""Test a trained model beside the seasonal-naive forecast, and calibrate its prediction intervals."""

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
    """The test of a model.

    Attributes:
        split: the test windows.
        facts: of their data.
        naive_errors: of the seasonal-naive forecast on the training rows, see `Series.seasonal_errors`.
        target: the channel of the headline metric, None for all channels.
        naive: the seasonal-naive forecaster, None if a window does not hold a season.
        origin: see `records.origin_of`.
        calibration: of the intervals; None without levels.
        levels: of the intervals, in per cent.
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

    def unit_errors(self) -> UnitErrors:
        """Return a new metric of the errors in the data's units."""
        return UnitErrors(self.facts, self.naive_errors, self.target)


def test(
    accelerator: Accelerator, model: nn.Module, setup: TestSetup, folder: Path, seconds_per_step: float | None
) -> None:
    """Score a model on the test windows; print the scores and write metrics.json and errors.png.

    Args:
        accelerator: of the run.
        model: with the best weights, possibly wrapped.
        setup: of the test.
        folder: the run folder.
        seconds_per_step: of its training, None if there was none.

    Raises:
        UserError: if the error is not finite.
    """
    split, target = setup.split, setup.target
    started = time.perf_counter()
    in_units, kept = setup.unit_errors(), KeptForecasts()
    headline = None if target is None else split.windows.channels.index(target)
    intervals = IntervalScores(setup.calibration, setup.levels, headline)
    metrics = [in_units, intervals, *([kept] if setup.keeps_forecasts else [])]
    scores = evaluate(accelerator, model, split, target, "test", metrics=metrics)
    seconds = time.perf_counter() - started
    if not math.isfinite(scores.mse):
        raise UserError(f"the test MSE is {scores.mse}: give --llm_dtype float32 or bfloat16, and look at the data")
    figures = in_units.compute(scores)
    _print_scores(accelerator, figures, split, target)
    _print_intervals(accelerator, intervals)
    naive_errors = setup.unit_errors()
    plain = score_naive(accelerator, setup, naive_errors) if setup.naive else None
    if not accelerator.is_main_process:
        return
    bare_model = accelerator.unwrap_model(model)
    if split.windows.is_long:
        write_series(folder, figures["per_channel"])
        figures |= summary_of_series(figures["per_channel"])
    cost = cost_of(bare_model, accelerator.device, seconds_per_step)
    write_metrics(folder, figures, intervals.compute(), plain, seconds, bare_model.llm_info, cost, setup.origin)
    by_step = naive_errors.compute(plain)["mse_by_step"] if plain else None
    draw_errors(folder / "errors.png", figures["mse_by_step"], by_step)
    if setup.keeps_forecasts:
        write_predictions(folder, kept, split.windows, setup.calibration, setup.levels)


def _print_scores(accelerator: Accelerator, figures: dict, split: Split, target: str | None) -> None:
    whose = "windows" if target is None else f"windows, those of {target},"
    accelerator.print(
        f"Test | MSE: {figures['mse']:.7f} MAE: {figures['mae']:.7f} | {figures['windows']} {whose} of"
        f" {len(split.windows)}"
    )
    mase = "none (a channel that never changes by the season)" if figures["mase"] is None else f"{figures['mase']:.4f}"
    accelerator.print(f"In the CSV's units | RMSE: {figures['rmse']:.6g} MASE: {mase} sMAPE: {figures['smape']:.2f}%")


def _print_intervals(accelerator: Accelerator, intervals: IntervalScores) -> None:
    for one in intervals.compute():
        accelerator.print(
            f"Intervals | level: {one['level']} coverage: {one['coverage']:.4f} width: {one['width']:.4f}"
            f" score: {one['score']:.4f} | {intervals.windows} windows"
        )


def score_naive(accelerator: Accelerator, setup: TestSetup, errors: UnitErrors) -> Scores:
    """Score the seasonal-naive forecast on the same windows, print its scores and update `errors`."""
    explained = " and what the covariates explain" if setup.split.windows.has_covariates else ""
    scores = evaluate(accelerator, setup.naive, setup.split, setup.target, "seasonal naive", metrics=[errors])
    accelerator.print(
        f"Seasonal naive | MSE: {scores.mse:.7f} MAE: {scores.mae:.7f} | the last {setup.naive.season} rows again"
        f"{explained}, on the same windows"
    )
    return scores


def check_levels(levels: Sequence[int], split: Split) -> None:
    """Refuse levels for which a split has too few windows.

    Raises:
        UserError: names the number that is needed.
    """
    if not levels:
        return
    windows, numbers = split.windows, window_numbers(split.loader)
    known = np.zeros((len(windows.channels), 1), np.int64)  # or by step, with gaps
    if windows.has_gaps:
        for some, _, targets in windows.in_chunks(numbers):
            is_known = ~targets.isnan().numpy()
            known = known + np.zeros((1, is_known.shape[1]), np.int64)
            np.add.at(known, windows.channel_of(some), is_known)
    else:
        np.add.at(known, windows.channel_of(numbers), 1)
    check_windows(levels, int((known.sum(axis=0) if windows.is_long else known).min()))


def calibrate(
    accelerator: Accelerator, model: nn.Module, split: Split, checkpoint: str, folder: Path | None
) -> Calibration:
    """Forecast the validation windows once, and keep in the run folder how far they were from their forecasts.

    Args:
        accelerator: of the run.
        model: with the best weights, possibly wrapped.
        split: the validation windows.
        checkpoint: the SHA-256 of the file that the weights were read from.
        folder: the run folder; None if it holds the calibration of other data, which stays.
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
