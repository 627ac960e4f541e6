"""A CSV as one scaled array, with the borders of its splits."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.preprocessing import StandardScaler

from data_provider.timefeatures import integer_features, scaled_features
from utils.cli.places import csv_path
from utils.errors import UserError
from utils.exact import mean_and_variance

SPLITS = ("train", "val", "test")

_MONTH_HOURS = 30 * 24

# Deviations from the mean beyond which the squares of an error would leave float32.
_LARGEST = 1e12

# Numbers beyond which a sum of squares would leave float64.
_HUGE = 1e150


@dataclass(frozen=True)
class Layout:
    """How a data set's rows are shared out.

    Without `val`, `train` and `test` are shares of the rows there are and validation has the rest; with it, all
    three are rows. `quarter_hours` adds the quarter of the hour to the integer time marks. `target_last` moves the
    target to the last channel, as Time-LLM does for every set but ETT.
    """

    train: float
    test: float
    val: int | None = None
    quarter_hours: bool = False
    target_last: bool = False

    def rows(self, rows_there: int) -> tuple[int, int, int]:
        """Return the numbers of training, validation and test rows."""
        if self.val is not None:
            return int(self.train), self.val, int(self.test)
        train, test = int(rows_there * self.train), int(rows_there * self.test)
        return train, rows_there - train - test, test


def _ett(rows_an_hour: int) -> Layout:
    month = _MONTH_HOURS * rows_an_hour
    return Layout(12 * month, 4 * month, val=4 * month, quarter_hours=rows_an_hour > 1)


_SHARES = Layout(0.7, 0.2, target_last=True)
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
        notes: what the user should know of the data, a line each.
    """

    values: np.ndarray
    marks: np.ndarray
    channels: tuple[str, ...]
    scaler: StandardScaler
    ends: tuple[int, int, int]
    notes: tuple[str, ...]

    def seasonal_errors(self, season: int) -> dict[str, float]:
        """Return how far, on average, each channel's training rows are from those `season` rows before, scaled.

        Of a channel that never changes by the season, or of fewer rows, there is none.
        """
        training = self.values[: self.ends[0]].astype(np.float64)
        if len(training) <= season:
            return {}
        errors = np.abs(training[season:] - training[:-season]).mean(axis=0)
        return {name: float(error) for name, error in zip(self.channels, errors, strict=True) if error}


@dataclass(frozen=True, eq=False)  # by identity: it is the key of a cache
class Table:
    """What a CSV holds of the channels in use.

    Attributes:
        dates: one a row, none before the one above it.
        raw: (rows, channels) float64, in the CSV's units.
        channels: the channels' names.
    """

    dates: pd.DatetimeIndex
    raw: np.ndarray
    channels: tuple[str, ...]

    def rows_of_a_season(self) -> int:
        """Return the rows of a day, of a week where they are days, of a year where they are longer; at least 1.

        They are counted, so that a week may have five days.
        """
        days = self.dates.to_series().diff().median() / pd.Timedelta("1D")  # of one row NaN: nothing is larger
        for longest_row, length, period in ((0.5, 1, "D"), (3.5, 7, "W"), (183, 365.25, "Y")):
            if days <= longest_row:
                counts = pd.Series(self.dates.tz_localize(None).to_period(period)).value_counts(sort=False)
                # The first and the last may be cut off.
                return int(counts.iloc[1:-1].median()) if len(counts) > 3 else max(round(length / days), 1)
        return 1


def read_table(args: argparse.Namespace) -> Table:
    """Read the run's CSV; a second call for the same file and flags returns the same object.

    Raises:
        UserError: names the file, column, row or flag that is wrong.
    """
    path = csv_path(args)
    return _read_table(path, path.stat().st_mtime_ns, args.data, args.features, args.target)


@lru_cache(maxsize=1)
def _read_table(path: Path, _changed: int, data: str, features: str, target: str) -> Table:
    return _table_of(_read_csv(path), path, data, features, target)


def _table_of(frame: pd.DataFrame, path: Path, data: str, features: str, target: str) -> Table:
    channels = _choose_channels(path, list(frame.columns), LAYOUTS[data], features, target)
    raw = _numbers(path, frame, channels)
    return Table(_dates(path, frame["date"]), raw, tuple(channels))


