"""CSVs as people have them, from the file to forecast.csv."""

import numpy as np
import pandas as pd
import pytest

from data_provider.csv_cells import find_sentinels
from utils.runs import load_run

SHORT = [
    *("--model", "DLinear", "--seq_len", "14", "--pred_len", "6", "--max_steps", "1", "--skip_epoch_test"),
    *("--eval_windows", "5", "--predict"),
]


def values(count, seed=0):
    return np.random.default_rng(seed).normal(50, 5, count).round(2)


@pytest.fixture
def forecast(run, tmp_path):
    """Return a function that writes a CSV, as a frame or as text, and returns the run and its forecast.csv as text."""

    def run_on(table, *flags, name="own.csv"):
        if isinstance(table, pd.DataFrame):
            table.to_csv(tmp_path / name, index=False)
        else:
            (tmp_path / name).write_text(table, encoding="utf-8")
        done = run("--csv", tmp_path / name, *SHORT, *flags)
        assert done.code == 0, done.err
        return done, pd.read_csv(done.folder / "forecast.csv", dtype=str)

    return run_on


def dated(dates, style="%Y-%m-%d", name="date", **columns):
    texts = [date.strftime(style) for date in dates]
    return pd.DataFrame({name: texts, **(columns or {"sales": values(len(texts))})})


def test_a_plain_csv_says_nothing_and_keeps_its_style(forecast):
    done, frame = forecast(dated(pd.date_range("2024-01-01", periods=150)))
    assert frame["date"].tolist() == [f"2024-05-{day}" for day in range(30, 32)] + [
        f"2024-06-0{day}" for day in range(1, 5)
    ]
    assert "Data |" not in done.out and "Warning" not in done.out
    assert frame["sales"].str.replace(r"\D", "", regex=True).str.lstrip("0").str.len().max() <= 7


def test_csv_stands_for_three_flags(forecast, run, tmp_path, assert_refused):
    done, _ = forecast(dated(pd.date_range("2024-01-01", periods=150)))
    metrics = done.metrics()
    again = run("--data", "custom", "--root_path", tmp_path, "--data_path", "own.csv", *SHORT)
    assert again.folders == done.folders and again.metrics()["mse"] == metrics["mse"]
    refused = run("--csv", tmp_path / "own.csv", "--data_path", "own.csv", *SHORT)
    assert refused.code == 2 and "--csv stands for" in refused.err


@pytest.mark.parametrize(
    ("step", "style", "expected"),
    [
        ("MS", "%d/%m/%Y", ["01/07/2017", "01/08/2017"]),
        ("D", "%d-%m-%Y", ["31-05-2005", "01-06-2005"]),
        ("D", "%d.%m.%y", ["31.05.05", "01.06.05"]),
        ("h", "%d/%m/%Y %H:%M", ["07/01/2005 06:00", "07/01/2005 07:00"]),
        ("D", "%m/%d/%Y", ["05/31/2005", "06/01/2005"]),
    ],
)
def test_day_and_month_are_read_so_that_the_step_is_regular(forecast, step, style, expected):
    done, frame = forecast(dated(pd.date_range("2005-01-01", periods=150, freq=step), style))
    assert frame["date"].tolist()[:2] == expected
    assert "gaps in the dates" not in done.out
    assert ("Data | own.csv: dates such as" in done.out) and "--date_format" in done.out


def test_the_date_format_decides(forecast, run, tmp_path):
    frame = dated(pd.date_range("2005-01-01", periods=150), "%Y|%d|%m")
    _, own = forecast(frame, "--date_format", "%Y|%d|%m")
    assert own["date"].tolist()[:2] == ["2005|31|05", "2005|01|06"]
    refused = run("--csv", tmp_path / "own.csv", *SHORT, "--date_format", "%Y-%m-%d")
    assert refused.code == 2 and "data row 1, column 'date': '2005|01|01' does not match --date_format" in refused.err


def test_a_stock_has_no_weekends_and_no_gaps(forecast):
    days = pd.bdate_range("2023-01-02", periods=400)
    holidays = pd.to_datetime(["2023-04-07", "2023-04-10", "2023-05-01", "2023-12-25", "2023-12-26", "2024-01-01"])
    done, frame = forecast(dated(days.drop(holidays)))
    coming = pd.to_datetime(frame["date"])
    assert (coming.dt.day_of_week < 5).all() and len(coming) == 6
    assert coming[0] == days[-1] + pd.offsets.BDay(1)
    assert "gaps in the dates" not in done.out


def test_a_shop_that_is_closed_on_mondays_and_open_hours(forecast):
    days = pd.date_range("2024-01-02", periods=240)
    done, frame = forecast(dated(days[days.day_of_week != 0]))
    assert (pd.to_datetime(frame["date"]).dt.day_of_week != 0).all() and "gaps" not in done.out
    hours = pd.date_range("2024-01-01", periods=24 * 60, freq="h")
    is_open = (hours.hour >= 9) & (hours.hour <= 17) & (hours.day_of_week < 6) & (hours.normalize() != "2024-02-14")
    done, frame = forecast(dated(hours[is_open], "%Y-%m-%d %H:%M"), name="hours.csv")
    coming = pd.to_datetime(frame["date"])
    assert coming.dt.hour.between(9, 17).all() and (coming.dt.day_of_week < 6).all()
    assert "gaps" not in done.out


