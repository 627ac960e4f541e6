"""Prediction intervals for any forecaster, by split conformal prediction (Lei et al., 2018)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.runs.checkpoint import Checkpoint
from utils.runs.metrics import Forecasts, Metric
from utils.system.files import atomic_write

# In per cent; a calibration holds the quantiles of all.
LEVELS = range(1, 100)


@dataclass(frozen=True)
class Calibration:
    """How far validation targets were from their forecasts, a channel and a forecast step each.

    Attributes:
        channels: their names.
        quantiles: (99, channels, pred_len) float32, in units of the deviation of what a window shows: of `n` validation
            windows, row L - 1 holds the distance that ceil((n + 1) L / 100) of them do not exceed. An interval of that
            half width holds what comes next with a probability of at least L per cent, if it is like the validation
            windows. Infinite where there are too few windows. If pooled, all channels share them: (99, 1, pred_len).
        checkpoint: the SHA-256 of the weights' file.
        is_pooled: whether they are of the series of a long CSV: then of any.
    """

    channels: tuple[str, ...]
    quantiles: np.ndarray
    checkpoint: str
    is_pooled: bool = False

    def half_widths(self, level: int, channels: np.ndarray, deviations: np.ndarray) -> np.ndarray:
        """Return half the width of intervals, (windows, pred_len), in the units of the deviations.

        Args:
            level: in per cent.
            channels: the number of each window's channel, (windows,).
            deviations: of what each window shows, (windows,).
        """
        own = self.quantiles[level - 1]
        return (own if self.is_pooled else own[channels]) * deviations[:, None]

    def save(self, folder: Path) -> None:
        """Write `calibration.npz`, whole or not at all."""
        contents = {name: np.array(value) for name, value in vars(self).items()}
        atomic_write(folder / FILE, lambda file: np.savez(file, **contents))


FILE = "calibration.npz"


class Residuals(Metric):
    """Distances of validation targets from their forecasts, to calibrate by.

    They come a channel after the other: of one that is over, its quantiles alone are kept. A target that is not known
    does not count.

    Args:
        pooled: whether all channels share their quantiles: each series of a long CSV has few windows, and distances in
            units of the windows' deviations can be set side by side.
    """

    def __init__(self, pooled: bool = False):
        self._pooled = pooled
        self._distances: dict[int, list[np.ndarray]] = {}  # of the channels in hand
        self._quantiles: dict[int, np.ndarray] = {}

    def update(self, batch: Forecasts) -> None:
        """Keep the distances of a batch's targets from their forecasts, in units of the windows' deviations."""
        distances = np.abs(batch.target - batch.forecast) / batch.deviation[:, None]
        channels = np.zeros_like(batch.channels) if self._pooled else batch.channels
        for channel in np.unique(channels).tolist():
            self._distances.setdefault(channel, []).append(distances[channels == channel])
        for channel in [channel for channel in self._distances if channel < channels[-1]]:
            self._finish(channel)

    def _finish(self, channel: int) -> None:
        ordered = np.sort(np.concatenate(self._distances.pop(channel)), axis=0)  # NaN last
        known, steps = (~np.isnan(ordered)).sum(axis=0), np.arange(ordered.shape[1])
        quantiles = np.full((len(LEVELS), ordered.shape[1]), np.inf, np.float32)
        for row, level in enumerate(LEVELS):
            enough = known >= windows_needed(level)
            quantiles[row, enough] = ordered[_rank(level, known[enough]) - 1, steps[enough]]
        self._quantiles[channel] = quantiles

    def calibration(self, channels: Sequence[str], checkpoint: str) -> Calibration:
        """Return the calibration of these channels.

        Args:
            channels: names, by number.
            checkpoint: the SHA-256 of the weights' file.
        """
        for channel in list(self._distances):
            self._finish(channel)
        quantiles = np.stack([self._quantiles[number] for number in sorted(self._quantiles)], axis=1)
        return Calibration(tuple(channels), quantiles, checkpoint, self._pooled)


def _rank(level: int, windows: np.ndarray) -> np.ndarray:
    """Return ceil((windows + 1) level / 100), without a rounding error."""
    return -(-(windows + 1) * level // 100)


def windows_needed(level: int) -> int:
    """Return the least number of windows that a level can be calibrated on."""
    return -(-level // (100 - level))


def check_windows(levels: Sequence[int], windows: int) -> None:
    """Refuse levels for which there are too few validation windows of some channel.

    Args:
        levels: in per cent.
        windows: validation windows of the channel, and the forecast step, that has the fewest.

    Raises:
        UserError: names the number that is needed.
    """
    if levels and windows < windows_needed(max(levels)):
        raise UserError(
            f"--level {max(levels)} needs {windows_needed(max(levels))} validation windows of each channel, there are"
            f" {windows}: give a lower level, a higher --eval_windows or more rows"
        )


def load_calibration(
    folder: Path, checkpoint: Checkpoint, channels: Sequence[str], levels: Sequence[int]
) -> Calibration:
    """Return what an earlier test with --level has kept in a run folder.

    Args:
        folder: the run folder of that test.
        checkpoint: that it must be of.
        channels: that it must be of.
        levels: that it must be enough for, in per cent.

    Raises:
        UserError: if there is none, or the file is damaged or too small for a level.
    """
    path, pred_len = folder / FILE, checkpoint.flags["pred_len"]
    calibration = _read(path, pred_len) if path.is_file() else None
    if calibration and calibration.is_pooled:
        calibration = replace(calibration, channels=tuple(channels))  # it is any series'
    if calibration is None or (calibration.checkpoint, calibration.channels) != (checkpoint.sha256, tuple(channels)):
        raise UserError(
            f"no {FILE} of {checkpoint.path} and these channels in {folder}: test once with --level, without"
            " --predict, on a CSV with validation rows"
        )
    for level in levels:
        if not np.isfinite(calibration.quantiles[level - 1]).all():
            raise UserError(f"{path} is of too few validation windows for --level {level}: give a lower one")
    return calibration


def _read(path: Path, pred_len: int) -> Calibration:
    try:
        with np.load(path, allow_pickle=False) as file:
            pooled = "is_pooled" in file and bool(file["is_pooled"])  # of an earlier version: not
            channels, quantiles = tuple(file["channels"].tolist()), file["quantiles"]
            _check_quantiles(quantiles, (len(LEVELS), 1 if pooled else len(channels), pred_len))
            return Calibration(channels, quantiles, str(file["checkpoint"]), pooled)
    except Exception as problem:  # a file that is cut off or of another kind can make numpy raise anything
        raise UserError(f"{path} is damaged: test once with --level to write it anew") from problem


def _check_quantiles(quantiles: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise ValueError for what `Residuals` does not return."""
    if quantiles.shape != shape or quantiles.dtype != np.float32:
        raise ValueError(f"quantiles of shape {quantiles.shape} and {quantiles.dtype}, not {shape} and float32")
    # Infinite ones may stand at the end: their differences are not numbers. NaN is not at least 0.
    if not ((quantiles >= 0).all() and (quantiles[1:] >= quantiles[:-1]).all()):
        raise ValueError("quantiles that are negative, out of order or no numbers")


