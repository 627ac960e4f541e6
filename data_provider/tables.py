"""What a CSV holds, as windows need it, and what of the flags that depends on."""

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


@dataclass(frozen=True, eq=False)  # arrays have no one answer to whether they are equal
class Table:
    """What a CSV holds of the channels in use, one channel behind the other.

    Attributes:
        source: the CSV, as messages call it.
        dates: all dates; `spans` says whose. None of a channel's is before the one above it.
        raw: (all rows,) float64, in the CSV's units; NaN where a cell is empty.
        channels: the channels' names.
        spans: the rows of each channel.
        is_long: whether it was a long CSV: channels may then be of different lengths.
        covariates: of its rows and of those to come; None if none are named.
        left_out: what a note says of series that were left out; empty if none were.
        sha256: of the CSV as it was read; empty for a DataFrame.
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
        """What windows see, (all rows,): in a gap the last value before it, at the very beginning the first."""
        return fill(self.raw, self.spans)

    def scaled(self, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
        """Return `raw` less each channel's mean, in units of its deviation, (channels,) each."""
        return (self.raw - np.repeat(mean, self.spans.rows)) / np.repeat(deviation, self.spans.rows)

    def rows_of(self, channel: int) -> slice:
        """Return where the values of a channel stand."""
        first = self.spans.first[channel]
        return slice(first, first + self.spans.rows[channel])

    def channel_at(self, place: int) -> int:
        """Return the number of the channel that the value at a place belongs to."""
        return int(np.searchsorted(self.spans.first, place, side="right")) - 1

    def date_rows(self) -> list[slice]:
        """Return where the dates of each channel stand, and so its covariates."""
        return [slice(first, first + rows) for first, rows in zip(self.spans.dates, self.spans.rows, strict=True)]

    def dates_of(self, channel: int) -> pd.DatetimeIndex:
        """Return the dates of a channel's rows."""
        first = self.spans.dates[channel]
        return self.dates[first : first + self.spans.rows[channel]]

    def dates_of_longest(self) -> pd.DatetimeIndex:
        """Return the dates of the channel with the most rows."""
        return self.dates_of(int(self.spans.rows.argmax()))

    def rows_of_a_season(self) -> int:
        """Return the rows of a day, of a week where they are days, of a year where they are longer; at least 1.

        They are counted, so that a week may have five days.
        """
        dates = self.dates_of_longest()
        days = dates.to_series().diff().median() / pd.Timedelta("1D")  # of one row NaN: nothing is larger
        for longest_row, length, period in ((0.5, 1, "D"), (3.5, 7, "W"), (183, 365.25, "Y")):
            if days <= longest_row:
                counts = pd.Series(dates.tz_localize(None).to_period(period)).value_counts(sort=False)
                # The first and the last may be cut off.
                return int(counts.iloc[1:-1].median()) if len(counts) > 3 else max(round(length / days), 1)
        return 1

    def notes(self, seq_len: int) -> list[str]:
        """Return what the user should know of it, a line each."""
        gaps = note_on_gaps(self.raw, self.spans, self.channels, seq_len)
        lines = [self.left_out, *self._notes_on_dates(), gaps]
        return [f"{self.source}: {line}" for line in lines if line]

    def _notes_on_dates(self) -> list[str]:
        """Return what is odd about the steps from date to date."""
        borders = np.zeros(max(len(self.dates) - 1, 0), bool)  # from a channel to the next is no step
        firsts = np.unique(self.spans.dates)
        borders[firsts[firsts > 0] - 1] = True
        steps = np.where(borders, -1, np.diff(self.dates.asi8))
        notes = []
        if (equal := np.flatnonzero(steps == 0)).size:
            notes.append(f"{len(equal)} rows have the date of the row above them, {self._row(equal[0] + 1)} first")
        usual = np.median(steps[~borders]) if not borders.all() else 0
        # Half as long again: months and years are not all of one length.
        jumps = np.flatnonzero(steps > 1.5 * usual) if usual else np.zeros(0, np.int64)
        if 0 < len(jumps) < (~borders).sum() / 2:
            where = f"before {self._row(jumps[0] + 1)} first"
            notes.append(f"{len(jumps)} gaps in the dates, {where}: windows run across them")
        return notes

    def _row(self, date: int) -> str:
        """Say which row a date is of, counted from 1."""
        if not self.is_long:
            return f"data row {date + 1}"
        channel = int(np.searchsorted(self.spans.dates, date, side="right")) - 1
        return f"row {date - self.spans.dates[channel] + 1} of {self.channels[channel]}"


@dataclass(frozen=True)
class Choice:
    """What of the flags a table depends on: those of these names; `covariates` one by one.

    `target_last` says whether the target is moved to the last channel, as Time-LLM does for every set but ETT.
    """

    features: str
    target: str
    series: str
    covariates: tuple[str, ...]
    seq_len: int
    target_last: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Take it from all flags."""
        covariates = tuple(filter(None, (name.strip() for name in args.covariates.split(","))))
        target_last = not args.data.startswith("ETT")
        return cls(args.features, args.target, args.series, covariates, args.seq_len, target_last)
