"""A CSV as arrays, the flags that select its series and columns, and its gaps."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.calendars import Calendar
from data_provider.date_styles import DateStyle
from data_provider.notes import NoteStates, is_empty
from data_provider.windows import Spans
from utils.cli.options import FlagGroup
from utils.errors import listed


@dataclass(frozen=True)
class Covariates:
    """The covariates of a table's rows and of the rows to forecast.

    Attributes:
        rows: one row for each date of the table.
        future: the rows after the last known row of each channel, with their dates as index.
        spans: the rows of `future` that belong to each channel (`first` and `rows`).
        known, past, notes: the names of the columns known in advance, of those known up to the origin of a forecast,
            and of those of text known in advance.
        states: what the LLM read in the notes; None before `with_states`, or without notes.
    """

    rows: pd.DataFrame
    future: pd.DataFrame
    spans: Spans
    known: tuple[str, ...]
    past: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    states: NoteStates | None = None

    def texts(self) -> list[str]:
        """List the distinct notes."""
        columns = [frame[name] for frame in (self.rows, self.future) for name in self.notes]
        return list(dict.fromkeys(text for values in columns for text in values[~is_empty(values)].astype(str)))


@dataclass(frozen=True, eq=False)  # arrays cannot be compared with ==
class Table:
    """The values of the channels in use, one channel after the other.

    Attributes:
        source: the CSV's name in messages.
        dates: the dates of all channels, see `spans`; they never decrease within a channel.
        raw: (all rows,) float64, in the CSV's units; NaN where a cell is empty.
        is_long: whether the CSV is long; its channels may differ in length.
        sha256: the hash of the CSV as it was read; empty for a DataFrame.
        date_style: how the CSV writes dates.
        reading: how the CSV was read where it is not plain, a line each.
        warnings: what is wrong with the CSV or not used, a line each.
    """

    source: Path
    dates: pd.DatetimeIndex
    raw: np.ndarray
    channels: tuple[str, ...]
    spans: Spans
    is_long: bool = False
    covariates: Covariates | None = None
    sha256: str = ""
    date_style: DateStyle = field(default_factory=DateStyle)
    reading: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def calendar(self) -> Calendar | None:
        """The calendar of the longest channel; None if it has fewer than two dates."""
        dates = self.dates_of(self.spans.rows.argmax())
        return Calendar.of(dates, self.source) if len(dates) and dates[0] != dates[-1] else None

    @cached_property
    def filled(self) -> np.ndarray:
        """The values with forward-filled gaps, (all rows,), see `fill`."""
        return fill(self.raw, self.spans)

    def scaled(self, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
        """Scale `raw` by the mean and the deviation of each channel, (channels,) each."""
        scaled = self.raw.copy()
        for rows, own_mean, own_deviation in zip(self.spans.slices(), mean, deviation, strict=True):
            scaled[rows] -= own_mean
            scaled[rows] /= own_deviation
        return scaled

    def with_states(self, states: NoteStates) -> "Table":
        """Add what the LLM read in the notes."""
        return replace(self, covariates=replace(self.covariates, states=states))

    def rows_of(self, channel: int) -> slice:
        """Compute the slice of a channel's values."""
        first = self.spans.first[channel]
        return slice(first, first + self.spans.rows[channel])

    def dates_of(self, channel: int) -> pd.DatetimeIndex:
        """Select a channel's dates."""
        first = self.spans.dates[channel]
        return self.dates[first : first + self.spans.rows[channel]]

    def rows_of_a_season(self) -> int:
        """Count the rows of a day, of a week for daily data, or of a year for longer steps; at least 1.

        The count is the median of the data, so that a week of business days has five rows.
        """
        return self.seasons()[0]

    def seasons(self) -> list[int]:
        """Count the rows of a day, a week and a year, as far as they are longer than the step; else [1]."""
        dates, days = self.dates_of(self.spans.rows.argmax()), self.step_in_days()
        found = []
        for longest_step, length, period in ((0.5, 1, "D"), (3.5, 7, "W"), (183, 365.25, "Y")):
            if days <= longest_step:  # NaN for a single row: no comparison holds
                counts = pd.Series(dates.tz_localize(None).to_period(period)).value_counts(sort=False)
                if len(counts) > 3:  # the first and the last period may be incomplete
                    found.append(int(counts.iloc[1:-1].median()))
                else:  # with several rows a date, the median step is 0
                    found.append(max(round(length / days), 1) if days else int(counts.max()))
        return found or [1]

    def step_in_days(self) -> float:
        """Return the median step between the dates of the longest channel; NaN for a single row."""
        return self.dates_of(self.spans.rows.argmax()).to_series().diff().median() / pd.Timedelta("1D")

    def notes(self, seq_len: int) -> list[str]:
        """Describe gaps, irregular dates and unused series or columns, one line each."""
        lines = [*self.warnings, *self._notes_on_dates(), _note_on_gaps(self, seq_len)]
        return [f"{self.source}: {line}" for line in lines if line]

    def _notes_on_dates(self) -> list[str]:
        """Describe repeated dates and gaps in the dates."""
        is_border = np.zeros(max(len(self.dates) - 1, 0), bool)  # the step from one channel to the next does not count
        firsts = np.unique(self.spans.dates)
        is_border[firsts[firsts > 0] - 1] = True
        steps = np.where(is_border, -1, np.diff(self.dates.asi8))
        notes = []
        if (equal := np.flatnonzero(steps == 0)).size:
            notes.append(f"{len(equal)} rows have the date of the row above them, {self._row(equal[0] + 1)} first")
        gaps = self._gaps(firsts)
        if 0 < len(gaps) < (~is_border).sum() / 2:
            notes.append(f"{len(gaps)} gaps in the dates, before {self._row(gaps[0])} first: windows run across them")
        return notes

    def _gaps(self, firsts: np.ndarray) -> np.ndarray:
        """Find the dates before which dates are missing; `firsts` are the first dates of the channels."""
        found = firsts[:0] if self.calendar is None else self.calendar.missing(self.dates)
        return found[~np.isin(found, firsts)]

    def _row(self, date: int) -> str:
        """Name the row of a date, counted from 1."""
        if not self.is_long:
            return f"data row {date + 1}"
        channel = self.spans.channel_of(date)
        return f"row {date - self.spans.dates[channel] + 1} of {self.channels[channel]}"


