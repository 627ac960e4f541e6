"""Features of the rows to forecast: what is known of a row in advance, and what its window says."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_provider.note_effect import tree_components

# Rows whose known columns are features of a row: itself and its neighbors.
_NEIGHBORS = (-1, 0, 1)


@dataclass(frozen=True, eq=False)
class KnownRows:
    """What is known of the rows of a table, as numbers; NaN where a cell is empty.

    Attributes:
        known: (dates, columns), known in advance.
        past: (dates, columns), known up to the origin of a forecast.
        calendar: (dates, 3), see `calendar_of`.
        notes: (dates, components), the encoded notes.
    """

    known: np.ndarray
    past: np.ndarray
    calendar: np.ndarray
    notes: np.ndarray


def calendar_of(dates: pd.DatetimeIndex, step_in_days: float) -> np.ndarray:
    """Compute hour, weekday and month, (dates, 3); 0 where the step makes them meaningless, as the hour of days."""
    calendar = np.stack([dates.hour + dates.minute / 60, dates.day_of_week, dates.month], axis=1)
    calendar[:, [step_in_days >= 1, step_in_days > 1, step_in_days > 31]] = 0
    return calendar


def row_features(
    contexts: np.ndarray,
    line: np.ndarray,
    rows: KnownRows,
    first: np.ndarray,
    lags: Sequence[int],
    note_effect: np.ndarray | None = None,
) -> np.ndarray:
    """Build the features of every row to forecast of some windows.

    They depend on the rows of the window alone, and on past columns of its context alone.

    Args:
        contexts: (B, seq_len), scaled, without gaps.
        line: a linear forecast of them, (B, pred_len).
        rows: what is known of the table's rows.
        first: the index in `rows` of each window's first date, (B,).
        lags: the rows of a season, and of the next longer one.
        note_effect: an estimate of the notes' effect, (B, pred_len); None without notes.

    Returns:
        (B * pred_len, features), window by window.
    """
    length, steps = contexts.shape[1], np.arange(line.shape[1])
    origin = first[:, None] + length - 1
    horizon = origin + 1 + steps  # (B, pred_len)
    parts = [*_window_features(contexts, line, lags), *_columns(rows.calendar[horizon])]
    if note_effect is not None:
        parts += [note_effect, note_effect.mean(axis=1, keepdims=True), *_columns(tree_components(rows.notes)[horizon])]
    for shift in _NEIGHBORS:
        parts += _columns(rows.known[np.minimum(horizon + shift, horizon[:, -1:])])
    parts += [*_columns(rows.known[origin]), *_columns(rows.past[origin])]
    for lag in lags:
        back = steps - lag * (steps // lag + 1)  # the same row of the season before the origin, from the horizon
        if -back.min() <= length:
            parts += _columns(rows.known[origin + 1 + back])
        if lag < length:
            parts += _columns(rows.past[origin - lag])
    features = np.stack([np.broadcast_to(part, line.shape).ravel() for part in parts], axis=1)
    # Rounded, so that the rounding of a matrix product, which differs between machines, hardly ever decides a split.
    return features.astype(np.float32).astype(np.float64)


def _columns(values: np.ndarray) -> list[np.ndarray]:
    """List the columns of values, (B, steps, columns)."""
    return list(np.moveaxis(values, 2, 0))


def _window_features(contexts: np.ndarray, line: np.ndarray, lags: Sequence[int]) -> list[np.ndarray]:
    """List features of the context and its linear forecast, each to be broadcast to (B, pred_len)."""
    length, steps = contexts.shape[1], np.arange(line.shape[1])
    last, recent = contexts[:, -1:], contexts[:, -lags[0] :]
    summaries = [line.mean(1), recent.mean(1), recent.max(1), recent.min(1)]
    neighbors = [line[:, np.maximum(steps - 1, 0)], line[:, np.minimum(steps + 1, steps[-1])]]
    parts = [steps, line, line - line[:, :1], *neighbors, last, *(summary[:, None] for summary in summaries)]
    for lag in lags:
        back = steps - lag * (steps // lag + 1)
        if -back.min() <= length:
            parts.append(contexts[:, length + back])
        if lag < length:
            parts.append(last - contexts[:, [-1 - lag]])
    return parts
