"""--covariates: columns that are known in advance."""

import numpy as np
import pandas as pd
import pytest

from data_provider.covariates import fit_explainer
from data_provider.data_factory import data_provider, load_series
from data_provider.tables import Covariates, Table
from data_provider.windows import Spans
from tests.data_provider.conftest import FLAGS
from utils.cli.options import get_parser
from utils.runs import load_run
from utils.runs.checkpoint import read_checkpoint


def sales(rows=900, to_come=12):
    """Two channels with a daily course that jump on holidays; `price` moves one of them, `noise` none."""
    drawn, count = np.random.default_rng(5), rows + to_come
    wave, holiday = np.sin(2 * np.pi * np.arange(count) / 24), drawn.random(count) < 0.15
    price = drawn.normal(5, 1, count).round(2)
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=count, freq="h")})
    frame["a"] = 10 + wave + 3 * holiday - 0.5 * price + 0.2 * drawn.normal(size=count)
    frame["b"] = 50 + 4 * wave + 6 * holiday + 0.4 * drawn.normal(size=count)
    frame.loc[rows:, ["a", "b"]] = np.nan
    return frame.assign(price=price, holiday=np.where(holiday, "yes", "no"), noise=drawn.normal(size=count))


def as_long(frame, names):
    long = frame.melt(["date", *names], ["a", "b"], "unique_id", "y")
    return long.rename(columns={"date": "ds"})


def test_what_a_holiday_does_is_known_in_advance(trained, flags):
    plain = trained("plain", sales(to_come=0)[["date", "a", "b"]]).metrics()["mse"]
    done = trained("known", sales().drop(columns="noise"), "--covariates", "price, holiday", "--predict")
    assert done.metrics()["mse"] < plain / 2
    assert done.metrics()["seasonal_naive"]["mse"] < plain
    (a, b) = [line for line in done.out.splitlines() if line.startswith("Covariates | ")]
    assert a.startswith("Covariates | a: price -") and "holiday=yes +" in b
    # In forecast.csv the holidays to come stand out: they add 3 and 6.
    forecast, frame = pd.read_csv(done.folder / "forecast.csv"), sales().tail(12).reset_index(drop=True)
    assert forecast["date"].tolist() == frame["date"].astype(str).tolist()
    holiday = frame["holiday"] == "yes"
    assert 0 < holiday.sum() < 12
    wave = np.sin(2 * np.pi * np.arange(900, 912) / 24)
    np.testing.assert_allclose(forecast["b"], 50 + 4 * wave + 6 * holiday, atol=1.5)
    np.testing.assert_allclose(forecast["a"], 10 + wave + 3 * holiday - 0.5 * frame["price"], atol=0.8)
    with_llm = trained("llm", sales().drop(columns="noise"), *flags[12:], "--model", "TimeLLM", "--residual", "linear",
                     "--covariates", "price,holiday")  # fmt: skip
    assert with_llm.metrics()["mse"] < plain / 2


def test_a_long_csv_has_covariates_too(trained):
    frame = as_long(sales(), ["price", "holiday"])
    done = trained("long", frame, "--covariates", "price,holiday", "--predict", "--level", "80")
    wide = trained("wide", sales().drop(columns="noise"), "--covariates", "price,holiday", "--predict")
    assert done.metrics()["mse"] == pytest.approx(wide.metrics()["mse"], rel=0.2)
    long, forecast = (pd.read_csv(one.folder / "forecast.csv") for one in (done, wide))
    np.testing.assert_allclose(long.loc[long["unique_id"] == "b", "y"], forecast["b"], atol=0.5)
    python = load_run(done.folder).predict(frame, level=80)
    np.testing.assert_allclose(python["y-hi-80"], long["y-hi-80"], rtol=1e-5)


def test_a_useless_covariate_costs_little(trained):
    frame = sales()[["date", "a", "b", "noise"]]
    plain = trained("plain", frame.drop(columns="noise").head(900)).metrics()["mse"]
    assert trained("noise", frame, "--covariates", "noise").metrics()["mse"] < 1.02 * plain


