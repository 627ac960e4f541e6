import csv
import json
import os
import re
import shutil
import sys

import pytest

import run_main
from dataset.demo import write_demo_csv
from scripts import compare
from utils.runs import pictures
from utils.runs.pictures import Validation, _best_so_far

pytestmark = pytest.mark.draws


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
        assert all(re.fullmatch(r"\d+\.\d{4} ± \d+\.\d{4}", cell) for cell in row[1:5])
    assert rows["last value"][5:7] == ["0", ""]

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


def test_covariates_and_notes_have_ways_of_their_own(started, flags, csv_folder, tmp_path, capsys):
    """The flags' own forecaster with and without what is known; LLMs that are random or missing where it has one."""
    plan = compare.plan_variants
    own = [*flags, "--model", "DLinear", "--covariates", "HUFL"]
    assert [one.name for one in plan([], 1, own, "")] == [
        "with what is known", "without what is known", "PatchTST", "DLinear", "last season"
    ]  # fmt: skip
    of_llm = plan([], 1, [*flags, "--covariates", "HUFL"], "")
    assert [one.name for one in of_llm][:4] == [
        "with what is known", "the same without LLM", "the same with a random LLM", "without what is known"
    ]  # fmt: skip
    assert [one.args.residual for one in of_llm] == ["linear"] * 4 + ["none"] * 3
    assert [one.args.ablation for one in of_llm][:4] == ["none", "no_llm", "random_llm", "none"]
    without = plan(["without what is known"], 1, own, "")[0].args
    assert (without.covariate_model, without.covariates, without.model) == ("none", "HUFL", "DLinear")


