"""Long CSVs: many series, a row a reading."""

import numpy as np
import pandas as pd
import pytest
import torch

from data_provider.data_factory import data_provider, load_series
from data_provider.reading import read_table
from dataset.demo import demo_frame
from utils.cli.options import get_parser
from utils.runs import load_run


def one(name, rows, start="2024-01-01", freq="h", base=0.0):
    """A series of so many rows, counting on from `base`."""
    dates = pd.date_range(start, periods=rows, freq=freq)
    return pd.DataFrame({"unique_id": name, "ds": dates, "y": base + np.arange(rows)})


def shops(count=12, rows=120):
    """Series with a daily course, each of a length, a level and a strength of its own."""
    drawn = np.random.default_rng(3)
    parts = []
    for number in range(count):
        frame = one(f"shop-{number}", rows + 7 * number, start=f"2024-01-{1 + number % 9:02}")
        wave = np.sin(2 * np.pi * np.arange(len(frame)) / 24)
        parts.append(frame.assign(y=100 * number + (1 + number) * (wave + 0.1 * drawn.normal(size=len(frame)))))
    return pd.concat(parts, ignore_index=True)


def options(folder, frame, *more):
    frame.to_csv(folder / "x.csv", index=False)
    command = ["--data", "custom", "--root_path", str(folder), "--data_path", "x.csv"]
    return get_parser().parse_args([*command, "--seq_len", "6", "--label_len", "2", "--pred_len", "3", *more])


def flags_of(folder, more):
    return ["--data", "custom", "--root_path", folder, "--data_path", "x.csv", "--label_len", "2", *more.split()]


