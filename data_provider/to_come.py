"""The last rows of a CSV, which a forecast is made from, and the dates of the rows to come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.covariates import Explainer
from data_provider.gaps import fill
from data_provider.tables import Table
from utils.errors import UserError


@dataclass(frozen=True)
class LastWindow:
    """The last rows of each channel of a CSV, and when the next ones will be.

    Attributes:
        table: the CSV.
        values: (seq_len, channels), in the CSV's units; gaps are filled.
        dates: of those rows, a channel each.
        dates_to_come: of the pred_len rows to come, a channel each.
    """

    table: Table
    values: np.ndarray
    dates: tuple[pd.DatetimeIndex, ...]
    dates_to_come: tuple[pd.DatetimeIndex, ...]

    @property
    def channels(self) -> tuple[str, ...]:
        """Return the channels' names."""
        return self.table.channels

    @property
    def is_long(self) -> bool:
        """Return whether it was a long CSV."""
        return self.table.is_long

    def scaled(self, mean: np.ndarray, deviation: np.ndarray, explainer: dict | None) -> np.ndarray:
        """Return the rows as a model sees them, (seq_len, channels).

        Args:
            mean, deviation: to scale each channel by, (channels,).
            explainer: `Explainer.as_dict` of the covariates, None if there are none.
        """
        if not explainer:
            return (self.values - mean) / deviation
        left = left_to_forecast(self.table, mean, deviation, explainer)
        return left[self.table.spans.last(len(self.values))[0]].T

    def explained_to_come(self, explainer: dict | None) -> np.ndarray:
        """Return what the covariates explain of the scaled rows to come, (pred_len, channels)."""
        steps = len(self.dates_to_come[0])
        if not explainer:
            return np.zeros((steps, len(self.channels)))
        covariates = self.table.covariates
        rows = [slice(first, first + steps) for first in covariates.spans.first]
        explained = Explainer.from_dict(explainer).explain(covariates.to_come, rows, self.channels)
        return explained.reshape(-1, steps).T


def left_to_forecast(table: Table, mean: np.ndarray, deviation: np.ndarray, explainer: dict) -> np.ndarray:
    """Return all rows of a table scaled, less what the covariates explain, gaps filled; (all rows,).

    Args:
        table: with covariates.
        mean, deviation: to scale each channel by, (channels,).
        explainer: `Explainer.as_dict`.
    """
    explained = Explainer.from_dict(explainer).explain(table.covariates.rows, table.date_rows(), table.channels)
    return fill(table.scaled(mean, deviation) - explained, table.spans)


def last_window(table: Table, seq_len: int, pred_len: int) -> LastWindow:
    """Return the window that the forecast beyond a table is made from.

    Args:
        table: what the CSV holds.
        seq_len, pred_len: rows of the window, and to forecast.

    Raises:
        UserError: if it has fewer rows than a window, or dates without a step.
    """
    spans = table.spans
    if spans.rows.min() < seq_len:
        raise UserError(f"{table.source} has {spans.rows.min()} rows: a forecast needs --seq_len {seq_len}")
    dates = [table.dates_of(channel) for channel in range(len(table.channels))]
    return LastWindow(
        table=table,
        values=table.filled[spans.last(seq_len)[0]].T,
        dates=tuple(own[-seq_len:] for own in dates),
        dates_to_come=tuple(_dates_to_come(table, dates, pred_len)),
    )


def _dates_to_come(table: Table, dates: Sequence[pd.DatetimeIndex], count: int) -> Iterator[pd.DatetimeIndex]:
    """Yield the dates of the next rows of each channel: those that the covariates have, or at the step of the data."""
    if table.covariates:
        spans, there = table.covariates.spans, table.covariates.to_come.index
        if (spans.rows < count).any():
            fewest = int(spans.rows.argmin())
            whose = f" of series {table.channels[fewest]!r}" if table.is_long else ""
            raise UserError(
                f"{table.source}: a forecast of --pred_len {count} rows with --covariates needs {count} rows behind the"
                f" last known one{whose}, with the covariates filled and the rest empty: there are {spans.rows[fewest]}"
            )
        for own, first in zip(dates, spans.first, strict=True):
            coming = there[first : first + count]
            if not coming.is_monotonic_increasing or coming[0] < own[-1]:
                raise UserError(f"{table.source}: the rows behind {own[-1]} are not in order: sort them by date")
            if table.is_long and (coming[0] == own[-1] or not coming.is_unique):
                raise UserError(f"{table.source}: a date behind {own[-1]} is there twice: each row needs its own")
            yield coming
        return
    step = step_of(table.dates_of_longest(), table.source)
    known = {}  # what follows a date: most series end with the same
    for own in dates:
        if own[-1] not in known:
            # Weeks that end on another day than the longest series' go on by their own step.
            fits = isinstance(step, pd.Timedelta) or step.is_on_offset(own[-1])
            known[own[-1]] = continue_dates(own[-1], step if fits else step_of(own, table.source), count)
        yield known[own[-1]]


def step_of(dates: pd.DatetimeIndex, source: Path) -> pd.offsets.BaseOffset | pd.Timedelta:
    """Return the step from date to date: a calendar's, such as a month, or the most frequent.

    Raises:
        UserError: if the dates have no step.
    """
    recent = dates[-1000:]
    # A calendar's steps, such as months, are not all of one length.
    with pd.option_context("future.infer_freq_returns_offset", True):
        offset = pd.infer_freq(recent) if len(recent) > 2 else None
    if offset is not None:
        return offset
    steps = pd.Series(recent).diff().dropna()
    step = steps[steps > pd.Timedelta(0)].mode()
    if step.empty:
        raise UserError(f"{source}: the dates have no step to go on with")
    return step[0]


def continue_dates(last: pd.Timestamp, step: pd.offsets.BaseOffset | pd.Timedelta, count: int) -> pd.DatetimeIndex:
    """Return so many dates after the last one."""
    if isinstance(step, pd.Timedelta):
        return pd.DatetimeIndex([last + step * number for number in range(1, count + 1)])
    dates = pd.date_range(last, periods=count + 1, freq=step)
    return dates[dates > last][:count]
