"""Read CSV files, parse their numbers and dates, and refuse invalid ones."""

import warnings
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd

from utils.errors import UserError, first_line
from utils.system.files import hash_of

# The columns of a long CSV, named as in Nixtla's libraries.
ID, DATE, VALUE = LONG = ("unique_id", "ds", "y")


def is_long(frame: pd.DataFrame) -> bool:
    """Return whether the data are in long format: one row for each series and date."""
    return set(LONG) <= set(frame.columns)


def read_csv(path: Path) -> tuple[pd.DataFrame, str]:
    """Read a CSV, check its header, and return it with the file's SHA-256.

    Raises:
        UserError: if the file is not a CSV in UTF-8 with a valid header, or changes while it is read.
    """
    before = _size_and_time(path)
    try:
        sha256 = hash_of(path)
        frame = pd.read_csv(path, encoding="utf-8-sig", dtype={ID: str})
    except Exception as problem:  # of any type: an empty or ragged file, a broken archive, a missing permission
        _refuse_change(path, before)
        if isinstance(problem, UnicodeDecodeError):
            raise UserError(f"{path} is not UTF-8 but {_guess_encoding(path)}: save it as UTF-8") from problem
        raise UserError(f"{path} is not a CSV with a header line: {first_line(problem)}") from problem
    _refuse_change(path, before)
    if not isinstance(frame.index, pd.RangeIndex):
        raise UserError(f"{path} has rows with more cells than its header: give every column a name")
    if "date" not in frame.columns and not is_long(frame):
        _refuse_header(path, list(frame.columns))
    return frame, sha256


def _refuse_change(path: Path, before: tuple[int, int] | None) -> None:
    if _size_and_time(path) != before:  # rows may be missing, and the last cell may be cut off
        raise UserError(f"{path} changed while it was read: run again once no other program writes to it")


def _size_and_time(path: Path) -> tuple[int, int] | None:
    """Read a file's size and modification time; None if the file does not exist."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _refuse_header(path: Path, columns: list[str]) -> NoReturn:
    if len(columns) == 1:
        for delimiter, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if delimiter in columns[0]:
                raise UserError(f"{path} has columns separated by {name}: save it with commas")
    missing = [name for name in LONG if name not in columns]
    also = f" ({', '.join(missing)} for a long CSV)" if len(missing) < len(LONG) else ""
    raise UserError(f"{path} has no column 'date'{also}, but {columns}: name the timestamps' column 'date'")


def _guess_encoding(path: Path) -> str:
    """Guess the encoding of a text file that is not UTF-8."""
    start = path.read_bytes()[:100_000]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in start:
        return "UTF-16"
    try:
        start[: len(start) // 2 * 2].decode("gbk")
    except UnicodeDecodeError as problem:
        # The last character may be cut off.
        return "GBK" if problem.end >= len(start) - 1 else "another encoding"
    return "GBK"


def parse_numbers(path: Path, frame: pd.DataFrame, columns: list[str]) -> np.ndarray:
    """Parse columns of numbers to float64, (rows, columns), NaN where a cell is empty.

    Raises:
        UserError: names the first cell that is neither empty nor a finite number.
    """
    if not columns:
        raise UserError(f"{path} has no column besides 'date': there is nothing to forecast")
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


def parse_dates(path: Path, column: pd.Series) -> pd.DatetimeIndex:
    """Parse a column of dates.

    Raises:
        UserError: names the first cell that is not a date.
    """

    def where(row: int) -> str:
        return f"{path} data row {column.index[row] + 1}, column {column.name!r}: {str(column.iloc[row])!r}"

    if pd.api.types.is_numeric_dtype(column):
        raise UserError(f"{path}, column {column.name!r}: numbers such as {column.iloc[0]} are not dates")
    # ISO 8601 first: pandas then accepts midnight without a time.
    for options in ({"format": "ISO8601"}, {}):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Could not infer format")
                dates = pd.to_datetime(column, errors="coerce", **options)
        except UserWarning as problem:  # pandas would guess the order of day and month for each cell separately
            first = int(column.notna().to_numpy().argmax())
            raise UserError(
                f"{where(first)} is not a date in a common format: write dates like 2024-01-31 09:00"
            ) from problem
        except ValueError as problem:  # mixed UTC offsets
            raise UserError(f"{path}, column {column.name!r}: {first_line(problem)}") from problem
        if not dates.isna().any():
            return pd.DatetimeIndex(dates)
    raise UserError(f"{where(int(dates.isna().to_numpy().argmax()))} is not a date")


def check_sorted(path: Path, column: pd.Series, dates: pd.DatetimeIndex) -> None:
    """Raise a UserError that names the first row whose date is before the date of the row above it."""
    if len(back := np.flatnonzero(np.diff(dates.asi8) < 0)):
        row = back[0] + 1
        raise UserError(
            f"{path} data row {row + 1}, column 'date': {str(column.iloc[row])!r} is before the row above it: sort the"
            f" rows by date ({len(back)} such rows)"
        )
