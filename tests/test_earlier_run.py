"""A run folder of an earlier version is tested, forecasts and is resumed with the figures it had then.

`tests/frozen/run/` was made on 2026-11-27 at commit b248963: training with `FLAGS` was stopped by Ctrl-C at step 9 of
14 and then tested once. `figures.json` holds what that version wrote in a second test, in a forecast and in the resumed
run. It is never made anew: later versions must give the same figures, if attention drops the weights that it dropped
then.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torch.nn import functional

from run_main import get_parser
from utils.cli.places import run_folder
from utils.runs import load_run

FROZEN = Path(__file__).parent / "frozen"
FIGURES = json.loads((FROZEN / "run" / "figures.json").read_text(encoding="utf-8"))
FLAGS = FIGURES["flags"]


@pytest.fixture
def earlier(tmp_path):
    """Lay out the earlier run's CSV, LLM and run folder; return the folder."""
    shutil.copytree(FROZEN / "llm", tmp_path / "llm", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shutil.copytree(FROZEN / "run" / "llm", tmp_path / "llm", dirs_exist_ok=True)
    shutil.copy(FROZEN / "run" / "series.csv", tmp_path)
    folder = tmp_path / run_folder(get_parser().parse_args(FLAGS), 0)
    folder.mkdir(parents=True)
    for name in ("args.json", "calibration.npz", "checkpoint", "history.csv", "last", "metrics.json"):
        shutil.copy(FROZEN / "run" / name, folder)
    return folder


def attention_of_torch(queries, keys, values, dropout, scale):
    """Drop attention weights as torch does on a CPU."""
    return functional.scaled_dot_product_attention(queries[None], keys[None], values[None], None, dropout, scale=scale)[
        0
    ]


def assert_same(found, kept):
    """Compare numbers but for the rounding of another machine, wherever they stand."""
    if isinstance(kept, dict):
        for name, value in kept.items():
            assert_same(found[name], value)
    elif isinstance(kept, list):
        assert len(found) == len(kept)
        for one, other in zip(found, kept, strict=True):
            assert_same(one, other)
    else:
        assert found == pytest.approx(kept, rel=1e-4)


def test_an_earlier_run_is_tested_and_forecasts_as_it_did(earlier, run):
    assert_same(run(*FLAGS, "--is_training", "0").metrics(), FIGURES["test"])
    assert run(*FLAGS, "--is_training", "0", "--predict").code == 0
    (earlier / "kept.csv").write_text(FIGURES["forecast"], encoding="utf-8")
    kept, found = (pd.read_csv(earlier / name) for name in ("kept.csv", "forecast.csv"))
    pd.testing.assert_frame_equal(found, kept, rtol=1e-5)
    series = pd.read_csv("series.csv")
    from_python = load_run(earlier).predict(series, level=80).drop(columns="date")
    np.testing.assert_array_equal(from_python, found.drop(columns="date"))


def test_an_earlier_run_is_resumed_to_the_same_end(earlier, run, monkeypatch):
    monkeypatch.setattr("layers.Reprogramming.attention_with_dropout", attention_of_torch)
    resumed = run(*FLAGS, "--resume")
    assert "Resuming at step 9, epoch 1" in resumed.out
    assert_same(resumed.metrics(), FIGURES["resumed"])
    for found, kept in zip(resumed.history(), FIGURES["history"], strict=True):
        for name in kept.keys() - {"seconds"}:
            assert_same(float(found[name]), float(kept[name]))
