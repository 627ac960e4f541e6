"""Whatever the input: exit code 0 or 2, never a traceback. `--fuzz 500` tries more."""

import argparse
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import run_main
import utils.memory.plan
from utils.cli.options import get_parser
from utils.errors import UserError

from .test_wrong_inputs import GOOD, LONG


@pytest.fixture
def fuzzed(request):
    """Settings for as many examples as were asked for."""
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    examples = request.config.getoption("--fuzz")
    return settings(max_examples=examples, deadline=None, suppress_health_check=slow, derandomize=True)


def in_empty_folder(argv):
    """Run the command line in a folder of its own; return the exit code."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return run_main.main([str(word) for word in argv])
        finally:
            os.chdir(before)


cells = st.one_of(
    st.floats().map(str),
    st.integers().map(str),
    st.text(max_size=6),
    st.sampled_from(["", "nan", "2024-01-01", "1e400", "NaT", '"', '"a', "\x00", "0x1f", "1_000", "三"]),
)


@st.composite
def damaged_csvs(draw):
    """A good CSV, wide or long, with some cells, rows or bytes changed."""
    lines = draw(st.sampled_from([GOOD, LONG])).splitlines()
    lines = lines[: draw(st.sampled_from([0, 1, 2, 60, 200, len(lines)]))]
    for _ in range(draw(st.integers(0, 3))):
        if lines:
            row = draw(st.integers(0, len(lines) - 1))
            parts = lines[row].split(",")
            parts[draw(st.integers(0, len(parts) - 1))] = draw(cells)
            lines[row] = draw(st.sampled_from([",", ",", ",", ";", ",,"])).join(parts)
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "gb18030"]))
    contents = "\n".join(lines).encode(encoding, errors="replace")
    place = draw(st.integers(0, len(contents)))
    return contents[:place] + draw(st.binary(max_size=4)) + contents[place:]


def test_any_csv(fuzzed, flags, tmp_path, monkeypatch):
    def enough(*_):
        raise UserError("the CSV was read")

    monkeypatch.setattr(utils.memory.plan, "plan_memory", enough)
    path = tmp_path / "fuzz.csv"

    @fuzzed
    @given(
        st.one_of(damaged_csvs(), st.binary(max_size=300)),
        st.sampled_from(["M", "S", "MS"]),
        st.sampled_from(["OT", "a", "date"]),
        st.sampled_from(["", "", "b", "y", "a,b"]),
        st.sampled_from(["", "", "p", "*"]),
    )
    def check(contents, features, target, covariates, series):
        path.write_bytes(contents)
        more = ["--root_path", tmp_path, "--data_path", path.name, "--features", features, "--target", target]
        more += ["--covariates", covariates, "--series", series]
        assert in_empty_folder([*flags, *more]) == 2

    check()


def words_for(action):
    """Return a strategy for the words of one flag."""
    name = action.option_strings[0]
    if action.nargs == 0:
        return st.just([name])
    if action.choices:
        values = st.sampled_from([*map(str, action.choices), "other"])
    elif action.type is int:
        values = st.integers(-2, 60).map(str)
    elif action.type is float:
        values = st.one_of(st.floats(-1, 2), st.sampled_from([float("nan"), float("inf"), 1e-30])).map(str)
    else:
        values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
    return values.map(lambda value: [f"{name}={value}"])


def flags_to_fuzz():
    # Those that would leave the tiny world of the test: the Hub, another folder, more than a second.
    left_out = {
        *("help", "llm_model", "llm_model_path", "root_path", "checkpoints", "train_epochs", "max_steps", "itr"),
        *("eval_windows", "num_workers", "demo", "eval_steps", "load_in_4bit", "patience"),
    }
    return [action for action in get_parser()._actions if action.dest not in left_out]


def test_any_flags(fuzzed, flags):
    flag = st.sampled_from(flags_to_fuzz()).flatmap(words_for)

    @fuzzed
    @given(st.lists(flag, max_size=3))
    def check(more):
        argv = [*flags, "--max_steps", "1", "--eval_windows", "7", *(word for words in more for word in words)]
        assert in_empty_folder(argv) in (0, 2)

    check()


def test_every_flag_is_fuzzed_or_left_out_on_purpose():
    assert len(flags_to_fuzz()) > 50
    assert all(isinstance(action, argparse.Action) for action in flags_to_fuzz())
