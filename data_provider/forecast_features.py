"""Features of the rows to forecast: what is known of a row in advance, and what its window says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd

# Neighbors whose known columns are features of a row, too: the weather of the hour before and after matters.
_NEIGHBORS = (-1, 0, 1)


@dataclass(frozen=True, eq=False)
class KnownRows:
    """What is known of the rows of a table, encoded as numbers; NaN where a cell is empty.

    Attributes:
        known: (dates, columns) float32, known in advance.
        past: (dates, columns) float32, known up to the row itself.
        calendar: (dates, 3) float32: hour, weekday and month.
    """

    known: np.ndarray
    past: np.ndarray
    calendar: np.ndarray

    @classmethod
    def of(cls, known: np.ndarray, past: np.ndarray, dates: pd.DatetimeIndex, step: pd.Timedelta) -> Self:
        """Add the calendar of the dates; what the step makes meaningless in it, such as the hour of days, is 0."""
        hour = dates.hour + dates.minute / 60
        calendar = np.stack([hour, dates.dayofweek, dates.month], axis=1).astype(np.float32)
        days = step / pd.Timedelta("1D")
        calendar[:, [days >= 1, days > 1, days > 31]] = 0
        return cls(known.astype(np.float32), past.astype(np.float32), calendar)


def row_features(
    contexts: np.ndarray, line: np.ndarray, rows: KnownRows, first: np.ndarray, lags: Sequence[int]
) -> np.ndarray:
    """Build the features of every row to forecast of some windows.

    No feature of a window depends on anything outside its rows, nor on past columns after its context.

    Args:
        contexts: (B, seq_len), scaled, without gaps.
        line: a linear forecast of them, (B, pred_len).
        rows: what is known of the table's rows.
        first: the index in `rows` of each window's first date, (B,).
        lags: the rows of a season, and of the next longer one.

    Returns:
        (B * pred_len, features) float64, window by window.
    """
    (batch, length), horizon = contexts.shape, line.shape[1]
    steps = np.arange(horizon)
    dates = first[:, None] + length + steps  # (B, pred_len)
    parts = [*_of_windows(contexts, line, lags), *np.moveaxis(rows.calendar[dates], 2, 0)]
    end = dates[:, -1:]
    for shift in _NEIGHBORS:
        parts += [*np.moveaxis(rows.known[np.minimum(dates + shift, end)], 2, 0)]
    origin = first + length - 1
    for lag in (0, *lags):
        # The same row of the season before the origin, or the origin itself.
        back = steps - lag * (steps // lag + 1) if lag else np.full(horizon, -1)
        is_inside = back >= -length
        for columns, places in ((rows.known, dates - steps + back), (rows.past, origin[:, None] - lag + 0 * steps)):
            values = columns[np.maximum(places, first[:, None])].astype(np.float64)
            values[:, ~is_inside if columns is rows.known else np.full(horizon, lag >= length)] = np.nan
            parts += [*np.moveaxis(values, 2, 0)]
    # In float32, so that no rounding of a matrix product can move a row across a split.
    return np.stack([np.broadcast_to(part, line.shape).ravel() for part in parts], axis=1).astype(np.float32).astype(float)


def _of_windows(contexts: np.ndarray, line: np.ndarray, lags: Sequence[int]) -> list[np.ndarray]:
    """List features from the context and its linear forecast, each to be broadcast to (B, pred_len)."""
    length, steps = contexts.shape[1], np.arange(line.shape[1])
    last, recent = contexts[:, -1:], contexts[:, -lags[0] :]
    parts = [
        steps,
        line,
        line - line[:, :1],
        line[:, np.maximum(steps - 1, 0)],
        line[:, np.minimum(steps + 1, steps[-1])],
        line.mean(axis=1, keepdims=True),
        last,
        recent.mean(axis=1, keepdims=True),
        recent.max(axis=1, keepdims=True),
    ]
    for lag in lags:
        back = steps - lag * (steps // lag + 1)
        values = contexts[:, np.maximum(back, -length)]
        values[:, back < -length] = np.nan
        change = last - contexts[:, [-1 - lag]] if lag < length else np.nan
        parts += [values, change]
    return parts
