"""A window's prompt is the same on every machine, in every batch, in every precision that holds the window."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_provider.data_factory import load_series
from dataset.demo import write_demo_csv
from tests.conftest import SHARED
from utils.cli.options import get_parser
from utils.exact import mean_and_variance
from utils.llm.prompt import render, window_statistics

# How libraries are told to compute as they would on another CPU. On some CPUs a few of these change nothing.
MACHINES = {
    "as it is": {},
    "MKL on AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL on SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "MKL on any CPU": {"MKL_CBWR": "COMPATIBLE"},
    "torch without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "torch on AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "NumPy on SSE": {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}

# Prints, for each CSV and batch size, a hash of the scaled series and one of the token ids of 210 windows.
CHILD = """
import hashlib, json, sys
import torch
from transformers import AutoTokenizer
from data_provider.data_factory import data_provider
from data_provider.data_factory import load_series
from utils.cli.options import get_parser
from utils.llm.prompt import DEFAULT_DESCRIPTION, PromptBuilder

sha = lambda data: hashlib.sha256(data).hexdigest()
found = {}
for path, seq_len in json.loads(sys.argv[2]):
    folder, name = path.rsplit("/", 1)
    words = ["--data", "custom", "--root_path", folder, "--data_path", name, "--seq_len", str(seq_len)]
    args = get_parser().parse_args(words)
    dataset, _ = data_provider(args, "train")
    windows = dataset.__getitems__(torch.linspace(0, len(dataset) - 1, 210).long().tolist())[0][..., 0]
    prompts = PromptBuilder(AutoTokenizer.from_pretrained(sys.argv[1]), DEFAULT_DESCRIPTION, seq_len, 96, -1, 64, None)
    for batch in (1, 64):
        ids = [row for part in windows.split(batch) for row in prompts(part)]
        found[f"{name}, batches of {batch}"] = sha(load_series(args).values.tobytes()), sha(json.dumps(ids).encode())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two_series(tmp_path_factory):
    """Two CSVs, and the rows of their windows; of real data where that is there."""
    folder = tmp_path_factory.mktemp("series")
    real = [SHARED / "ETT-small" / f"{name}.csv" for name in ("ETTh1", "ETTm2")]
    made = [write_demo_csv(folder / f"{step}.csv", 1500, step, seed) for seed, step in enumerate(("h", "15min"))]
    return [(path.as_posix(), rows) for path, rows in zip(real if real[0].exists() else made, (512, 336), strict=True)]