class IntervalScores(Metric):
    """The share of test targets inside their intervals, and the width of those.

    Args:
        calibration: the widths; None if there are no levels.
        levels: in per cent.
        headline: the number of the channel that figures are of, None for all.
    """

    def __init__(self, calibration: Calibration | None, levels: Sequence[int], headline: int | None):
        self._calibration = calibration
        self._levels = levels
        self._headline = headline
        self._sums = {level: np.zeros(()) for level in levels}  # then (3, pred_len): held, width, score
        self._known: np.ndarray | int = 0  # targets, by step
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
            # The interval score of Winkler (1972): the width, and what is missed, the dearer the higher the level.
            score = 2 * half + beyond * 200 / (100 - level)
            parts = np.stack([(distance <= half).astype(np.float64), 2 * half, score])
            self._sums[level] = self._sums[level] + np.where(is_known, parts, 0).sum(axis=1)
        self._known = self._known + is_known.sum(axis=0)
        self.windows += int(is_known.any(axis=1).sum())

    def compute(self) -> list[dict]:
        """Return the intervals of metrics.json, a dictionary for each level; widths and scores are scaled."""
        found = []
        for level, sums in self._sums.items():
            means = sums / np.maximum(self._known, 1)  # (3, pred_len)
            names = ("coverage", "width", "score")
            overall = {name: self._mean(row) for name, row in zip(names, means, strict=True)}
            by_step = {
                f"{name}_by_step": [value if known else None for value, known in zip(row, self._known, strict=True)]
                for name, row in zip(names, means.tolist(), strict=True)
            }
            found.append({"level": level, **overall, **by_step})
        return found

    def _mean(self, by_step: np.ndarray) -> float:
        """Return the mean over all known targets of what is a mean at each step."""
        if (self._known == self._known[0]).all():
            return float(by_step.mean())
        return float(np.average(by_step, weights=self._known))
