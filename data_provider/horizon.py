"""The forecast horizon: the last rows of a CSV, which a forecast is made from, and the dates to forecast."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.covariates import Explainer
from data_provider.facts import DataFacts
from data_provider.gaps import fill
from data_provider.tables import Table
from utils.errors import UserError


@dataclass(frozen=True)
class LastWindow:
    """The last rows of each channel of a CSV, and the dates of the next ones.

    Attributes:
        table: the CSV.
        values: (seq_len, channels), in the CSV's units; gaps are filled.
        dates: of those rows, for each channel.
        future_dates: of the pred_len rows to forecast, for each channel.
    """

    table: Table
    values: np.ndarray
    dates: tuple[pd.DatetimeIndex, ...]
    future_dates: tuple[pd.DatetimeIndex, ...]

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels' names."""
        return self.table.channels

    @property
    def is_long(self) -> bool:
        """Whether it was a long CSV."""
        return self.table.is_long

    def scaled(self, facts: DataFacts) -> np.ndarray:
        """Return the rows as the model sees them, (seq_len, channels): scaled, without the covariates' effect.

        Args:
            facts: of the run's data.
        """
        rows = scaled_rows(self.table, *facts.scale_of(self.channels, self.values), facts.explainer)
        return rows[self.table.spans.last(len(self.values))[0]].T

    def restore(self, forecast: np.ndarray, facts: DataFacts) -> np.ndarray:
        """Return a model's forecast, (pred_len, channels), in the CSV's units, with the covariates' effect.

        Args:
            forecast: scaled as `scaled` does.
            facts: of the run's data.
        """
        mean, deviation = facts.scale_of(self.channels, self.values)
        return (forecast + self.future_covariate_effect(facts)) * deviation + mean

    def future_covariate_effect(self, facts: DataFacts) -> np.ndarray:
        """Return what the covariates explain of the scaled rows to forecast, (pred_len, channels).

        Raises:
            UserError: if a covariate is not as it was in training.
        """
        steps = len(self.future_dates[0])
        if not facts.explainer:
            return np.zeros((steps, len(self.channels)))
        covariates = self.table.covariates
        rows = [slice(first, first + steps) for first in covariates.spans.first]
        effect = Explainer.from_dict(facts.explainer).explain(covariates.future, rows, self.channels)
        return effect.reshape(-1, steps).T


def scaled_rows(table: Table, mean: np.ndarray, deviation: np.ndarray, explainer: dict | None) -> np.ndarray:
    """Return all rows of a table as a model sees them, (all rows,): scaled, without the covariates' effect, filled.

    Args:
        table: the CSV.
        mean, deviation: to scale each channel by, (channels,) each.
        explainer: `Explainer.as_dict`; None without covariates.
    """
    scaled = table.scaled(mean, deviation)
    if explainer:
        effect = Explainer.from_dict(explainer).explain(table.covariates.rows, table.date_rows(), table.channels)
        scaled = scaled - effect
    return fill(scaled, table.spans)


def last_window(table: Table, seq_len: int, pred_len: int) -> LastWindow:
    """Return the last rows of a table, to forecast from.

    Args:
        table: the CSV.
        seq_len, pred_len: rows of the window, and to forecast.

    Raises:
        UserError: if it has fewer rows than a window, or its dates have no step.
    """
    spans = table.spans
    if spans.rows.min() < seq_len:
        raise UserError(f"{table.source} has {spans.rows.min()} rows: a forecast needs --seq_len {seq_len}")
    dates = [table.dates_of(channel) for channel in range(len(table.channels))]
    find = _dates_of_covariates if table.covariates else _continued_dates
    return LastWindow(
        table=table,
        values=table.filled[spans.last(seq_len)[0]].T,
        dates=tuple(own[-seq_len:] for own in dates),
        future_dates=tuple(find(table, dates, pred_len)),
    )


def _dates_of_covariates(table: Table, dates: Sequence[pd.DatetimeIndex], count: int) -> Iterator[pd.DatetimeIndex]:
    """Yield the next dates of each channel: those that the covariates have."""
    spans, there = table.covariates.spans, table.covariates.future.index
    if (spans.rows < count).any():
        fewest = int(spans.rows.argmin())
        whose = f" of series {table.channels[fewest]!r}" if table.is_long else ""
        raise UserError(
            f"{table.source}: a forecast of --pred_len {count} rows with --covariates needs {count} rows behind the"
            f" last known one{whose}, with the covariates filled and the rest empty: there are {spans.rows[fewest]}"
        )
    for own, first in zip(dates, spans.first, strict=True):
        future = there[first : first + count]
        if not future.is_monotonic_increasing or future[0] < own[-1]:
            raise UserError(f"{table.source}: the rows behind {own[-1]} are not in order: sort them by date")
        if table.is_long and (future[0] == own[-1] or not future.is_unique):
            raise UserError(f"{table.source}: a date behind {own[-1]} is there twice: each row needs its own")
        yield future


def _continued_dates(table: Table, dates: Sequence[pd.DatetimeIndex], count: int) -> Iterator[pd.DatetimeIndex]:
    """Yield the next dates of each channel, at the step of the data."""
    step = step_of(table.dates_of_longest(), table.source)
    known = {}  # most series end with the same date
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
        raise UserError(f"{source}: the dates have no step to continue with")
    return step[0]


def continue_dates(last: pd.Timestamp, step: pd.offsets.BaseOffset | pd.Timedelta, count: int) -> pd.DatetimeIndex:
    """Return so many dates after the last one."""
    if isinstance(step, pd.Timedelta):
        return pd.DatetimeIndex([last + step * number for number in range(1, count + 1)])
    dates = pd.date_range(last, periods=count + 1, freq=step)
    return dates[dates > last][:count]