def test_a_regular_series_keeps_its_gaps(forecast):
    hours = pd.date_range("2024-01-01", periods=600, freq="h")
    done, frame = forecast(dated(hours.delete([100, 101, 300]), "%Y-%m-%d %H:%M"))
    assert "2 gaps in the dates" in done.out
    assert frame["date"].tolist()[:2] == ["2024-01-26 00:00", "2024-01-26 01:00"]


def test_rows_at_the_end_without_a_value_are_to_be_forecast(forecast):
    frame = dated(pd.date_range("2024-01-01", periods=150))
    frame.loc[130:, "sales"] = np.nan
    done, own = forecast(frame)
    assert own["date"].tolist()[0] == frame["date"][130]
    assert "the last 20 rows have no value" in done.out and "cells are empty" not in done.out
    _, theirs = forecast(frame.head(130), name="short.csv")
    assert own.equals(theirs)


def test_an_index_column_is_left_out(forecast, tmp_path):
    frame = dated(pd.date_range("2024-01-01", periods=150))
    done, own = forecast(frame.to_csv())
    assert own.columns.tolist() == ["date", "sales"] and "has no name" in done.out
    assert list(done.metrics()["per_channel"]) == ["sales"]


def test_marks_of_missing_values_are_named_and_can_be_given(forecast):
    frame = dated(pd.date_range("2024-01-01", periods=150))
    frame.loc[[5, 50, 90, 120], "sales"] = -999
    done, _ = forecast(frame)
    assert "column 'sales' is -999 in 4 rows" in done.out and "--na_values=-999" in done.out
    done, _ = forecast(frame, "--na_values=-999", name="given.csv")
    assert "4 of 150 cells are empty" in done.out and "is -999" not in done.out
    assert find_sentinels(["a"], np.array([[1.0], [2.0], [9999.0], [9999.0]])) == ()
    assert find_sentinels(["a"], np.r_[np.arange(9000.0), [9999.0] * 5][:, None]) == ()


@pytest.mark.parametrize(
    ("dates", "expected"),
    [
        (pd.date_range("2010-01-01", periods=150, freq="MS") + pd.Timedelta("3D"), ["2022-07-04", "2022-08-04"]),
        (pd.date_range("2010-01-01", periods=150, freq="MS") + pd.Timedelta("14D"), ["2022-07-15", "2022-08-15"]),
        (pd.date_range("2010-01-31", periods=150, freq="ME"), ["2022-07-31", "2022-08-31"]),
        (pd.date_range("1990-03-31", periods=150, freq="QE"), ["2027-09-30", "2027-12-31"]),
    ],
)
def test_the_step_of_a_calendar_survives_a_gap(forecast, dates, expected):
    done, frame = forecast(dated(dates.delete(140)))
    assert frame["date"].tolist()[:2] == expected
    assert "1 gaps in the dates" in done.out
    _, whole = forecast(dated(dates), name="whole.csv")
    assert whole["date"].tolist()[:2] == expected


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda days: days + pd.Timedelta("10D"), "2024-06-08"),
        (lambda days: pd.date_range(days[0], periods=6, freq="3D"), "2024-06-01"),
        (lambda days: days + pd.DateOffset(years=1), "2025-05-29"),
    ],
)
def test_rows_to_forecast_go_on_at_the_step_of_the_data(forecast, run, tmp_path, change, what):
    days = pd.date_range("2024-01-01", periods=155)
    frame = dated(days[:149].append(change(days[149:])), price=values(155, 1), sales=values(155))
    frame.loc[149:, "sales"] = np.nan
    frame.to_csv(tmp_path / "own.csv", index=False)
    refused = run("--csv", tmp_path / "own.csv", *SHORT, "--covariates", "price")
    assert refused.code == 2 and refused.err.count("\n") == 1 and what in refused.err
    frame["date"] = days.strftime("%Y-%m-%d")
    _, own = forecast(frame, "--covariates", "price", name="good.csv")
    assert own["date"].tolist() == frame["date"][149:].tolist()


@pytest.mark.parametrize("name", ["Date", "Time", "ds", "timestamp", "datetime", "date_time", "DATE", "when"])
def test_the_date_column_is_found(forecast, name):
    frame = dated(pd.date_range("2024-01-01", periods=150), name=name)
    done, own = forecast(frame)
    assert own.columns.tolist() == ["date", "sales"] and own["date"][0] == "2024-05-30"
    assert f"'{name}'" in done.out and "--date_column" in done.out
    named, theirs = forecast(frame, "--date_column", name)
    assert theirs.equals(own) and "--date_column" not in named.out


