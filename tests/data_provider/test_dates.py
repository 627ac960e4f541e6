"""The dates of a CSV: how they are found, read and written again."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_provider.dates import find_date_column, parse_dates
from utils.errors import UserError

DAYS = pd.date_range("2005-01-01", periods=60)
HOURS = pd.date_range("2005-01-30 22:00", periods=60, freq="h")
MONTHS = pd.date_range("2005-01-01", periods=60, freq="MS")
PATH = Path("x.csv")


def written(dates, style):
    return dates.strftime(style).tolist()


def parsed(cells, date_format="", groups=None):
    return parse_dates(PATH, pd.Series(cells, name="date"), date_format, groups)


@pytest.mark.parametrize(
    ("dates", "style", "note"),
    [
        (DAYS, "%Y-%m-%d", ""),
        (HOURS, "%Y-%m-%d %H:%M", ""),
        (HOURS, "%Y-%m-%d %H:%M:%S", ""),
        (HOURS, "%Y-%m-%dT%H:%M:%S", ""),
        (MONTHS, "%Y-%m", ""),
        (DAYS, "%Y/%m/%d", ""),
        (DAYS, "%d %b %Y", ""),
        (DAYS, "%B %d, %Y", ""),
        (MONTHS, "%d/%m/%Y", "'01/01/2005' are read with the day first"),
        (DAYS, "%d-%m-%Y", "with the day first"),
        (DAYS, "%d.%m.%y", "with the day first"),
        (HOURS, "%d/%m/%Y %H:%M", "with the day first"),
        (HOURS, "%d.%m.%Y %H:%M:%S", "with the day first"),
        (DAYS, "%m/%d/%Y", "with the month first"),
        (HOURS, "%m/%d/%Y %I:%M %p", "with the month first"),
        (DAYS[::-1], "%d/%m/%Y", "with the day first"),
        (DAYS, "%Y%m%d", "numbers such as 20050101"),
        (MONTHS, "%Y%m", "numbers such as 200501"),
        (HOURS, "%Y%m%d%H%M", "numbers such as 200501302200"),
        (MONTHS[::12], "%Y", "the dates are years"),
    ],
)
def test_dates_are_written_as_they_were_read(dates, style, note):
    cells = written(dates, style)
    found = parsed(cells)
    assert found.dates.tolist() == dates.tolist()
    assert found.style.write(found.dates) == cells
    assert bool(found.notes) == bool(note) and note in "".join(found.notes)
    coming = pd.DatetimeIndex(dates[-1:] + pd.Timedelta("90min"))
    assert pd.to_datetime(found.style.write(coming)[0]) == coming[0]  # in more digits, if need be


@pytest.mark.parametrize(
    "write",
    [
        lambda date: f"{date.day}/{date.month}/{date.year}",
        lambda date: f"{date.month}/{date.day}/{date.year} {date.hour}:{date.minute:02d}",
        lambda date: f"{date.month}/{date.day}/{date.year} {date.hour:02d}:{date.minute:02d}",
    ],
)
def test_zeros_are_left_out_where_the_csv_leaves_them_out(write):
    dates = pd.date_range("2005-01-08 07:05", periods=60, freq="h")
    dates = dates.normalize()[::24].union(DAYS) if ":" not in write(dates[0]) else dates
    cells = [write(date) for date in dates]
    found = parsed(cells)
    assert found.dates.tolist() == dates.tolist() and found.style.write(found.dates) == cells


def test_numbers_since_1970():
    seconds = [1577836800 + 3600 * number for number in range(9)]
    for cells in (seconds, [1000 * second for second in seconds]):
        found = parsed(cells)
        assert found.dates[0] == pd.Timestamp("2020-01-01") and found.dates[1] == pd.Timestamp("2020-01-01 01:00")
        assert found.style.write(found.dates) == [str(cell) for cell in cells] and "since 1970" in found.notes[0]


def test_the_step_within_series_decides():
    cells = written(MONTHS, "%d/%m/%Y") * 2
    found = parsed(cells, groups=np.repeat([0, 1], len(MONTHS)))
    assert found.dates.tolist() == [*MONTHS, *MONTHS]


@pytest.mark.parametrize(
    ("cells", "date_format", "words"),
    [
        (["01/02/2020", "02/02/2020"], "", "month first: give --date_format dayfirst or --date_format %m/%d/%Y"),
        (["2020-01-01", "x"], "", "data row 2, column 'date': 'x' is not a date"),
        (["2020-01-01", None], "", "data row 2, column 'date': 'nan' is not a date"),
        (["foo", "bar"], "", "not a date in a common format"),
        ([2020.0, float("inf")], "", "data row 2, column 'date': 'inf' is not a date"),
        ([1, 2, 3], "", "numbers such as 1 are not dates"),
        (["2020-01-01", "2020|01|02"], "%Y-%m-%d", "row 2, column 'date': '2020|01|02' does not match --date_format"),
        (["2020-01-01"], "%", "--date_format %: stray %"),
        (["2024-01-01 00:00+01:00", "2024-01-01 01:00"], "", "UTC offset"),
        (["32/01/2020", "01/02/2020"], "dayfirst", "'32/01/2020' is not a date"),
    ],
)  # fmt: skip
def test_what_is_no_date_is_named(cells, date_format, words):
    with pytest.raises(UserError) as refused:
        parsed(cells, date_format)
    assert words in str(refused.value)


@pytest.mark.parametrize("time", [", %H:%M", " %H:%M+01:00", " %H:%M:%SZ", "T%H:%M:%S.000", " %Hh"])
def test_day_and_month_are_told_apart_before_any_time(time):
    dates = pd.date_range("2024-02-01", periods=72, freq="h")
    found = parsed(written(dates, "%d/%m/%Y" + time))
    assert found.dates.tz_localize(None).tolist() == dates.tolist() and "the day first" in found.notes[0]
    assert (parsed(found.style.write(found.dates)).dates == found.dates).all()
    chosen = parsed(written(dates[:2], "%d/%m/%Y" + time), "dayfirst")
    assert chosen.dates.tz_localize(None).tolist() == dates[:2].tolist()


def test_changing_offsets_need_iso_dates():
    with pytest.raises(UserError, match=r"UTC offsets that change are read in dates like 2024-01-31 09:00\+01:00 only"):
        parsed(["13/01/2024 00:00+01:00", "13/07/2024 00:00+02:00"])


@pytest.mark.parametrize("style", ["%d%m%y", "%m%d%Y", "%d%m%Y%H"])
def test_numbers_with_a_format_regain_the_zeros_they_began_with(style):
    cells = written(DAYS, style)
    found = parsed([int(cell) for cell in cells], style)
    assert found.dates.tolist() == DAYS.tolist() and found.style.write(found.dates) == cells


def test_seconds_since_1970_are_not_hours_of_1601():
    assert parsed([1601010100, 1601010101]).dates[0] == pd.Timestamp("2020-09-25 05:01:40")


def test_the_format_decides():
    assert parsed(["01/02/2020", "02/02/2020"], "dayfirst").dates[0] == pd.Timestamp("2020-02-01")
    assert parsed(["01/02/2020", "02/02/2020"], "monthfirst").dates[0] == pd.Timestamp("2020-01-02")
    assert parsed(["2020|13|01"], "%Y|%d|%m").dates[0] == pd.Timestamp("2020-01-13")


@pytest.mark.parametrize(
    ("zone", "start"),
    [("Europe/Berlin", "2024-03-30"), ("Europe/London", "2024-10-26"), ("America/New_York", "2024-03-09")],
)
def test_summer_time_is_one_time_line(zone, start):
    hours = pd.date_range(start, periods=72, freq="h", tz=zone)
    cells = [hour.isoformat(sep=" ") for hour in hours]
    found = parsed(cells)
    assert (found.dates == hours).all() and str(found.dates.tz) == "UTC"
    assert found.style.write(found.dates) == cells and zone in found.notes[0]
    unknown = parsed(["2024-01-01 00:00:00+01:00", "2024-01-01 01:00:00+01:00", "2024-01-01 02:00:00+03:00"])
    assert unknown.style.write(unknown.dates)[2] == "2023-12-31 23:00:00+00:00" and "no zone" in unknown.notes[0]


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"date": 1, "Time": 1}, "date"),
        ({"sales": 1, "Date": 1}, "Date"),
        ({"sales": 1, "Date_Time ": 1}, "Date_Time "),
        ({"day": 1, "timestamp": 1}, "timestamp"),
        ({"Date": "2024-01-01", "Time": ["2024-01-01 00:00", "2024-01-01 01:00", "2024-01-01 02:00"]}, "Time"),
        ({"sales": 1, "when": "2024-01-01"}, "when"),
        ({"Date": "2024-01-01", "Time": ["00:00", "01:00", "02:00"]}, "Date"),
        ({"year": 2024, "month": [1, 2, 3], "day": [1, 2, 3], "when": "2024-01-01"}, "when"),
        ({"sales": 1, "year": [1990, 1991, 1992]}, "year"),
        ({"sales": 1, "when": "31.12.2024 10:00", "note": "on 2024-01-01"}, "when"),
    ],
)
def test_the_column_of_dates_is_found(columns, found):
    name, note = find_date_column(PATH, pd.DataFrame(columns, index=range(3)))
    assert name == found and (found == "date" or (repr(found) in note and "--date_column" in note))


@pytest.mark.parametrize(
    ("columns", "wanted", "words"),
    [
        ({"sales": 1, "month": [1, 2, 3]}, "", "no other column of dates"),
        ({"sales": 1, "text": "a"}, "", "no column 'date' and no other column of dates"),
        ({"when": "2024-01-01", "then": "2024-01-02"}, "", "several columns of dates, when, then"),
        ({"sales": 1}, "day", "no column 'day' for --date_column"),
    ],
)
def test_no_column_of_dates_is_an_error(columns, wanted, words):
    with pytest.raises(UserError) as refused:
        find_date_column(PATH, pd.DataFrame(columns, index=range(3)), wanted)
    assert words in str(refused.value)
