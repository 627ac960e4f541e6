"""What a CSV holds: a wide one, a column a channel, or a long one, a row a reading of one of many series."""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NoReturn, Self

import numpy as np
import pandas as pd

from data_provider.covariates import Covariates, check_cells, check_covariates
from data_provider.gaps import fill, note_on_gaps
from data_provider.windows import Spans
from utils.cli.places import csv_path
from utils.errors import UserError

# The columns of a long CSV, as Nixtla's libraries have them.
ID, DATE, VALUE = LONG = ("unique_id", "ds", "y")


@dataclass(frozen=True, eq=False)  # by identity: it is the key of a cache
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
    """

    source: Path
    dates: pd.DatetimeIndex
    raw: np.ndarray
    channels: tuple[str, ...]
    spans: Spans
    is_long: bool = False
    covariates: Covariates | None = None
    left_out: str = ""

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


def read_table(args: argparse.Namespace) -> Table:
    """Read the run's CSV; a second call for the same file and flags returns the same object.

    Raises:
        UserError: names the file, column, row or flag that is wrong.
    """
    path = csv_path(args)
    return _read_table(path, path.stat().st_mtime_ns, Choice.of(args))


def table_of(frame: pd.DataFrame, name: str, args: argparse.Namespace) -> Table:
    """Return the same of a DataFrame like the CSV: with a column `date`, or dates for its index; or a long one.

    Args:
        frame: the DataFrame.
        name: what messages call it.
        args: the parsed flags.

    Raises:
        UserError: as in `read_table`.
    """
    if "date" not in frame.columns and not is_long(frame):
        if not isinstance(frame.index, pd.DatetimeIndex):
            raise UserError(f"{name} has no column 'date' and no dates for its index: give it either")
        frame = frame.rename_axis("date").reset_index()
    return _table_of(frame.reset_index(drop=True), Path(name), Choice.of(args))


def is_long(frame: pd.DataFrame) -> bool:
    """Return whether these are the readings of many series, a row each."""
    return set(LONG) <= set(frame.columns)


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


@lru_cache(maxsize=1)
def _read_table(path: Path, _changed: int, choice: Choice) -> Table:
    return _table_of(_read_csv(path), path, choice)


def _table_of(frame: pd.DataFrame, path: Path, choice: Choice) -> Table:
    if is_long(frame):
        if choice.features != "M":
            raise UserError(
                f"{path} is a long CSV, its series have no --target: leave out --features {choice.features}"
            )
        return _long_table(frame, path, choice)
    if choice.series:
        raise UserError(f"--series {choice.series} chooses among the series of a long CSV: {path} has no column {ID!r}")
    target_is_needed = choice.features != "M" or choice.target != "OT"
    forecast = ("date", choice.target) if target_is_needed else ("date",)
    check_covariates(path, frame.columns, choice.covariates, forecast)
    check_cells(path, frame, choice.covariates)
    columns = [name for name in frame.columns if name not in choice.covariates]
    channels = _choose_channels(path, columns, choice.features, choice.target, choice.target_last)
    cells = _numbers(path, frame, channels)
    dates = _in_order(path, frame["date"], _dates(path, frame["date"]))
    rows = len(cells)
    if choice.covariates and rows:  # rows behind the last known one are the future
        is_known = ~np.isnan(cells).all(axis=1)
        rows -= int(is_known[::-1].argmax())
    cells, known = cells[:rows], ~np.isnan(cells[:rows])
    if rows and not known.any(axis=0).all():
        raise UserError(f"{path}, column {channels[known.any(axis=0).argmin()]!r} holds no number: drop it")
    spans, covariates = Spans.of_table(*cells.shape), None
    if choice.covariates:
        count = len(channels)
        to_come = Spans(np.zeros(count, np.int64), np.full(count, len(frame) - rows), np.zeros(count, np.int64))
        explaining = frame[list(choice.covariates)]
        covariates = Covariates(explaining[:rows], explaining[rows:].set_axis(dates[rows:]), to_come)
    values = np.ascontiguousarray(cells.T).ravel()
    return Table(path, dates[:rows], values, tuple(channels), spans, covariates=covariates)


def _long_table(frame: pd.DataFrame, path: Path, choice: Choice) -> Table:
    """Return the series that are asked for, in the order in which they begin in the CSV, without those too short."""
    check_covariates(path, frame.columns, choice.covariates, LONG)
    check_cells(path, frame, choice.covariates)
    ids, seq_len = frame[ID], choice.seq_len
    if ids.isna().any():
        raise UserError(f"{path} data row {ids.isna().argmax() + 1}, column {ID!r} is empty: name its series")
    codes, names = pd.factorize(ids.astype(str))
    chosen = _choose_series(path, names, choice.series)
    future = None
    if choice.covariates:
        is_future = _behind_the_last_known(frame[VALUE].notna().to_numpy(), codes)
        future, frame, codes = (frame[is_future], codes[is_future]), frame[~is_future], codes[~is_future]
    rows = np.bincount(codes, minlength=len(names))
    long_enough = rows >= seq_len
    if not len(names):
        raise UserError(f"{path} has no rows")
    if not (chosen & long_enough).any():
        longest = int(rows[chosen].max(initial=0))
        raise UserError(
            f"{path}: none of {chosen.sum()} series has as many rows as --seq_len {seq_len}, the longest has {longest}"
        )
    codes = np.where((chosen & long_enough)[codes], codes, len(names))
    order = np.argsort(codes, kind="stable")[: rows[chosen & long_enough].sum()]
    frame, kept = frame.iloc[order], np.flatnonzero(chosen & long_enough)
    first = np.concatenate([[0], rows[kept].cumsum()[:-1]])
    spans, kept_names = Spans(first, rows[kept], first), tuple(names[kept])
    dates = _dates(path, frame[DATE])
    _check_steps(path, dates, spans, kept_names)
    raw = _numbers(path, frame, [VALUE])[:, 0]
    if (nothing := np.logical_and.reduceat(np.isnan(raw), first)).any():
        raise UserError(f"{path}, series {kept_names[nothing.argmax()]!r} holds no number: drop it")
    covariates = _long_covariates(path, frame, future, kept, choice) if future else None
    left_out = _left_out(int((chosen & ~long_enough).sum()), int(chosen.sum()), frame.columns, choice)
    return Table(path, dates, raw, kept_names, spans, is_long=True, covariates=covariates, left_out=left_out)


def _left_out(short: int, series: int, columns: Sequence[str], choice: Choice) -> str:
    """Say which series and columns of a long CSV are not used."""
    parts = [f"{short} of {series} series have fewer rows than --seq_len {choice.seq_len}: left out"] if short else []
    if unused := [name for name in columns if name not in (*LONG, *choice.covariates)]:
        names = ",".join(unused)
        parts.append(f"columns {names} are not used (--covariates {names} uses what is known in advance)")
    return "; ".join(parts)


def _behind_the_last_known(is_known: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return which rows come behind the last known one of their series."""
    last = np.full(codes.max(initial=0) + 1, -1)
    np.maximum.at(last, codes[is_known], np.flatnonzero(is_known))
    return np.arange(len(codes)) > last[codes]


