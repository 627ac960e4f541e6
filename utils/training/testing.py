"""The test of a trained model, beside the plainest forecast there is."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from utils.errors import UserError
from utils.llm.loading import llm_of
from utils.runs.records import cost_of, write_metrics, write_predictions
from utils.runs.scores import Scores
from utils.training.evaluation import Split, evaluate, window_numbers


def test(
    accelerator: Accelerator,
    model: nn.Module,
    naive: nn.Module | None,
    naive_errors: Mapping[str, float],
    split: Split,
    target: str | None,
    keep_forecasts: bool,
    folder: Path,
    origin: dict,
    progress: dict,
) -> None:
    """Score a model on the test windows; print the scores and write metrics.json.

    Args:
        accelerator: of the run.
        model: with the best weights.
        naive: the seasonal-naive forecaster, None if no season fits into a window.
        naive_errors: its mean absolute error on the training rows, by channel.
        split: the test windows.
        target: the channel of the headline metric, None for all channels.
        keep_forecasts: whether to write forecasts and targets as arrays.
        folder: the run folder.
        origin: see `records.origin_of`.
        progress: what the checkpoint says of the training.

    Raises:
        UserError: if the error is not finite.
    """
    started = time.perf_counter()
    kept = [] if keep_forecasts else None
    scores = evaluate(accelerator, model, split, target, "test", keep=kept).with_mase(naive_errors, target)
    seconds = time.perf_counter() - started
    if not math.isfinite(scores.mse):
        raise UserError(f"the test MSE is {scores.mse}: give --llm_dtype float32 or bfloat16, and look at the data")
    whose = "windows" if target is None else f"windows, those of {target},"
    accelerator.print(
        f"Test | MSE: {scores.mse:.7f} MAE: {scores.mae:.7f} | {scores.windows} {whose} of {len(split.windows)}"
    )
    plain = score_naive(accelerator, naive, split, target) if naive else None
    if accelerator.is_main_process:
        bare_model = accelerator.unwrap_model(model)
        cost = cost_of(bare_model, accelerator.device, progress)
        write_metrics(folder, scores, plain, seconds, llm_of(bare_model), cost, origin)
        if kept:
            write_predictions(folder, kept, split.windows, window_numbers(split.loader))


def score_naive(accelerator: Accelerator, naive: nn.Module, split: Split, target: str | None) -> Scores:
    """Score the seasonal-naive forecast on the same windows, and print its scores."""
    scores = evaluate(accelerator, naive, split, target, "seasonal naive")
    accelerator.print(
        f"Seasonal naive | MSE: {scores.mse:.7f} MAE: {scores.mae:.7f} | the last {naive.season} rows again,"
        " on the same windows"
    )
    return scores
