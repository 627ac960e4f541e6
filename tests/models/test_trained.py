"""Forecasting from Python: `utils.runs.load_run`."""

import io
from pathlib import Path
from shutil import copyfile, copytree

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from utils.errors import UserError
from utils.runs import load_run


@pytest.fixture
def whole(csv_folder):
    """The CSV that runs were trained on."""
    return pd.read_csv(csv_folder / "small.csv")


def as_csv(forecast):
    written = forecast.assign(date=forecast["date"].dt.strftime("%Y-%m-%d %H:%M:%S"))
    return written.to_csv(index=False, lineterminator="\n").encode()


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--residual", "linear", "--normalize_prototypes"],
        ["--ablation", "random_llm"],
        ["--use_amp"],
        ["--features", "S"],
    ]
    + [["--model", model] for model in ("PatchTST", "DLinear", "SeasonalNaive", "LastValue")],
)
def test_the_figures_are_those_of_predict_to_the_last_digit(run, flags, whole, more):
    done = run(*flags, "--predict", "--eval_windows", 0, "--level", 80, 95, *more)
    assert done.code == 0, done.err
    before = torch.get_rng_state()
    trained = load_run(done.folder)
    assert torch.equal(torch.get_rng_state(), before), "whoever calls has a generator of their own"
    assert (trained.seq_len, trained.pred_len) == (48, 8)
    written = (done.folder / "forecast.csv").read_bytes()
    assert as_csv(trained.predict(whole, level=[95, 80])) == written
    plain = trained.predict(whole)
    assert list(plain.columns) == ["date", *trained.channels]
    np.testing.assert_array_equal(plain, pd.read_csv(io.BytesIO(written), parse_dates=["date"])[plain.columns])

    # Neither older rows nor where the dates stand matter.
    indexed = whole.tail(48).assign(date=pd.to_datetime(whole["date"])).set_index("date")
    for frame in (whole.tail(48), indexed, indexed.rename_axis(None)):
        pd.testing.assert_frame_equal(trained.predict(frame), plain)
    later = trained.predict(whole.head(200))
    assert later["date"].iloc[0] == pd.Timestamp(whole["date"][200])
    assert not np.allclose(later[plain.columns[1:]], plain[plain.columns[1:]])
    pd.testing.assert_frame_equal(trained.predict(whole), plain)


def test_it_stays_where_it_is_told_to(run, flags):
    folder = run(*flags, "--model", "DLinear").folder
    assert load_run(str(folder), device="cpu").model.device == torch.device("cpu")


def test_an_llm_that_was_moved_is_named(run, flags, tiny_llm, tmp_path, whole):
    copytree(tiny_llm("qwen2"), tmp_path / "llm")
    place = flags.index("--llm_model_path") + 1
    folder = run(*[*flags[:place], tmp_path / "llm", *flags[place + 1 :]]).folder
    forecast = load_run(folder).predict(whole)
    (tmp_path / "llm").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="llm"):
        load_run(folder)
    pd.testing.assert_frame_equal(load_run(folder, llm_model_path=str(tmp_path / "moved")).predict(whole), forecast)


def test_what_is_wrong_is_said(run, flags, whole, tmp_path):
    trained = load_run(run(*flags, "--model", "DLinear").folder)
    for frame, words in (
        (whole.drop(columns="HULL"), "the DataFrame has the channels"),
        (whole.drop(columns="date"), "no column 'date' and no other column of dates"),
        (whole.tail(47), "the DataFrame has 47 rows: a forecast needs --seq_len 48"),
        (whole.sample(frac=1, random_state=0), "is before the row above it"),
        (whole.assign(OT="x"), "column 'OT' is text, such as 'x'"),
    ):
        with pytest.raises(UserError, match=words):
            trained.predict(frame)
    with pytest.raises(UserError, match=r"intervals need calibration\.npz"):
        trained.predict(whole, level=80)
    with pytest.raises(UserError, match="--level 0"):
        trained.predict(whole, level=[0])
    for level in (80.0, [80.5], "80"):
        with pytest.raises(UserError, match="levels are whole percentages"):
            trained.predict(whole, level=level)
    with pytest.raises(UserError, match="no flag nonsense"):
        load_run(run(*flags, "--model", "DLinear").folder, nonsense=3)
    with pytest.raises(UserError, match="no checkpoint in"):
        load_run(tmp_path)


def test_a_csv_that_was_moved_is_named(run, flags, whole, tmp_path):
    folder = run(*flags, "--model", "SeasonalNaive").folder
    forecast = load_run(folder).predict(whole)
    csv = flags[flags.index("--root_path") + 1]
    copyfile(Path(csv) / "small.csv", tmp_path / "moved.csv")
    with pytest.raises(UserError, match="root_path="):
        load_run(folder, root_path="gone")
    moved = load_run(folder, root_path=str(tmp_path), data_path="moved.csv")
    pd.testing.assert_frame_equal(moved.predict(whole), forecast)


def test_runs_of_different_precision_do_not_disturb_each_other(run, flags, whole):
    half = load_run(run(*flags, "--use_amp", "--des", "half").folder)
    before = half.predict(whole)
    load_run(next(folder for folder in run(*flags).folders if "_half_" not in folder.name))
    pd.testing.assert_frame_equal(half.predict(whole), before)


def test_many_forecasts_leave_nothing_behind(run, flags, whole):
    trained = load_run(run(*flags).folder)
    used = []
    for count in (10, 90):
        for _ in range(count):
            trained.predict(whole)
        used.append(psutil.Process().memory_info().rss)
    assert used[1] < 1.01 * used[0]
