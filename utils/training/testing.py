"""The test of a trained model, beside the plainest forecast there is."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from utils.errors import UserError
from utils.llm.loading import llm_of
from utils.runs.intervals import Calibration, IntervalScores
from utils.runs.pictures import draw_errors
from utils.runs.records import cost_of, write_metrics, write_predictions, write_series
from utils.runs.scores import Scores
from utils.runs.watchers import KeptForecasts, UnitErrors, Units, summary_of_series
from utils.training.evaluation import Split, evaluate


@dataclass(frozen=True)
class Examination:
    """What a model is tested on.

    Attributes:
        split: the test windows.
        units: of their data.
        target: the channel of the headline metric, None for all channels.
        naive: the seasonal-naive forecaster, None if no season fits into a window.
        origin: see `records.origin_of`.
        calibration: of the intervals; None if no levels are asked for.
        levels: of those, in per cent.
    """

    split: Split
    units: Units
    target: str | None
    naive: nn.Module | None
    origin: dict
    calibration: Calibration | None
    levels: Sequence[int]

    @property
    def headline(self) -> int | None:
        """The number of the headline metric's channel, None for all."""
        return None if self.target is None else self.split.windows.channels.index(self.target)


def test(
    accelerator: Accelerator,
    model: nn.Module,
    examination: Examination,
    folder: Path,
    seconds_per_step: float | None,
    keeps_forecasts: bool,
) -> None:
    """Score a model on the test windows; print the scores and write metrics.json and errors.png.

    Args:
        accelerator: of the run.
        model: with the best weights.
        examination: what it is tested on.
        folder: the run folder.
        seconds_per_step: of its training, None if there was none.
        keeps_forecasts: whether to write forecasts and targets as arrays.

    Raises:
        UserError: if the error is not finite.
    """
    split, target = examination.split, examination.target
    started = time.perf_counter()
    in_units, kept = UnitErrors(examination.units, target), KeptForecasts()
    intervals = IntervalScores(examination.calibration, examination.levels, examination.headline)
    watchers = [in_units, intervals, *([kept] if keeps_forecasts else [])]
    scores = evaluate(accelerator, model, split, target, "test", watchers=watchers)
    seconds = time.perf_counter() - started
    if not math.isfinite(scores.mse):
        raise UserError(f"the test MSE is {scores.mse}: give --llm_dtype float32 or bfloat16, and look at the data")
    figures = in_units.figures(scores)
    _print_scores(accelerator, figures, split, target)
    _print_intervals(accelerator, intervals)
    naive_errors = UnitErrors(examination.units, target)
    plain = score_naive(accelerator, examination, naive_errors) if examination.naive else None
    if accelerator.is_main_process:
        bare_model = accelerator.unwrap_model(model)
        if split.windows.is_long:
            write_series(folder, figures["per_channel"])
            figures |= summary_of_series(figures["per_channel"])
        cost = cost_of(bare_model, accelerator.device, seconds_per_step)
        llm, origin = llm_of(bare_model), examination.origin
        write_metrics(folder, figures, intervals.figures(), plain, seconds, llm, cost, origin)
        by_step = naive_errors.figures(plain)["mse_by_step"] if plain else None
        draw_errors(folder / "errors.png", figures["mse_by_step"], by_step)
        if keeps_forecasts:
            write_predictions(folder, kept, split.windows, examination.calibration, examination.levels)


def _print_scores(accelerator: Accelerator, figures: dict, split: Split, target: str | None) -> None:
    whose = "windows" if target is None else f"windows, those of {target},"
    accelerator.print(
        f"Test | MSE: {figures['mse']:.7f} MAE: {figures['mae']:.7f} | {figures['windows']} {whose} of"
        f" {len(split.windows)}"
    )
    mase = "none (a channel that never changes by the season)" if figures["mase"] is None else f"{figures['mase']:.4f}"
    accelerator.print(f"In the CSV's units | RMSE: {figures['rmse']:.6g} MASE: {mase} sMAPE: {figures['smape']:.2f}%")


def _print_intervals(accelerator: Accelerator, intervals: IntervalScores) -> None:
    for one in intervals.figures():
        accelerator.print(
            f"Intervals | level: {one['level']} coverage: {one['coverage']:.4f} width: {one['width']:.4f}"
            f" score: {one['score']:.4f} | {intervals.windows} windows"
        )


def score_naive(accelerator: Accelerator, examination: Examination, errors: UnitErrors) -> Scores:
    """Score the seasonal-naive forecast on the same windows, and print its scores; `errors` watches it."""
    naive = examination.naive
    has_covariates = examination.split.windows.explained_of([0]) is not None
    explained = " and what the covariates explain" if has_covariates else ""
    scores = evaluate(accelerator, naive, examination.split, examination.target, "seasonal naive", watchers=[errors])
    accelerator.print(
        f"Seasonal naive | MSE: {scores.mse:.7f} MAE: {scores.mae:.7f} | the last {naive.season} rows again"
        f"{explained}, on the same windows"
    )
    return scores