def test_a_long_csv_by_other_names(forecast, tmp_path):
    days = pd.date_range("2024-01-01", periods=150).strftime("%Y-%m-%d")
    parts = [pd.DataFrame({"store": name, "day": days, "sales": values(150, seed)}) for seed, name in enumerate("ab")]
    frame = pd.concat([parts[0].head(1), pd.concat([parts[0][1:], parts[1]]).sample(frac=1, random_state=0)])
    flags = ["--id_column", "store", "--date_column", "day", "--target", "sales"]
    done, own = forecast(frame, *flags)
    assert own.columns.tolist() == ["unique_id", "ds", "y"] and len(own) == 12
    assert set(own["ds"]) == set(pd.date_range("2024-05-30", periods=6).strftime("%Y-%m-%d"))
    assert "sorted by date" in done.out
    python = load_run(done.folder, device="cpu").predict(frame)
    np.testing.assert_array_equal(python["y"], own["y"].astype(float))
    usual = pd.concat(parts).set_axis(["unique_id", "ds", "y"], axis=1)
    _, theirs = forecast(usual, name="usual.csv")
    order = ["unique_id", "ds"]
    ours, theirs = (one.sort_values(order).reset_index(drop=True) for one in (own, theirs))
    assert ours.equals(theirs)


def test_newest_first_is_sorted(forecast):
    frame = dated(pd.date_range("2024-01-01", periods=150))
    done, own = forecast(frame[::-1])
    assert "newest first" in done.out
    _, theirs = forecast(frame, name="sorted.csv")
    assert own.equals(theirs)


def test_the_european_excel_is_read(forecast):
    frame = dated(pd.date_range("2024-01-01", periods=150), "%d.%m.%Y")
    text = frame.to_csv(index=False, sep=";", decimal=",")
    done, own = forecast(text)
    assert "semicolons" in done.out and "decimal commas" in done.out
    assert own["date"][0] == "30.05.2024"
    _, theirs = forecast(frame, name="commas.csv")
    assert own.equals(theirs)
    thousands = frame.assign(sales=[f"{1000 + value:,.2f}" for value in frame["sales"]])
    _, own = forecast(thousands, name="thousands.csv")
    assert own["sales"].astype(float).between(1000, 1100).all()
    dashes = frame.assign(sales=frame["sales"].astype(str).where(frame.index % 10 != 3, "-"))
    done, _ = forecast(dashes, "--na_values", "-", name="dashes.csv")
    assert "15 of 150 cells are empty" in done.out


def test_time_zones_with_summer_time_are_one_time_line(forecast):
    hours = pd.date_range("2024-03-25", periods=200, freq="h", tz="Europe/Berlin")
    frame = pd.DataFrame({"date": [hour.isoformat(sep=" ") for hour in hours], "load": values(200)})
    done, own = forecast(frame)
    assert own["date"][0] == (hours[-1] + pd.Timedelta("1h")).isoformat(sep=" ")
    assert "UTC" in done.out and "gaps" not in done.out


def test_a_short_context_needs_no_label_len(run, forecast):
    done, _ = forecast(dated(pd.date_range("2024-01-01", periods=150)))
    assert "_sl14_ll14_" in done.folder.name


def test_numbers_for_dates(forecast, run, tmp_path):
    seconds = pd.DataFrame({"time": 1577836800 + 3600 * np.arange(150), "load": values(150)})
    _, own = forecast(seconds)
    assert own["date"].tolist()[:2] == [str(1577836800 + 3600 * 150), str(1577836800 + 3600 * 151)]
    years = pd.DataFrame({"year": np.arange(1870, 2020), "load": values(150)})
    _, own = forecast(years, "--date_column", "year", name="years.csv")
    assert own["date"].tolist() == ["2020", "2021", "2022", "2023", "2024", "2025"]
    pd.DataFrame({"time": np.arange(150), "load": values(150)}).to_csv(tmp_path / "odd.csv", index=False)
    refused = run("--csv", tmp_path / "odd.csv", *SHORT)
    assert refused.code == 2 and "are not dates" in refused.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "Sales of 2024\n\n" + text, ["line 1", "Sales of 2024"]),
        (lambda text: text + "Total,7500\n", ["line 152", "Total"]),
        (lambda text: text.replace("2024-01-05,", "2024-01-05,7,", 1), ["line 6"]),
        (lambda text: text.replace("sales", "sales,sales", 1).replace("\n2", ",1\n2"), ["'sales'"]),
        (lambda text: text.replace("date,sales", "date,sales,", 1).replace("\n2", ",x\n2"), ["has no name"]),
        (lambda text: text.replace("date,sales", "date,sales,weather", 1).replace("\n2", ",sunny\n2"),
         ["'weather' is text", "--covariates"]),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(assert_refused, tmp_path_factory, change, words):
    text = dated(pd.date_range("2024-01-01", periods=150)).to_csv(index=False)
    path = tmp_path_factory.mktemp("csv") / "own.csv"
    path.write_text(change(text), encoding="utf-8")
    assert_refused(["--csv", path, *SHORT], *words)
