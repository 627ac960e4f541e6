"""How a CSV writes its dates: found from its first cells, and used to write other dates."""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(?:([ T])\d{2}:\d{2}(:\d{2}(?:[.,]\d+)?)?)?\s*(Z|[+-]\d{2}:?\d{2})?")


@dataclass(frozen=True)
class DateStyle:
    """How a CSV writes its dates.

    Attributes:
        format: of `strptime`; empty for ISO 8601.
        unit: s or ms for numbers since 1970, else empty.
        precision: the digits of ISO dates at least: days, minutes or seconds.
        separator: between an ISO date and its time.
        suffix: after an ISO time without offset, such as Z.
        unpadded: which zeros are left out: "", "date" or "all" (of hours, too).
        zone: the time zone of dates whose offset changes; empty for UTC.
    """

    format: str = ""
    unit: str = ""
    precision: str = "seconds"
    separator: str = " "
    suffix: str = ""
    unpadded: str = ""
    zone: str = ""

    def write(self, dates: pd.DatetimeIndex) -> list[str]:
        """Write dates in this style, with more digits where it cannot express them."""
        numbers, distinct = pd.factorize(dates)
        if len(distinct) < len(dates):  # the dates of many series
            texts = self.write(distinct)
            return [texts[number] for number in numbers]
        if self.zone:
            dates = dates.tz_convert(self.zone)
        if self.unit:
            return [f"{number:.15g}" for number in dates.as_unit("ns").asi8 / pd.Timedelta(1, self.unit).value]
        if self.format:
            texts = [_UNPAD[self.unpadded](date.strftime(self.format)) for date in dates]
            read_back = pd.to_datetime(pd.Series(texts), format=self.format, errors="coerce")
            if (pd.DatetimeIndex(read_back).tz_localize(None) == dates.tz_localize(None)).all():
                return texts
        return self._write_iso(dates)

    def _write_iso(self, dates: pd.DatetimeIndex) -> list[str]:
        naive = dates.tz_localize(None)
        if self.precision == "days" and dates.tz is None and (naive == naive.normalize()).all():
            return [date.strftime("%Y-%m-%d") for date in dates]
        steps = {"min": "minutes", "s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
        if self.precision == "seconds":
            del steps["min"]
        precision = next(name for unit, name in steps.items() if (naive == naive.floor(unit)).all())
        texts = [date.isoformat(sep=self.separator, timespec=precision) for date in dates]
        return [text.removesuffix("+00:00") + self.suffix for text in texts] if self.suffix else texts


_UNPAD: dict[str, Callable[[str], str]] = {
    "": lambda text: text,
    "date": lambda text: re.sub(r"(?<![\d:])0(?=\d)(?!\d:)", "", text),
    "all": lambda text: re.sub(r"(?<![\d:])0(?=\d)", "", text),
}


def find_style(cells: Sequence[str], dates: pd.DatetimeIndex) -> DateStyle:
    """Find the style of texts whose format pandas recognized, from the first cells and their dates."""
    matches = [ISO_DATE.fullmatch(text) for text in cells]
    if all(matches):
        separators = {match.group(1) for match in matches} - {None}
        is_precise = any(match.group(2) for match in matches)
        has_time = any(match.group(1) for match in matches)
        precision = "seconds" if is_precise else "minutes" if has_time else "days"
        suffix = "Z" if all(match.group(3) == "Z" for match in matches) else ""
        return DateStyle(precision=precision, separator=separators.pop() if separators else " ", suffix=suffix)
    date_format = guess_format(cells[0])
    return find_padding(date_format, cells, dates) if date_format else DateStyle()


def find_padding(date_format: str, cells: Sequence[str], dates: pd.DatetimeIndex) -> DateStyle:
    """Find out which zeros of a format the first cells leave out; ISO 8601 if the format does not write them."""
    for unpadded in _UNPAD:
        style = DateStyle(date_format, unpadded=unpadded)
        if style.write(dates[: len(cells)]) == list(cells):
            return style
    return DateStyle(precision="days")


def guess_format(cell: str) -> str:
    """Guess the `strptime` format of a date; empty if pandas does not know it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the order of day and month, which is decided elsewhere
        return pd.tseries.api.guess_datetime_format(cell) or ""
