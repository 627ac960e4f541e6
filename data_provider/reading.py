"""Read a table from a CSV or a DataFrame, either wide (one column per channel) or long."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.covariates import check_covariates
from data_provider.csv_cells import ID, check_sorted, is_long, parse_dates, parse_numbers, read_csv
from data_provider.long_tables import long_table
from data_provider.tables import Covariates, Table, TableOptions
from data_provider.windows import Spans
from utils.cli.places import csv_path
from utils.errors import UserError


def read_table(args: argparse.Namespace) -> Table:
    """Read the run's CSV.

    Raises:
        UserError: names the file, column, row or flag that is wrong.
    """
    path = csv_path(args)
    frame, sha256 = read_csv(path)
    return replace(_table(frame, path, TableOptions.of(args)), sha256=sha256)


def table_of(frame: pd.DataFrame, name: str, args: argparse.Namespace) -> Table:
    """Build the table of a DataFrame: in long format, or with dates in the column `date` or as index.

    `name` is the DataFrame's name in messages; the errors are those of `read_table`.
    """
    if "date" not in frame.columns and not is_long(frame):
        if not isinstance(frame.index, pd.DatetimeIndex):
            raise UserError(f"{name} has no column 'date' and no dates for its index: it needs one of them")
        frame = frame.rename_axis("date").reset_index()
    return _table(frame.reset_index(drop=True), Path(name), TableOptions.of(args))


def _table(frame: pd.DataFrame, path: Path, options: TableOptions) -> Table:
    if is_long(frame):
        if options.features != "M":
            raise UserError(
                f"{path} is a long CSV, whose series have no --target: leave out --features {options.features}"
            )
        return long_table(frame, path, options)
    if options.series:
        raise UserError(f"--series {options.series} selects series of a long CSV, but {path} has no column {ID!r}")
    return _wide_table(frame, path, options)


def _wide_table(frame: pd.DataFrame, path: Path, options: TableOptions) -> Table:
    reserved = ("date", options.target) if options.needs_target else ("date",)
    check_covariates(path, frame, options, reserved)
    channels = _choose_channels(path, frame, options)
    cells = parse_numbers(path, frame, channels)
    dates = parse_dates(path, frame["date"])
    check_sorted(path, frame["date"], dates)
    rows = len(cells)
    if options.has_future and rows:  # the rows after the last known one are to be forecast
        is_known = ~np.isnan(cells).all(axis=1)
        rows -= int(is_known[::-1].argmax())
    cells = cells[:rows]
    has_numbers = ~np.isnan(cells).all(axis=0)
    if rows and not has_numbers.all():
        raise UserError(f"{path}, column {channels[has_numbers.argmin()]!r} holds no number: drop it")
    covariates = None
    if names := options.all_names:
        zeros = np.zeros(len(channels), np.int64)
        future = frame[names][rows:].set_axis(dates[rows:])
        future_spans = Spans(zeros, zeros + len(future), zeros)
        covariates = Covariates(frame[names][:rows], future, future_spans, *options.column_names)
    spans = Spans.of_table(*cells.shape)
    return Table(path, dates[:rows], cells.T.ravel(), tuple(channels), spans, covariates=covariates)


def _choose_channels(path: Path, frame: pd.DataFrame, options: TableOptions) -> list[str]:
    channels = [name for name in frame.columns if name not in ("date", *options.all_names)]
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
