"""A CSV as arrays, and the flags that decide which series and columns are used."""

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from data_provider.covariates import Covariates
from data_provider.gaps import fill, note_on_gaps
from data_provider.windows import Spans


@dataclass(frozen=True, eq=False)  # arrays cannot be compared with ==
class Table:
    """The values of the channels in use, one channel after the other.

    Attributes:
        source: the CSV's name in messages.
        dates: the dates of all channels, see `spans`; they never decrease within a channel.
        raw: (all rows,) float64, in the CSV's units; NaN where a cell is empty.
        channels: the channels' names.
        spans: the rows of each channel.
        is_long: whether the CSV is long; its channels may differ in length.
        covariates: None if no covariates are named.
        left_out: a note on series and columns that are not used; empty if all are used.
        sha256: the hash of the CSV as it was read; empty for a DataFrame.
    """

    source: Path
    dates: pd.DatetimeIndex
    raw: np.ndarray
    channels: tuple[str, ...]
    spans: Spans
    is_long: bool = False
    covariates: Covariates | None = None
    left_out: str = ""
    sha256: str = ""

    @cached_property
    def filled(self) -> np.ndarray:
        """The values with forward-filled gaps, (all rows,), see `gaps.fill`."""
        return fill(self.raw, self.spans)

    def scaled(self, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
        """Scale `raw` by the mean and the deviation of each channel, (channels,) each."""
        return (self.raw - np.repeat(mean, self.spans.rows)) / np.repeat(deviation, self.spans.rows)

    def rows_of(self, channel: int) -> slice:
        """Return the slice of a channel's values."""
        first = self.spans.first[channel]
        return slice(first, first + self.spans.rows[channel])

    def date_rows(self) -> list[slice]:
        """List the slices of each channel's dates and covariates."""
        return [slice(first, first + rows) for first, rows in zip(self.spans.dates, self.spans.rows, strict=True)]

    def dates_of(self, channel: int) -> pd.DatetimeIndex:
        """Return a channel's dates."""
        first = self.spans.dates[channel]
        return self.dates[first : first + self.spans.rows[channel]]

    def dates_of_longest(self) -> pd.DatetimeIndex:
        """Return the dates of the channel with the most rows."""
        return self.dates_of(int(self.spans.rows.argmax()))

    def rows_of_a_season(self) -> int:
        """Count the rows of a day, of a week for daily data, or of a year for longer steps; at least 1.

        The count is the median of the data, so that a week of business days has five rows.
        """
        dates = self.dates_of_longest()
        days = dates.to_series().diff().median() / pd.Timedelta("1D")  # NaN for a single row: no comparison holds
        for longest_step, length, period in ((0.5, 1, "D"), (3.5, 7, "W"), (183, 365.25, "Y")):
            if days <= longest_step:
                counts = pd.Series(dates.tz_localize(None).to_period(period)).value_counts(sort=False)
                # The first and the last period may be incomplete.
                return int(counts.iloc[1:-1].median()) if len(counts) > 3 else max(round(length / days), 1)
        return 1

    def notes(self, seq_len: int) -> list[str]:
        """Describe gaps, irregular dates and unused series or columns, one line each."""
        gaps = note_on_gaps(self.raw, self.spans, self.channels, seq_len)
        lines = [self.left_out, *self._notes_on_dates(), gaps]
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
        usual = np.median(steps[~is_border]) if not is_border.all() else 0
        # With a tolerance of one half, because months and years differ in length.
        jumps = np.flatnonzero(steps > 1.5 * usual) if usual else np.zeros(0, np.int64)
        if 0 < len(jumps) < (~is_border).sum() / 2:
            where = f"before {self._row(jumps[0] + 1)} first"
            notes.append(f"{len(jumps)} gaps in the dates, {where}: windows run across them")
        return notes

    def _row(self, date: int) -> str:
        """Name the row of a date, counted from 1."""
        if not self.is_long:
            return f"data row {date + 1}"
        channel = self.spans.channel_of(date)
        return f"row {date - self.spans.dates[channel] + 1} of {self.channels[channel]}"


@dataclass(frozen=True)
class TableOptions:
    """The flags that a table depends on.

    `covariates` is the flag's list; `target_last` says whether the target becomes the last channel, as in Time-LLM for
    every data set except ETT.
    """

    features: str
    target: str
    series: str
    covariates: tuple[str, ...]
    seq_len: int
    target_last: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Take the options from the parsed flags."""
        covariates = tuple(filter(None, (name.strip() for name in args.covariates.split(","))))
        target_last = not args.data.startswith("ETT")
        return cls(args.features, args.target, args.series, covariates, args.seq_len, target_last)

    @property
    def needs_target(self) -> bool:
        """Whether the CSV must have the target column: always, except for --features M with the default target."""
        return self.features != "M" or self.target != "OT"
