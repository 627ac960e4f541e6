"""Prediction intervals for any forecaster, by split conformal prediction (Lei et al., 2018)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.runs.checkpoint import Checkpoint
from utils.runs.metrics import Forecasts, Metric, by_step
from utils.system.files import atomic_write

FILE = "calibration.npz"

LEVELS = range(1, 100)  # in percent; a calibration holds the quantiles of all levels


@dataclass(frozen=True)
class Calibration:
    """Quantiles of the absolute forecast errors on the validation windows, for each channel and forecast step.

    Attributes:
        channels: the channels' names.
        quantiles: (99, channels, pred_len) float32, or (99, 1, pred_len) if pooled, in units of the standard deviation
            of a window's context. Row L - 1 holds the absolute error that ceil((n + 1) L / 100) of `n` validation
            windows do not exceed: intervals of that half width cover the targets of new, exchangeable windows with a
            probability of at least L percent. Infinite where there are too few windows.
        checkpoint: the SHA-256 of the checkpoint.
        is_pooled: whether all series of a long CSV share the quantiles, which then hold for any series.
    """

    channels: tuple[str, ...]
    quantiles: np.ndarray
    checkpoint: str
    is_pooled: bool = False

    def half_widths(self, level: int, channels: np.ndarray, deviations: np.ndarray) -> np.ndarray:
        """Compute half the width of windows' intervals, (windows, pred_len), in the units of `deviations`."""
        own = self.quantiles[level - 1]
        return (own if self.is_pooled else own[channels]) * deviations[:, None]

    def save(self, folder: Path) -> None:
        """Write `calibration.npz` atomically."""
        atomic_write(folder / FILE, lambda file: np.savez(file, **vars(self)))


class Residuals(Metric):
    """Absolute forecast errors on the validation windows, from which a `Calibration` is computed.

    Batches arrive in the order of their channels; once a channel is complete, only its quantiles are kept. Missing
    targets do not count. Pooled channels share their quantiles: each series of a long CSV has few windows, and errors
    in units of the windows' deviations are comparable between series.
    """

    def __init__(self, pooled: bool = False):
        self._pooled = pooled
        self._errors: dict[int, list[np.ndarray]] = {}  # errors of the incomplete channels
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
        known = (~np.isnan(ordered)).sum(axis=0)
        ranks = -(-(known + 1) * np.array(LEVELS)[:, None] // 100)  # rounded up, in exact integer arithmetic
        quantiles = np.take_along_axis(ordered, np.minimum(ranks, len(ordered)) - 1, axis=0)
        self._quantiles[channel] = np.where(ranks <= known, quantiles, np.inf).astype(np.float32)

    def calibration(self, channels: Sequence[str], checkpoint: str) -> Calibration:
        """Build the calibration of these channels, for the checkpoint with this SHA-256."""
        for channel in list(self._errors):
            self._finish(channel)
        quantiles = np.stack([self._quantiles[number] for number in sorted(self._quantiles)], axis=1)
        return Calibration(tuple(channels), quantiles, checkpoint, self._pooled)


def windows_needed(level: int) -> int:
    """Compute the minimum number of windows to calibrate a level on."""
    return -(-level // (100 - level))


def check_windows(levels: Sequence[int], windows: int) -> None:
    """Raise UserError for levels that need more than `windows` validation windows of each channel and step."""
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
    path = folder / FILE
    calibration = _read(path, checkpoint.flags["pred_len"]) if path.is_file() else None
    fits = calibration and calibration.checkpoint == checkpoint.sha256
    if not fits or not (calibration.is_pooled or calibration.channels == tuple(channels)):
        raise UserError(
            f"intervals need {FILE} in {folder}, of {checkpoint.path} and these channels: test the run once with"
            " --level, without --predict, on a CSV with validation rows"
        )
    if too_high := [level for level in levels if not np.isfinite(calibration.quantiles[level - 1]).all()]:
        raise UserError(f"{path} has too few validation windows for --level {too_high[0]}: give a lower level")
    return calibration


def _read(path: Path, pred_len: int) -> Calibration:
    try:
        with np.load(path, allow_pickle=False) as file:
            pooled = "is_pooled" in file and bool(file["is_pooled"])  # earlier versions never pooled
            channels, quantiles = tuple(file["channels"].tolist()), file["quantiles"]
            shape = (len(LEVELS), 1 if pooled else len(channels), pred_len)
            if quantiles.shape != shape or quantiles.dtype != np.float32:
                raise ValueError(f"quantiles of shape {quantiles.shape} and {quantiles.dtype}")
            # Not np.diff: the last quantiles may be infinite, and inf - inf is NaN. NaN fails the first comparison.
            if not ((quantiles >= 0).all() and (quantiles[1:] >= quantiles[:-1]).all()):
                raise ValueError("quantiles that are negative, unsorted or NaN")
            return Calibration(channels, quantiles, str(file["checkpoint"]), pooled)
    except Exception as problem:  # numpy can raise anything for a truncated or foreign file
        raise UserError(f"{path} is damaged: test once with --level to write it anew") from problem


class IntervalScores(Metric):
    """Coverage, width and interval score of prediction intervals on the test windows.

    `headline` is the index of the channel to score, None for all channels. Without levels, there is no calibration.
    """

    def __init__(self, calibration: Calibration | None, levels: Sequence[int], headline: int | None):
        self._calibration, self._headline = calibration, headline
        self._sums = {level: np.zeros(()) for level in levels}  # (3, pred_len): covered, width, score
        self._known: np.ndarray | int = 0  # number of known targets, by step
        self.windows = 0

    def update(self, batch: Forecasts) -> None:
        """Add a batch to the sums."""
        counted = slice(None) if self._headline is None else batch.channels == self._headline
        channels, deviations = batch.channels[counted], batch.deviation[counted]
        distance = np.abs(batch.target - batch.forecast)[counted].astype(np.float64)
        is_known = ~np.isnan(batch.target[counted])
        for level, sums in self._sums.items():
            half = self._calibration.half_widths(level, channels, deviations)
            beyond = np.maximum(distance - half, 0)
            # The interval score of Winkler (1972): the width, plus a penalty for misses that grows with the level.
            score = 2 * half + beyond * 200 / (100 - level)
            parts = np.stack([(distance <= half).astype(np.float64), 2 * half, score])
            self._sums[level] = sums + np.where(is_known, parts, 0).sum(axis=1)
        self._known = self._known + is_known.sum(axis=0)
        self.windows += int(is_known.any(axis=1).sum())

    def compute(self) -> list[dict]:
        """Compute the intervals of metrics.json, a dictionary for each level; widths and scores are scaled."""
        intervals = []
        for level, sums in self._sums.items():
            parts = dict(zip(("coverage", "width", "score"), sums, strict=True))
            overall = {name: self._mean(part) for name, part in parts.items()}
            steps = {f"{name}_by_step": by_step(part, self._known) for name, part in parts.items()}
            intervals.append({"level": level, **overall, **steps})
        return intervals

    def _mean(self, sums: np.ndarray) -> float:
        """Average the means of the steps over all known targets."""
        means = sums / np.maximum(self._known, 1)
        if (self._known == self._known[0]).all():
            return float(means.mean())
        return float(np.average(means, weights=self._known))
