"""From a CSV or a DataFrame to a table: a wide one, a column a channel, or a long one."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.covariates import Covariates, check_cells, check_covariates
from data_provider.csv_cells import ID, check_sorted, dates_of, is_long, numbers_of, read_csv
from data_provider.long_tables import long_table
from data_provider.tables import Choice, Table
from data_provider.windows import Spans
from utils.cli.places import csv_path
from utils.errors import UserError


def read_table(args: argparse.Namespace) -> Table:
    """Read the run's CSV. What happens to the file later is not seen.

    Raises:
        UserError: names the file, column, row or flag that is wrong.
    """
    path = csv_path(args)
    frame, sha256 = read_csv(path)
    return replace(_table_of(frame, path, Choice.of(args)), sha256=sha256)


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


def _table_of(frame: pd.DataFrame, path: Path, choice: Choice) -> Table:
    if is_long(frame):
        if choice.features != "M":
            raise UserError(
                f"{path} is a long CSV, its series have no --target: leave out --features {choice.features}"
            )
        return long_table(frame, path, choice)
    if choice.series:
        raise UserError(f"--series {choice.series} chooses among the series of a long CSV: {path} has no column {ID!r}")
    return _wide_table(frame, path, choice)


def _wide_table(frame: pd.DataFrame, path: Path, choice: Choice) -> Table:
    target_is_needed = choice.features != "M" or choice.target != "OT"
    forecast = ("date", choice.target) if target_is_needed else ("date",)
    check_covariates(path, frame.columns, choice.covariates, forecast)
    check_cells(path, frame, choice.covariates)
    columns = [name for name in frame.columns if name not in choice.covariates]
    channels = _choose_channels(path, columns, choice.features, choice.target, choice.target_last)
    cells = numbers_of(path, frame, channels)
    dates = dates_of(path, frame["date"])
    check_sorted(path, frame["date"], dates)
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
        future = Spans(np.zeros(count, np.int64), np.full(count, len(frame) - rows), np.zeros(count, np.int64))
        explaining = frame[list(choice.covariates)]
        covariates = Covariates(explaining[:rows], explaining[rows:].set_axis(dates[rows:]), future)
    values = np.ascontiguousarray(cells.T).ravel()
    return Table(path, dates[:rows], values, tuple(channels), spans, covariates=covariates)


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
