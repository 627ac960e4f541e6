"""The linear map of the scaled window that --residual linear adds."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge

from layers.LinearResidual import RIDGES, LinearResidual
from models.TimeLLM import Model
from tests.conftest import largest_difference
from utils.cli.options import get_parser
from utils.training.trainer import Trainer


def pairs(count, seed, noise=0.0):
    """Windows of 12 values at their own levels and scales, and the 5 that a fixed map of each makes of it."""
    drawn = torch.Generator().manual_seed(seed)
    level, scale = torch.randn(2, count, 1, generator=drawn)
    windows = level * 5 + scale.exp() * torch.randn(count, 12, generator=drawn)
    mean = windows.mean(1, keepdim=True)
    rule = torch.randn(12, 5, generator=torch.Generator().manual_seed(9))
    return windows, (windows - mean) @ rule + mean + noise * torch.randn(count, 5, generator=drawn)


def in_batches(both):
    return lambda: zip(*(part.split(30) for part in both), strict=True)


def test_it_begins_as_the_mean_of_the_window():
    model = LinearResidual(12, 5)
    forecast, windows = torch.randn(3, 5), torch.randn(3, 12)
    assert torch.equal(model(forecast, windows), forecast)


def test_what_is_linear_is_fitted_at_once():
    model = LinearResidual(12, 5)
    error = model.fit(in_batches(pairs(100, 1)), in_batches(pairs(50, 2)))
    windows, targets = pairs(50, 3)
    mean, deviation = windows.mean(1, keepdim=True), windows.std(1, keepdim=True, correction=0)
    forecast = model(torch.zeros(50, 5), (windows - mean) / deviation) * deviation + mean
    assert largest_difference(forecast, targets) < 1e-3
    assert error < 1e-4


def test_the_penalty_is_chosen_on_validation_pairs():
    training, validation = pairs(14, 4, noise=3.0), pairs(200, 5, noise=3.0)
    x, y = (part.double().numpy() - training[0].double().numpy().mean(1, keepdims=True) for part in training)
    x_new, y_new = (
        part.double().numpy() - validation[0].double().numpy().mean(1, keepdims=True) for part in validation
    )
    errors, maps = [], []
    for ridge in RIDGES:
        fitted = Ridge(alpha=ridge * np.trace(x.T @ x) / 12, fit_intercept=False).fit(x, y)
        maps.append(fitted.coef_)
        errors.append(((fitted.predict(x_new) - y_new) ** 2).mean())
    best = int(np.argmin(errors))
    assert 0 < best < len(RIDGES) - 1, "both ends must be worse"
    model = LinearResidual(12, 5)
    assert model.fit(in_batches(training), in_batches(validation)) == pytest.approx(errors[best], rel=1e-6)
    assert largest_difference(model.linear.weight, maps[best]) < 1e-5


def test_targets_that_are_not_known_do_not_count():
    training, validation = pairs(60, 4, noise=3.0), pairs(200, 5, noise=3.0)
    drawn = torch.Generator().manual_seed(8)
    known = [torch.rand(part[1].shape, generator=drawn) > 0.3 for part in (training, validation)]
    gaps = [
        (x, torch.where(is_known, y, torch.nan)) for (x, y), is_known in zip((training, validation), known, strict=True)
    ]
    model = LinearResidual(12, 5)
    error = model.fit(*map(in_batches, gaps))
    x, y = (part.double().numpy() - training[0].double().numpy().mean(1, keepdims=True) for part in training)
    x_new, y_new = (
        part.double().numpy() - validation[0].double().numpy().mean(1, keepdims=True) for part in validation
    )
    for step in range(5):
        rows = known[0][:, step].numpy()
        alone = [
            Ridge(alpha=ridge * np.trace(x.T @ x) / 12, fit_intercept=False).fit(x[rows], y[rows, step]).coef_
            for ridge in RIDGES
        ]
        assert min(largest_difference(model.linear.weight[step], weights) for weights in alone) < 5e-3
    forecast = x_new @ model.linear.weight.detach().double().numpy().T
    of_known = np.square(forecast - y_new)[known[1].numpy()]
    assert error == pytest.approx(of_known.mean(), rel=1e-4)


def test_the_forecast_begins_as_the_line_and_the_heads(tiny_llm):
    flags = ["--data", "ETTh1", "--llm_model_path", tiny_llm("qwen2"), "--seq_len", "64", "--pred_len", "12"]
    torch.manual_seed(0)
    model = Model(get_parser().parse_args([*flags, "--residual", "linear"])).eval()
    torch.manual_seed(0)
    plain = Model(get_parser().parse_args(flags)).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.nn.init.normal_(model.residual.linear.weight, std=0.1)
    windows = torch.randn(3, 64, 2).cumsum(1)
    flat = windows.transpose(1, 2).flatten(0, 1)
    mean, deviation = flat.mean(1, keepdim=True), flat.std(1, keepdim=True, correction=0)
    line = model.residual.linear((flat - mean) / deviation) * deviation
    with torch.no_grad():
        added = model(windows) - plain(windows)
    assert largest_difference(added, line.unflatten(0, (3, 2)).transpose(1, 2)) < 1e-4
    assert not [name for name in plain.state_dict() if "residual" in name], "a plain model's checkpoint is as before"


@pytest.mark.parametrize("more", [[], ["--ablation", "no_llm"], ["--ablation", "random_llm"], ["--features", "MS"]])
def test_a_run_with_a_line_trains_tests_resumes_and_forecasts(run, flags, more):
    flags = [*flags, "--residual", "linear", "--prompt_decimals", 2, *more]
    done = run(*flags, "--predict")
    assert (done.code, done.err) == (0, "")
    assert "Linear residual: fitted to the training windows; its MSE on all validation windows is 0." in done.out
    scores, forecast = done.metrics(), (done.folder / "forecast.csv").read_bytes()
    for again in (["--is_training", 0], ["--resume"], ["--is_training", 0, "--predict"]):
        assert run(*flags, *again).metrics()["mse"] == scores["mse"]
    assert (done.folder / "forecast.csv").read_bytes() == forecast


def test_a_checkpoint_knows_whether_it_has_a_line(run, flags):
    run(*flags, "--residual", "linear")
    refused = run(*flags, "--is_training", 0)
    assert refused.code == 2 and "trained with --residual linear, not none" in refused.err


def test_a_resumed_run_is_the_run_with_its_line(run, flags):
    flags = [*flags, "--residual", "linear", "--dropout", 0, "--max_steps", 6, "--eval_steps", 2]
    whole = run(*flags, "--des", "whole").metrics()["mse"]
    run(*flags, "--max_steps", 2)
    done = run(*flags, "--resume")
    assert "Linear residual: fitted" not in done.out
    (folder,) = (folder for folder in done.folders if "_whole_" not in folder.name)
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["mse"] == whole


def weights_of(done):
    return torch.load(done.folder / "last", weights_only=True)["weights"]


def test_a_run_that_was_stopped_while_the_line_was_validated_goes_on_exactly(run, flags, monkeypatch):
    flags = [*flags, "--residual", "linear", "--dropout", 0.3]
    whole = weights_of(run(*flags))
    score = Trainer._scores

    def interrupted(self, split):
        score(self, split)  # which draws random numbers
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_scores", interrupted)
    for more in ([], ["--resume"]):  # twice
        assert run(*flags, *more).code == 130
    monkeypatch.setattr(Trainer, "_scores", score)
    parts = weights_of(run(*flags, "--resume"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_a_line_through_what_never_changes_is_flat(run, flags, csv_folder, tmp_path):
    frame = pd.read_csv(csv_folder / "small.csv").assign(OT=[1.0] * 300 + list(range(100)))
    frame.to_csv(tmp_path / "flat.csv", index=False)
    words = ["--residual", "linear", "--features", "S", "--root_path", tmp_path, "--data_path", "flat.csv"]
    done = run(*flags, *words)
    assert done.code == 0, done.err


def test_a_run_whose_line_stays_best_knows_what_its_steps_took(run, flags):
    done = run(*flags, "--residual", "linear", "--learning_rate", 1e-9, "--residual_rate", 1e9, "--loss", "MAE")
    assert torch.load(done.folder / "checkpoint", weights_only=True)["progress"]["steps"] == 0
    assert done.metrics()["cost"]["seconds_per_step"] > 0


def test_a_loss_that_is_no_number_leaves_the_line(run, flags):
    done = run(*flags, "--residual", "linear", "--learning_rate", 1e25)
    assert done.code == 2 and "the best checkpoint is kept" in done.err


def test_the_plan_counts_the_line(run, flags):
    plans = [
        run(*flags, "--plan", "--seq_len", 4096, "--pred_len", 4096, *more) for more in ([], ["--residual", "linear"])
    ]
    without, with_line = (
        float(next(line for line in plan.out.splitlines() if "trained layers" in line).split()[-1]) for plan in plans
    )
    assert with_line - without == pytest.approx(4097 * 4096 * 4 / 2**30, abs=0.011)


def test_a_line_is_a_part_of_timellm(assert_refused, flags):
    assert_refused([*flags, "--model", "DLinear", "--residual", "linear"], "--residual linear", "--model DLinear")
    assert_refused([*flags, "--residual_rate", 0], "--residual_rate 0.0", "above 0")