def _long_covariates(
    path: Path, frame: pd.DataFrame, future: tuple[pd.DataFrame, np.ndarray], kept: np.ndarray, choice: Choice
) -> Covariates:
    """Return the covariates of the rows of series, and of those behind them.

    Args:
        path: the CSV.
        frame: the rows, a series behind the other.
        future: rows behind the last known ones, in the CSV's order, and the numbers of their series.
        kept: the numbers of the series that are used.
        choice: of the columns.
    """
    names = list(choice.covariates)
    rows, codes = future
    counts = np.bincount(codes, minlength=kept.max() + 1)[kept]
    order = np.argsort(codes, kind="stable")
    order = order[np.isin(codes[order], kept)]
    rows = rows.iloc[order]
    dates = _dates(path, rows[DATE]) if len(rows) else pd.DatetimeIndex([])
    first = np.concatenate([[0], counts.cumsum()[:-1]])
    spans = Spans(first, counts, first)
    return Covariates(frame[names].reset_index(drop=True), rows[names].set_axis(dates), spans)


def _choose_series(path: Path, names: Sequence[str], series: str) -> np.ndarray:
    """Return which series --series asks for: names or patterns such as `shop-*`, between commas."""
    if not series:
        return np.ones(len(names), bool)
    chosen = np.zeros(len(names), bool)
    for pattern in filter(None, (word.strip() for word in series.split(","))):
        matching = np.array([name == pattern or fnmatchcase(name, pattern) for name in names])
        if not matching.any():
            raise UserError(f"--series {pattern}: {path} has no such series, but {', '.join(names[:5])} ...")
        chosen |= matching
    if not chosen.any():
        raise UserError(f"--series {series} names none: give names or patterns, with commas between them")
    return chosen


def _check_steps(path: Path, dates: pd.DatetimeIndex, spans: Spans, names: Sequence[str]) -> None:
    """Refuse series that are not in order, that have a date twice, or whose steps are not alike."""
    steps = np.diff(dates.asi8)
    within = np.ones(len(steps), bool)
    within[spans.first[1:] - 1] = False
    for wrong, what in ((steps < 0, "is before the row above it: sort by date"), (steps == 0, "is there twice")):
        if (bad := np.flatnonzero(within & wrong)).size:
            name = names[np.searchsorted(spans.first, bad[0] + 1, side="right") - 1]
            raise UserError(f"{path}, series {name!r}: {dates[bad[0] + 1]} {what} ({len(bad)} such rows)")
    usual = np.array(
        [
            _most_frequent(steps[first : first + rows - 1]) if rows > 1 else np.nan
            for first, rows in zip(spans.first, spans.rows, strict=True)
        ]
    )
    if np.isnan(usual).all():
        return
    longest, shortest = int(np.nanargmax(usual)), int(np.nanargmin(usual))
    if usual[longest] > 1.5 * usual[shortest]:  # months are not all of one length
        one, other = (
            f"{names[number]!r} {pd.Timedelta(usual[number], unit=dates.unit)}" for number in (shortest, longest)
        )
        raise UserError(
            f"{path}: series of different steps, {one} and {other}: put each step into a CSV of its own, or choose"
            " with --series"
        )


