"""Build tables from long CSVs, which have one row for each series and date."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data_provider.covariates import check_covariates
from data_provider.csv_cells import find_sentinels, parse_numbers
from data_provider.date_styles import DateStyle
from data_provider.dates import find_date_column, parse_dates
from data_provider.tables import Covariates, Table, TableOptions
from data_provider.windows import Spans
from utils.errors import UserError, listed

# The columns of a long CSV, named as in Nixtla's libraries.
ID, DATE, VALUE = LONG = ("unique_id", "ds", "y")


class LongColumns(NamedTuple):
    """The names of the columns of a long CSV."""

    series: str
    date: str
    value: str


def is_long(frame: pd.DataFrame, options: TableOptions) -> bool:
    """Return whether the data are in long format: one row for each series and date."""
    return bool(options.id_column) or set(LONG) <= set(frame.columns)


class LongRows(NamedTuple):
    """The rows of a long CSV, in order of date within each series.

    Attributes:
        frame: the values and the covariates.
        unused: the names of the columns that are left out.
        codes: the number of each row's series, (rows,) int32.
        names: of the series.
        style: how the dates are written.
        notes: how the CSV was read, a line each.
    """

    columns: LongColumns
    frame: pd.DataFrame
    unused: list[str]
    codes: np.ndarray
    names: pd.Index
    dates: pd.DatetimeIndex
    style: DateStyle
    notes: tuple[str, ...]


def long_table(frame: pd.DataFrame, path: Path, options: TableOptions) -> Table:
    """Build the table of the selected series with at least seq_len rows, in the order of their first rows in the CSV.

    `frame` loses its columns of series and dates, whose memory is needed.

    Raises:
        UserError: names the row, column, series or flag that is wrong.
    """
    rows = _read_rows(frame, path, options)
    is_chosen = _choose_series(path, rows.names, options.series)
    is_known = rows.frame[rows.columns.value].notna().to_numpy()
    is_future = _follows_last_known(is_known, rows.codes)
    if not options.has_future:  # of a series without a value nothing can be said
        is_future &= np.bincount(rows.codes[is_known], minlength=len(rows.names))[rows.codes] > 0
    kept = _long_series(path, rows, is_future, is_chosen, options.seq_len)
    places, spans = _places_by_series(~is_future, rows.codes, kept)
    dates, known, channels = rows.dates[places], rows.frame.iloc[places], tuple(rows.names[kept])
    _check_steps(path, dates, spans, channels)
    codes = rows.codes[places]
    raw = parse_numbers(path, known, [rows.columns.value], lambda row: rows.names[codes[row]])[:, 0]
    if (is_empty := np.logical_and.reduceat(np.isnan(raw), spans.first)).any():
        raise UserError(f"{path}, series {channels[is_empty.argmax()]!r} holds no number: drop it")
    covariates, notes = None, rows.notes
    if names := options.all_names:
        future_places, future_spans = _places_by_series(is_future, rows.codes, kept)
        future = rows.frame.iloc[future_places][names].set_axis(rows.dates[future_places])
        covariates = Covariates(known[names].reset_index(drop=True), future, future_spans, *options.column_names)
    elif is_future.any():
        notes = (*notes, "the last rows of some series have no value: their forecast begins at the first of them")
    warnings = _left_out(int(is_chosen.sum()) - len(kept), int(is_chosen.sum()), rows.unused, options)
    warnings += find_sentinels([rows.columns.value], raw[:, None])
    read = {"date_style": rows.style, "reading": notes, "warnings": tuple(warnings)}
    return Table(path, dates, raw, channels, spans, is_long=True, covariates=covariates, **read)


def _read_rows(frame: pd.DataFrame, path: Path, options: TableOptions) -> LongRows:
    """Find the columns, number the series, parse the dates, and sort the rows within each series."""
    columns, note = _find_columns(path, frame, options)
    check_covariates(path, frame, options, columns)
    ids = frame[columns.series]
    if ids.isna().any():
        raise UserError(f"{path} data row {ids.isna().argmax() + 1}, column {ids.name!r} is empty: name its series")
    codes, names = pd.factorize(ids.astype(str))
    codes = codes.astype(np.int32)
    dates, style, notes = parse_dates(path, frame[columns.date], options.date_format, codes)
    del frame[columns.series], frame[columns.date]
    unused = [name for name in frame.columns if name not in (columns.value, *options.all_names)]
    notes = (note, *notes) if note else notes
    if _is_unsorted(dates, codes):
        order = np.lexsort((dates.asi8, codes))
        frame, codes, dates = frame.iloc[order], codes[order], dates[order]
        notes = (*notes, "the rows of some series are not in order: they are sorted by date")
    return LongRows(columns, frame, unused, codes, names, dates, style, notes)


def _long_series(path: Path, rows: LongRows, is_future: np.ndarray, is_chosen: np.ndarray, seq_len: int) -> np.ndarray:
    """Find the chosen series with at least seq_len known rows."""
    counts = np.bincount(rows.codes[~is_future], minlength=len(rows.names))
    is_kept = is_chosen & (counts >= seq_len)
    if not len(rows.names):
        raise UserError(f"{path} has no rows")
    if not is_kept.any():
        raise UserError(
            f"{path}: none of {is_chosen.sum()} series has as many rows as --seq_len {seq_len}, the longest has"
            f" {int(counts[is_chosen].max(initial=0))}"
        )
    return np.flatnonzero(is_kept)


def _find_columns(path: Path, frame: pd.DataFrame, options: TableOptions) -> tuple[LongColumns, str]:
    """Find the columns of series, dates and values, and describe how the dates were found."""
    series = options.id_column or ID
    if series not in frame.columns:
        raise UserError(f"{path} has no column {series!r} for --id_column: it has {list(frame.columns)}")
    date, note = DATE, ""
    if options.date_column or DATE not in frame.columns:
        others = frame.drop(columns=[series, *(name for name in options.all_names if name in frame.columns)])
        date, note = find_date_column(path, others, options.date_column)
    value = options.target if options.target in frame.columns else VALUE
    if value not in frame.columns:
        raise UserError(f"{path} has no column {options.target!r} for --target: it has {list(frame.columns)}")
    return LongColumns(series, date, value), note


def _is_unsorted(dates: pd.DatetimeIndex, codes: np.ndarray) -> bool:
    """Return whether a row of some series is before the row of the series above it."""
    times, changes = dates.asi8, np.diff(codes)
    if (changes < 0).any():  # else the rows of each series follow each other
        by_series = np.argsort(codes, kind="stable")
        times, changes = times[by_series], np.diff(codes[by_series])
    return bool(((changes == 0) & (np.diff(times) < 0)).any())


def _places_by_series(is_chosen: np.ndarray, codes: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray | slice, Spans]:
    """Find the chosen rows of the kept series, sorted by series, without changing the order within a series."""
    if is_chosen.all() and len(kept) == codes.max(initial=-1) + 1 and not (codes[1:] < codes[:-1]).any():
        return slice(None), Spans.of_series(np.bincount(codes))  # as they are, without a copy
    places = np.flatnonzero(is_chosen)
    order = places[np.argsort(codes[places], kind="stable")]
    counts = np.bincount(codes[places], minlength=kept.max() + 1)[kept]
    return order[np.isin(codes[order], kept)], Spans.of_series(counts)


def _left_out(short: int, series: int, unused: Collection[str], options: TableOptions) -> list[str]:
    """Describe the series and columns that are not used."""
    parts = [f"{short} of {series} series have fewer rows than --seq_len {options.seq_len}: left out"] if short else []
    if unused:
        names = ",".join(unused)
        parts.append(f"columns {names} are not used (--covariates {names} uses those that are known in advance)")
    return ["; ".join(parts)] if parts else []


def _follows_last_known(is_known: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Mark the rows after the last known row of their series."""
    if is_known.all():
        return np.zeros(len(codes), bool)
    last = np.full(codes.max(initial=0) + 1, -1)
    np.maximum.at(last, codes[is_known], np.flatnonzero(is_known))
    return np.arange(len(codes)) > last[codes]


