"""Prediction intervals: --level."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dataset.demo import write_demo_csv
from utils.errors import UserError
from utils.runs.intervals import Calibration, IntervalScores, Residuals, check_windows, windows_needed
from utils.runs.metrics import Forecasts


def batch_of(errors, deviation=None, channels=None, forecast=10.0):
    """Windows whose targets are off by `errors`, (windows, steps)."""
    errors = np.asarray(errors, np.float32)
    count = len(errors)
    return Forecasts(
        numbers=np.arange(count),
        channels=np.zeros(count, int) if channels is None else np.asarray(channels),
        forecast=np.full(errors.shape, forecast, np.float32),
        target=forecast + errors,
        deviation=np.ones(count, np.float32) if deviation is None else np.asarray(deviation, np.float32),
    )


def calibrated(*batches, channels=("a",), checkpoint="gone"):
    residuals = Residuals()
    for batch in batches:
        residuals.update(batch)
    return residuals.calibration(channels, Path(checkpoint))


def test_the_quantiles_are_those_of_known_errors():
    errors = np.random.default_rng(0).permutation(np.arange(1, 20))[:, None] * [1.0, -2.0]  # 1 ... 19, and twice that
    widths = calibrated(batch_of(errors[:7]), batch_of(errors[7:])).quantiles
    assert widths.shape == (99, 1, 2)
    # ceil(20 L / 100) of 19
    for level, rank in ((1, 1), (5, 1), (6, 2), (50, 10), (80, 16), (95, 19)):
        np.testing.assert_allclose(widths[level - 1, 0], [rank, 2 * rank], rtol=1e-6)
    assert np.isinf(widths[95:]).all(), "96% would need a twentieth window and more"


def test_each_channel_and_step_is_calibrated_by_itself_in_units_of_its_windows():
    errors = np.concatenate([np.full((30, 2), [1.0, 3.0]), np.full((30, 2), [5.0, 7.0])])
    calibration = calibrated(batch_of(errors, np.repeat([2.0, 0.5], 30), np.repeat([0, 1], 30)), channels=("a", "b"))
    np.testing.assert_allclose(calibration.quantiles[89], [[0.5, 1.5], [10, 14]])
    half = calibration.half_widths(90, np.array([1, 0, 0]), np.array([1.0, 1.0, 4.0]))
    np.testing.assert_allclose(half, [[10, 14], [0.5, 1.5], [2, 6]])


def test_quantiles_never_cross():
    rng = np.random.default_rng(1)
    calibration = calibrated(batch_of(rng.standard_t(2, (300, 6)), rng.lognormal(size=300)))
    assert (np.diff(calibration.quantiles, axis=0) >= 0).all()


@pytest.mark.parametrize(("level", "windows"), [(1, 1), (50, 1), (51, 2), (80, 4), (90, 9), (95, 19), (99, 99)])
def test_a_level_needs_so_many_windows(level, windows):
    assert windows_needed(level) == windows
    check_windows([1, level], windows)
    with pytest.raises(UserError, match=f"--level {level} needs {windows} validation windows"):
        check_windows([level], windows - 1)
    enough, few = (calibrated(batch_of(np.ones((count, 1)))).quantiles for count in (windows, windows - 1 or 1))
    assert np.isfinite(enough[level - 1]).all()
    assert windows == 1 or np.isinf(few[level - 1]).all()


def test_coverage_width_and_score_are_counted_out():
    quantiles = np.full((99, 2, 2), 2.0, np.float32)
    scores = IntervalScores(Calibration(("a", "b"), quantiles, ""), [80, 90], headline=0)
    # Half widths of 2 and 4; the second window's second step is 5 off, 1 beyond. The third is another channel's.
    errors = [[1.9, -2.0], [-4.0, 5.0], [100, 100]]
    for one in range(3):
        scores.update(batch_of(errors[one : one + 1], [[1.0], [2.0], [1.0]][one], [[0], [0], [1]][one]))
    first, second = scores.compute()
    assert scores.windows == 2 and (first["level"], second["level"]) == (80, 90)
    assert first["coverage"] == 0.75 and first["coverage_by_step"] == [1.0, 0.5]
    assert first["width"] == 6.0 and first["width_by_step"] == [6.0, 6.0]
    assert first["score_by_step"] == pytest.approx([6.0, 6.0 + 10 / 2])
    assert second["score"] == pytest.approx((6.0 + 6.0 + 20 / 2) / 2)


def test_where_the_series_is_wild_now_and_then_scaled_intervals_score_better():
    """Against the same without the windows' deviations."""
    rng = np.random.default_rng(2)
    wildness = np.exp(np.sin(np.arange(4000) / 150) * 1.5)
    errors = rng.normal(size=(4000, 3)) * wildness[:, None]
    seen = wildness * rng.uniform(0.8, 1.2, 4000)
    score = {}
    for name, deviation in (("scaled", seen), ("unscaled", np.ones(4000))):
        calibration = calibrated(batch_of(errors[:2000], deviation[:2000]))
        scores = IntervalScores(calibration, [90], None)
        scores.update(batch_of(errors[2000:], deviation[2000:]))
        (figures,) = scores.compute()
        assert abs(figures["coverage"] - 0.9) < 0.03
        score[name] = figures["score"]
    assert score["scaled"] < 0.8 * score["unscaled"]


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Three channels of noise around a daily course: what was so in validation is so in the test."""
    rows = np.arange(2400)
    dates = pd.date_range("2022-01-01", periods=2400, freq="h").strftime("%Y-%m-%d %H:%M:%S")
    drawn = np.random.default_rng(3).normal(size=(2400, 3)) + 2 * np.sin(rows * 2 * np.pi / 24)[:, None]
    path = tmp_path_factory.mktemp("noise") / "noise.csv"
    pd.DataFrame(drawn * [1, 10, 0.1], columns=["x", "y", "OT"]).assign(date=dates).to_csv(path, index=False)
    return ["--root_path", path.parent, "--data_path", path.name]


@pytest.mark.parametrize("more", [["--model", "DLinear"], ["--model", "SeasonalNaive"], ["--features", "MS"]])
def test_a_stationary_series_is_covered_as_promised(run, flags, noise, more):
    done = run(*flags, *noise, "--eval_windows", 900, "--level", 95, 80, *more)
    metrics = done.metrics()
    assert [one["level"] for one in metrics["intervals"]] == [80, 95]
    for one in metrics["intervals"]:
        assert abs(one["coverage"] - one["level"] / 100) < 0.03
        assert len(one["coverage_by_step"]) == len(one["width_by_step"]) == 8
        figures = f"coverage: {one['coverage']:.4f} width: {one['width']:.4f} score: {one['score']:.4f}"
        assert f"Intervals | level: {one['level']} {figures} | {metrics['windows']} windows\n" in done.out
    assert metrics["intervals"][0]["width"] < metrics["intervals"][1]["width"]


@pytest.mark.parametrize("more", [[], ["--model", "LastValue"], ["--features", "S"], ["--save_predictions"]])
def test_a_forecast_has_its_bounds_beside_it(run, flags, csv_folder, tmp_path, more):
    flags = [*flags, "--eval_windows", 0, "--level", 80, 90, *more]
    done = run(*flags, "--predict")
    assert (done.code, done.err) == (0, "")
    written = (done.folder / "forecast.csv").read_bytes()
    frame = pd.read_csv(done.folder / "forecast.csv").set_index("date")
    assert list(frame.columns[-5:]) == ["OT", "OT-lo-90", "OT-lo-80", "OT-hi-80", "OT-hi-90"]
    assert len(frame.columns) == (5 if "S" in more else 35)
    bounds = frame[["OT-lo-90", "OT-lo-80", "OT", "OT-hi-80", "OT-hi-90"]].to_numpy()
    assert (np.diff(bounds, axis=1) > 0).all()
    assert (done.folder / "test.png").is_file() == ("--save_predictions" in more)
    plain = run(*flags[: flags.index("--level")], *more, "--is_training", 0, "--predict")
    assert list(pd.read_csv(plain.folder / "forecast.csv").columns) == ["date", *frame.columns[::5]]

    # The calibration is kept: neither older rows nor validation rows are needed any more.
    whole = pd.read_csv(csv_folder / "small.csv")
    whole.tail(48).to_csv(tmp_path / "small.csv", index=False)
    again = run(*flags, "--is_training", 0, "--predict", "--root_path", tmp_path)
    assert again.code == 0, again.err
    assert (again.folder / "forecast.csv").read_bytes() == written
    # Nor is a level that was asked for before.
    other = run(*flags, "--is_training", 0, "--predict", "--root_path", tmp_path, "--level", 50)
    assert list(pd.read_csv(other.folder / "forecast.csv").columns[-3:]) == ["OT", "OT-lo-50", "OT-hi-50"]


def test_testing_and_resuming_give_the_same_intervals(run, flags):
    flags = [*flags, "--eval_windows", 0, "--level", 80]
    first = run(*flags).metrics()["intervals"]
    assert run(*flags, "--is_training", 0).metrics()["intervals"] == first
    assert run(*flags, "--resume").metrics()["intervals"] == first
    assert "intervals" not in run(*flags[:-2], "--is_training", 0).metrics()


def test_another_data_set_is_calibrated_on_its_own_rows(run, flags, tmp_path):
    flags = [*flags, "--eval_windows", 0, "--level", 80]
    trained = run(*flags).folder
    write_demo_csv(tmp_path / "other.csv", rows=500, seed=9)
    elsewhere = ["--root_path", tmp_path, "--data_path", "other.csv", "--des", "other", "--is_training", 0]
    done = run(*flags, *elsewhere, "--checkpoint", trained)
    (folder,) = (folder for folder in done.folders if folder != trained)
    own, others = (np.load(one / "calibration.npz")["quantiles"] for one in (folder, trained))
    assert not np.array_equal(own, others)
    forecast = run(*flags, *elsewhere, "--checkpoint", trained, "--predict")
    assert forecast.code == 0, forecast.err


def test_a_runs_own_calibration_stays_its_own(run, flags, tmp_path):
    """The CSV's name is not in the run folder's: a test on another one is the same run."""
    flags = [*flags, "--eval_windows", 0, "--level", 80, "--model", "DLinear"]
    trained = run(*flags).folder
    kept = (trained / "calibration.npz").read_bytes()
    write_demo_csv(tmp_path / "other.csv", rows=500, seed=9)
    elsewhere = ["--root_path", tmp_path, "--data_path", "other.csv", "--is_training", 0]
    done = run(*flags, *elsewhere, "--checkpoint", trained)
    assert "this calibration is not kept" in done.out
    assert (trained / "calibration.npz").read_bytes() == kept

    pd.read_csv(tmp_path / "other.csv").iloc[:, :3].to_csv(tmp_path / "other.csv", index=False)
    assert run(*flags, *elsewhere).code == 0
    refused = run(*flags, *elsewhere, "--predict")
    assert refused.code == 2 and "the checkpoint was trained on" in refused.err
    (tmp_path / "other.csv").unlink()
    write_demo_csv(tmp_path / "other.csv", rows=500, seed=9)
    refused = run(*flags, *elsewhere, "--predict", "--checkpoint", trained, "--des", "other")
    assert refused.code == 2 and "intervals need calibration.npz" in refused.err, "not that of the training's data"


def test_what_cannot_be_is_refused_in_a_line(run, flags, assert_refused):
    for levels, words in (
        ([0], ["--level 0", "1 to 99"]),
        ([100, 80], ["--level 80 100"]),
        ([80, 80], ["--level 80 80", "repeats a level"]),
        (["80.5"], ["--level", "80.5"]),
        ([95], ["--level 95 needs 19", "there are 5", "--eval_windows"]),  # 40 windows of seven channels
    ):
        assert_refused([*flags, "--level", *levels], *words)


def test_a_forecast_without_a_calibration_is_refused(run, flags):
    flags = [*flags, "--eval_windows", 140]
    run(*flags)
    forecast = [*flags, "--is_training", 0, "--predict", "--level", 80]
    refused = run(*forecast)
    assert refused.code == 2 and "intervals need calibration.npz" in refused.err and refused.err.count("\n") == 1
    run(*flags, "--is_training", 0, "--level", 80)
    assert run(*forecast).code == 0
    # Other weights are not what was calibrated.
    kept = run(*flags, "--is_training", 0, "--level", 80).folder / "calibration.npz"
    calibration = kept.read_bytes()
    run(*flags, "--seed", 5)
    kept.write_bytes(calibration)
    refused = run(*forecast, "--seed", 5)
    assert refused.code == 2 and "intervals need calibration.npz" in refused.err
    (run(*flags, "--seed", 5).folder / "calibration.npz").write_bytes(b"no zip")
    refused = run(*forecast, "--seed", 5)
    assert refused.code == 2 and "is damaged" in refused.err


def test_too_high_a_level_for_what_was_kept(run, flags):
    flags = [*flags, "--eval_windows", 70]  # ten of each channel
    run(*flags, "--level", 80)
    refused = run(*flags, "--is_training", 0, "--predict", "--level", 95)
    assert refused.code == 2 and "too few validation windows for --level 95" in refused.err
