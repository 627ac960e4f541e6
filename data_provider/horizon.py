"""The last rows of a CSV, which are the context of a forecast, and the dates of the horizon."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_provider.calendars import Calendar
from data_provider.covariates import Explainer
from data_provider.facts import DataFacts
from data_provider.forecast_features import KnownRows
from data_provider.known_ahead import BoostedEffect
from data_provider.tables import Table, fill
from utils.errors import UserError


@dataclass(frozen=True)
class LastWindow:
    """The last rows of each channel of a CSV, and the dates to forecast.

    Attributes:
        values: (seq_len, channels), in the CSV's units, with filled gaps.
        dates: the dates of these rows, for each channel.
        future_dates: the pred_len dates to forecast, for each channel.
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
        """Whether the CSV is long."""
        return self.table.is_long

    def scaled(self, facts: DataFacts) -> np.ndarray:
        """Scale the rows and subtract the covariates' effect, (seq_len, channels), by the facts of a run."""
        rows = scaled_rows(self.table, *facts.scale_of(self.channels, self.values), facts.explainer)
        return rows[self.table.spans.last(len(self.values))[0]].T

    def restore(self, forecast: np.ndarray, facts: DataFacts) -> np.ndarray:
        """Convert a forecast with the covariates' effect, (pred_len, channels), to the CSV's units; undoes `scaled`."""
        mean, deviation = facts.scale_of(self.channels, self.values)
        return forecast * deviation + mean

    def covariate_effect(self, facts: DataFacts) -> np.ndarray:
        """Compute the covariates' effect on the scaled rows to forecast, (pred_len, channels).

        Raises:
            UserError: if a covariate that was numeric in training is text.
        """
        steps, covariates = len(self.future_dates[0]), self.table.covariates
        effect = np.zeros((steps, len(self.channels)))
        if facts.explainer:
            rows = covariates.spans.part(0, steps).slices()
            linear = Explainer.from_dict(facts.explainer).explain(covariates.future, rows, self.channels)
            effect += linear.reshape(-1, steps).T
        if facts.boosted:
            boosted = BoostedEffect.from_dict(facts.boosted)
            contexts = self.scaled(facts).T.astype(np.float32)
            first = np.arange(len(contexts)) * (contexts.shape[1] + steps)
            effect += boosted.effect(contexts, self.channels, self._known_rows(boosted), first).T
        return effect

    def _known_rows(self, effect: BoostedEffect) -> KnownRows:
        """Encode what is known of the rows of each channel's context and horizon, one channel after the other."""
        covariates, count, steps = self.table.covariates, len(self.channels), len(self.future_dates[0])
        contexts = covariates.rows.iloc[self.table.spans.last(len(self.values))[1].ravel()]
        if covariates.known or covariates.notes:
            horizons = covariates.future.iloc[(covariates.spans.first[:, None] + np.arange(steps)).ravel()]
        else:  # nothing is known of them but their dates
            horizons = contexts.iloc[:1].map(lambda _: np.nan).iloc[np.zeros(count * steps, int)]
        dates = [self.dates[0].append([*self.dates[1:]]), self.future_dates[0].append([*self.future_dates[1:]])]
        parts = [
            effect.rows_of(frame, own, covariates.states)
            for frame, own in zip((contexts, horizons), dates, strict=True)
        ]
        joined = []
        for pair in zip(*((part.known, part.past, part.calendar, part.notes) for part in parts), strict=True):
            by_channel = [values.reshape(count, len(values) // count, values.shape[1]) for values in pair]
            both = np.concatenate(by_channel, axis=1)
            joined.append(both.reshape(count * both.shape[1], both.shape[2]))
        return KnownRows(*joined)


def scaled_rows(table: Table, mean: np.ndarray, deviation: np.ndarray, explainer: dict | None) -> np.ndarray:
    """Scale all rows of a table, subtract the covariates' effect and fill the gaps, (all rows,).

    `mean` and `deviation` are (channels,); `explainer` holds the fields of an `Explainer`, None without covariates.
    """
    scaled = table.scaled(mean, deviation)
    if explainer:
        rows, dates = table.covariates.rows, table.spans.date_slices()
        scaled = scaled - Explainer.from_dict(explainer).explain(rows, dates, table.channels)
    return fill(scaled, table.spans)


def last_window(table: Table, seq_len: int, pred_len: int) -> LastWindow:
    """Take the last seq_len rows of a table, and find the next pred_len dates.

    Raises:
        UserError: if a channel has fewer rows than seq_len, or the next dates are missing or invalid.
    """
    spans = table.spans
    if spans.rows.min() < seq_len:
        raise UserError(f"{table.source} has {spans.rows.min()} rows: a forecast needs --seq_len {seq_len}")
    has_future = table.covariates and (table.covariates.known or table.covariates.notes)
    next_dates = _dates_of_covariates if has_future else _extrapolated_dates
    return LastWindow(
        table=table,
        values=table.filled[spans.last(seq_len)[0]].T,
        dates=tuple(table.dates[rows.stop - seq_len : rows.stop] for rows in spans.date_slices()),
        future_dates=tuple(next_dates(table, pred_len)),
    )


def _last_dates(table: Table) -> pd.DatetimeIndex:
    """Take the last date of each channel."""
    return table.dates[table.spans.last(1)[1][:, 0]]


def _dates_of_covariates(table: Table, count: int) -> Iterator[pd.DatetimeIndex]:
    """Yield the next dates of each channel, for which the covariates are known."""
    spans, known = table.covariates.spans, table.covariates.future.index
    if (spans.rows < count).any():
        fewest = int(spans.rows.argmin())
        whose = f" of series {table.channels[fewest]!r}" if table.is_long else ""
        raise UserError(
            f"{table.source}: a forecast of --pred_len {count} rows with --covariates needs {count} rows after the"
            f" last known one{whose}, in which only the covariates have values: there are {spans.rows[fewest]}"
        )
    horizons = table.covariates.future[list(table.covariates.known)].iloc[
        np.unique((spans.first[:, None] + np.arange(count)).ravel())
    ]
    if missing := int(horizons.isna().sum().sum()):
        name = horizons.isna().any().idxmax()
        raise UserError(
            f"{table.source}: {missing} cells of --covariates are empty in the rows to forecast, {name!r} at"
            f" {horizons.index[horizons[name].isna().argmax()]} first: fill them"
        )
    calendars = {}
    for channel, (last, first) in enumerate(zip(_last_dates(table), spans.first, strict=True)):
        future = known[first : first + count]
        if not future.is_monotonic_increasing or future[0] < last:
            raise UserError(f"{table.source}: the rows after {last} are not in order: sort them by date")
        if table.is_long and (future[0] == last or not future.is_unique):
            raise UserError(f"{table.source}: a date from {last} on occurs twice: give each row its own date")
        _check_step(table, _calendar_of(table, channel, last, calendars), last, future)
        yield future


def _check_step(table: Table, calendar: Calendar, last: pd.Timestamp, future: pd.DatetimeIndex) -> None:
    """Refuse rows to forecast whose dates do not go on at the step of the data."""
    if (wrong := calendar.first_deviation(last, future)) is None:
        return
    before = future[wrong - 1] if wrong else last
    raise UserError(
        f"{table.source}: the rows to forecast do not go on at the step of the data: {future[wrong]} comes after"
        f" {before}, expected was {calendar.next_dates(before, 1)[0]}: add the missing rows, or correct the dates"
    )


def _extrapolated_dates(table: Table, count: int) -> Iterator[pd.DatetimeIndex]:
    """Yield the next dates of each channel, by the calendar of the data."""
    calendars, futures = {}, {}
    for channel, last in enumerate(_last_dates(table)):
        if last not in futures:  # most series end with the same date
            futures[last] = _calendar_of(table, channel, last, calendars).next_dates(last, count)
        yield futures[last]


def _calendar_of(table: Table, channel: int, last: pd.Timestamp, known: dict[pd.Timestamp, Calendar]) -> Calendar:
    """Choose the calendar of a channel: that of the longest channel, unless its last date is not on it.

    A weekly series may end on another weekday than the longest one. `known` holds the calendars by last date.
    """
    if last not in known:
        calendar = table.calendar
        fits = calendar and calendar.fits(last)
        known[last] = calendar if fits else Calendar.of(table.dates_of(channel), table.source)
    return known[last]
