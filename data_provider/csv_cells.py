"""Parse the numbers of a CSV, and refuse or report cells that can hardly be meant."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError

# A number that marks missing values occurs at least this often in a column.
_FEWEST_SENTINELS = 3


def parse_numbers(
    path: Path, frame: pd.DataFrame, columns: Sequence[str], series_of: Callable[[int], str] | None = None
) -> np.ndarray:
    """Parse columns of numbers to float64, (rows, columns), NaN where a cell is empty.

    `series_of` names the series of a row of a long CSV.

    Raises:
        UserError: names the first cell that is neither empty nor a finite number, or a column of text.
    """
    if not len(columns):
        raise UserError(f"{path} has no column besides its dates: there is nothing to forecast")
    numbers = frame[list(columns)].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    bad = ~np.isfinite(numbers)
    if bad.any() and (bad := bad & frame[list(columns)].notna().to_numpy()).any():
        column = int(bad.any(axis=0).argmax())
        own, name = frame[columns[column]], columns[column]
        if bad[:, column].sum() > own.notna().sum() / 2:
            text = str(own[bad[:, column]].iloc[0])
            raise UserError(
                f"{path}, column {name!r} is text, such as {text!r}: name it in --covariates"
                " (free text in --notes) if it is known in advance, in --past_covariates if not, or delete it"
            )
        row = int(bad[:, column].argmax())
        whose = f"series {series_of(row)!r}, " if series_of else ""
        raise UserError(
            f"{path} data row {frame.index[row] + 1}, {whose}column {name!r}: {str(own.iloc[row])!r} is not a finite"
            f" number: correct such cells, leave them empty or name them in --na_values ({bad.sum()} in all)"
        )
    return numbers


def find_sentinels(names: Sequence[str], numbers: np.ndarray) -> tuple[str, ...]:
    """Warn of numbers that probably stand for missing values, such as -999 among temperatures.

    Args:
        names: of the columns.
        numbers: (rows, columns), NaN where a cell is empty.
    """
    warnings = []
    for name, column in zip(names, numbers.T, strict=True):
        for extreme in (np.fmin.reduce(column, initial=np.inf), np.fmax.reduce(column, initial=-np.inf)):
            if not _looks_like_a_mark(extreme):  # nearly all columns
                continue
            is_extreme = column == extreme
            others = column[~is_extreme & ~np.isnan(column)]
            if is_extreme.sum() < _FEWEST_SENTINELS or not len(others):
                continue
            low, high = others.min(), others.max()
            if max(low - extreme, extreme - high) > high - low > 0:
                warnings.append(
                    f"column {name!r} is {extreme:g} in {is_extreme.sum()} rows, far from all others ({low:g} to"
                    f" {high:g}): if it means that a value is missing, give --na_values={extreme:g}"
                )
    return tuple(warnings)


def _looks_like_a_mark(number: float) -> bool:
    """Return whether a number consists of nines, as -999 and 9999.9, or is the least or greatest of a type."""
    digits = f"{abs(number):.10g}".replace(".", "")
    return (set(digits) == {"9"} and len(digits) > 1) or abs(number) in (32767, 32768, 65535, 2147483647, 2147483648)


def is_newest_first(dates: pd.DatetimeIndex) -> bool:
    """Return whether dates never increase, and decrease somewhere."""
    steps = np.diff(dates.asi8)
    return bool(len(steps) and (steps <= 0).all() and (steps < 0).any())


def check_sorted(path: Path, column: pd.Series, dates: pd.DatetimeIndex) -> None:
    """Raise a UserError that names the first row whose date is before the date of the row above it."""
    if len(back := np.flatnonzero(np.diff(dates.asi8) < 0)):
        row = back[0] + 1
        raise UserError(
            f"{path} data row {column.index[row] + 1}, column {column.name!r}: {str(column.iloc[row])!r} is before the"
            f" row above it: sort the rows by date ({len(back)} such rows)"
        )