def load_series(args: argparse.Namespace) -> Series:
    """Return the run's CSV scaled, with its splits; a second call for the same returns the same object.

    Raises:
        UserError: names the file, column, row or flag that is wrong.
    """
    path = csv_path(args)
    return _load_series(read_table(args), path, args.data, args.embed, args.freq)


@lru_cache(maxsize=1)
def _load_series(table: Table, path: Path, data: str, embed: str, freq: str) -> Series:
    layout, raw, dates, channels = LAYOUTS[data], table.raw, table.dates, table.channels
    rows = layout.rows(len(raw))
    if sum(rows) > len(raw):
        raise UserError(
            f"{path} is too short for --data {data}: {sum(rows)} rows needed, {len(raw)} there"
            " (--data custom splits any length 70/10/20)"
        )
    if rows[0] == 0:
        raise UserError(f"{path} has {len(raw)} data rows: too few to train on")
    # Fitted on all training rows, whatever --percent uses of them, as in Time-LLM.
    scaler = _fit_scaler(path, raw[: rows[0]], channels)
    return Series(
        values=_scale(path, raw, channels, scaler),
        marks=time_marks(dates, data, embed, freq),
        channels=channels,
        scaler=scaler,
        ends=(rows[0], rows[0] + rows[1], sum(rows)),
        notes=(*_notes_on_dates(path, dates), *_notes_on_channels(path, raw[: rows[0]], channels)),
    )


@dataclass(frozen=True)
class LastWindow:
    """The last rows of a CSV, and when the next ones will be.

    Attributes:
        dates, values: (seq_len,) and (seq_len, channels), in the CSV's units.
        channels: the channels' names.
        dates_to_come: (pred_len,).
    """

    dates: pd.DatetimeIndex
    values: np.ndarray
    channels: tuple[str, ...]
    dates_to_come: pd.DatetimeIndex


def last_window(args: argparse.Namespace) -> LastWindow:
    """Return the window that the forecast beyond the CSV is made from.

    Raises:
        UserError: if the CSV is wrong, has fewer rows than a window or dates without a step.
    """
    return _last_window(read_table(args), csv_path(args), args)


def last_window_of(frame: pd.DataFrame, args: argparse.Namespace) -> LastWindow:
    """Return the same of a DataFrame like the CSV: with a column `date`, or dates for its index.

    Raises:
        UserError: as in `last_window`.
    """
    if "date" not in frame.columns:
        if not isinstance(frame.index, pd.DatetimeIndex):
            raise UserError("the DataFrame has no column 'date' and no dates for its index: give it either")
        frame = frame.rename_axis("date").reset_index()
    name = Path("the DataFrame")  # what messages call it
    return _last_window(_table_of(frame, name, args.data, args.features, args.target), name, args)


def _last_window(table: Table, path: Path, args: argparse.Namespace) -> LastWindow:
    if len(table.raw) < args.seq_len:
        raise UserError(f"{path} has {len(table.raw)} rows: a forecast needs --seq_len {args.seq_len}")
    return LastWindow(
        dates=table.dates[-args.seq_len :],
        values=table.raw[-args.seq_len :],
        channels=table.channels,
        dates_to_come=continue_dates(table.dates, args.pred_len, path),
    )


def continue_dates(dates: pd.DatetimeIndex, count: int, path: Path) -> pd.DatetimeIndex:
    """Return so many dates after the last of those that a CSV has, at their own step.

    Raises:
        UserError: if the dates have no step.
    """
    recent = dates[-1000:]
    # A calendar's steps, such as months, are not all of one length.
    with pd.option_context("future.infer_freq_returns_offset", True):
        offset = pd.infer_freq(recent) if len(recent) > 2 else None
    if offset is not None:
        return pd.date_range(recent[-1], periods=count + 1, freq=offset)[1:]
    steps = pd.Series(recent).diff().dropna()
    step = steps[steps > pd.Timedelta(0)].mode()
    if step.empty:
        raise UserError(f"{path}: the dates have no step to go on with")
    return pd.DatetimeIndex([recent[-1] + step[0] * number for number in range(1, count + 1)])


