"""Build tables from long CSVs, which have one row for each series and date."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.covariates import check_covariates
from data_provider.csv_cells import DATE, ID, LONG, VALUE, parse_dates, parse_numbers
from data_provider.tables import Covariates, Table, TableOptions
from data_provider.windows import Spans
from utils.errors import UserError, listed


def long_table(frame: pd.DataFrame, path: Path, options: TableOptions) -> Table:
    """Build the table of the selected series with at least seq_len rows, in the order of their first rows in the CSV.

    Raises:
        UserError: names the row, column, series or flag that is wrong.
    """
    check_covariates(path, frame, options, LONG)
    ids = frame[ID]
    if ids.isna().any():
        raise UserError(f"{path} data row {ids.isna().argmax() + 1}, column {ID!r} is empty: name its series")
    codes, names = pd.factorize(ids.astype(str))
    is_chosen = _choose_series(path, names, options.series)
    is_known = frame[VALUE].notna().to_numpy()
    is_future = _follows_last_known(is_known, codes) if options.has_future else np.zeros(len(frame), bool)
    rows = np.bincount(codes[~is_future], minlength=len(names))
    is_kept = is_chosen & (rows >= options.seq_len)
    if not is_kept.any():
        if not len(names):
            raise UserError(f"{path} has no rows")
        raise UserError(
            f"{path}: none of {is_chosen.sum()} series has as many rows as --seq_len {options.seq_len}, the longest has"
            f" {int(rows[is_chosen].max(initial=0))}"
        )
    kept = np.flatnonzero(is_kept)
    known, spans = _sort_by_series(frame[~is_future], codes[~is_future], kept)
    channels = tuple(names[kept])
    dates = parse_dates(path, known[DATE])
    _check_steps(path, dates, spans, channels)
    raw = parse_numbers(path, known, [VALUE])[:, 0]
    if (is_empty := np.logical_and.reduceat(np.isnan(raw), spans.first)).any():
        raise UserError(f"{path}, series {channels[is_empty.argmax()]!r} holds no number: drop it")
    covariates = None
    if columns := options.all_names:
        future, future_spans = _sort_by_series(frame[is_future], codes[is_future], kept)
        future_dates = parse_dates(path, future[DATE]) if len(future) else pd.DatetimeIndex([])
        future = future[columns].set_axis(future_dates)
        rows = known[columns].reset_index(drop=True)
        covariates = Covariates(rows, future, future_spans, *options.column_names)
    left_out = _left_out((is_chosen & ~is_kept).sum(), is_chosen.sum(), frame.columns, options)
    return Table(path, dates, raw, channels, spans, is_long=True, covariates=covariates, left_out=left_out)


def _sort_by_series(frame: pd.DataFrame, codes: np.ndarray, kept: np.ndarray) -> tuple[pd.DataFrame, Spans]:
    """Select the rows of the kept series and sort them by series, without changing the order within a series."""
    order = np.argsort(codes, kind="stable")
    order = order[np.isin(codes[order], kept)]
    return frame.iloc[order], Spans.of_series(np.bincount(codes, minlength=kept.max() + 1)[kept])


def _left_out(short: int, series: int, columns: Sequence[str], options: TableOptions) -> str:
    """Describe the series and columns that are not used."""
    parts = [f"{short} of {series} series have fewer rows than --seq_len {options.seq_len}: left out"] if short else []
    if unused := [name for name in columns if name not in (*LONG, *options.all_names)]:
        names = ",".join(unused)
        parts.append(f"columns {names} are not used (--covariates {names} uses those that are known in advance)")
    return "; ".join(parts)


def _follows_last_known(is_known: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Mark the rows after the last known row of their series."""
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
    """Refuse series with unsorted or repeated dates, and series whose steps differ."""
    steps = np.diff(dates.asi8)
    is_within = np.ones(len(steps), bool)
    is_within[spans.first[1:] - 1] = False
    for is_wrong, what in ((steps < 0, "is before the row above it: sort by date"), (steps == 0, "occurs twice")):
        if (bad := np.flatnonzero(is_within & is_wrong)).size:
            name = names[spans.channel_of(bad[0] + 1)]
            raise UserError(f"{path}, series {name!r}: {dates[bad[0] + 1]} {what} ({len(bad)} such rows)")
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
