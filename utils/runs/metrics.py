"""Mean errors of forecasts, and metrics that an evaluation updates batch by batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from data_provider.facts import DataFacts

# The errors of each series of a long CSV; metrics.json keeps only the worst series.
SERIES_FILE = "series.csv"
WORST_SHOWN = 10


@dataclass(frozen=True)
class Scores:
    """Mean errors of the scaled series over all windows, or those of the target channel, counting only known targets.

    `per_channel` holds mse, mae and windows of each channel, and the number of `known` targets if some are missing.
    """

    mse: float
    mae: float
    windows: int
    per_channel: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Forecasts:
    """The forecasts of one batch of windows, gathered from all processes, in the order of their split.

    Attributes:
        numbers, channels: the indices of the windows in their split, and of their channels, (B,) each.
        forecast, target: (B, pred_len) float32, scaled; a missing target is NaN.
        deviation: the standard deviation of each window's context, (B,) float32, scaled.
    """

    numbers: np.ndarray
    channels: np.ndarray
    forecast: np.ndarray
    target: np.ndarray
    deviation: np.ndarray


class Metric:
    """Base class of metrics that are computed from the forecasts of an evaluation."""

    def update(self, batch: Forecasts) -> None:
        """Add a batch of forecasts."""
        raise NotImplementedError


class KeptForecasts(Metric):
    """All forecasts and targets, in the order of their batches."""

    def __init__(self):
        self._batches: list[Forecasts] = []

    def update(self, batch: Forecasts) -> None:
        """Keep a batch of forecasts."""
        self._batches.append(batch)

    def compute(self) -> Forecasts:
        """Concatenate all batches."""
        names = [field.name for field in fields(Forecasts)]
        return Forecasts(*(np.concatenate([getattr(batch, name) for batch in self._batches]) for name in names))


class UnitErrors(Metric):
    """Errors by forecast step, and errors in the data's own units.

    Args:
        naive_errors: the mean absolute error of the seasonal naive forecast on the scaled training rows, by channel;
            it may lack channels.
        target: the channel of the headline errors, None for all channels.
    """

    def __init__(self, facts: DataFacts, naive_errors: Mapping[str, float], target: str | None = None):
        self.naive_errors = naive_errors
        self.target = target
        self._number_of = {name: number for number, name in enumerate(facts.channels)}
        self._headline = None if target is None else self._number_of[target]
        self._mean, self._deviation = np.asarray(facts.mean), np.asarray(facts.deviation)
        # Sums over the headline's windows, by step: of scaled squared errors, and of known targets.
        self._squares: np.ndarray | float = 0.0
        self._known: np.ndarray | int = 0
        self._smape = np.zeros((2, len(facts.channels)))  # sums over windows, by channel: weighted errors and weights

    def update(self, batch: Forecasts) -> None:
        """Add a batch to the sums."""
        forecast, target = batch.forecast.astype(np.float64), batch.target.astype(np.float64)
        counted = slice(None) if self._headline is None else batch.channels == self._headline
        squares = np.square(forecast - target)[counted]
        self._squares = self._squares + np.nansum(squares, axis=0)
        self._known = self._known + (~np.isnan(target[counted])).sum(axis=0)
        mean, deviation = self._mean[batch.channels, None], self._deviation[batch.channels, None]
        in_units = (forecast * deviation + mean, target * deviation + mean)
        # A window's weight is its share of known targets.
        weights = (~np.isnan(target)).mean(axis=-1)
        np.add.at(self._smape[0], batch.channels, weights * _symmetric_error(*in_units))
        np.add.at(self._smape[1], batch.channels, weights)

    def compute(self, scores: Scores) -> dict:
        """Compute the errors of metrics.json, overall and for each channel, given the mean errors of the same windows.

        mse, mae and mse_by_step are scaled, rmse is in the data's units, smape in percent. mase is the mean absolute
        error divided by that of the seasonal naive forecast on the training rows (Hyndman and Koehler, 2006), None if
        that is unknown or 0. Overall errors are means over windows (rmse: of its square).
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
            "mse_by_step": by_step(self._squares, self._known),
        }

    def _of_channel(self, name: str, errors: dict[str, float]) -> dict[str, float | None]:
        number, naive = self._number_of[name], self.naive_errors.get(name)
        return {
            **errors,
            "rmse": math.sqrt(errors["mse"]) * float(self._deviation[number]),
            "mase": errors["mae"] / naive if naive else None,
            "smape": float(self._smape[0, number] / self._smape[1, number]),
        }


def by_step(sums: np.ndarray, known: np.ndarray) -> list[float | None]:
    """Divide sums by the number of known targets of each forecast step; None for a step without any."""
    return np.where(known > 0, sums / np.maximum(known, 1), None).tolist()


def summary_of_series(per_channel: Mapping[str, dict]) -> dict:
    """Summarize the errors of many series for metrics.json: their quartiles, and the errors of the worst series."""
    worst = sorted(per_channel, key=lambda name: -per_channel[name]["mse"])[:WORST_SHOWN]
    spread = {}
    for name in ("mse", "mase"):
        known = [errors[name] for errors in per_channel.values() if errors[name] is not None]
        quartiles = np.quantile(known, [0, 0.25, 0.5, 0.75, 1]).tolist() if known else []
        spread[name] = dict(zip(("min", "25%", "50%", "75%", "max"), quartiles, strict=False))
    return {"series": {"count": len(per_channel), **spread}, "per_channel": {name: per_channel[name] for name in worst}}


def _symmetric_error(forecast: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Average 200 |forecast - target| / (|forecast| + |target|) over the last axis' known targets; 0 / 0 is 0."""
    size = np.abs(forecast) + np.abs(target)
    error = np.abs(forecast - target)
    shares = np.divide(error, size, out=np.zeros_like(error), where=size > 0)  # also 0 where size is NaN
    counts = (~np.isnan(target)).sum(axis=-1)
    return 200 * (shares.sum(axis=-1) / np.maximum(counts, 1))