def test_the_checkpoint_forecasts_alone_what_the_run_did(trained, run, tmp_path):
    frame = sales().drop(columns="noise")
    done = trained("all", frame, "--covariates", "price,holiday", "--predict")
    first = (done.folder / "forecast.csv").read_bytes()
    kept = read_checkpoint(done.folder / "checkpoint").contents["explainer"]
    assert [column["name"] for column in kept["columns"]] == ["price", "holiday"]
    frame.tail(48 + 12).to_csv(tmp_path / "all.csv", index=False)
    here = ["--root_path", tmp_path, "--data_path", "all.csv", "--model_id", "all", "--model", "DLinear"]
    again = run(*FLAGS, *here, "--covariates", "price,holiday", "--is_training", "0", "--predict")
    assert again.code == 0, again.err
    np.testing.assert_allclose(
        pd.read_csv(done.folder / "forecast.csv").iloc[:, 1:],
        pd.read_csv(pd.io.common.BytesIO(first)).iloc[:, 1:],
        rtol=1e-6,
    )
    refused = run(*FLAGS, *here, "--is_training", "0")
    assert refused.code == 2


def test_a_gap_is_filled_with_what_is_left_before_it(tmp_path):
    frame = sales(rows=200, to_come=0).drop(columns="noise")
    frame.loc[50, "b"] = np.nan
    frame.to_csv(tmp_path / "x.csv", index=False)
    command = [
        "--data",
        "custom",
        "--root_path",
        str(tmp_path),
        "--data_path",
        "x.csv",
        "--covariates",
        "price,holiday",
    ]
    args = get_parser().parse_args([*command, "--seq_len", "16", "--label_len", "4", "--pred_len", "3"])
    series = load_series(args)
    left = series.values[series.table.rows_of(1)]
    assert left[50] == left[49]
    assert np.isnan(series.targets[200 + 50])
    windows = data_provider(args, "train")[0]
    number = 182 - 60  # of channel a: 140 training rows make 122 windows
    _, seq_y, *_ = windows[number]
    sum_of_both = (
        windows.with_covariate_effect([number], seq_y[None, 4:, 0])[0] * series.scaler.scale_[1]
        + series.scaler.mean_[1]
    )
    np.testing.assert_allclose(sum_of_both, frame["b"][16:19], rtol=1e-5)


def test_a_covariate_that_is_the_target_is_warned_of(trained):
    frame = sales(to_come=0)[["date", "a", "b"]]
    done = trained("leak", frame.assign(same=2 * frame["b"] + 1), "--covariates", "same")
    assert "the covariates explain b almost completely" in done.out


def test_a_penalty_is_chosen_in_the_order_of_time(tmp_path):
    drawn = np.random.default_rng(0)
    rows = pd.DataFrame({"x": drawn.normal(size=300)})
    strong = 2 * rows["x"].to_numpy() + 0.1 * drawn.normal(size=300)
    spans = Spans.of_table(300, 2)
    values = np.concatenate([strong, drawn.normal(size=300)])
    table = Table(tmp_path, rows.index, values, ("s", "n"), spans, covariates=Covariates(rows, rows[:0], spans, ("x",)))
    explained = fit_explainer(table, values, spans.rows)
    (of_strong,), (of_noise,) = explained.coefficients
    assert of_strong == pytest.approx(2 * rows["x"].std(ddof=0), rel=0.02)
    assert abs(of_noise) < 0.1
    assert explained.shares[0] > 0.99 > 0.1 > explained.shares[1]