def _most_frequent(steps: np.ndarray) -> int:
    values, counts = np.unique(steps, return_counts=True)
    return values[counts.argmax()]


def _read_csv(path: Path) -> pd.DataFrame:
    before = _state_of(path)
    try:
        frame = pd.read_csv(path, encoding="utf-8-sig", dtype={ID: str})
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8 but {_guess_encoding(path)}: save it as UTF-8") from problem
    except Exception as problem:  # of whatever kind: empty, ragged, a broken archive, a folder without permission
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise UserError(f"{path} is not a CSV with a header line: {reason[0]}") from problem
    if _state_of(path) != before:  # half of it may be of before, its last cell may lack digits
        raise UserError(f"{path} changed while it was read: run it again when it is written")
    if not isinstance(frame.index, pd.RangeIndex):
        raise UserError(f"{path} has rows with more cells than its header: give every column a name")
    if "date" not in frame.columns and not is_long(frame):
        _refuse_header(path, list(frame.columns))
    return frame


def _state_of(path: Path) -> tuple[int, int] | None:
    """Return size and time of change of a file; None if it is not there any more."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _refuse_header(path: Path, columns: list[str]) -> NoReturn:
    if len(columns) == 1:
        for delimiter, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if delimiter in columns[0]:
                raise UserError(f"{path} has its columns separated by {name}: save it with commas")
    if missing := [name for name in LONG if name not in columns]:
        also = f" ({', '.join(missing)} for a long CSV)" if len(missing) < len(LONG) else ""
        raise UserError(f"{path} has no column 'date'{also}, but {columns}: name the timestamps' column 'date'")
    raise AssertionError(columns)


def _guess_encoding(path: Path) -> str:
    """Name the encoding of a text that is not UTF-8."""
    start = path.read_bytes()[:100_000]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in start:
        return "UTF-16"
    try:
        start[: len(start) // 2 * 2].decode("gbk")
    except UnicodeDecodeError as problem:
        # Cut in the middle of a character at the very end is no sign against it.
        return "GBK" if problem.end >= len(start) - 1 else "of another encoding"
    return "GBK"


def _choose_channels(path: Path, columns: list[str], features: str, target: str, target_last: bool) -> list[str]:
    channels = [name for name in columns if name != "date"]
    target_is_needed = features != "M" or target != "OT"
    if target not in channels:
        if target_is_needed:
            raise UserError(f"{path} has no column {target!r} for --target, but {channels}")
        return channels
    if features == "S":
        return [target]
    if target_last:
        channels.remove(target)
        channels.append(target)
    return channels


def _numbers(path: Path, frame: pd.DataFrame, columns: list[str]) -> np.ndarray:
    """Return columns as float64, (rows, columns): NaN where a cell is empty; nothing else may stand there."""
    if not columns:
        raise UserError(f"{path} has no column beside 'date': there is nothing to forecast")
    numbers = frame[columns].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    bad = ~np.isfinite(numbers)
    if bad.any() and (bad := np.argwhere(bad & frame[columns].notna().to_numpy())).size:
        row, column = bad[0]
        cell = frame[columns[column]].iloc[row]
        whose = f"series {frame[ID].iloc[row]!r}, " if is_long(frame) else ""
        raise UserError(
            f"{path} data row {frame.index[row] + 1}, {whose}column {columns[column]!r}: {str(cell)!r} is not a finite"
            f" number: correct such cells or leave them empty ({len(bad)} in all)"
        )
    return numbers


def _dates(path: Path, column: pd.Series) -> pd.DatetimeIndex:
    if pd.api.types.is_numeric_dtype(column):
        raise UserError(f"{path}, column {column.name!r}: numbers such as {column.iloc[0]} are no dates")
    # ISO 8601 first: with it, midnight may be written without a time.
    for options in ({"format": "ISO8601"}, {}):
        try:
            with warnings.catch_warnings():  # what pandas warns of, cells that are no dates, is refused below
                warnings.filterwarnings("ignore", "Could not infer format")
                dates = pd.to_datetime(column, errors="coerce", **options)
        except ValueError as problem:  # offsets from UTC that change
            raise UserError(f"{path}, column {column.name!r}: {str(problem).splitlines()[0]}") from problem
        if not dates.isna().any():
            return pd.DatetimeIndex(dates)
    row = int(dates.isna().to_numpy().argmax())
    text = str(column.iloc[row])
    raise UserError(f"{path} data row {column.index[row] + 1}, column {column.name!r}: {text!r} is not a date")


def _in_order(path: Path, column: pd.Series, dates: pd.DatetimeIndex) -> pd.DatetimeIndex:
    """Return the dates if none is before the one above it."""
    back = np.flatnonzero(np.diff(dates.asi8) < 0)
    if len(back):
        row = back[0] + 1
        raise UserError(
            f"{path} data row {row + 1}, column 'date': {str(column.iloc[row])!r} is before the row above it: sort the"
            f" rows by date ({len(back)} such rows)"
        )
    return dates