def _choose_series(path: Path, names: Sequence[str], series: str) -> np.ndarray:
    """Mark the series that --series names, by comma-separated names or patterns such as `shop-*`."""
    if not series:
        return np.ones(len(names), bool)
    is_chosen = np.zeros(len(names), bool)
    for pattern in filter(None, (word.strip() for word in series.split(","))):
        matches = np.array([name == pattern or fnmatchcase(name, pattern) for name in names], bool)
        if not matches.any():
            raise UserError(f"--series {pattern}: {path} has no such series, but {listed(names)}")
        is_chosen |= matches
    if not is_chosen.any():
        raise UserError(f"--series {series} names no series: give names or patterns separated by commas")
    return is_chosen


def _check_steps(path: Path, dates: pd.DatetimeIndex, spans: Spans, names: Sequence[str]) -> None:
    """Refuse series with repeated dates, and series whose steps differ."""
    steps = np.diff(dates.asi8)
    is_within = np.ones(len(steps), bool)
    is_within[spans.first[1:] - 1] = False
    if (bad := np.flatnonzero(is_within & (steps == 0))).size:
        name = names[spans.channel_of(bad[0] + 1)]
        raise UserError(f"{path}, series {name!r}: {dates[bad[0] + 1]} occurs twice ({len(bad)} such rows)")
    usual = np.full(len(names), np.nan)
    for number, (first, rows) in enumerate(zip(spans.first, spans.rows, strict=True)):
        if rows > 1:
            values, counts = np.unique(steps[first : first + rows - 1], return_counts=True)
            usual[number] = values[counts.argmax()]
    if np.isnan(usual).all():
        return
    shortest, longest = int(np.nanargmin(usual)), int(np.nanargmax(usual))
    if usual[longest] > 1.5 * usual[shortest]:  # months differ in length
        one, other = (f"{names[n]!r} {pd.Timedelta(usual[n], unit=dates.unit)}" for n in (shortest, longest))
        raise UserError(
            f"{path}: the series have different steps, {one} and {other}: use one CSV for each step, or select series"
            " with --series"
        )