def test_each_series_has_its_own_scaler_borders_and_dates(tmp_path):
    frame = pd.concat([one("b", 40, base=1000), one("a", 20, "2024-02-01"), one("short", 5)])
    interleaved = frame.sort_values("ds", kind="stable")
    args = options(tmp_path, interleaved)
    series = load_series(args)
    assert series.channels == ("b", "a"), "in the order in which they begin"
    assert series.ends.tolist() == [[28, 32, 40], [14, 16, 20]]
    np.testing.assert_allclose(series.scaler.mean_, [1000 + np.arange(28).mean(), np.arange(14).mean()])
    assert "1 of 3 series have fewer rows than --seq_len 6: left out" in series.notes[0]
    train, val, test = (data_provider(args, split)[0] for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (28 - 8 + 14 - 8, 4 - 2, 8 - 2 + 4 - 2)
    assert train.channel_of(range(len(train))).tolist() == [0] * 20 + [1] * 6
    for windows, number, channel, first in ((train, 19, 0, 19), (train, 20, 1, 0), (val, 0, 0, 22), (test, 6, 1, 10)):
        seq_x, seq_y, seq_x_mark, seq_y_mark = windows[number]
        values = series.scaler.mean_[channel] + series.scaler.scale_[channel] * np.concatenate([seq_x, seq_y[2:]])[:, 0]
        np.testing.assert_allclose(values, [1000, 0][channel] + np.arange(first, first + 9), atol=1e-3)
        hours = (np.concatenate([seq_x_mark, seq_y_mark[2:]])[:, 0] + 0.5) * 23
        np.testing.assert_allclose(hours, np.arange(first, first + 9) % 24, atol=1e-4)


def test_a_series_too_short_to_train_on_is_forecast(run, tmp_path):
    options(tmp_path, pd.concat([shops(3), one("new", 8, "2024-03-01")]))
    flags = [
        "--data",
        "custom",
        "--root_path",
        tmp_path,
        "--data_path",
        "x.csv",
        "--model",
        "DLinear",
        "--max_steps",
        3,
    ]
    flags += ["--seq_len", "6", "--label_len", "2", "--pred_len", "3", "--max_steps", "3"]
    done = run(*flags, "--predict")
    assert done.code == 0, done.err
    assert "1 of 4 series are too short to train on" in done.out
    forecast = pd.read_csv(done.folder / "forecast.csv", parse_dates=["ds"])
    assert list(forecast.columns) == ["unique_id", "ds", "y"]
    assert forecast["unique_id"].value_counts().to_dict() == {"shop-0": 3, "shop-1": 3, "shop-2": 3, "new": 3}
    new = forecast[forecast["unique_id"] == "new"]
    assert new["ds"].tolist() == list(pd.date_range("2024-03-01 08:00", periods=3, freq="h"))
    assert new["y"].between(-8, 16).all()


def test_from_the_csv_to_the_forecast(run, flags, tmp_path):
    frame = shops()
    options(tmp_path, frame)
    flags = [*flags, "--root_path", tmp_path, "--data_path", "x.csv", "--residual", "linear", "--level", "80"]
    done = run(*flags, "--predict")
    assert done.code == 0, done.err
    metrics = done.metrics()
    assert metrics["mse"] < metrics["seasonal_naive"]["mse"]
    assert metrics["series"]["count"] == 12
    assert len(metrics["per_channel"]) == 10
    assert 0.5 < metrics["intervals"][0]["coverage"] <= 1
    scores = pd.read_csv(done.folder / "series.csv")
    assert set(scores["unique_id"]) == set(frame["unique_id"])
    worst = scores.sort_values("mse", ascending=False)["unique_id"].tolist()
    assert list(metrics["per_channel"]) == worst[:10]
    forecast = pd.read_csv(done.folder / "forecast.csv")
    assert list(forecast.columns) == ["unique_id", "ds", "y", "y-lo-80", "y-hi-80"]
    assert (forecast["y-hi-80"] > forecast["y"]).all()
    for name, own in forecast.groupby("unique_id"):
        assert own["y"].between(*frame.loc[frame["unique_id"] == name, "y"].quantile([0, 1])).mean() > 0.5
    # Of some series, of one that was not there, and from Python: the same figures.
    some = run(*flags, "--is_training", "0", "--predict", "--series", "shop-3, shop-1*")
    assert some.code == 0, some.err
    chosen = pd.read_csv(some.folder / "forecast.csv")
    assert set(chosen["unique_id"]) == {"shop-3", "shop-1", "shop-10", "shop-11"}
    both = chosen.merge(forecast, on=["unique_id", "ds"])
    np.testing.assert_allclose(both["y_x"], both["y_y"], rtol=1e-5)
    python = load_run(done.folder).predict(frame, level=80)
    np.testing.assert_allclose(python["y-lo-80"], forecast["y-lo-80"], rtol=1e-5)
    new = one("new", 60, base=5)
    (row, *_) = load_run(done.folder).predict(new)["y"]
    assert 5 < row < 100


def test_a_test_of_some_series_needs_no_note(run, tmp_path):
    options(tmp_path, shops())
    flags = [
        "--data",
        "custom",
        "--root_path",
        tmp_path,
        "--data_path",
        "x.csv",
        "--model",
        "DLinear",
        "--max_steps",
        3,
    ]
    flags += ["--seq_len", "24", "--label_len", "8", "--pred_len", "8", "--max_steps", "3"]
    run(*flags)
    done = run(*flags, "--is_training", "0", "--series", "shop-2")
    assert (done.code, done.err) == (0, "")
    assert "Note" not in done.out
    assert done.metrics()["series"]["count"] == 1


def test_gaps_in_dates_are_counted_within_series(tmp_path):
    frame = pd.concat([one("a", 30), one("b", 30, "2025-01-01").drop(index=[7, 8])])
    assert [note.split(": ")[1] for note in read_table(options(tmp_path, frame)).notes(6)] == [
        "1 gaps in the dates, before row 8 of b first"
    ]


@pytest.mark.parametrize(
    ("frame", "more", "words"),
    [
        (pd.concat([one("a", 40), one("a", 40).tail(1)]), [], ["series 'a'", "2024-01-02 15:00:00 occurs twice"]),
        (pd.concat([one("a", 40), one("b", 40, freq="D")]), [], ["different steps", "'a' 0 days 01:00", "'b' 1 days"]),
        (pd.concat([one("a", 40), one("b", 40).assign(y="much")]), [], ["data row 41", "series 'b'", "'much'"]),
        (pd.concat([one("a", 40), one("b", 40).assign(y=np.nan)]), [], ["series 'b' holds no number"]),
        (one("a", 40).assign(unique_id=None), [], ["data row 1", "'unique_id' is empty"]),
        (one("a", 40).assign(ds="soon"), [], ["data row 1, column 'ds': 'soon' is not a date"]),
        (one("a", 40), ["--series", "a,c*"], ["--series c*", "no such series, but a"]),
        (one("a", 40), ["--features", "S"], ["--features S"]),
        (one("a", 40), ["--seq_len", "50"], ["none of 1 series", "--seq_len 50", "the longest has 40"]),
        (one("a", 40), ["--pred_len", "30"], ["the train split of its longest series is too short"]),
        (one("a", 40).drop(columns="y"), [], ["y for a long CSV"]),
        (one("a", 40).assign(unique_id=range(40)), [], ["none of 40 series"]),
        (demo_frame(rows=60), ["--series", "a"], ["--series a", "no column 'unique_id'"]),
    ],
)
def test_wrong_long_csvs_get_one_line(assert_refused, tmp_path_factory, frame, more, words):
    folder = tmp_path_factory.mktemp("wrong")
    frame.to_csv(folder / "x.csv", index=False)
    command = ["--data", "custom", "--root_path", str(folder), "--data_path", "x.csv", "--model", "DLinear"]
    assert_refused([*command, "--seq_len", "6", "--label_len", "2", "--pred_len", "3", *more], *words)


def test_weeks_go_on_at_each_series_own_day(run, tmp_path):
    frame = pd.concat([one("a", 60, "2021-01-03", "7D"), one("b", 50, "2021-01-06", "7D")])
    options(tmp_path, frame)
    done = run(*flags_of(tmp_path, "--model LastValue --seq_len 6 --pred_len 2 --season 2 --predict"))
    assert done.code == 0, done.err
    forecast = pd.read_csv(done.folder / "forecast.csv", parse_dates=["ds"])
    assert forecast["ds"].dt.day_name().tolist() == ["Sunday", "Sunday", "Wednesday", "Wednesday"]
    for name, own in frame.groupby("unique_id"):
        assert (forecast.loc[forecast["unique_id"] == name, "ds"].min() - own["ds"].max()).days == 7


def test_a_series_with_missing_rows_has_the_same_step(tmp_path):
    steps = [1, 1, 1, 1, 2, 2, 2, 3, 3, 3] * 4  # most often an hour, though the median is two
    thin = one("thin", 100).iloc[np.cumsum(steps)]
    assert read_table(options(tmp_path, pd.concat([one("a", 60), thin]))).channels == ("a", "thin")


def test_some_series_are_not_the_runs_own_data(run, tmp_path):
    options(tmp_path, shops(4))
    flags = flags_of(tmp_path, "--model DLinear --seq_len 24 --pred_len 8 --max_steps 3 --level 50 --save_steps 1")
    folder = run(*flags).folder
    kept = (folder / "calibration.npz").read_bytes()
    done = run(*flags, "--is_training", "0", "--series", "shop-2")
    assert done.code == 0 and "this calibration is not kept" in done.out
    assert (folder / "calibration.npz").read_bytes() == kept
    shops(4).query("unique_id != 'shop-1'").to_csv(tmp_path / "x.csv", index=False)
    refused = run(*flags, "--resume", "--max_steps", "5")
    assert refused.code == 2 and "a run on other data" in refused.err


def test_a_series_without_a_number_in_its_training_rows_is_forecast(run, tmp_path):
    late = one("late", 60, base=7).assign(y=lambda frame: frame["y"].where(frame["y"] > 7 + 50))
    options(tmp_path, pd.concat([shops(3), late]))
    done = run(*flags_of(tmp_path, "--model LastValue --seq_len 6 --pred_len 3 --season 2 --predict"))
    assert done.code == 0, done.err
    forecast = pd.read_csv(done.folder / "forecast.csv")
    assert forecast.loc[forecast["unique_id"] == "late", "y"].tolist() == pytest.approx([66] * 3)


def test_a_long_run_with_gaps_and_covariates_goes_on_exactly(run, tmp_path):
    frame = shops(4).assign(holiday=lambda made: made.index % 9 < 2)
    gaps = np.random.default_rng(0).random(len(frame)) < 0.1
    options(tmp_path, frame.assign(y=frame["y"].mask(gaps & ~frame["unique_id"].duplicated(keep="last"))))
    flags = flags_of(tmp_path, "--model DLinear --seq_len 24 --pred_len 8 --covariates holiday --lradj constant")
    whole = run(*flags, "--max_steps", "6", "--des", "whole")
    assert run(*flags, "--max_steps", "3", "--des", "parts").code == 0
    resumed = run(*flags, "--max_steps", "6", "--des", "parts", "--resume")
    assert (whole.code, resumed.code) == (0, 0), resumed.err
    one, other = (
        torch.load(folder / "last", weights_only=True)["weights"] for folder in sorted(resumed.folders, reverse=True)
    )
    assert all(torch.equal(values, other[name]) for name, values in one.items())
