"""DLinear, the naive forecasts and the ablations of Time-LLM."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data_provider.tables import Table
from data_provider.windows import Spans
from models.DLinear import Model as DLinear
from models.DLinear import moving_average
from models.LastValue import Model as LastValue
from models.PatchTST import Model as PatchTST
from models.SeasonalNaive import Model as SeasonalNaive
from tests.conftest import largest_difference
from utils.cli.options import get_parser


def configs(*argv):
    return get_parser().parse_args(["--data", "custom", "--seq_len", "30", "--pred_len", "20", *argv])


def test_the_moving_average_continues_the_ends():
    windows = torch.randn(2, 3, 12)
    for rows in (1, 4, 5):
        before = (rows - 1) // 2
        padded = np.pad(windows.numpy(), ((0, 0), (0, 0), (before, rows - 1 - before)), mode="edge")
        expected = np.lib.stride_tricks.sliding_window_view(padded, rows, axis=-1).mean(-1)
        assert largest_difference(moving_average(windows, rows), expected) < 1e-6


def test_dlinear_starts_as_the_mean_and_shares_its_maps():
    model = DLinear(configs())
    windows = torch.randn(4, 30, 3)
    forecast = model(windows)
    assert forecast.shape == (4, 20, 3)
    offset = (model.trend.bias + model.rest.bias)[:, None]
    assert largest_difference(forecast - offset, windows.mean(1, keepdim=True).expand(-1, 20, -1)) < 1e-5
    alone = torch.cat([model(windows[..., [channel]]) for channel in range(3)], dim=-1)
    assert largest_difference(alone, forecast) < 1e-6
    assert sorted(name for name, _ in model.named_parameters()) == [
        *("rest.bias", "rest.weight", "trend.bias", "trend.weight"),
    ]


def patch_tst(*argv):
    flags = ["--d_model", "8", "--n_heads", "2", "--d_ff", "16", "--patch_len", "6", "--stride", "4", *argv]
    torch.manual_seed(0)
    return PatchTST(configs(*flags)).eval()


def test_patchtst_forecasts_each_channel_by_itself_in_its_own_units():
    model, windows = patch_tst(), torch.randn(4, 30, 3).cumsum(1)
    with torch.no_grad():
        forecast = model(windows)
        alone = torch.cat([model(windows[..., [channel]]) for channel in range(3)], dim=-1)
        moved = model(windows * 7 + 100)
    assert forecast.shape == (4, 20, 3)
    assert largest_difference(alone, forecast) < 1e-5
    assert largest_difference(moved, forecast * 7 + 100) < 1e-4


def test_patchtst_is_the_authors_size():
    """Of their PatchTST/42 for ETTh1: patches 272, positions 672, three layers of 5,392, head 64,608."""
    flags = ["--seq_len", "336", "--pred_len", "96", "--patch_len", "16", "--stride", "8", "--e_layers", "3"]
    model = patch_tst(*flags, "--d_model", "16", "--n_heads", "4", "--d_ff", "128")
    assert sum(parameter.numel() for parameter in model.parameters()) == 81_728


def test_patchtst_knows_its_dropout_from_testing():
    model, windows = patch_tst("--dropout", "0.5"), torch.randn(2, 30, 1)
    assert torch.equal(model(windows), model(windows))
    model.train()
    assert not torch.equal(model(windows), model(windows))


def test_heads_that_do_not_share_the_width_are_refused(assert_refused, flags):
    assert_refused([*flags, "--model", "PatchTST", "--n_heads", 3], "--d_model 8", "--n_heads 3")


def test_naive_forecasts_repeat_what_was_seen():
    windows = torch.arange(60.0).reshape(1, 30, 2)
    again = SeasonalNaive(configs("--season", "7"))(windows)
    assert torch.equal(again[0, :7], windows[0, -7:])
    assert torch.equal(again[0, 7:14], windows[0, -7:])
    assert torch.equal(again[0, 14:], windows[0, -7:-1])
    assert torch.equal(LastValue(configs())(windows), windows[:, -1:].expand(-1, 20, -1))


def season(dates):
    rows = len(dates)
    return Table(Path("x.csv"), dates, np.zeros(rows), ("a",), Spans.of_table(rows, 1)).rows_of_a_season()


@pytest.mark.parametrize(
    ("freq", "rows"),
    [
        *(("h", 24), ("15min", 96), ("10s", 8640), ("D", 7), ("W", 52), ("MS", 12), ("QS", 4), ("YS", 1), ("12h", 2)),
        *(("B", 5), ("bh", 8)),  # working days, and their hours
    ],
)
@pytest.mark.parametrize("zone", [None, "UTC"])
def test_a_season_is_read_off_the_dates(freq, rows, zone):
    dates = pd.date_range("2020-01-01", periods=60, freq=freq, tz=zone)
    assert season(dates) == rows
    assert season(dates[:1]) == 1


def test_several_rows_a_date_are_a_season():
    dates = pd.DatetimeIndex(np.repeat(pd.date_range("2020-01-01", periods=9), 3))
    assert season(dates) == 3


def test_a_season_longer_than_a_window_is_refused(run, flags):
    refused = run(*flags, "--model", "SeasonalNaive", "--season", 49)
    assert (refused.code, refused.folders) == (2, [])
    assert "--seq_len 48" in refused.err and "49" in refused.err


@pytest.mark.parametrize("model", ["PatchTST", "DLinear", "SeasonalNaive", "LastValue"])
def test_a_baseline_trains_tests_forecasts_and_resumes_without_an_llm(run, flags, model):
    patch_len = 6 if model == "PatchTST" else 30  # longer than a window: the others have no patches
    flags = [*flags, "--model", model, "--llm_model_path", "./gone", "--seq_len", 24, "--patch_len", patch_len]
    done = run(*flags, "--predict")
    assert (done.code, done.err) == (0, "")
    assert "LLM" not in done.out
    trained, forecast = done.metrics(), (done.folder / "forecast.csv").read_bytes()
    assert trained["llm"] is None
    assert (done.folder / "last").is_file()
    steps = [row["steps"] for row in done.history()]
    assert steps == (["4"] if model in ("PatchTST", "DLinear") else ["0"])
    for more in (["--is_training", 0], ["--resume"], ["--is_training", 0, "--predict"]):
        again = run(*flags, *more)
        assert again.code == 0, again.err
        assert again.metrics()["mse"] == trained["mse"]
        assert [row["steps"] for row in again.history()] == steps
    assert (again.folder / "forecast.csv").read_bytes() == forecast
    assert run(*flags, "--plan").out == f"{model} has no LLM: it fits wherever the data fit.\n"


def test_every_test_has_the_seasonal_naive_beside_it(run, flags):
    naive = run(*flags, "--model", "SeasonalNaive", "--des", "naive").metrics()
    done = run(*flags, "--model", "LastValue")
    (folder,) = (folder for folder in done.folders if "LastValue" in folder.name)
    metrics = done._replace(folders=[folder]).metrics()
    assert metrics["seasonal_naive"] == {"mse": naive["mse"], "mae": naive["mae"]} == naive["seasonal_naive"]
    assert f"Seasonal naive | MSE: {naive['mse']:.7f} MAE: {naive['mae']:.7f} | the last 24 rows again" in done.out
    too_long = run(*flags, "--model", "LastValue", "--season", 49)
    assert "Seasonal naive" not in too_long.out
    assert too_long._replace(folders=[folder]).metrics()["seasonal_naive"] is None


def test_without_the_llm_the_prompt_does_not_matter(run, flags):
    one, other = (
        run(*flags, "--ablation", "no_llm", "--content", content).metrics()["mse"] for content in ("one", "another")
    )
    assert one == other
    assert "--llm_layers 99" in run(*flags, "--ablation", "no_llm", "--llm_layers", 99).err
    done = run(*flags, "--ablation", "no_llm", "--llm_layers", 2, "--predict")
    assert "1 of 2 layers, hidden size 64, float32 (not run, only its token embeddings are used)" in done.out
    assert "Prompt of the first window" not in done.out
    assert done.metrics()["mse"] == one
    assert run(*flags, "--ablation", "no_llm", "--llm_layers", 2, "--resume").metrics()["mse"] == one


def test_a_random_llm_is_the_same_for_the_same_seed(run, flags):
    pretrained = run(*flags).metrics()["mse"]
    done = run(*flags, "--ablation", "random_llm")
    drawn, words = done.metrics()["mse"], done.metrics()["llm"]["embedding_hash"]
    assert "2 of 2 layers, hidden size 64, float32 (random weights)" in done.out
    assert drawn != pretrained
    assert run(*flags, "--ablation", "random_llm", "--is_training", 0).metrics()["mse"] == drawn
    refused = run(*flags, "--ablation", "random_llm", "--is_training", 0, "--seed", 5)
    assert refused.code == 2 and "another LLM (embedding_hash" in refused.err

    # A repetition draws its own, as if it were run by itself.
    run(*flags, "--ablation", "random_llm", "--itr", 2, "--des", "two")
    folders = run(*flags, "--ablation", "random_llm", "--seed", 2022, "--des", "alone").folders
    ours, theirs = (
        json.loads((next(path for path in folders if end in path.name) / "metrics.json").read_text(encoding="utf-8"))
        for end in ("_two_1-", "_alone_0-")
    )
    assert ours["mse"] == theirs["mse"]
    assert ours["llm"]["embedding_hash"] == theirs["llm"]["embedding_hash"] != words


def test_a_random_llm_in_4_bits(run, flags):
    done = run(*flags, "--ablation", "random_llm", "--load_in_4bit", "--max_steps", 1, "--eval_windows", 7)
    assert (done.code, done.err) == (0, "")
    assert "NF4, computing in float32 (random weights)" in done.out


@pytest.mark.parametrize(
    ("trained", "tested", "words"),
    [
        (["--model", "DLinear"], ["--model", "LastValue"], "trained with --model DLinear, not LastValue"),
        (["--model", "DLinear"], ["--model", "DLinear", "--moving_avg", "5"], "trained with --moving_avg 25, not 5"),
        (["--model", "PatchTST"], ["--model", "PatchTST", "--n_heads", "4"], "trained with --n_heads 2, not 4"),
        (["--model", "PatchTST"], ["--model", "PatchTST", "--stride", "4"], "trained with --stride 8, not 4"),
        (["--model", "PatchTST"], ["--model", "PatchTST", "--e_layers", "3"], "give it the flags of its run"),
        (["--model", "SeasonalNaive"], ["--model", "SeasonalNaive", "--season", "7"], "--season 0, not 7"),
        ([], ["--ablation", "no_llm"], "trained with --ablation none, not no_llm"),
        ([], ["--normalize_prototypes"], "trained with --normalize_prototypes False, not True"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(run, flags, trained, tested, words):
    folder = run(*flags, *trained).folder
    refused = run(*flags, *tested, "--is_training", 0, "--checkpoint", folder)
    assert refused.code == 2
    assert words in refused.err


def test_an_ablation_of_another_model_is_refused(assert_refused, flags):
    assert_refused([*flags, "--model", "DLinear", "--ablation", "no_llm"], "--ablation no_llm", "--model DLinear")
