"""Find and parse the dates of a CSV."""

import re
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, NoReturn
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import pandas as pd

from data_provider.date_styles import ISO_DATE, DateStyle, find_padding, find_style, guess_format
from utils.errors import UserError, first_line, listed

# Usual names of the column of dates, in lower case, the best first.
_NAMES = ("date", "ds", "time", "timestamp", "datetime", "date_time", "date time")

# Names that columns of dates share with columns of parts of dates; they count if no other column holds dates.
_PARTS = ("day", "month", "quarter", "year")

# The first cells show how dates are written.
_SAMPLE = 50

_DAY_OR_MONTH = re.compile(r"\d{1,2}([/.-])\d{1,2}\1(\d{4}|\d{2})(?!\d)(.*)")
_TIMES = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", "T%H:%M", "T%H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
_DIGITS = {4: "%Y", 6: "%Y%m", 8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
_WIDTHS = {"%Y": 4, "%j": 3} | dict.fromkeys(("%y", "%m", "%d", "%H", "%M", "%S"), 2)
_EPOCHS = {"s": ("seconds", 1e8, 5e9), "ms": ("milliseconds", 1e11, 5e12)}

_UNCOMMON = "is not a date in a common format: write dates like 2024-01-31 09:00, or give --date_format"

# Time zones that changing UTC offsets are compared with.
_ZONES = (
    *("Europe/Berlin", "Europe/London", "Europe/Athens", "Europe/Lisbon", "America/New_York", "America/Chicago"),
    *("America/Denver", "America/Los_Angeles", "America/Halifax", "America/Sao_Paulo", "America/Santiago"),
    *("Australia/Sydney", "Australia/Adelaide", "Pacific/Auckland", "Asia/Jerusalem", "Africa/Cairo"),
)


class ParsedDates(NamedTuple):
    """Dates, how the CSV writes them, and how they were read, a line each where it is not plain."""

    dates: pd.DatetimeIndex
    style: DateStyle
    notes: tuple[str, ...]


def find_date_column(path: Path, frame: pd.DataFrame, wanted: str = "") -> tuple[str, str]:
    """Find the column of dates.

    Args:
        wanted: its name, if the user gave one.

    Returns:
        the name, and a line that says how it was found; empty for `date` and for a given name.

    Raises:
        UserError: if there is none, or several are possible.
    """
    names = [str(name) for name in frame.columns]
    if wanted:
        if wanted not in names:
            raise UserError(f"{path} has no column {wanted!r} for --date_column: it has {names}")
        return wanted, ""
    if "date" in names:
        return "date", ""
    usual = {name.strip().lower(): name for name in reversed(names)}
    found = [usual[name] for name in _NAMES if name in usual and not _are_times(frame[usual[name]])]
    # Of a time and a day, the time tells the rows apart; of equals, the first is the more usual name.
    found = sorted(found, key=lambda name: -frame[name].head(_SAMPLE).nunique())[:1]
    found = found or [name for name in names if are_dates(frame[name])]
    found = found or [usual[name] for name in _PARTS if name in usual and _are_full_numbers(frame[usual[name]])][:1]
    if not found:
        raise UserError(
            f"{path} has no column 'date' and no other column of dates, but {names}: name it with --date_column"
        )
    if len(found) > 1:
        raise UserError(f"{path} has several columns of dates, {listed(found)}: name one with --date_column")
    return found[0], f"the dates are read from column {found[0]!r} (--date_column names another)"


def _are_times(values: pd.Series) -> bool:
    """Return whether the first cells are times of day, whose day is in another column."""
    cells = values.dropna().head(_SAMPLE).astype(str).str.strip()
    return bool(len(cells) and cells.str.fullmatch(r"\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?").all())


def _are_full_numbers(values: pd.Series) -> bool:
    """Return whether the first cells are years, or years with months and days, as numbers such as 20240131."""
    cells = values.dropna().head(_SAMPLE).astype(str).str.strip()
    return bool(len(cells) and cells.str.fullmatch(r"(1[5-9]|2[01])\d{2}(\d{2}){0,2}(\.0)?").all())


def are_dates(values: pd.Series) -> bool:
    """Return whether the first cells are texts that are dates."""
    cells = values.dropna().head(_SAMPLE)
    if not len(cells) or pd.api.types.is_numeric_dtype(cells):
        return False
    if pd.api.types.is_datetime64_any_dtype(cells):
        return True
    texts = cells.astype(str).str.strip()
    is_date = texts.map(lambda text: bool(ISO_DATE.fullmatch(text) or _DAY_OR_MONTH.fullmatch(text)))
    return bool(is_date.all())


def parse_dates(path: Path, column: pd.Series, date_format: str = "", groups: np.ndarray | None = None) -> ParsedDates:
    """Parse a column of dates.

    Args:
        date_format: as `strptime` has it, or dayfirst or monthfirst; empty to find it.
        groups: the number of each row's series, within which steps are regular; None for one series.

    Raises:
        UserError: names the first cell that is not a date, or asks for the format.
    """
    cells = _Cells(path, column, groups)
    if not len(column) or pd.api.types.is_datetime64_any_dtype(column):
        return ParsedDates(_index(cells, pd.to_datetime(column)), DateStyle(), ())
    if date_format not in ("", "dayfirst", "monthfirst"):
        return _parse_format(cells, date_format)
    if (numbers := cells.numbers()) is not None:
        return _parse_numbers(cells, numbers)
    first = cells.first()
    if (match := _DAY_OR_MONTH.fullmatch(first)) and not ISO_DATE.fullmatch(first):
        return _parse_day_and_month(cells, match, date_format)
    return _parse_text(cells)


class _Cells(NamedTuple):
    """The cells of a column of dates, and where they stand."""

    path: Path
    column: pd.Series
    groups: np.ndarray | None

    def first(self) -> str:
        """Return the first cell that is not empty."""
        for cells in (self.column.head(_SAMPLE), self.column):
            if len(known := cells.dropna()):
                return str(known.iloc[0]).strip()
        return ""

    def sample(self) -> list[str]:
        """List the first cells as texts."""
        return self.column.head(_SAMPLE).astype(str).str.strip().tolist()

    def numbers(self) -> pd.Series | None:
        """Convert cells that are whole numbers; None if some are not."""
        if pd.api.types.is_numeric_dtype(self.column):
            return self.column
        return pd.to_numeric(self.column) if re.fullmatch(r"\d+(\.0*)?", self.first()) and self._all_digits() else None

    def _all_digits(self) -> bool:
        return bool(self.column.astype(str).str.fullmatch(r"\s*\d+(\.0*)?\s*").all())

    def refuse(self, row: int, problem: str) -> NoReturn:
        """Raise a UserError about the cell of a row."""
        cell = str(self.column.iloc[row])
        raise UserError(
            f"{self.path} data row {self.column.index[row] + 1}, column {self.column.name!r}: {cell!r} {problem}"
        )

    def steps(self, dates: pd.Series) -> Iterator[pd.Series]:
        """Yield the dates of each series."""
        groups = np.zeros(len(dates), int) if self.groups is None else self.groups
        for _, own in dates.groupby(groups):
            yield own


def _index(cells: _Cells, dates: pd.Series) -> pd.DatetimeIndex:
    """Convert parsed dates to an index; refuse the first cell that is not a date."""
    if (empty := dates.isna().to_numpy()).any():
        cells.refuse(int(empty.argmax()), "is not a date")
    return pd.DatetimeIndex(dates)


def _parse_format(cells: _Cells, date_format: str) -> ParsedDates:
    texts = cells.column
    if pd.api.types.is_numeric_dtype(texts):
        # Numbers have lost the zeros that they began with: 10124 is 010124.
        widths = [_WIDTHS.get(part, 0) for part in re.findall("%.", date_format)]
        width = sum(widths) if all(widths) and len(date_format) == 2 * len(widths) else 0
        texts = texts.map(lambda number: f"{number:.15g}".zfill(width), na_action="ignore")
    try:
        dates = pd.to_datetime(texts, format=date_format, errors="coerce")
    except ValueError as problem:
        raise UserError(f"--date_format {date_format}: {first_line(problem)}") from problem
    if (empty := dates.isna().to_numpy()).any():
        cells.refuse(int(empty.argmax()), f"does not match --date_format {date_format}")
    dates = pd.DatetimeIndex(dates)
    return ParsedDates(dates, find_padding(date_format, cells._replace(column=texts).sample(), dates), ())


def _parse_numbers(cells: _Cells, numbers: pd.Series) -> ParsedDates:
    """Parse numbers: dates without separators, years, or seconds or milliseconds since 1970."""
    if not (is_finite := np.isfinite(numbers.to_numpy(dtype=np.float64))).all():
        cells.refuse(int(is_finite.argmin()), "is not a date")
    if (numbers == numbers.round()).all():
        texts = numbers.astype(np.int64).astype(str)
        date_format = _DIGITS.get(len(texts.iloc[0]), "")
        dates = pd.to_datetime(texts, format=date_format, errors="coerce") if date_format else pd.Series([pd.NaT])
        # Seconds since 1970 could be hours of the year 1601.
        first_year = 1500 if len(date_format) <= len("%Y%m%d") else 1900
        if not dates.isna().any() and dates.dt.year.between(first_year, 2200).all():
            written = "years" if date_format == "%Y" else f"numbers such as {texts.iloc[0]}"
            return ParsedDates(pd.DatetimeIndex(dates), DateStyle(date_format), (f"the dates are {written}",))
    for unit, (name, low, high) in _EPOCHS.items():
        if numbers.between(low, high).all():
            dates = pd.DatetimeIndex(pd.to_datetime(numbers, unit=unit))
            return ParsedDates(dates, DateStyle(unit=unit), (f"the dates are {name} since 1970",))
    raise UserError(
        f"{cells.path}, column {cells.column.name!r}: numbers such as {numbers.iloc[0]} are not dates: write dates like"
        " 2024-01-31 09:00, or give --date_format"
    )


def _parse_day_and_month(cells: _Cells, match: re.Match, wanted: str) -> ParsedDates:
    """Parse dates whose day and month are numbers: as wanted, or so that all are dates and their step is regular."""
    separator, year, _ = match.groups()
    order = {"dayfirst": ("%d", "%m"), "monthfirst": ("%m", "%d")}
    year_format = "%Y" if len(year) == 4 else "%y"
    formats = {name: separator.join((*parts, year_format)) for name, parts in order.items()}
    time = _find_time(match.group(0), tuple(formats.values()))
    if time is None:  # pandas would take the month first without a word
        cells.refuse(int(cells.column.notna().to_numpy().argmax()), _UNCOMMON)
    texts = cells.column.astype(str).str.strip()
    readings = {name: _read(cells, texts, one + time) for name, one in formats.items() if wanted in ("", name)}
    valid = {name: dates for name, dates in readings.items() if not dates.isna().any()}
    if not valid:
        fewest = min(readings.values(), key=lambda dates: dates.isna().sum())
        cells.refuse(int(fewest.isna().to_numpy().argmax()), "is not a date")
    scores = {name: _regularity(cells, dates) for name, dates in valid.items()}
    if len(scores) == 2 and len(set(scores.values())) == 1 and not valid["dayfirst"].equals(valid["monthfirst"]):
        raise UserError(
            f"{cells.path}, column {cells.column.name!r}: dates such as {match.group(0)!r} may have the day or the"
            f" month first: give --date_format dayfirst or --date_format {formats['monthfirst'] + time}"
        )
    name = max(scores, key=scores.__getitem__)
    dates = pd.DatetimeIndex(valid[name])
    style = find_padding(formats[name] + time, cells.sample(), dates)
    which = "day" if name == "dayfirst" else "month"
    note = f"dates such as {match.group(0)!r} are read with the {which} first (--date_format decides)"
    return ParsedDates(dates, style, () if wanted else (note,))


def _read(cells: _Cells, texts: pd.Series, date_format: str) -> pd.Series:
    """Read texts in one format, NaT where it does not fit; refuse UTC offsets that change."""
    try:
        return pd.to_datetime(texts, format=date_format, errors="coerce")
    except ValueError as problem:
        if "timezones" not in str(problem):
            raise
        raise UserError(
            f"{cells.path}, column {cells.column.name!r}: UTC offsets that change are read in dates like"
            " 2024-01-31 09:00+01:00 only: write such dates"
        ) from problem


def _find_time(cell: str, dates: Sequence[str]) -> str | None:
    """Find the format of the time after a date; None if it is not a common one."""
    for time in _TIMES:
        for date in dates:
            try:
                datetime.strptime(cell, date + time)
            except ValueError:  # of another format
                continue
            return time
    guessed = guess_format(cell)
    return next((guessed.removeprefix(date) for date in dates if guessed.startswith(date)), None)


def _regularity(cells: _Cells, dates: pd.Series) -> tuple[bool, float]:
    """Score a reading: whether dates are in order, and the share of the most common step, in time or in months."""
    in_order, regular, total = True, 0, 0
    for own in cells.steps(dates.dt.tz_localize(None)):
        steps = np.diff(own.to_numpy())
        if not len(steps):
            continue
        in_order &= bool((steps >= np.timedelta64(0)).all() or (steps <= np.timedelta64(0)).all())
        months = np.diff(own.dt.year * 12 + own.dt.month)
        same_day = own.dt.day.nunique() == 1 or (own.dt.is_month_end.all() and own.dt.day.min() > 27)
        parts = [steps, months[months != 0]] if same_day else [steps]
        regular += max(pd.Series(part).value_counts().iloc[0] if len(part) else 0 for part in parts)
        total += len(steps)
    return in_order, round(regular / total, 9) if total else 1.0


def _parse_text(cells: _Cells) -> ParsedDates:
    """Parse ISO 8601, or what pandas recognizes."""
    # ISO 8601 first: pandas then accepts midnight without a time.
    for options in ({"format": "ISO8601"}, {}):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Could not infer format")
                dates = pd.to_datetime(cells.column, errors="coerce", **options)
        except UserWarning:  # pandas would guess the order of day and month for each cell separately
            first = int(cells.column.notna().to_numpy().argmax())
            cells.refuse(first, _UNCOMMON)
        except ValueError:  # offsets that differ
            return _parse_offsets(cells)
        if not dates.isna().any():
            dates = pd.DatetimeIndex(dates)
            return ParsedDates(dates, find_style(cells.sample(), dates), ())
    return ParsedDates(_index(cells, dates), DateStyle(), ())


def _parse_offsets(cells: _Cells) -> ParsedDates:
    """Parse dates whose UTC offset changes, as with summer time."""
    dates = _index(cells, pd.to_datetime(cells.column, format="ISO8601", utc=True, errors="coerce"))
    offsets = cells.column.astype(str).str.extract(r"([+-]\d{2}:?\d{2}|Z)\s*$", expand=False).fillna("")
    seen = [offset or "none" for offset in dict.fromkeys(offsets)]
    if "none" in seen:
        cells.refuse(
            int((offsets == "").to_numpy().argmax()), "has no UTC offset, and others have one: give all or none"
        )
    minutes = offsets.replace("Z", "+00:00").str.replace(":", "")
    minutes = (minutes.str[:1] + "1").astype(int) * (minutes.str[1:3].astype(int) * 60 + minutes.str[3:].astype(int))
    zone = _find_zone(dates, minutes.to_numpy())
    where = f"as in {zone}" if zone else "as in no zone that is known here"
    note = f"UTC offsets change between {' and '.join(seen[:2])}, {where}: the dates are one time line in UTC"
    style = find_style(cells.sample(), dates)
    return ParsedDates(dates, DateStyle(precision=style.precision, separator=style.separator, zone=zone), (note,))


def _find_zone(dates: pd.DatetimeIndex, minutes: np.ndarray) -> str:
    """Find a time zone with these offsets at these dates; empty if none has."""
    for name in _ZONES:
        try:
            ZoneInfo(name)
        except ZoneInfoNotFoundError:  # Windows has none without the package tzdata
            continue
        local = dates.tz_convert(name).tz_localize(None)
        if np.array_equal((local - dates.tz_localize(None)) / pd.Timedelta("1min"), minutes):
            return name
    return ""
