"""Prediction intervals for any forecaster, by split conformal prediction (Lei et al., 2018)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.runs.checkpoint import Checkpoint
from utils.runs.metrics import Forecasts, Metric
from utils.system.files import atomic_write

FILE = "calibration.npz"

LEVELS = range(1, 100)  # in percent; a calibration holds the quantiles of all levels


@dataclass(frozen=True)
class Calibration:
    """Quantiles of the absolute forecast errors on the validation windows, for each channel and forecast step.

    Attributes:
        channels: the channels' names.
        quantiles: (99, channels, pred_len) float32, in units of the standard deviation of a window's context. Row L - 1
            holds the absolute error that ceil((n + 1) L / 100) of `n` validation windows do not exceed. An interval of
            that half width covers the target of a new window with a probability of at least L percent, if the new
            window is exchangeable with the validation windows. Infinite where there are too few windows.
            (99, 1, pred_len) if pooled.
        checkpoint: the SHA-256 of the checkpoint.
        is_pooled: whether all series of a long CSV share the quantiles, which then hold for any series.
    """

    channels: tuple[str, ...]
    quantiles: np.ndarray
    checkpoint: str
    is_pooled: bool = False

    def half_widths(self, level: int, channels: np.ndarray, deviations: np.ndarray) -> np.ndarray:
        """Scale the quantiles of a level to half the width of intervals, (windows, pred_len).

        Args:
            level: in percent.
            channels: the index of each window's channel, (windows,).
            deviations: the standard deviation of each window's context, (windows,), in the units of the result.
        """
        own = self.quantiles[level - 1]
        return (own if self.is_pooled else own[channels]) * deviations[:, None]

    def save(self, folder: Path) -> None:
        """Write `calibration.npz` atomically."""
        contents = {name: np.array(value) for name, value in vars(self).items()}
        atomic_write(folder / FILE, lambda file: np.savez(file, **contents))


class Residuals(Metric):
    """Absolute forecast errors on the validation windows, from which a `Calibration` is computed.

    Batches arrive in the order of their channels; once a channel is complete, only its quantiles are kept. Missing
    targets do not count.

    Args:
        pooled: whether all channels share their quantiles. Each series of a long CSV has few windows, and errors in
            units of the windows' deviations are comparable between series.
    """

    def __init__(self, pooled: bool = False):
        self._pooled = pooled
        self._errors: dict[int, list[np.ndarray]] = {}  # of the incomplete channels
        self._quantiles: dict[int, np.ndarray] = {}

    def update(self, batch: Forecasts) -> None:
        """Add the absolute errors of a batch, in units of the windows' deviations."""
        errors = np.abs(batch.target - batch.forecast) / batch.deviation[:, None]
        channels = np.zeros_like(batch.channels) if self._pooled else batch.channels
        for channel in np.unique(channels).tolist():
            self._errors.setdefault(channel, []).append(errors[channels == channel])
        for channel in [channel for channel in self._errors if channel < channels[-1]]:
            self._finish(channel)

    def _finish(self, channel: int) -> None:
        """Replace the errors of a channel by their quantiles."""
        ordered = np.sort(np.concatenate(self._errors.pop(channel)), axis=0)  # NaN last
        known, steps = (~np.isnan(ordered)).sum(axis=0), np.arange(ordered.shape[1])
        quantiles = np.full((len(LEVELS), ordered.shape[1]), np.inf, np.float32)
        for row, level in enumerate(LEVELS):
            enough = known >= windows_needed(level)
            quantiles[row, enough] = ordered[_rank(level, known[enough]) - 1, steps[enough]]
        self._quantiles[channel] = quantiles

    def calibration(self, channels: Sequence[str], checkpoint: str) -> Calibration:
        """Build the calibration of these channels, for the checkpoint with this SHA-256."""
        for channel in list(self._errors):
            self._finish(channel)
        quantiles = np.stack([self._quantiles[number] for number in sorted(self._quantiles)], axis=1)
        return Calibration(tuple(channels), quantiles, checkpoint, self._pooled)


