"""What stands in a CSV: its columns, its cells as numbers and dates, and what is refused of them."""

import warnings
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd

from utils.errors import UserError, first_line
from utils.system.files import hash_of

# The columns of a long CSV, as Nixtla's libraries have them.
ID, DATE, VALUE = LONG = ("unique_id", "ds", "y")


def is_long(frame: pd.DataFrame) -> bool:
    """Return whether these are the readings of many series, a row each."""
    return set(LONG) <= set(frame.columns)


def read_csv(path: Path) -> tuple[pd.DataFrame, str]:
    """Return a CSV as it is, once it is known to be one that this project reads, and the file's SHA-256.

    Raises:
        UserError: if it is no CSV in UTF-8 with a header line of ours, or changes meanwhile.
    """
    before = _state_of(path)
    try:
        sha256 = hash_of(path)
        frame = pd.read_csv(path, encoding="utf-8-sig", dtype={ID: str})
    except Exception as problem:  # of whatever kind: empty, ragged, a broken archive, a folder without permission
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
    if _state_of(path) != before:  # half of it may be of before, its last cell may lack digits
        raise UserError(f"{path} changed while it was read: run it again once nothing writes to it any more")


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


def numbers_of(path: Path, frame: pd.DataFrame, columns: list[str]) -> np.ndarray:
    """Return columns as float64, (rows, columns): NaN where a cell is empty.

    Raises:
        UserError: names the first cell that is neither empty nor a finite number.
    """
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


def dates_of(path: Path, column: pd.Series) -> pd.DatetimeIndex:
    """Return a column of dates as such, in its order.

    Raises:
        UserError: names the first cell that is none.
    """
    if pd.api.types.is_numeric_dtype(column):
        raise UserError(f"{path}, column {column.name!r}: numbers such as {column.iloc[0]} are no dates")
    # ISO 8601 first: with it, midnight may be written without a time.
    for options in ({"format": "ISO8601"}, {}):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Could not infer format")
                dates = pd.to_datetime(column, errors="coerce", **options)
        except UserWarning as problem:  # each cell would be read by itself, one month first and the next day first
            row = int(column.notna().to_numpy().argmax())
            raise UserError(
                f"{path} data row {column.index[row] + 1}, column {column.name!r}: {str(column.iloc[row])!r} is not a"
                " date of a common format: write them like 2024-01-31 09:00"
            ) from problem
        except ValueError as problem:  # offsets from UTC that change
            raise UserError(f"{path}, column {column.name!r}: {str(problem).splitlines()[0]}") from problem
        if not dates.isna().any():
            return pd.DatetimeIndex(dates)
    row = int(dates.isna().to_numpy().argmax())
    text = str(column.iloc[row])
    raise UserError(f"{path} data row {column.index[row] + 1}, column {column.name!r}: {text!r} is not a date")


def check_sorted(path: Path, column: pd.Series, dates: pd.DatetimeIndex) -> None:
    """Refuse dates that are not in order.

    Raises:
        UserError: names the first row whose date is before the one above it.
    """
    back = np.flatnonzero(np.diff(dates.asi8) < 0)
    if len(back):
        row = back[0] + 1
        raise UserError(
            f"{path} data row {row + 1}, column 'date': {str(column.iloc[row])!r} is before the row above it: sort the"
            f" rows by date ({len(back)} such rows)"
        )