@dataclass(frozen=True)
class TableOptions(FlagGroup):
    """The flags that a table depends on."""

    data: str
    features: str
    target: str
    series: str
    covariates: str
    past_covariates: str
    notes: str
    seq_len: int
    date_column: str
    id_column: str
    date_format: str
    na_values: str

    @property
    def marks_of_missing(self) -> list[str]:
        """The cells of --na_values."""
        return [cell.strip() for cell in self.na_values.split(",") if cell.strip()]

    @property
    def column_names(self) -> tuple[tuple[str, ...], ...]:
        """The names in --covariates, --past_covariates and --notes."""
        flags = (self.covariates, self.past_covariates, self.notes)
        return tuple(tuple(name.strip() for name in names.split(",") if name.strip()) for names in flags)

    @property
    def all_names(self) -> list[str]:
        """The names of all columns that explain the channels and are not forecast."""
        return [name for names in self.column_names for name in names]

    @property
    def has_future(self) -> bool:
        """Whether something is known of the rows to forecast."""
        return bool(self.column_names[0] or self.column_names[2])

    @property
    def needs_target(self) -> bool:
        """Whether the CSV must have the target column: always, except for --features M with the default target."""
        return self.features != "M" or self.target != "OT"


def fill(values: np.ndarray, spans: Spans) -> np.ndarray:
    """Forward-fill the gaps of each channel; a gap at a channel's start takes the channel's first value.

    So a context never holds a later value, except in a channel that begins with a gap. Every channel of `values`,
    (all rows,), needs a number. Without gaps, `values` itself is returned.
    """
    empty = np.isnan(values)
    if not empty.any():
        return values
    known = np.flatnonzero(~empty)
    source = np.where(empty, 0, np.arange(len(values)))
    # A channel's first row takes the channel's first number, not the last number of the channel before.
    source[spans.first] = known[np.searchsorted(known, spans.first)]
    return values[np.maximum.accumulate(source)]


def _note_on_gaps(table: Table, seq_len: int) -> str:
    """Describe the empty cells in one line: their number, the longest gaps, the channels with too many."""
    spans, channels, empty = table.spans, table.channels, np.isnan(table.raw)
    if not empty.any():
        return ""
    starts_gap = empty & ~np.concatenate([[False], empty[:-1]])
    starts_gap[spans.first] = empty[spans.first]  # no gap crosses from one channel into the next
    begins, lengths = np.flatnonzero(starts_gap), np.bincount(starts_gap.cumsum()[empty] - 1)
    longest = np.zeros(len(channels), np.int64)
    np.maximum.at(longest, spans.channel_of(begins), lengths)
    cells = np.bincount(spans.channel_of(np.flatnonzero(empty)), minlength=len(channels))
    parts = [
        f"{cells.sum()} of {len(empty)} cells are empty",
        "longest gap in rows: " + listed([f"{channels[n]} {longest[n]}" for n in np.argsort(-longest) if longest[n]]),
    ]
    if leading := int(lengths[np.isin(begins, spans.first)].sum()):
        parts.append(f"{leading} at the very beginning take the first value")
    for is_bad, words in (
        (cells > spans.rows / 2, "more than half empty"),
        (longest > seq_len, f"a gap longer than --seq_len {seq_len}"),
    ):
        if is_bad.any():
            parts.append(f"{words}: {listed([channels[n] for n in np.flatnonzero(is_bad)])}")
    return "; ".join(parts)