def time_marks(dates: pd.DatetimeIndex, data: str, embed: str, freq: str) -> np.ndarray:
    """Return the time marks of dates, (dates, marks) float32, as the flags of the same names ask for them."""
    if embed == "timeF":
        return scaled_features(dates, freq)
    return integer_features(dates, LAYOUTS[data].quarter_hours)


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8 but {_guess_encoding(path)}: save it as UTF-8") from problem
    except Exception as problem:  # of whatever kind: empty, ragged, a broken archive, a folder without permission
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise UserError(f"{path} is not a CSV with a header line: {reason[0]}") from problem
    if not isinstance(frame.index, pd.RangeIndex):
        raise UserError(f"{path} has rows with more cells than its header: give every column a name")
    if "date" not in frame.columns and len(frame.columns) == 1:
        for delimiter, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if delimiter in frame.columns[0]:
                raise UserError(f"{path} has its columns separated by {name}: save it with commas")
    if "date" not in frame.columns:
        raise UserError(f"{path} has no column 'date', but {list(frame.columns)}: name the timestamps' column 'date'")
    return frame


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
    if pd.api.types.is_numeric_dtype(column):
        raise UserError(f"{path}, column 'date': numbers such as {column.iloc[0]} are no dates")
    # ISO 8601 first: with it, midnight may be written without a time.
    for options in ({"format": "ISO8601"}, {}):
        try:
            dates = pd.to_datetime(column, errors="coerce", **options)
        except ValueError as problem:  # offsets from UTC that change
            raise UserError(f"{path}, column 'date': {str(problem).splitlines()[0]}") from problem
        if not dates.isna().any():
            return _in_order(path, column, pd.DatetimeIndex(dates))
    row = int(dates.isna().to_numpy().argmax())
    raise UserError(f"{path} data row {row + 1}, column 'date': {str(column.iloc[row])!r} is not a date")


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


def _notes_on_dates(path: Path, dates: pd.DatetimeIndex) -> list[str]:
    """Return what is odd about the steps from date to date."""
    steps = np.diff(dates.asi8)
    notes = []
    if not steps.all():
        row = np.flatnonzero(steps == 0)[0] + 2
        notes.append(f"{path}: {(steps == 0).sum()} rows have the date of the row above them, data row {row} first")
    usual = np.median(steps) if len(steps) else 0
    # Half as long again: months and years are not all of one length.
    gaps = np.flatnonzero(steps > 1.5 * usual) if usual else []
    if len(gaps) and len(gaps) < len(steps) / 2:
        row = gaps[0] + 2
        notes.append(f"{path}: {len(gaps)} gaps in the dates, before data row {row} first: windows run across them")
    return notes


def _notes_on_channels(path: Path, training: np.ndarray, channels: Sequence[str]) -> list[str]:
    """Return which channels never change in the rows that they are scaled by."""
    constant = [name for name, column in zip(channels, training.T, strict=True) if np.ptp(column) == 0]
    return [f"{path}: constant in the training rows, so not scaled: {', '.join(constant)}"] if constant else []


def _fit_scaler(path: Path, training: np.ndarray, channels: Sequence[str]) -> StandardScaler:
    """Return scikit-learn's scaler, with means and deviations that come out alike on every machine.

    A channel that it takes for constant keeps its scale of 1.
    """
    huge = np.argwhere(np.abs(training) > _HUGE)
    if len(huge):
        row, column = huge[0]
        raise UserError(
            f"{path} data row {row + 1}, column {channels[column]!r}: {training[row, column]:g} is too large to be a"
            " reading"
        )
    scaler = StandardScaler().fit(training)
    scaler.mean_, scaler.var_ = np.array([mean_and_variance(column) for column in training.T]).T
    scaler.scale_ = np.where(scaler.scale_ == 1, 1, np.sqrt(scaler.var_))
    return scaler


def _scale(path: Path, raw: np.ndarray, channels: Sequence[str], scaler: StandardScaler) -> np.ndarray:
    """Return the scaled rows as float32."""
    scaled = scaler.transform(raw)
    too_large = np.argwhere(np.abs(scaled) > _LARGEST)
    if len(too_large):
        row, column = too_large[0]
        raise UserError(
            f"{path} data row {row + 1}, column {channels[column]!r}: {raw[row, column]:g} is too far from the training"
            f" rows' mean {scaler.mean_[column]:g} and deviation {scaler.scale_[column]:g} to be a reading"
        )
    return scaled.astype(np.float32)