def _rank(level: int, windows: np.ndarray) -> np.ndarray:
    """Compute ceil((windows + 1) level / 100) in exact integer arithmetic."""
    return -(-(windows + 1) * level // 100)


def windows_needed(level: int) -> int:
    """Return the minimum number of windows to calibrate a level on."""
    return -(-level // (100 - level))


def check_windows(levels: Sequence[int], windows: int) -> None:
    """Refuse levels that need more validation windows than the channel and forecast step with the fewest has.

    Raises:
        UserError: names the number of windows that is needed.
    """
    if levels and windows < windows_needed(max(levels)):
        raise UserError(
            f"--level {max(levels)} needs {windows_needed(max(levels))} validation windows of each channel, but there"
            f" are {windows}: give a lower level, a higher --eval_windows or more rows"
        )


def load_calibration(
    folder: Path, checkpoint: Checkpoint, channels: Sequence[str], levels: Sequence[int]
) -> Calibration:
    """Load the calibration of a checkpoint's channels that an earlier test with --level wrote to a run folder.

    Raises:
        UserError: if no calibration fits, the file is damaged, or a level needs more validation windows.
    """
    path, pred_len = folder / FILE, checkpoint.flags["pred_len"]
    calibration = _read(path, pred_len) if path.is_file() else None
    if calibration and calibration.is_pooled:
        calibration = replace(calibration, channels=tuple(channels))  # valid for any series
    if calibration is None or (calibration.checkpoint, calibration.channels) != (checkpoint.sha256, tuple(channels)):
        raise UserError(
            f"no {FILE} of {checkpoint.path} and these channels in {folder}: test once with --level, without"
            " --predict, on a CSV with validation rows"
        )
    for level in levels:
        if not np.isfinite(calibration.quantiles[level - 1]).all():
            raise UserError(f"{path} has too few validation windows for --level {level}: give a lower level")
    return calibration


def _read(path: Path, pred_len: int) -> Calibration:
    try:
        with np.load(path, allow_pickle=False) as file:
            pooled = "is_pooled" in file and bool(file["is_pooled"])  # earlier versions never pooled
            channels, quantiles = tuple(file["channels"].tolist()), file["quantiles"]
            _check_quantiles(quantiles, (len(LEVELS), 1 if pooled else len(channels), pred_len))
            return Calibration(channels, quantiles, str(file["checkpoint"]), pooled)
    except Exception as problem:  # numpy can raise anything for a truncated or foreign file
        raise UserError(f"{path} is damaged: test once with --level to write it anew") from problem


def _check_quantiles(quantiles: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise ValueError for quantiles that `Residuals` cannot have computed."""
    if quantiles.shape != shape or quantiles.dtype != np.float32:
        raise ValueError(f"quantiles of shape {quantiles.shape} and {quantiles.dtype}, not {shape} and float32")
    # Not np.diff: the last quantiles may be infinite, and inf - inf is NaN. NaN itself fails the first comparison.
    if not ((quantiles >= 0).all() and (quantiles[1:] >= quantiles[:-1]).all()):
        raise ValueError("quantiles that are negative, unsorted or NaN")


class IntervalScores(Metric):
    """Coverage, width and interval score of prediction intervals on the test windows.

    Args:
        calibration: the calibration of the intervals; None if there are no levels.
        levels: in percent.
        headline: the index of the channel to score, None for all channels.
    """

    def __init__(self, calibration: Calibration | None, levels: Sequence[int], headline: int | None):
        self._calibration = calibration
        self._levels = levels
        self._headline = headline
        self._sums = {level: np.zeros(()) for level in levels}  # (3, pred_len): covered, width, score
        self._known: np.ndarray | int = 0  # number of known targets, by step
        self.windows = 0

    def update(self, batch: Forecasts) -> None:
        """Add a batch to the sums."""
        counted = slice(None) if self._headline is None else batch.channels == self._headline
        channels, deviations = batch.channels[counted], batch.deviation[counted]
        distance = np.abs(batch.target - batch.forecast)[counted].astype(np.float64)
        is_known = ~np.isnan(batch.target[counted])
        for level in self._levels:
            half = self._calibration.half_widths(level, channels, deviations)
            beyond = np.maximum(distance - half, 0)
            # The interval score of Winkler (1972): the width, plus a penalty for misses that grows with the level.
            score = 2 * half + beyond * 200 / (100 - level)
            parts = np.stack([(distance <= half).astype(np.float64), 2 * half, score])
            self._sums[level] = self._sums[level] + np.where(is_known, parts, 0).sum(axis=1)
        self._known = self._known + is_known.sum(axis=0)
        self.windows += int(is_known.any(axis=1).sum())

    def compute(self) -> list[dict]:
        """Compute the intervals of metrics.json, a dictionary for each level; widths and scores are scaled."""
        found, names = [], ("coverage", "width", "score")
        for level, sums in self._sums.items():
            means = sums / np.maximum(self._known, 1)  # (3, pred_len)
            overall = {name: self._mean(row) for name, row in zip(names, means, strict=True)}
            by_step = {
                f"{name}_by_step": [value if known else None for value, known in zip(row, self._known, strict=True)]
                for name, row in zip(names, means.tolist(), strict=True)
            }
            found.append({"level": level, **overall, **by_step})
        return found

    def _mean(self, by_step: np.ndarray) -> float:
        """Average the means of the steps over all known targets."""
        if (self._known == self._known[0]).all():
            return float(by_step.mean())
        return float(np.average(by_step, weights=self._known))
