"""The step, the weekdays and the hours of a series' dates, and the dates that come next."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_provider.calendars import Calendar
from utils.errors import UserError

HOURS = pd.date_range("2024-01-01", periods=24 * 60, freq="h")  # a Monday
DAYS = pd.date_range("2024-01-02", periods=240)
HOLIDAYS = pd.to_datetime(["2023-04-07", "2023-04-10", "2023-12-25", "2023-12-26", "2024-01-01"])


def calendar(dates):
    return Calendar.of(pd.DatetimeIndex(dates), Path("x.csv"))


def following(dates, count=4):
    return [str(date) for date in calendar(dates).next_dates(dates[-1], count)]


def is_open(hours, first=9, last=17, days=6):
    return hours[(hours.hour >= first) & (hours.hour <= last) & (hours.day_of_week < days)]


@pytest.mark.parametrize(
    ("dates", "described", "first"),
    [
        (pd.bdate_range("2023-01-02", periods=400), "Monday to Friday", "2024-07-15 00:00:00"),
        (pd.bdate_range("2023-01-02", periods=10), "Monday to Friday", "2023-01-16 00:00:00"),
        (pd.bdate_range("2023-01-02", periods=400).drop(HOLIDAYS), "Monday to Friday", "2024-07-15 00:00:00"),
        (DAYS[DAYS.day_of_week != 0], "Tuesday to Sunday", "2024-08-29 00:00:00"),
        (is_open(HOURS), "Monday to Saturday, 09:00 to 17:00", "2024-03-01 09:00:00"),
        (is_open(HOURS + pd.Timedelta("30min"), 9, 15, 5), "Monday to Friday, 09:30 to 15:30", "2024-03-01 09:30:00"),
        (HOURS[HOURS.hour < 20][:160], "Monday to Sunday, 00:00 to 19:00", "2024-01-09 00:00:00"),
    ],
)
def test_weekdays_and_hours_without_rows_stay_without(dates, described, first):
    found = calendar(dates)
    assert found.describe() == f"rows fall on {described}"
    assert following(dates)[0] == first
    slots = {(date.day_of_week, date.time()) for date in dates}
    assert all((date.day_of_week, date.time()) in slots for date in found.next_dates(dates[-1], 300))
    assert not len(found.missing(dates))


def test_a_missing_hour_of_an_open_day_is_a_gap_and_a_holiday_is_none():
    opened = is_open(HOURS)
    assert calendar(opened.delete([100, 101])).missing(opened.delete([100, 101])).tolist() == [100]
    for closed, gaps in ((1, 0), (3, 0), (4, 1)):
        day = opened[opened.normalize() == "2024-01-22"][0].normalize()
        kept = opened[(opened < day) | (opened >= day + pd.Timedelta(days=closed))]
        assert len(calendar(kept).missing(kept)) == gaps, closed


@pytest.mark.parametrize("seed", range(12))
def test_rows_that_are_missing_by_chance_are_no_calendar(seed):
    drawn = np.random.default_rng(seed)
    for dates in (HOURS[: 24 * 21], HOURS, DAYS[:60]):
        kept = dates[drawn.random(len(dates)) > 0.03 * (1 + seed % 5)]
        found = calendar(kept)
        assert found.describe() == "", len(dates)
        assert len(found.missing(kept)) == (np.diff(kept.asi8) > np.diff(dates.asi8)[0]).sum()
        assert found.next_dates(kept[-1], 1)[0] - kept[-1] == dates[1] - dates[0]


@pytest.mark.parametrize("seed", [11, 28, 49, 87, 184, 239])
def test_a_weekday_that_is_missing_by_chance_is_none(seed):
    """Of 46 days three in ten are missing, and in these draws nearly all of one weekday."""
    kept = DAYS[:46][np.random.default_rng(seed).random(46) > 0.3]
    weekdays = kept[(kept >= "2024-01-08") & (kept < "2024-02-12")].day_of_week
    assert np.bincount(weekdays, minlength=7).min() <= 1
    assert calendar(kept).describe() == ""


@pytest.mark.parametrize("freq", ["MS", "ME", "QS", "QE", "YS", "YE", "W", "W-WED", "D", "h", "15min"])
def test_the_step_survives_a_gap(freq):
    dates = pd.date_range("2020-01-31", periods=64, freq=freq)
    assert following(dates[:60]) == [str(date) for date in dates[60:]]
    gap = dates[:60].delete(40)
    assert following(gap) == [str(date) for date in dates[60:]]
    assert calendar(gap).missing(gap).tolist() == [40] and not len(calendar(dates).missing(dates))


@pytest.mark.parametrize("day", [4, 15, 30])
def test_months_keep_their_day(day):
    months = pd.date_range("2020-01-01", periods=64, freq="MS")
    dates = pd.DatetimeIndex([month.replace(day=min(day, month.days_in_month)) for month in months])
    assert following(dates[:60]) == [str(date) for date in dates[60:]]
    assert following(dates[:60].delete([30, 50])) == [str(date) for date in dates[60:]]


def test_a_day_of_a_time_zone_and_repeated_dates():
    days = pd.date_range("2024-03-01", periods=33, freq="D", tz="Europe/Berlin")
    assert following(days[:29]) == [str(date) for date in days[29:]]
    twice = DAYS.repeat(2)
    assert following(twice, 2) == ["2024-08-29 00:00:00", "2024-08-30 00:00:00"]
    with pytest.raises(UserError, match="no step"):
        calendar(DAYS[:1].repeat(3))


def test_dates_that_do_not_go_on_are_found():
    for dates in (HOURS, pd.date_range("2020-01-31", periods=40, freq="ME")):
        found = calendar(dates)
        coming = found.next_dates(dates[-1], 12)
        assert found.first_deviation(dates[-1], coming) is None
        assert found.first_deviation(dates[-1], coming.delete(range(2, 8))) == 2
        assert found.first_deviation(dates[-1], coming[::3]) == 1
        assert found.first_deviation(dates[-1], coming + pd.DateOffset(years=1)) == 0
    business = pd.bdate_range("2023-01-02", periods=400)
    found = calendar(business)
    coming = found.next_dates(business[-1], 12)
    assert found.first_deviation(business[-1], coming.delete([3, 4])) is None  # holidays
    assert found.first_deviation(business[-1], coming.delete(range(2, 8))) == 2
    jump = pd.DatetimeIndex(["2024-03-31 01:00", "2024-03-31 03:00", "2024-03-31 04:00"])  # summer time, local
    assert calendar(HOURS).first_deviation(pd.Timestamp("2024-03-31 00:00"), jump) is None


@pytest.mark.parametrize("unit", ["s", "us", "ns"])
def test_dates_of_a_time_zone_keep_their_time_of_day_and_unit(unit):
    opened = is_open(pd.date_range("2024-01-01", periods=24 * 91, freq="h", tz="Europe/Berlin"), days=5)
    business = pd.bdate_range("2024-01-01", periods=70, tz="Europe/Berlin")
    months = pd.date_range("2020-01-31", periods=48, freq="ME", tz="Europe/Berlin")
    for dates, known in ((opened, 9 * 62), (business, 64), (months.delete(5), 38)):
        dates = dates.as_unit(unit)
        found, coming = calendar(dates[:known]), dates[known:]
        next_dates = found.next_dates(dates[known - 1], len(coming))
        assert list(next_dates) == list(coming) and next_dates.unit == unit
        assert found.first_deviation(dates[known - 1], coming) is None


def test_an_hour_that_summer_time_skips_is_no_gap_and_no_date():
    hours = pd.date_range("2024-03-01", periods=24 * 40, freq="h", tz="Europe/Berlin")
    assert not len(calendar(hours).missing(hours))
    without_one = hours.delete([800])
    assert calendar(without_one).missing(without_one).tolist() == [800]
    assert calendar(hours).first_deviation(hours[-1], calendar(hours).next_dates(hours[-1], 9).delete(5)) == 5
    nights = pd.date_range("2024-01-01", "2024-03-30 23:00", freq="h", tz="Europe/Berlin")
    nights = nights[nights.hour < 6]
    assert [date.hour for date in calendar(nights).next_dates(nights[-1], 8)] == [0, 1, 3, 4, 5, 0, 1, 2]


def test_rows_that_go_on_a_year_later_are_found_on_every_weekday():
    business = pd.bdate_range("2023-01-02", periods=400)
    found = calendar(business)
    coming = found.next_dates(business[-1], 12)
    for days in range(360, 367):
        assert found.first_deviation(business[-1], coming + pd.Timedelta(days=days)) == 0, days
