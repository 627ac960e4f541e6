"""Errors of forecasts: mean errors, and metrics that are updated batch by batch of an evaluation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data_provider.facts import DataFacts

# The errors of each series of a long CSV; metrics.json has those of the worst.
SERIES_FILE = "series.csv"
WORST_SHOWN = 10


@dataclass(frozen=True)
class Scores:
    """Mean errors of the scaled series over windows; where targets are unknown, over the known ones.

    Attributes:
        mse, mae: the headline: over all windows, or over the target's.
        windows: how many windows the headline is the mean of.
        per_channel: mse, mae and windows of each channel; and `known`, the number of targets, where some are unknown.
    """

    mse: float
    mae: float
    windows: int
    per_channel: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Forecasts:
    """Forecast windows of one batch, from all processes, in the order of their split.

    Attributes:
        numbers: of the windows in their split, (B,).
        channels: their channels' numbers, (B,).
        forecast, target: (B, pred_len) float32, scaled; a target that is not known is NaN.
        deviation: of the values that each window shows, (B,) float32, scaled.
    """

    numbers: np.ndarray
    channels: np.ndarray
    forecast: np.ndarray
    target: np.ndarray
    deviation: np.ndarray


class Metric:
    """Base class of what is computed from the forecasts of an evaluation."""

    def update(self, batch: Forecasts) -> None:
        """Take in the next batch."""
        raise NotImplementedError


class KeptForecasts(Metric):
    """Every forecast and target, as they come."""

    def __init__(self):
        self._batches: list[Forecasts] = []

    def update(self, batch: Forecasts) -> None:
        """Keep a batch."""
        self._batches.append(batch)

    @property
    def numbers(self) -> np.ndarray:
        """The windows' numbers in their split, (windows,)."""
        return np.concatenate([batch.numbers for batch in self._batches])

    @property
    def forecast(self) -> np.ndarray:
        """(windows, pred_len) float32, scaled."""
        return np.concatenate([batch.forecast for batch in self._batches])

    @property
    def target(self) -> np.ndarray:
        """(windows, pred_len) float32, scaled."""
        return np.concatenate([batch.target for batch in self._batches])


class UnitErrors(Metric):
    """Errors by step, and errors in the data's own units.

    Args:
        facts: of the data.
        naive_errors: the seasonal-naive forecast's mean absolute error on the scaled training rows, by channel; some
            channels may have none.
        target: the channel of the overall figures, None for all channels.
    """

    def __init__(self, facts: DataFacts, naive_errors: Mapping[str, float], target: str | None = None):
        self.naive_errors = naive_errors
        self.target = target
        self._number_of = {name: number for number, name in enumerate(facts.channels)}
        self._headline = None if target is None else self._number_of[target]
        self._mean, self._deviation = np.asarray(facts.mean), np.asarray(facts.deviation)
        self._squares: np.ndarray | float = 0.0  # by step, of the headline's windows, scaled
        self._known: np.ndarray | int = 0  # targets, by step, of the headline's windows
        self._smape = np.zeros((2, len(facts.channels)))  # sums over windows, by channel: of errors, of their weights

    def update(self, batch: Forecasts) -> None:
        """Add a batch to the sums."""
        forecast, target = batch.forecast.astype(np.float64), batch.target.astype(np.float64)
        counted = slice(None) if self._headline is None else batch.channels == self._headline
        squares = np.square(forecast - target)[counted]
        self._squares = self._squares + np.nansum(squares, axis=0)
        self._known = self._known + (~np.isnan(target[counted])).sum(axis=0)
        mean, deviation = self._mean[batch.channels, None], self._deviation[batch.channels, None]
        own = (forecast * deviation + mean, target * deviation + mean)
        # Means over windows, each with the weight of what is known of it.
        weights = (~np.isnan(target)).mean(axis=-1)
        np.add.at(self._smape[0], batch.channels, weights * symmetric_error(*own))
        np.add.at(self._smape[1], batch.channels, weights)

    def compute(self, scores: Scores) -> dict:
        """Return the errors of metrics.json.

        Beside the scaled mse and mae, overall and a channel each: rmse, the root of the mean squared error in the
        data's units; mase, the mean absolute error in units of the seasonal-naive forecast's on the training rows
        (Hyndman and Koehler, 2006), None where there is none; smape, in per cent. Overall figures are means over
        windows (under the root, for rmse). mse_by_step is scaled, a number a forecast step.

        Args:
            scores: of the same windows.
        """
        per_channel = {name: self._of_channel(name, errors) for name, errors in scores.per_channel.items()}
        headline = [errors for name, errors in per_channel.items() if self.target in (None, name)]
        weights = [errors.get("known", errors["windows"]) for errors in headline]
        has_mase = all(errors["mase"] is not None for errors in headline)
        return {
            "mse": scores.mse,
            "mae": scores.mae,
            "rmse": math.sqrt(np.average([errors["rmse"] ** 2 for errors in headline], weights=weights)),
            "mase": float(np.average([errors["mase"] for errors in headline], weights=weights)) if has_mase else None,
            "smape": float(np.average([errors["smape"] for errors in headline], weights=weights)),
            "windows": scores.windows,
            "per_channel": per_channel,
            "mse_by_step": [
                square / known if known else None  # of a step whose every target is a gap there is none
                for square, known in zip(self._squares.tolist(), self._known.tolist(), strict=True)
            ],
        }

    def _of_channel(self, name: str, errors: dict[str, float]) -> dict[str, float | None]:
        number = self._number_of[name]
        naive = self.naive_errors.get(name)
        return {
            **errors,
            "rmse": math.sqrt(errors["mse"]) * float(self._deviation[number]),
            "mase": errors["mae"] / naive if naive else None,
            "smape": float(self._smape[0, number] / self._smape[1, number]),
        }


def summary_of_series(per_channel: Mapping[str, dict]) -> dict:
    """Summarise the errors of many series for metrics.json: their spread, and the worst.

    Args:
        per_channel: the errors of each series.
    """
    worst = sorted(per_channel, key=lambda name: -per_channel[name]["mse"])[:WORST_SHOWN]
    spread = {}
    for name in ("mse", "mase"):
        known = [errors[name] for errors in per_channel.values() if errors[name] is not None]
        quartiles = np.quantile(known, [0, 0.25, 0.5, 0.75, 1]).tolist() if known else []
        spread[name] = dict(zip(("min", "25%", "50%", "75%", "max"), quartiles, strict=False))
    return {"series": {"count": len(per_channel), **spread}, "per_channel": {name: per_channel[name] for name in worst}}


def symmetric_error(forecast: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return 200 |forecast - target| / (|forecast| + |target|), the mean over the last axis; of 0 and 0 it is 0.

    A target of NaN does not count; where there is no other, the mean is 0.
    """
    size = np.abs(forecast) + np.abs(target)
    error = np.abs(forecast - target)
    shares = np.divide(error, size, out=np.zeros_like(error), where=size > 0)  # NaN is not above 0
    counts = (~np.isnan(target)).sum(axis=-1)
    return 200 * (shares.sum(axis=-1) / np.maximum(counts, 1))
