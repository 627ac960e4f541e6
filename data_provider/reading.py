"""Read a table from a CSV or a DataFrame, either wide (one column per channel) or long."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.covariates import check_covariates
from data_provider.csv_cells import check_sorted, find_sentinels, is_newest_first, parse_numbers
from data_provider.csv_files import read_csv
from data_provider.dates import are_dates, find_date_column, parse_dates
from data_provider.long_tables import ID, LONG, is_long, long_table
from data_provider.tables import Covariates, Table, TableOptions
from data_provider.windows import Spans
from utils.cli.places import csv_path
from utils.errors import UserError


def read_table(args: argparse.Namespace) -> Table:
    """Read the run's CSV.

    Raises:
        UserError: names the file, column, row or flag that is wrong.
    """
    path, options = csv_path(args), TableOptions.of(args)
    file = read_csv(path, options.marks_of_missing, [options.id_column or ID])
    table = _table(file.frame, path, options)
    calendar = table.calendar.describe() if table.calendar else ""
    reading = tuple(filter(None, (*file.notes, *table.reading, calendar)))
    return replace(table, sha256=file.sha256, reading=reading)


def table_of(frame: pd.DataFrame, name: str, args: argparse.Namespace) -> Table:
    """Build the table of a DataFrame: in long format, or with dates in a column or as index.

    `name` is the DataFrame's name in messages; the errors are those of `read_table`.
    """
    options = TableOptions.of(args)
    if isinstance(frame.index, pd.DatetimeIndex) and not is_long(frame, options) and "date" not in frame.columns:
        frame, options = frame.rename_axis("date").reset_index(), replace(options, date_column="date")
    return _table(frame.reset_index(drop=True), Path(name), options)


def _table(frame: pd.DataFrame, path: Path, options: TableOptions) -> Table:
    if is_long(frame, options):
        if options.features != "M":
            raise UserError(
                f"{path} is a long CSV, whose series are all forecast: leave out --features {options.features}"
            )
        return long_table(frame, path, options)
    if ID in frame.columns:
        missing = [name for name in LONG if name not in frame.columns]
        raise UserError(
            f"{path} has no column {' and '.join(missing)} for a long CSV, but {list(frame.columns)}: name its columns"
            " with --id_column, --date_column and --target"
        )
    if options.series:
        raise UserError(
            f"--series {options.series} selects series of a long CSV, but {path} has no column {ID!r}: name the series'"
            " column with --id_column"
        )
    return _wide_table(frame, path, options)


def _wide_table(frame: pd.DataFrame, path: Path, options: TableOptions) -> Table:
    date, note = find_date_column(path, frame, options.date_column)
    reserved = (date, options.target) if options.needs_target else (date,)
    check_covariates(path, frame, options, reserved)
    further = [name for name in frame.columns if name not in (date, *options.all_names) and are_dates(frame[name])]
    frame = frame.drop(columns=further)
    channels = _choose_channels(path, frame, options, date)
    dates, style, notes = parse_dates(path, frame[date], options.date_format)
    if is_newest_first(dates):
        frame, dates = frame[::-1], dates[::-1]
        notes = (*notes, "the rows are newest first: they are sorted by date")
    check_sorted(path, frame[date], dates)
    cells = parse_numbers(path, frame, channels)
    # The rows after the last known one are to be forecast.
    rows = len(cells) - int((~np.isnan(cells).all(axis=1))[::-1].argmax()) if len(cells) else 0
    if rows < len(cells) and not options.has_future:
        notes = (*notes, f"the last {len(cells) - rows} rows have no value: the forecast begins at the first of them")
    cells = cells[:rows]
    has_numbers = ~np.isnan(cells).all(axis=0)
    if rows and not has_numbers.all():
        raise UserError(f"{path}, column {channels[has_numbers.argmin()]!r} holds no number: drop it")
    covariates = None
    if names := options.all_names:
        zeros = np.zeros(len(channels), np.int64)
        future = frame[names][rows:].set_axis(dates[rows:])
        future_spans = Spans(zeros, zeros + len(future), zeros)
        covariates = Covariates(frame[names][:rows].reset_index(drop=True), future, future_spans, *options.column_names)
    return Table(
        path,
        dates[:rows],
        cells.T.ravel(),
        tuple(channels),
        Spans.of_table(*cells.shape),
        covariates=covariates,
        date_style=style,
        reading=tuple(
            filter(None, (note, *(f"column {name!r} holds dates, too: left out" for name in further), *notes))
        ),
        warnings=find_sentinels(channels, cells),
    )


def _choose_channels(path: Path, frame: pd.DataFrame, options: TableOptions, date: str) -> list[str]:
    channels = [name for name in frame.columns if name not in (date, *options.all_names)]
    target = options.target
    if target not in channels:
        if options.needs_target:
            raise UserError(f"{path} has no column {target!r} for --target: it has {channels}")
        return channels
    if options.features == "S":
        return [target]
    if not options.data.startswith("ETT"):  # Time-LLM puts the target last
        channels.remove(target)
        channels.append(target)
    return channels
