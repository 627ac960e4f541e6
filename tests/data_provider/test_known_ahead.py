"""What is known in advance: the choice between ways, boosted trees, and where their effect may come from."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingRegressor

from data_provider import fit_known_ahead
from data_provider.boosting import Trees, fit_trees
from data_provider.data_factory import load_series
from tests.data_provider.conftest import FLAGS
from utils.cli.options import get_parser
from utils.runs import load_run
from utils.runs.checkpoint import read_checkpoint


def demand(rows=1500, future=12):
    """A channel that cold and heat raise alike, by the square of the distance from 20 degrees; `noise` does nothing."""
    drawn, count = np.random.default_rng(7), rows + future
    hour = np.arange(count) % 24
    temperature = 20 + 6 * np.sin(2 * np.pi * np.arange(count) / 500) + drawn.normal(0, 4, count).round(1)
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=count, freq="h")})
    frame["load"] = 100 + 5 * np.sin(2 * np.pi * hour / 24) + 0.3 * (temperature - 20) ** 2 + drawn.normal(size=count)
    frame.loc[rows:, "load"] = np.nan
    return frame.assign(temperature=temperature, noise=drawn.normal(size=count))


def test_trees_forecast_what_no_line_can(trained):
    plain = trained("plain", demand()[["date", "load"]].head(1500)).metrics()["mse"]
    linear = trained("linear", demand()[["date", "load", "temperature"]], "--covariates", "temperature",
                     "--covariate_model", "linear")  # fmt: skip
    done = trained("boosted", demand(), "--covariates", "temperature,noise")
    assert done.metrics()["mse"] < 0.5 * min(plain, linear.metrics()["mse"])
    (line,) = [line for line in done.out.splitlines() if line.startswith("Known in advance")]
    assert line.startswith("Known in advance | load: boosted | validation MSE 0.")
    assert ", without 1." in line and ", linear " in line and "| temperature " in line
    rises = pd.read_csv(done.folder / "covariates.csv").set_index("column")["rise"]
    assert rises["temperature"] > 100 * abs(rises["noise"])
    known = read_checkpoint(done.folder / "checkpoint").data.boosted["known"]
    assert [column["name"] for column in known] == ["temperature"], "noise is not left out"


def test_time_llm_says_what_would_start_better(trained, tiny_llm):
    frame = demand().head(812)
    small = ["--covariates", "temperature", "--covariate_model", "boosted", "--model", "TimeLLM", "--max_steps", "1"]
    small += ["--llm_model_path", str(tiny_llm("qwen2")), "--eval_windows", "8"]
    plain = trained("plain", frame, *small)
    assert "Note: --residual linear would start" in plain.out
    assert "Note: --residual linear" not in trained("linear", frame, *small, "--residual", "linear").out
    of_ett = "Note: this prompt tells the LLM that the data are those of a power transformer"
    assert of_ett in plain.out
    assert of_ett not in trained("own", frame, *small, "--content", "Load of a town.").out


def test_noise_changes_nothing(trained):
    """Where nothing helps, the run is the run without the columns, to the bit."""
    frame = demand(future=0)[["date", "load", "noise"]]
    noise = trained("noise", frame, "--covariates", "noise")
    plain = trained("plain", frame[["date", "load"]])
    assert "load: none |" in noise.out
    assert noise.metrics()["mse"] == plain.metrics()["mse"]
    assert pd.read_csv(noise.folder / "covariates.csv").columns.tolist() == ["channel", "column", "way", "rise"]


@pytest.mark.parametrize("model", [["--model", "DLinear"], ["--model", "PatchTST", "--patch_len", "8"]])
def test_a_forecast_from_python_equals_that_of_the_command_line(trained, run, tmp_path, model):
    frame = demand()[["date", "load", "temperature"]]
    folder = trained("both", frame, "--covariates", "temperature", "--predict", "--level", "80", *model).folder
    written = pd.read_csv(folder / "forecast.csv")
    from_python = load_run(folder, device="cpu").predict(frame, level=80)
    np.testing.assert_array_equal(written["load"], from_python["load"])
    before = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    here = ["--root_path", tmp_path, "--data_path", "both.csv", "--model_id", "both", *model]
    tested = run(*FLAGS, *here, "--covariates", "temperature", "--is_training", "0", "--level", "80")
    assert tested.metrics()["mse"] == before["mse"]
    assert 0.7 < before["intervals"][0]["coverage"] < 0.9


def test_no_forecast_looks_ahead(trained):
    frame = demand(future=30)[["date", "load", "temperature"]]
    frame["reading"] = frame["load"] * 2 + np.random.default_rng(1).normal(size=len(frame))
    frame.loc[1500:, "reading"] = np.nan
    folder = trained("ahead", frame, "--covariates", "temperature", "--past_covariates", "reading").folder
    forecaster = load_run(folder, device="cpu")
    assert forecaster._saved.data.boosted, "trees were not chosen"
    forecast = forecaster.predict(frame)
    behind = frame.copy()
    behind.loc[1512:, "temperature"] += 50
    pd.testing.assert_frame_equal(forecast, forecaster.predict(behind), check_exact=True)
    within = frame.copy()
    within.loc[1505, "temperature"] += 50
    assert (forecaster.predict(within)["load"] != forecast["load"]).any()
    past = frame.copy()
    past.loc[1400, "reading"] += 50  # long before the context
    pd.testing.assert_frame_equal(forecast, forecaster.predict(past), check_exact=True)


def test_windows_do_not_read_past_covariates_of_their_horizon(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_known_ahead, "_USELESS", -1.0)  # a reading that follows the load says nothing more
    frame = demand(future=0)[["date", "load", "temperature"]].assign(reading=lambda f: f["load"].round())
    trained("w", frame, "--covariates", "temperature", "--past_covariates", "reading")
    here = ["--root_path", str(tmp_path), "--data_path", "w.csv", "--model", "DLinear"]
    args = get_parser().parse_args([*FLAGS, *here, "--covariates", "temperature", "--past_covariates", "reading"])
    series = load_series(args)
    rows = series.window_effect.rows
    first, length = np.array([200]), 48
    contexts = series.values[None, 200:248]
    before = series.window_effect(contexts, np.array([0]), first)
    rows.past[248:] += 100
    rows.known[260:] += 100
    np.testing.assert_array_equal(series.window_effect(contexts, np.array([0]), first), before)
    rows.past[first + length - 1] += 100
    assert (series.window_effect(contexts, np.array([0]), first) != before).any()


def test_a_resumed_run_has_the_trees_it_began_with(trained, run, tmp_path):
    frame = demand()[["date", "load", "temperature"]]
    whole = trained("whole", frame, "--covariates", "temperature", "--save_steps", "20")
    part = trained("part", frame, "--covariates", "temperature", "--save_steps", "20", "--max_steps", "20")
    here = ["--root_path", tmp_path, "--data_path", "part.csv", "--model_id", "part", "--model", "DLinear"]
    resumed = run(*FLAGS, *here, "--covariates", "temperature", "--save_steps", "20", "--resume")
    assert resumed.code == 0, resumed.err
    ours, theirs = (read_checkpoint(folder / "checkpoint").contents for folder in (part.folder, whole.folder))
    for name, tensor in theirs["weights"].items():
        assert torch.equal(ours["weights"][name], tensor), name
    assert Trees.from_dict(ours["boosted"]["trees"][0]).predict(np.zeros((1, 100))) == Trees.from_dict(
        theirs["boosted"]["trees"][0]
    ).predict(np.zeros((1, 100)))


def test_series_of_a_long_csv_share_their_trees(trained):
    frame = demand(700)
    parts = [
        pd.DataFrame(
            {"unique_id": name, "ds": frame["date"], "y": frame["load"] * scale, "temperature": frame["temperature"]}
        )
        for name, scale in (("a", 1), ("b", 3), ("c", 0.5))
    ]
    plain = trained("plain", pd.concat([part.head(700).drop(columns="temperature") for part in parts]))
    done = trained("long", pd.concat(parts), "--covariates", "temperature", "--predict")
    assert done.metrics()["mse"] < 0.6 * plain.metrics()["mse"]
    assert len(read_checkpoint(done.folder / "checkpoint").data.boosted["trees"]) == 1
    assert pd.read_csv(done.folder / "forecast.csv")["y"].notna().all()


def test_missing_covariates_are_missing(trained):
    frame = demand()[["date", "load", "temperature"]]
    frame.loc[np.random.default_rng(3).random(len(frame)) < 0.2, "temperature"] = np.nan
    frame.loc[1500:, "temperature"] = 25.0
    plain = trained("plain", frame[["date", "load"]].head(1500)).metrics()["mse"]
    for way in ("auto", "linear"):
        done = trained(way, frame, "--covariates", "temperature", "--covariate_model", way, "--predict")
        assert done.metrics()["mse"] < (0.8 if way == "auto" else 1.2) * plain


@pytest.fixture(scope="module")
def examples():
    drawn = np.random.default_rng(0)
    features = drawn.normal(size=(4000, 5))
    features[drawn.random(features.shape) < 0.1] = np.nan
    known = np.nan_to_num(features)
    return features, known[:, 0] * known[:, 1] + 0.1 * drawn.normal(size=4000)


def test_stored_trees_predict_as_scikit_learn_to_the_bit(examples, tmp_path):
    features, targets = examples
    trees = fit_trees(features[:3000], targets[:3000], (features[3000:], targets[3000:]))
    torch.save(trees.as_dict(), tmp_path / "trees")
    stored = Trees.from_dict(torch.load(tmp_path / "trees", weights_only=True))
    reference = HistGradientBoostingRegressor(
        learning_rate=0.1, l2_regularization=1.0, min_samples_leaf=60, max_leaf_nodes=63,
        max_iter=len(trees.roots), early_stopping=False, random_state=0,
    ).fit(features[:3000], targets[:3000])  # fmt: skip
    np.testing.assert_array_equal(stored.predict(features), reference.predict(features))


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: kept["left"].__setitem__(0, 0),
        lambda kept: kept["right"].__setitem__(0, 10**6),
        lambda kept: kept["feature_idx"].__setitem__(0, 5),
        lambda kept: kept["value"].__setitem__(1, float("nan")),
        lambda kept: kept["num_threshold"].__setitem__(0, float("nan")),
        lambda kept: kept["roots"].__setitem__(0, 1),
        lambda kept: kept.update(baseline=float("inf")),
        lambda kept: kept.update(left=kept["left"][:-1]),
        lambda kept: kept.update(value=kept["value"].float()),
    ],
)
def test_damaged_trees_are_refused(examples, damage):
    features, targets = examples
    kept = fit_trees(features, targets, (features, targets)).as_dict()
    damage(kept)
    with pytest.raises(ValueError, match=r"its trees|shape or type|no roots"):
        Trees.from_dict(kept)