def test_what_was_tested_at_the_end_alone_is_a_dot_at_its_time(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save_picture", lambda figure, path: drawn.append(figure))
    course = [Validation(steps, steps / 10, 0.5 - steps / 100, None) for steps in (10, 20)]
    followed = [Validation(steps, steps / 10, 0.5 - steps / 100, 0.9 - steps / 100) for steps in (10, 20)]
    pictures.draw_comparison(tmp_path, {"a": [0.4, 0.3], "b": [0.7]}, {"a": [course, course], "b": [followed]})
    lines = drawn[0].axes[2].lines
    assert [line.get_xydata().tolist() for line in lines] == [[[2, 0.4]], [[2, 0.3]], [[1, 0.8], [2, 0.7], [2, 0.7]]]
    assert [line.get_marker() for line in lines] == ["o", "o", "None"]


def test_comparisons_are_ranked_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    head = "way,seed,mse,mase\n"
    for name, rows in {
        "compare-one": "a,1,0.1,1.0\na,2,0.3,2.0\nb,1,0.3,0.5\nonly here,1,0.0,0.0\nc,1,0.1,3.0\n",
        "two": "c,1,0.4,5.0\nb,1,0.6,1.5\na,1,0.5,1.0\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "compare.csv").write_text(head + rows, encoding="utf-8")
    assert compare.main(["--rank", "compare-one", "two"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows == {
        "": ["one test MSE", "two test MSE", "mean MASE", "average rank"],
        "c": ["0.1000", "0.4000", "4.0000", "1.00"],
        "a": ["0.2000", "0.5000", "1.2500", "2.00"],
        "b": ["0.3000", "0.6000", "1.0000", "3.00"],
    }


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rank", "gone"], ["no compare.csv in gone"]),
        (["--rank", "one", "--data", "ETTh1"], ["--rank", "leave out"]),
        (["--rank", "one", "other"], ["share no way"]),
    ],
)
def test_what_cannot_be_ranked(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "compare.csv").write_text(f"way,mse,mase\n{name},1,1\n", encoding="utf-8")
    assert compare.main(argv) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert all(word in printed for word in words)


def test_the_course_of_a_run_is_that_of_its_best_weights():
    history = [Validation(steps, steps * 0.5, *errors) for steps, errors in enumerate([(3, 9), (1, 8), (2, 1), (0, 7)])]
    assert _best_so_far(history) == ([0.0, 0.5, 1.5, 1.5], [9, 8, 7, 7])
    assert _best_so_far([Validation(1, 1.0, 1.0, None)]) == ([], [])


def test_a_comparison_of_an_earlier_version_has_no_mase(started, flags, tmp_path, capsys):
    words = [*small(flags), "--seeds", "1", "--way", "DLinear"]
    compare.main(words)
    (path,) = (tmp_path / "all").glob("*/metrics.json")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    del metrics["mase"]
    path.write_text(json.dumps(metrics), encoding="utf-8")
    capsys.readouterr()
    assert compare.main(words) == 0
    assert rows_of(capsys.readouterr().out)["DLinear"][3] == ""
    csv_file = tmp_path / "all" / "compare.csv"
    csv_file.write_text("way,mse\nDLinear,0.5\n", encoding="utf-8")
    assert compare.main(["--rank", "all"]) == 0
    assert rows_of(capsys.readouterr().out)["DLinear"] == ["0.5000", "", "1.00"]


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


def test_what_was_begun_with_other_flags_is_not_gone_on_with(started, flags, tmp_path):
    ways = ["--way", "DLinear"]
    compare.main([*small(flags), *ways, "--max_steps", "8"])
    # As if seed 2021 had been begun anew, with 2 steps, and killed.
    (first,) = (tmp_path / "all").glob("*_0-none/args.json")
    first.write_text(first.read_text(encoding="utf-8").replace('"max_steps": 8', '"max_steps": 2'), encoding="utf-8")
    first.with_name("metrics.json").unlink()
    compare.main([*small(flags), *ways, "--max_steps", "2"])
    assert "--resume" not in started[-1]
    with (tmp_path / "all" / "compare.csv").open(encoding="utf-8", newline="") as file:
        assert [row["steps"] for row in csv.DictReader(file)] == ["2", "2"]


def test_other_windows_and_other_data_are_scored_again(started, flags, tmp_path, csv_folder):
    own = tmp_path / "data"
    shutil.copytree(csv_folder, own)
    words = [*small(flags), "--root_path", str(own), "--way", "DLinear", "--seeds", "1"]
    compare.main(words)
    compare.main(words)
    assert len(started) == 1
    folder = next((tmp_path / "all").glob("*/metrics.json")).parent
    run_main.main([*started[0], "--is_training", "0", "--eval_windows", "7"])
    compare.main(words)
    assert len(started) == 2, "metrics.json was of other windows"
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["windows"] == 14
    write_demo_csv(own / "more.csv", rows=401).replace(own / "small.csv")
    assert compare.main(words) == 0
    assert len(started) == 3, "metrics.json was of other data"
    assert "--resume" not in started[-1]


def test_another_comparison_is_kept(started, flags, tmp_path):
    for way in ("DLinear", "DLinear", "last value"):
        compare.main([*small(flags), "--way", way])
    kept = sorted(file.name for file in (tmp_path / "all").glob("compare*"))
    assert kept == [f"compare.{kind}{ending}" for kind in ("csv", "md", "png") for ending in ("", ".old")]


def test_a_season_that_is_too_long_is_left_out(started, flags, capsys):
    variants = compare.plan_variants([], 1, [*flags, "--season", "49"], "all")
    assert [variant.name for variant in variants] == [name for name in compare.VARIANTS if name != "last season"]
    assert "Leaving out last season: a season has 49 rows" in capsys.readouterr().out


def test_names_are_drawn_as_they_are(started, flags, tmp_path, recwarn):
    assert compare.main([*small(flags), "--seeds", "1", "--way", "$a_{$ 负荷=--model LastValue"]) == 0
    assert (tmp_path / "all" / "compare.png").is_file()
    assert not [warning for warning in recwarn if "legend" in str(warning.message) or "Glyph" in str(warning.message)]


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
        (["--way", "Autoformer"], ["--way 'Autoformer'", "TimeLLM"]),
        (["--way", "a=--ablation no_llm", "--way", "a=--model DLinear"], ["two ways"]),
        (["--way", "a=--bathc_size 3"], ["--bathc_size"]),
        (["--way", "a=--model DLinear --ablation no_llm"], ["--ablation no_llm"]),
        (["--way", "a=--content 'b"], ["No closing quotation"]),
        (["--plan"], ["--plan"]),
        (["--way", "a=--des x"], ["--des"]),
        (["--way", "a=--model LastValue", "--way", "A=--model DLinear"], ["two ways"]),
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
