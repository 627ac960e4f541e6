import numpy as np
import pandas as pd
import pytest

from data_provider.calendars import Calendar
from data_provider.reading import read_table
from dataset.demo import demo_frame
from utils.cli.options import get_parser
from utils.errors import UserError

pytestmark = pytest.mark.draws


def forecast_of(folder):
    return pd.read_csv(folder / "forecast.csv", parse_dates=["date"])


def to_come(args, count):
    table = read_table(args)
    return list(Calendar.of(table.dates, table.source).next_dates(table.dates[-1], count))


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_a_forecast_goes_on_where_the_csv_ends(run, flags, csv_folder):
    run(*flags)
    done = run(*flags, "--is_training", "0", "--predict")
    assert (done.code, done.err) == (0, "")
    assert "Test | MSE" not in done.out
    seen, forecast = pd.read_csv(csv_folder / "small.csv", parse_dates=["date"]), forecast_of(done.folder)
    assert list(forecast.columns) == list(seen.columns)
    assert len(forecast) == 8
    assert (forecast["date"].diff().dropna() == pd.Timedelta("1h")).all()
    assert forecast["date"].iloc[0] == seen["date"].iloc[-1] + pd.Timedelta("1h")
    # In the CSV's units: within the range of each channel, widened by half.
    for name in seen.columns[1:]:
        low, high = seen[name].min(), seen[name].max()
        assert forecast[name].between(low - (high - low) / 2, high + (high - low) / 2).all()
    assert is_png(done.folder / "forecast.png")


def test_training_can_end_with_a_forecast_and_it_is_the_same(run, flags):
    trained = run(*flags, "--predict")
    first = (trained.folder / "forecast.csv").read_bytes()
    again = run(*flags, "--is_training", "0", "--predict")
    assert "Test | MSE" in trained.out
    assert (again.folder / "forecast.csv").read_bytes() == first


def test_under_mixed_precision_too(run, flags):
    flags = [*flags, "--use_amp", "--learning_rate", "0.1", "--lradj", "constant"]
    first = (run(*flags, "--predict").folder / "forecast.csv").read_bytes()
    again = run(*flags, "--is_training", "0", "--predict")
    assert (again.folder / "forecast.csv").read_bytes() == first


@pytest.mark.parametrize(
    ("dates", "first"),
    [
        (pd.date_range("2024-01-01", periods=400, freq="100ms"), "2024-01-01 00:00:40.000"),
        (pd.date_range("2024-01-01", periods=400, freq="h", tz="+05:30"), "2024-01-17 16:00:00+05:30"),
        (pd.date_range("2024-01-01", periods=400, freq="D"), "2025-02-04"),
    ],
)
def test_dates_are_written_with_fractions_and_offsets(run, flags, tmp_path, dates, first):
    demo_frame(rows=400).assign(date=dates).to_csv(tmp_path / "small.csv", index=False)
    done = run(*flags, "--root_path", tmp_path, "--model", "LastValue", "--predict")
    assert done.code == 0, done.err
    written = [line.split(",")[0] for line in (done.folder / "forecast.csv").read_text().splitlines()[1:]]
    assert written[0] == first
    assert len(set(written)) == 8


def test_earlier_rows_do_not_matter(run, flags, tmp_path):
    whole = demo_frame(rows=900)
    whole.iloc[500:].to_csv(tmp_path / "short.csv", index=False)
    whole.to_csv(tmp_path / "long.csv", index=False)
    whole.iloc[-48:].to_csv(tmp_path / "window.csv", index=False)
    flags = [*flags, "--root_path", tmp_path, "--data_path"]
    run(*flags, "short.csv")
    forecasts = []
    for name in ("short.csv", "long.csv", "window.csv"):
        done = run(*flags, name, "--is_training", "0", "--predict")
        assert done.code == 0, done.err
        forecasts.append(forecast_of(done.folder))
    for other in forecasts[1:]:
        pd.testing.assert_frame_equal(other, forecasts[0])


def test_what_cannot_be_forecast_is_refused(run, flags, tmp_path):
    whole = demo_frame(rows=400)
    run(*flags)
    for name, frame, words in (
        ("few.csv", whole.iloc[-47:], "47 rows: a forecast needs --seq_len 48"),
        ("other.csv", whole.drop(columns="HUFL"), "the checkpoint was trained on"),
    ):
        frame.to_csv(tmp_path / name, index=False)
        refused = run(*flags, "--root_path", tmp_path, "--data_path", name, "--is_training", "0", "--predict")
        assert refused.code == 2 and refused.err.count("\n") == 1 and words in refused.err
        assert not (refused.folder / "forecast.csv").exists()


@pytest.mark.parametrize(
    ("freq", "expected"),
    [
        ("15min", ["2024-03-01 00:00", "2024-03-01 00:15"]),
        ("h", ["2024-03-01 00:00", "2024-03-01 01:00"]),
        ("D", ["2024-03-01", "2024-03-02"]),
        ("MS", ["2024-03-01", "2024-04-01"]),
        ("ME", ["2024-03-31", "2024-04-30"]),
        ("W-SUN", ["2024-03-03", "2024-03-10"]),
        ("B", ["2024-03-01", "2024-03-04"]),
    ],
)
def test_dates_go_on_at_the_step_of_the_data(tmp_path, freq, expected):
    dates = pd.date_range(end="2024-02-29 23:59", periods=40, freq=freq, normalize=freq not in ("15min", "h"))
    if freq in ("15min", "h"):
        dates = dates.floor(freq)
    pd.DataFrame({"date": dates, "a": np.arange(40)}).to_csv(tmp_path / "x.csv", index=False)
    args = get_parser().parse_args(["--data", "custom", "--root_path", str(tmp_path), "--data_path", "x.csv"])
    assert to_come(args, 2) == [pd.Timestamp(date) for date in expected]


def test_dates_with_a_gap_go_on_at_the_commonest_step(tmp_path):
    dates = [*pd.date_range("2024-01-01", periods=10, freq="h"), *pd.date_range("2024-01-03", periods=10, freq="h")]
    pd.DataFrame({"date": dates, "a": range(20)}).to_csv(tmp_path / "x.csv", index=False)
    args = get_parser().parse_args(["--data", "custom", "--root_path", str(tmp_path), "--data_path", "x.csv"])
    assert to_come(args, 1) == [pd.Timestamp("2024-01-03 10:00")]
    pd.DataFrame({"date": dates[:1] * 3, "a": range(3)}).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(UserError, match="no step"):
        to_come(args, 1)


def test_test_forecasts_are_kept(run, flags):
    done = run(*flags, "--save_predictions")
    forecast, truth = (np.load(done.folder / f"{name}.npy") for name in ("pred", "true"))
    assert forecast.shape == truth.shape == (40, 8)
    assert forecast.dtype == truth.dtype == np.float32
    metrics = done.metrics()
    assert np.square(forecast - truth).mean() == pytest.approx(metrics["mse"], rel=1e-5)
    assert np.abs(forecast - truth).mean() == pytest.approx(metrics["mae"], rel=1e-5)
    assert is_png(done.folder / "test.png")