@pytest.mark.parametrize(
    ("make", "more", "words"),
    [
        (lambda f: f, ["--covariates", "prize"], ["no column 'prize' for --covariates"]),
        (lambda f: f.head(0), ["--covariates", "price"], ["0 data rows"]),
        (lambda f: f.assign(a=np.nan, b=np.nan), ["--covariates", "price"], ["'a' holds no number"]),
        (lambda f: f, ["--covariates", "price,price"], ["names price twice"]),
        (lambda f: f, ["--covariates", "date"], ["--covariates date", "date"]),
        (lambda f: f, ["--covariates", "a", "--target", "a", "--features", "MS"], ["--covariates a", "forecast"]),
        (lambda f: f.assign(price=np.nan), ["--covariates", "price"], ["'price' has no value"]),
        (
            lambda f: f.assign(price=f.price.where(f.index > 700)),
            ["--covariates", "price"],
            ["no value in the"],
        ),
        (
            lambda f: f.assign(price=f.price.where(f.index < 905)),
            ["--covariates", "price", "--predict"],
            ["7 cells of --covariates are empty in the rows to forecast, 'price' at"],
        ),
        (lambda f: f, ["--covariates", "price", "--past_covariates", "price"], ["and --past_covariates name price"]),
        (lambda f: f, ["--past_covariates", "price", "--covariate_model", "linear"], ["linear needs --covariates"]),
        (lambda f: f, ["--past_covariates", "prize"], ["no column 'prize' for --past_covariates"]),
        (lambda f: f.assign(price=np.inf), ["--covariates", "price"], ["data row 1", "inf"]),
        (lambda f: f.assign(day=f.date.astype(str)), ["--covariates", "day"], ["'day' has", "different texts"]),
        (lambda f: f.head(905), ["--covariates", "price", "--predict"], ["needs 12 rows", "there are 5"]),
        (lambda f: as_long(f, ["price"]), ["--covariates", "y"], ["--covariates y"]),
        (
            lambda f: as_long(f, ["price"]).iloc[:-3],
            ["--covariates", "price", "--predict"],
            ["12 rows after the last known one of series 'b'", "there are 9"],
        ),
    ],
)
def test_wrong_covariates_get_one_line(assert_refused, tmp_path_factory, make, more, words):
    folder = tmp_path_factory.mktemp("wrong")
    make(sales()[["date", "a", "b", "price"]]).to_csv(folder / "x.csv", index=False)
    assert_refused([*FLAGS, "--model", "DLinear", "--root_path", folder, "--data_path", "x.csv", *more], *words)


def test_a_forecast_that_lacks_something_writes_nothing(trained, run, tmp_path):
    frame = sales().drop(columns="noise")
    folder = trained("all", frame, "--covariates", "price,holiday").folder
    here = ["--root_path", tmp_path, "--data_path", "few.csv", "--model_id", "few", "--model", "DLinear"]
    here += ["--covariates", "price,holiday", "--is_training", "0", "--predict", "--checkpoint", folder]
    for name, changed, words in (
        ("too few", frame.head(905), "there are 5"),
        ("text", frame.assign(price="much"), "'price' was numeric in training"),
        ("long", as_long(frame, ["price", "holiday"]), "is a long CSV"),
    ):
        changed.to_csv(tmp_path / "few.csv", index=False)
        refused = run(*FLAGS, *here)
        assert refused.code == 2 and words in refused.err, (name, refused.err)
        assert len(refused.folders) == 1


def test_what_never_changes_is_no_leak(trained):
    frame = sales(to_come=0)[["date", "a", "price"]].assign(still=3.0)
    done = trained("still", frame, "--covariates", "price")
    assert "almost completely" not in done.out
    assert "Known in advance | still: none | validation MSE 0.0000" in done.out


@pytest.mark.parametrize(
    ("cell", "words"), [("5,0", "'5,0' is text in a column of numbers"), (1e200, "covariate 'price' is 1e+200")]
)
def test_a_cell_of_another_kind_is_named(assert_refused, tmp_path_factory, cell, words):
    folder = tmp_path_factory.mktemp("odd")
    frame = sales(to_come=0)[["date", "a", "price"]]
    frame["price"] = frame["price"].round().astype(object).where(frame.index != 70, cell)
    frame.to_csv(folder / "x.csv", index=False)
    more = ["--root_path", folder, "--data_path", "x.csv", "--covariates", "price", "--model", "DLinear"]
    assert_refused([*FLAGS, *more], words)
