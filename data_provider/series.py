"""A CSV as one scaled array, with the borders of its splits."""

import argparse
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.preprocessing import StandardScaler

from data_provider.timefeatures import integer_features, scaled_features
from utils.errors import UserError
from utils.options import csv_path

SPLITS = ("train", "val", "test")

_MONTH_HOURS = 30 * 24


@dataclass(frozen=True)
class Layout:
    """How a data set's rows are shared out.

    `train`, `val`, `test` are rows where `fixed`, else shares of the rows there are (`val` is then the
    rest). `quarter_hours` adds the quarter of the hour to the integer time marks. `target_last` moves the
    target to the last channel, as Time-LLM does for every set but ETT.
    """

    train: float
    val: float
    test: float
    fixed: bool = False
    quarter_hours: bool = False
    target_last: bool = False

    def rows(self, rows_there: int) -> tuple[int, int, int]:
        """Return the numbers of training, validation and test rows."""
        if self.fixed:
            return int(self.train), int(self.val), int(self.test)
        train, test = int(rows_there * self.train), int(rows_there * self.test)
        return train, rows_there - train - test, test


def _ett(rows_an_hour: int) -> Layout:
    train, val, test = (months * _MONTH_HOURS * rows_an_hour for months in (12, 4, 4))
    return Layout(train, val, test, fixed=True, quarter_hours=rows_an_hour > 1)


_SHARES = Layout(0.7, 0.1, 0.2, target_last=True)
LAYOUTS = {
    "ETTh1": _ett(1),
    "ETTh2": _ett(1),
    "ETTm1": _ett(4),
    "ETTm2": _ett(4),
    "custom": _SHARES,
    "ECL": _SHARES,
    "Traffic": _SHARES,
    "Weather": _SHARES,
}


@dataclass(frozen=True)
class Series:
    """A scaled multivariate series.

    Attributes:
        values: (rows, channels) float32, scaled with the training rows' mean and deviation.
        marks: (rows, marks) float32, the time marks.
        channels: the channels' names.
        scaler: the fitted scaler; `scaler.mean_` and `scaler.scale_` are in the CSV's units.
        ends: the first row after the training, validation and test rows.
    """

    values: np.ndarray
    marks: np.ndarray
    channels: tuple[str, ...]
    scaler: StandardScaler
    ends: tuple[int, int, int]


def load_series(args: argparse.Namespace) -> Series:
    """Read the run's CSV; a second call for the same file and flags returns the same object.

    Raises:
        UserError: names the file, column, row or flag that is wrong.
    """
    path = csv_path(args)
    if not path.is_file():
        raise UserError(f"no data file {path}: check --root_path and --data_path")
    changed = path.stat().st_mtime_ns
    return _load_series(path, changed, args.data, args.features, args.target, args.embed, args.freq)


@lru_cache(maxsize=1)
def _load_series(path: Path, _changed: int, data: str, features: str, target: str, embed: str, freq: str) -> Series:
    layout = LAYOUTS[data]
    frame = _read_csv(path)
    channels = _choose_channels(path, list(frame.columns), layout, features, target)
    raw = _numbers(path, frame, channels)
    dates = _dates(path, frame["date"])
    rows = layout.rows(len(raw))
    if sum(rows) > len(raw):
        raise UserError(
            f"{path} is too short for --data {data}: {sum(rows)} rows needed, {len(raw)} there"
            " (--data custom splits any length 70/10/20)"
        )
    if rows[0] == 0:
        raise UserError(f"{path} has {len(raw)} data rows: too few to train on")
    # Fitted on all training rows, whatever --percent uses of them, as in Time-LLM.
    scaler = StandardScaler().fit(raw[: rows[0]])
    marks = scaled_features(dates, freq) if embed == "timeF" else integer_features(dates, layout.quarter_hours)
    return Series(
        values=scaler.transform(raw).astype(np.float32),
        marks=marks,
        channels=tuple(channels),
        scaler=scaler,
        ends=(rows[0], rows[0] + rows[1], sum(rows)),
    )


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as problem:
        raise UserError(f"{path} is not a CSV with a header line: {str(problem).strip()}") from problem
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8 ({problem.reason}): save it as UTF-8") from problem
    if "date" not in frame.columns:
        raise UserError(f"{path} has no column 'date', but {list(frame.columns)}: name the timestamps' column 'date'")
    return frame


def _choose_channels(path: Path, columns: list[str], layout: Layout, features: str, target: str) -> list[str]:
    channels = [name for name in columns if name != "date"]
    target_is_needed = features != "M" or target != "OT"
    if target not in channels:
        if target_is_needed:
            raise UserError(f"{path} has no column {target!r} for --target, but {channels}")
        return channels
    if features == "S":
        return [target]
    if layout.target_last:
        channels.remove(target)
        channels.append(target)
    return channels


def _numbers(path: Path, frame: pd.DataFrame, channels: list[str]) -> np.ndarray:
    if not channels:
        raise UserError(f"{path} has no column beside 'date': there is nothing to forecast")
    numbers = frame[channels].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    bad = np.argwhere(~np.isfinite(numbers))
    if len(bad):
        row, column = bad[0]
        cell = frame[channels[column]].iloc[row]
        raise UserError(
            f"{path} data row {row + 1}, column {channels[column]!r}: {str(cell)!r} is not a finite number:"
            f" fill or drop such cells ({len(bad)} in all)"
        )
    return numbers


def _dates(path: Path, column: pd.Series) -> pd.DatetimeIndex:
    dates = pd.to_datetime(column, errors="coerce")
    if dates.isna().any():
        row = int(dates.isna().to_numpy().argmax())
        raise UserError(f"{path} data row {row + 1}, column 'date': {str(column.iloc[row])!r} is not a date")
    return pd.DatetimeIndex(dates)