@pytest.mark.slow  # six processes
def test_token_ids_do_not_depend_on_the_cpu_the_threads_or_the_batch(tiny_llm, two_series):
    changed = {name for machine in MACHINES.values() for name in machine}
    plain = {name: value for name, value in os.environ.items() if name not in changed}
    command = [sys.executable, "-c", CHILD, tiny_llm("qwen2"), json.dumps(two_series)]
    children = {
        name: subprocess.Popen(
            command,
            env={**plain, "OMP_NUM_THREADS": "1", **machine},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, machine in MACHINES.items()
    }
    found = {name: json.loads(child.communicate()[0].splitlines()[-1]) for name, child in children.items()}
    truth = found["as it is"]
    assert len(truth) == 4
    assert all(other == truth for other in found.values()), found
    for (path, _), (one, many) in zip(two_series, zip(*[iter(truth.values())] * 2, strict=True), strict=True):
        assert one == many, path


def texts(windows):
    return [render(statistics, "", windows.shape[1], 8) for statistics in window_statistics(torch.as_tensor(windows))]


def without_trend(prompt):
    return prompt.replace("upward", "downward")


@pytest.mark.parametrize("seq_len", [63, 64, 97, 336, 512])
def test_the_order_of_sums_does_not_matter(seq_len):
    """Turned around or begun elsewhere on its circle, a window has the same numbers and lags, by other sums."""
    windows = torch.randn(50, seq_len, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    expected = [without_trend(text) for text in texts(windows)]
    for other in (windows.flip(-1), windows.roll(seq_len // 3, -1)):
        assert [without_trend(text) for text in texts(other)] == expected


def test_the_noise_of_a_transform_does_not_reach_the_lags(monkeypatch):
    windows = torch.randn(50, 336, generator=torch.Generator().manual_seed(1)).cumsum(-1)
    windows[::2] = torch.sin(torch.arange(336) * 0.3).sign() + windows[::2].round()  # with many equal correlations
    expected = texts(windows)
    noise, transform = np.random.default_rng(0), np.fft.irfft
    # Ten times what float64 transforms were seen to differ by.
    monkeypatch.setattr(np.fft, "irfft", lambda *given: transform(*given) + noise.uniform(-0.05, 0.05, (50, 336)))
    assert texts(windows) == expected


def test_the_moments_are_those_of_exact_arithmetic():
    values = np.array([1e16, 1.0, -1e16, 3.0])
    assert mean_and_variance(values)[0] == 1.0
    values = np.random.default_rng(0).normal(5, 1e-3, 10_001)
    shuffled = np.random.default_rng(1).permutation(values)
    assert mean_and_variance(values) == mean_and_variance(shuffled)
    assert mean_and_variance(values) == pytest.approx((values.mean(), values.var()))


def test_a_series_is_scaled_alike_whatever_the_order_of_its_sums(tmp_path):
    """Only the training rows' order changes, so each row must get the same float32 numbers."""
    lines = write_demo_csv(tmp_path / "a.csv", rows=500).read_text(encoding="utf-8").splitlines()
    dates, rows = zip(*(line.split(",", 1) for line in lines[1:]), strict=True)
    turned = [f"{date},{row}" for date, row in zip(dates, [*rows[:350][::-1], *rows[350:]], strict=True)]
    (tmp_path / "b.csv").write_text("\n".join([lines[0], *turned]), encoding="utf-8")
    flags = ["--data", "custom", "--root_path", str(tmp_path), "--data_path"]
    both = (load_series(get_parser().parse_args([*flags, name])) for name in ("a.csv", "b.csv"))
    one, other = (series.values.reshape(len(series.channels), -1).T for series in both)
    np.testing.assert_array_equal(one, np.concatenate([other[:350][::-1], other[350:]]))


@st.composite
def windows_of_a_kind(draw):
    """Windows full of ties: constant, straight, periodic, flat but for a spike; tiny and huge ones; any others."""
    count, size = draw(st.integers(1, 5)), draw(st.integers(8, 130))
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, 7.3, 1e5, 1e30]))
    time = np.arange(size)
    kinds = {
        "constant": lambda: np.full(size, draw(st.floats(-10, 10))),
        "ramp": lambda: draw(st.floats(-5, 5)) + time * draw(st.floats(-1, 1)),
        "periodic": lambda: np.resize(draw(st.lists(st.floats(-3, 3), min_size=2, max_size=24)), size),
        "spike": lambda: draw(st.floats(-1, 1)) + (time == draw(st.integers(0, size - 1))) * draw(st.floats(-9, 9)),
        "any": lambda: np.array(draw(st.lists(st.floats(-1e3, 1e3, width=32), min_size=size, max_size=size))),
    }
    made = [kinds[draw(st.sampled_from(sorted(kinds)))]() * scale for _ in range(count)]
    return np.stack(made).astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(windows_of_a_kind())
def test_alone_in_a_batch_and_in_float64_the_text_is_the_same(windows):
    together = texts(windows)
    assert [texts(window[None])[0] for window in windows] == together
    assert texts(windows[::-1].copy())[::-1] == together
    assert texts(windows.astype(np.float64)) == together
    assert [without_trend(text) for text in texts(windows[:, ::-1].copy())] == [without_trend(t) for t in together]
    assert not any(word in text for text in together for word in ("value nan", "value inf", "value -inf", "-0.0,"))
