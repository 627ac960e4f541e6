import csv
import os
import re
import sys

import pytest

import run_main
from scripts import compare


@pytest.fixture
def started(monkeypatch, tmp_path) -> list[list[str]]:
    """Run what compare.py starts in this process, in an empty folder; return the command lines."""
    commands = []

    def run_here(command):
        assert command[:2] == [sys.executable, str(compare.RUN_MAIN)]
        commands.append(command[2:])
        return run_main.main(command[2:])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "run_child", run_here)
    return commands


def small(flags):
    return [*flags, "--max_steps", "2", "--eval_windows", "14", "--skip_epoch_test", "--seeds", "2", "--out", "all"]


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}


def test_ways_are_compared_over_seeds_and_what_is_done_is_kept(started, flags, tmp_path, capsys):
    ways = ["--way", "TimeLLM", "--way", "faster=--learning_rate 0.02", "--way", "DLinear", "--way", "last value"]
    assert compare.main([*small(flags), *ways]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["", "TimeLLM", "faster", "DLinear", "last value"]
    assert [row[0] for row in rows.values()] == ["seeds", "2", "2", "2", "1"]
    for row in list(rows.values())[1:4]:
        assert all(re.fullmatch(r"\d+\.\d{4} ± \d+\.\d{4}", cell) for cell in row[1:4])
    assert rows["last value"][4:6] == ["0", ""]

    written = tmp_path / "all"
    assert rows_of((written / "compare.md").read_text(encoding="utf-8")) == rows
    with (written / "compare.csv").open(encoding="utf-8", newline="") as file:
        figures = list(csv.DictReader(file))
    assert [(row["way"], row["seed"]) for row in figures] == [
        *(("TimeLLM", "2021"), ("TimeLLM", "2022"), ("faster", "2021"), ("faster", "2022")),
        *(("DLinear", "2021"), ("DLinear", "2022"), ("last value", "2021")),
    ]
    assert float(figures[0]["mse"]) != float(figures[1]["mse"])
    assert int(figures[0]["trainable_parameters"]) > 0 and float(figures[0]["seconds_per_step"]) > 0
    assert {row["windows"] for row in figures} == {"14"}
    assert (written / "compare.png").stat().st_size > 10_000

    started.clear()
    assert compare.main([*small(flags), *ways, "--way", "last season"]) == 0
    assert ["SeasonalNaive" in command for command in started] == [True], "only the new way is run"
    assert "TimeLLM: done already" in capsys.readouterr().out


def test_a_way_that_fails_leaves_the_others_alone(started, flags, capsys):
    ways = ["--way", "bad=--learning_rate 1e25", "--way", "DLinear"]
    assert compare.main([*small(flags), *ways]) == 1
    rows = rows_of(capsys.readouterr().out)
    assert rows["bad"][0] == "failed with exit code 2"
    assert rows["DLinear"][0] == "2"


def test_paths_of_windows_stay_whole(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    flags = compare.split_flags('--llm_model_path D:\\llm\\x --content "a b"')
    assert flags == ["--llm_model_path", "D:/llm/x", "--content", "a b"]


def test_other_flags_are_another_run(started, flags, tmp_path):
    ways = ["--way", "DLinear"]
    compare.main([*small(flags), *ways])
    compare.main([*small(flags), *ways, "--percent", "50"])
    assert len(started) == 2
    assert list((tmp_path / "all").glob("*/metrics.json.old")), "the first figures are kept"


def test_a_comparison_that_was_cut_short_goes_on(started, flags, tmp_path):
    ways = ["--way", "DLinear"]
    compare.main([*small(flags), *ways])
    for metrics in (tmp_path / "all").glob("*_1-none/metrics.json"):
        metrics.unlink()
    compare.main([*small(flags), *ways])
    assert started[1][-2:] == ["--resume", "auto"]
    assert not list((tmp_path / "all").glob("*/*.old"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--way", "Autoformer"], ["--way Autoformer", "TimeLLM"]),
        (["--way", "a=--ablation no_llm", "--way", "a=--model DLinear"], ["two ways"]),
        (["--way", "a=--bathc_size 3"], ["--bathc_size"]),
        (["--way", "a=--model DLinear --ablation no_llm"], ["--ablation no_llm"]),
        (["--way", "a=--content 'b"], ["No closing quotation"]),
        (["--seeds", "0"], ["--seeds 0"]),
        (["--root_path", "gone"], ["gone"]),
    ],
)
def test_wrong_input_runs_nothing(started, flags, tmp_path, capsys, argv, words):
    assert compare.main([*small(flags), *argv]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert all(word in printed for word in words)
    assert not started and not list(tmp_path.iterdir())
