"""Long CSVs: a row a reading of one of many series."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.covariates import Covariates, check_cells, check_covariates
from data_provider.csv_cells import DATE, ID, LONG, VALUE, dates_of, numbers_of
from data_provider.tables import Choice, Table
from data_provider.windows import Spans
from utils.errors import UserError


def long_table(frame: pd.DataFrame, path: Path, choice: Choice) -> Table:
    """Return the series that are asked for, in the order in which they begin in the CSV, without those too short.

    Raises:
        UserError: names the row, column, series or flag that is wrong.
    """
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
    dates = dates_of(path, frame[DATE])
    _check_steps(path, dates, spans, kept_names)
    raw = numbers_of(path, frame, [VALUE])[:, 0]
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
    dates = dates_of(path, rows[DATE]) if len(rows) else pd.DatetimeIndex([])
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
