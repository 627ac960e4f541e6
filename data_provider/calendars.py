"""The calendar of a series: its step, the weekdays and hours that it has rows on, and the dates that come next."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from utils.errors import UserError

# The last dates, at most, that a calendar is inferred from.
_JUDGED = 20_000

# A time of the week is left out if it occurs in at most the first share of the weeks, used if in at least the second.
_LEFT_OUT, _USED = 0.03, 0.5

# The fewest whole weeks that show a weekly calendar, and whole days that show hours.
_FEWEST_WEEKS, _FEWEST_DAYS = 4, 4

# The accepted probability that any time is empty by chance.
_CHANCE = 0.01

# The most open days in a row that holidays close.
_HOLIDAYS = 3

_DAY, _WEEK, _HOUR = (pd.Timedelta(length).value for length in ("1D", "7D", "1h"))
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class MonthStep:
    """A step of some months, on the same day of each month or on its last day.

    Attributes:
        day: of the month, from 1; 31 for the last one.
    """

    months: int
    day: int

    def dates_after(self, last: pd.Timestamp, count: int) -> pd.DatetimeIndex:
        """Compute the next dates."""
        first = last.tz_localize(None).replace(day=1)
        months = [first + pd.DateOffset(months=self.months * number) for number in range(1, count + 1)]
        dates = pd.DatetimeIndex([month.replace(day=self._day_in(month)) for month in months])
        return _on_clock(dates, last)

    def _day_in(self, date: pd.Timestamp) -> int:
        return min(self.day, date.days_in_month)

    def holds(self, date: pd.Timestamp) -> bool:
        """Return whether a date is on the day."""
        return date.day == self._day_in(date)


@dataclass(frozen=True, eq=False)
class Calendar:
    """The calendar of a series' dates.

    Attributes:
        step: from one date to the next.
        slots: the times of the week that rows fall on, in nanoseconds after Monday 00:00; None if all do.
    """

    step: pd.Timedelta | pd.offsets.BaseOffset | MonthStep
    slots: np.ndarray | None = None

    @classmethod
    def of(cls, dates: pd.DatetimeIndex, source: Path) -> Self:
        """Find the calendar of dates, which never decrease.

        Raises:
            UserError: if the dates have no step.
        """
        dates = dates[-_JUDGED:].unique()
        # Calendar steps such as months differ in length.
        with pd.option_context("future.infer_freq_returns_offset", True):
            offset = pd.infer_freq(dates[-1000:]) if len(dates) > 2 else None
        if isinstance(offset, pd.offsets.BusinessDay) and offset.n == 1:
            return cls(pd.Timedelta("1D"), np.arange(5) * _DAY + _in_week(_nanoseconds(dates[:1])) % _DAY)
        # A calendar day of a time zone is not always 24 hours long.
        is_fixed = isinstance(offset, pd.offsets.Tick) or (isinstance(offset, pd.offsets.Day) and dates.tz is None)
        if offset is not None and not is_fixed:
            return cls(offset)
        if offset is None and (months := _month_step(dates)):
            return cls(months)
        steps = pd.Series(dates).diff().dropna()
        if steps.empty:
            raise UserError(f"{source}: the dates have no step with which to continue them")
        step = pd.Timedelta(steps.mode()[0])
        return cls(step, _find_slots(_nanoseconds(dates), step.value) if offset is None else None)

    def fits(self, date: pd.Timestamp) -> bool:
        """Return whether a date is one of the calendar's: always for a step of fixed length."""
        if isinstance(self.step, MonthStep):
            return self.step.holds(date)
        return isinstance(self.step, pd.Timedelta) or self.step.is_on_offset(date)

    def next_dates(self, last: pd.Timestamp, count: int) -> pd.DatetimeIndex:
        """Compute the `count` dates after the last one."""
        if isinstance(self.step, MonthStep):
            return self.step.dates_after(last, count)
        if not isinstance(self.step, pd.Timedelta):
            dates = pd.date_range(last, periods=count + 1, freq=self.step)
            return dates[dates > last][:count]
        if self.slots is None:
            return pd.DatetimeIndex([last + self.step * number for number in range(1, count + 1)])
        (own,) = _nanoseconds(pd.DatetimeIndex([last]))
        skipped = 4 * (_HOUR // self.step.value + 1)  # dates that the change to summer time may leave out
        places = np.searchsorted(self.slots, _in_week(own), side="right") + np.arange(count + skipped)
        weeks, numbers = np.divmod(places, len(self.slots))
        ahead = weeks * _WEEK + self.slots[numbers] - _in_week(own)
        naive = last.tz_localize(None)
        dates = pd.DatetimeIndex([naive + pd.Timedelta(int(one), unit="ns") for one in ahead])
        return _on_clock(dates, last).unique()[:count]

    def missing(self, dates: pd.DatetimeIndex) -> np.ndarray:
        """Find the rows before which rows are missing; days that holidays may close are not.

        Each row is compared with the one above it, so that several series may follow each other in `dates`.
        """
        if len(dates) < 2:
            return np.zeros(0, np.int64)
        if isinstance(self.step, pd.Timedelta) and self.slots is not None:
            return np.flatnonzero(self._skips_rows(_nanoseconds(dates))) + 1
        if isinstance(self.step, pd.Timedelta):
            # With a tolerance of one half, for steps that are not quite equal.
            return np.flatnonzero(np.diff(self._times(dates)) > 1.5 * self.step.value) + 1
        if isinstance(self.step, MonthStep):
            return np.flatnonzero(np.diff(dates.year * 12 + dates.month) > self.step.months) + 1
        expected = pd.date_range(dates.min(), dates.max(), freq=self.step)
        return np.flatnonzero(np.diff(expected.searchsorted(dates)) > 1) + 1

    def _skips_rows(self, times: np.ndarray) -> np.ndarray:
        """Return for each step between times whether it skips rows that no holiday explains, (times - 1,)."""
        weeks, in_week = (times - _in_week(times)) // _WEEK, _in_week(times)
        places = weeks * len(self.slots) + np.searchsorted(self.slots, in_week)
        open_days, days = np.unique(self.slots // _DAY), in_week // _DAY
        day_places = weeks * len(open_days) + np.searchsorted(open_days, days)
        first_of_day = self.slots[np.searchsorted(self.slots, days * _DAY).clip(max=len(self.slots) - 1)]
        last_of_day = self.slots[np.searchsorted(self.slots, (days + 1) * _DAY) - 1]
        whole_days = (in_week[1:] <= first_of_day[1:]) & (in_week[:-1] >= last_of_day[:-1])
        is_long = np.diff(day_places) > _HOLIDAYS + 1
        is_used = np.isin(in_week, self.slots)
        # Next to a row outside the calendar, only missing days count: hours around it may be special, too.
        is_gap = np.where(is_used[1:] & is_used[:-1], is_long | ~whole_days, is_long)
        return (np.diff(places) > 1) & is_gap

    def _times(self, dates: pd.DatetimeIndex) -> np.ndarray:
        """Convert dates to nanoseconds in which a step of fixed length is equally long in summer and winter time."""
        return _nanoseconds(dates if self.step.value >= _DAY or dates.tz is None else dates.tz_convert("UTC"))

    def first_deviation(self, last: pd.Timestamp, dates: pd.DatetimeIndex) -> int | None:
        """Find the first of some dates after `last` that is not the next one by the calendar; None if all are."""
        both = dates.insert(0, last)
        if not isinstance(self.step, pd.Timedelta):
            wrong = [number for number, date in enumerate(dates) if date not in self.next_dates(both[number], 1)]
        elif self.slots is not None:
            wrong = np.flatnonzero(self._skips_rows(_nanoseconds(both)))
        else:
            off = np.abs(np.diff(self._times(both)) - self.step.value)
            # Local time without a zone jumps by an hour twice a year; several rows may have the same date.
            is_wrong = (off > self.step.value / 2) & (np.diff(both.asi8) != 0)
            jumps = is_wrong & (off == _HOUR) & (self.step.value < _DAY) & (both.tz is None)
            wrong = np.flatnonzero(is_wrong & ~(jumps & (jumps.sum() == 1)))
        return int(wrong[0]) if len(wrong) else None

    def describe(self) -> str:
        """Describe on which weekdays and hours rows fall; empty if they fall on all."""
        if self.slots is None:
            return ""
        days = _list_days(np.unique(self.slots // _DAY))
        times = self.slots % _DAY
        if (times == times[0]).all():
            return f"rows fall on {days}"
        first, last = (str(pd.Timestamp(int(time)).time())[:5] for time in (times.min(), times.max()))
        return f"rows fall on {days}, {first} to {last}"


def _nanoseconds(dates: pd.DatetimeIndex) -> np.ndarray:
    """Convert dates to nanoseconds of their own clock, from a Monday on."""
    naive = dates.tz_localize(None) if dates.tz is not None else dates
    return naive.as_unit("ns").asi8 - pd.Timestamp("1969-12-29").value


def _on_clock(dates: pd.DatetimeIndex, like: pd.Timestamp) -> pd.DatetimeIndex:
    """Move dates without a zone to the zone and unit of another; an hour that is skipped becomes the one after it."""
    summer = np.ones(len(dates), bool)  # an hour that occurs twice is the first
    return dates.tz_localize(like.tz, ambiguous=summer, nonexistent="shift_forward").as_unit(like.unit)


def _in_week(times: np.ndarray) -> np.ndarray:
    """Compute the nanoseconds after Monday 00:00."""
    return times % _WEEK


def _list_days(days: Sequence[int]) -> str:
    """Name weekdays, as a range if they follow each other."""
    names = [_WEEKDAYS[day] for day in days]
    follow = len(days) > 2 and days[-1] - days[0] == len(days) - 1
    return f"{names[0]} to {names[-1]}" if follow else ", ".join(names)


def _month_step(dates: pd.DatetimeIndex) -> MonthStep | None:
    """Find a step of whole months, with rows missing or on a day that no offset of pandas stands for."""
    months = np.unique(np.diff(dates.year * 12 + dates.month))
    if len(dates) < 3 or months[0] < 1 or (dates - dates.normalize()).nunique() > 1:
        return None
    day = int(dates.day.max())
    if day > 28 and dates.is_month_end.all():
        day = 31
    if (dates.day != np.minimum(day, dates.days_in_month)).any():
        return None
    return MonthStep(gcd(*(int(step) for step in months)), day)


def _find_slots(times: np.ndarray, step: int) -> np.ndarray | None:
    """Find the slots of the week that rows fall on; None if rows fall on all of them, or rows are missing at random."""
    if step > _DAY or _WEEK % step:
        return None
    first, last = times[0] // _WEEK, times[-1] // _WEEK
    if last - first - 1 >= _FEWEST_WEEKS:  # the first and the last week may be incomplete
        inner = times[(times // _WEEK > first) & (times // _WEEK < last)]
        return _used_slots(_in_week(inner), last - first - 1, _WEEK // step)
    first, last = times[0] // _DAY, times[-1] // _DAY
    if last - first - 1 < _FEWEST_DAYS or step == _DAY:
        return None
    inner = times[(times // _DAY > first) & (times // _DAY < last)]
    slots = _used_slots(inner % _DAY, last - first - 1, _DAY // step)
    return None if slots is None else np.concatenate([slots + day * _DAY for day in range(7)])


def _used_slots(times: np.ndarray, periods: int, count: int) -> np.ndarray | None:
    """Find the times of a period that occur in most of the periods; None unless the others (almost) never do."""
    slots, counts = np.unique(times, return_counts=True)
    shares = counts / periods
    is_used = shares >= _USED
    used = slots[is_used]
    if not len(used) or len(used) >= count or (~is_used & (shares > _LEFT_OUT) & (counts > 1)).any():
        return None
    # Rows that are missing at random leave a slot empty by chance. Their share is taken a standard error higher than
    # among the used slots, since the empty ones are not counted there.
    missing = 1 - np.minimum(shares[is_used], 1).mean()
    missing += np.sqrt(missing * (1 - missing) / (periods * len(used)))
    return used if count * missing**periods < _CHANCE else None
