"""What changes behind a run's back is said or refused, or does not reach the run."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

import data_provider.reading
from data_provider.facts import estimate_overlap, sample_fingerprints
from data_provider.tables import Table
from data_provider.windows import Spans
from dataset.demo import write_demo_csv
from scripts import compare, launch
from utils.errors import UserError
from utils.runs import load_run
from utils.training import testing
from utils.training.trainer import Trainer

from .test_damage import DLINEAR, assert_one_line
from .test_resume import LONGER, run_with_stop


def test_a_half_trained_run_that_was_looked_at_is_not_done(run, flags, monkeypatch):
    argv = [*flags, *DLINEAR, *LONGER, "--eval_steps", "3"]
    run_with_stop(run, monkeypatch, argv, "_train_batch", 6)
    assert run(*argv, "--is_training", "0").code == 0
    done = run(*argv, "--itr", "2", "--resume", "auto")
    assert done.code == 0, done.err
    assert "is done" not in done.out and "Resuming at step 6" in done.out
    assert "Seed 2021 is done" in run(*argv, "--itr", "2", "--resume", "auto").out


def test_a_run_that_is_to_be_longer_and_was_cut_short_is_not_done(run, flags, monkeypatch):
    argv = [*flags, *DLINEAR, "--lradj", "constant", "--eval_steps", "2"]
    assert run(*argv, "--max_steps", "4").code == 0
    run_with_stop(run, monkeypatch, [*argv, "--max_steps", "40", "--resume"], "_train_batch", 2)
    longer = [*argv, "--max_steps", "40", "--itr", "2", "--resume", "auto"]
    assert "is done" not in run(*longer).out
    assert "Seed 2021 is done" in run(*longer).out


def test_neither_a_comparison_nor_a_launcher_takes_it_for_done(run, flags, monkeypatch, capsys):
    argv = [*flags, "--max_steps", "20", "--eval_steps", "2", "--model", "DLinear"]
    run_with_stop(run, monkeypatch, [*argv, "--des", "DLinear", "--checkpoints", "all"], "_train_batch", 6)
    tested = run(*argv, "--des", "DLinear", "--checkpoints", "all", "--is_training", "0")
    assert tested.code == 0, tested.err
    started = []
    monkeypatch.setattr(compare, "run_child", lambda command: started.append(command) or 1)
    compare.main([*argv, "--seeds", "1", "--out", "all", "--way", "DLinear"])
    assert len(started) == 1 and "--resume" in started[0], capsys.readouterr().out
    monkeypatch.setattr(launch, "ROOT", Path.cwd())
    args = compare.get_parser().parse_args([*map(str, argv), "--des", "DLinear", "--checkpoints", "all"])
    assert not launch.is_done(args)


@pytest.mark.parametrize("other", [["--max_steps", "40"], ["--learning_rate", "0.5"]])
def test_a_test_with_the_flags_of_another_run_does_not_make_it_done(run, flags, other):
    argv = [*flags, *DLINEAR]
    folder = run(*argv).folder
    assert run(*argv, *other, "--is_training", "0").code == 0
    again = run(*argv, *other, "--resume", "auto", "--itr", "2")
    assert f"is done: {folder}" not in again.out + again.err


def test_scores_of_other_flags_do_not_make_a_run_done(run, flags):
    argv = [*flags, *DLINEAR, "--itr", "2", "--resume", "auto"]
    first, _ = run(*argv).folders
    assert run(*flags, *DLINEAR, "--is_training", "0", "--use_amp").code == 0
    assert f"is done: {first}" not in run(*argv).out


def without_best(folder):
    (folder / "checkpoint").unlink()


def with_damaged_best(folder):
    (folder / "checkpoint").write_bytes(b"nothing")


@pytest.mark.parametrize("lose", [without_best, with_damaged_best])
def test_a_run_whose_best_weights_are_lost_is_not_resumed(run, flags, monkeypatch, lose):
    argv = [*flags, *DLINEAR, *LONGER, "--eval_steps", "3"]
    lose(run_with_stop(run, monkeypatch, argv, "_train_batch", 6).folder)
    monkeypatch.setattr(Trainer, "fit", lambda _: pytest.fail("it trained"))
    assert_one_line(run(*argv, "--resume"), "checkpoint")


def with_file(flags, text):
    Path("about.txt").write_text(text, encoding="utf-8")
    place = flags.index("--content")
    return [*flags[:place], "--prompt_file", "about.txt", *flags[place + 2 :]]


def test_another_text_in_a_prompt_file_is_said_and_not_resumed(run, flags):
    argv = with_file(flags, "Hourly loads.")
    run(*argv)
    assert "another description" not in run(*argv, "--is_training", "0").out
    with_file(flags, "Oil prices.")
    assert_one_line(run(*argv, "--itr", "2", "--resume", "auto"), "another description of the data")
    assert "another description of the data" in run(*argv, "--is_training", "0").out


def edit_json(path, change):
    contents = json.loads(path.read_text(encoding="utf-8"))
    change(contents)
    path.write_text(json.dumps(contents), encoding="utf-8")


def permuted_tokenizer(folder):
    def change(contents):
        vocabulary = contents["model"]["vocab"]
        one, other = (token for token, number in vocabulary.items() if number in (40, 41))
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    edit_json(folder / "tokenizer.json", change)


def other_embeddings(folder):
    tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    tensors["embed_tokens.weight"][300] = tensors["embed_tokens.weight"][301]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_config(**changes):
    return lambda folder: edit_json(folder / "config.json", lambda contents: contents.update(changes))


def reordered_merges(folder):
    def change(contents):
        merges = contents["model"]["merges"]
        merges.append(merges.pop(5))

    edit_json(folder / "tokenizer.json", change)


CHANGES = {
    "merges_hash": reordered_merges,
    "tokenizer_hash": permuted_tokenizer,
    "its token embeddings differ": other_embeddings,
    "sliding": in_config(sliding_window=16, use_sliding_window=True, layer_types=["sliding_attention"] * 2),
    "rope_theta": in_config(rope_parameters={"rope_type": "default", "rope_theta": 10001.0}),
    "rms_norm_eps": in_config(rms_norm_eps=1.1e-6),
}


def test_an_llm_that_was_changed_is_refused(run, flags, tiny_llm):
    shutil.copytree(tiny_llm("qwen2"), "llm")
    argv = [*flags, "--llm_model_path", "./llm"]
    assert run(*argv).code == 0
    for words, change in CHANGES.items():
        shutil.rmtree("llm")
        shutil.copytree(tiny_llm("qwen2"), "llm")
        change(Path("llm"))
        for more in (["--is_training", "0"], ["--is_training", "0", "--predict"], ["--resume", "--max_steps", "6"]):
            assert_one_line(run(*argv, *more), "another LLM", words)


@pytest.fixture
def own_csv(run, flags, csv_folder):
    """A CSV that a test may change, and the flags of a run on it."""
    shutil.copy(csv_folder / "small.csv", "own.csv")
    return Path("own.csv"), [*flags, *DLINEAR, "--root_path", ".", "--data_path", "own.csv"]


def change_rows(path, change):
    frame = pd.read_csv(path)
    change(frame)
    frame.to_csv(path, index=False)


def swap_rows(frame):
    """Swap training rows: the mean stays what it was."""
    values = frame.columns[1:]
    frame.loc[[20, 21], values] = frame.loc[[21, 20], values].to_numpy()


def set_validation_cell(frame):
    frame.loc[300, "HULL"] += 0.001


@pytest.mark.parametrize(("change", "words"), [(swap_rows, "training rows"), (set_validation_cell, "validation rows")])
def test_changed_rows_are_not_resumed_and_are_said(run, own_csv, change, words):
    path, argv = own_csv
    run(*argv)
    change_rows(path, change)
    assert_one_line(run(*argv, "--resume", "--max_steps", "6"), "other data", words)
    assert f"was trained on other data: the {words} differ" in run(*argv, "--is_training", "0").out


def test_a_test_on_rows_that_were_trained_on_says_so(run, own_csv):
    path, argv = own_csv
    folder = run(*argv).folder
    assert "of these test rows" not in run(*argv, "--is_training", "0").out
    pd.read_csv(path).head(250).to_csv(path, index=False)
    for more in ([], ["--checkpoint", folder]):
        assert "was trained on about 100% of these test rows" in run(*argv, "--is_training", "0", *more).out
    other = write_demo_csv("other.csv", rows=250, seed=9)
    done = run(*argv, "--data_path", other, "--is_training", "0", "--checkpoint", folder, "--des", "other")
    assert done.code == 0 and "of these test rows" not in done.out


# --- a CSV that changes while a run is at work --------------------------------------------------------------------


def append_rows(path):
    rows = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*rows, *[rows[-1]] * 200]) + "\n", encoding="utf-8")


def reorder_columns(path):
    frame = pd.read_csv(path)
    frame[["date", *reversed(frame.columns[1:])]].to_csv(path, index=False)


@pytest.mark.parametrize("change", [append_rows, reorder_columns, os.unlink])
def test_a_csv_that_changes_meanwhile_does_not_reach_the_run(run, own_csv, change, monkeypatch):
    path, argv = own_csv
    argv += ["--level", "50", "--predict"]
    undisturbed = run(*argv).metrics()
    fit = Trainer.fit

    def changed_meanwhile(trainer):
        fit(trainer)
        change(path)

    monkeypatch.setattr(Trainer, "fit", changed_meanwhile)
    finished = run(*argv)
    disturbed = finished.metrics()
    for metrics in (undisturbed, disturbed):
        for name in ("seconds", "cost", "checkpoint_sha256", "ended_state_sha256"):  # of the clock
            del metrics[name]
    assert disturbed == undisturbed
    args = json.loads((finished.folder / "args.json").read_text(encoding="utf-8"))
    assert args["data_sha256"] == undisturbed["data_sha256"]


def test_the_csv_is_read_once(run, own_csv, monkeypatch):
    _, argv = own_csv
    reads, read = [], data_provider.reading.read_csv
    monkeypatch.setattr(data_provider.reading, "read_csv", lambda path, *more: reads.append(path) or read(path, *more))
    assert run(*argv, "--level", "50", "--predict", "--itr", "2").code == 0
    assert len(reads) == 1


def test_a_calibration_is_of_the_weights_that_were_loaded(run, flags, monkeypatch):
    argv = [*flags, *DLINEAR]
    folder = run(*argv).folder
    evaluate = testing.evaluate

    def while_it_trains(*arguments, **options):
        contents = torch.load(folder / "checkpoint", weights_only=True)
        contents["progress"]["steps"] = 99
        torch.save(contents, folder / "checkpoint")
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(testing, "evaluate", while_it_trains)
        assert run(*argv, "--is_training", "0", "--level", "50").code == 0
    assert_one_line(run(*argv, "--is_training", "0", "--predict", "--level", "50"), "intervals need calibration.npz in")


# --- from elsewhere, and absurd -----------------------------------------------------------------------------------


def test_a_local_llm_is_found_from_elsewhere_and_never_asked_of_the_hub(run, flags, tiny_llm, csv_folder, monkeypatch):
    shutil.copytree(tiny_llm("qwen2"), "models_here/tiny")
    folder = run(*flags, "--llm_model_path", "models_here/tiny").folder.absolute()
    frame = pd.read_csv(csv_folder / "small.csv")
    expected = load_run(folder).predict(frame)
    Path("elsewhere").mkdir()
    home = Path.cwd()
    monkeypatch.chdir("elsewhere")
    pd.testing.assert_frame_equal(load_run(folder).predict(frame), expected)
    (home / "models_here").rename(home / "moved")
    with pytest.raises(UserError, match=r"models_here.*llm_model_path"):
        load_run(folder)


def test_a_name_under_base_models_is_no_hub_id(assert_refused, flags):
    assert_refused([*flags, "--llm_model_path", "base_models/NAME"], "no LLM in base_models/NAME")


@pytest.mark.parametrize(("cell", "refused"), [(1e20, True), (1e13, True), (1e10, False), (1e5, False)])
def test_a_last_cell_that_is_no_reading(run, own_csv, cell, refused):
    path, argv = own_csv
    folder = run(*argv).folder
    frame = pd.read_csv(path)
    frame.loc[len(frame) - 1, "HULL"] = cell
    frame.to_csv(path, index=False)
    done = run(*argv, "--is_training", "0", "--predict")
    if refused:
        assert_one_line(done, "'HULL'", "too far from the training rows' mean")
        with pytest.raises(UserError, match="too far"):
            load_run(folder).predict(frame)
    else:
        assert done.code == 0 and "Warning: 'HULL'" in done.out
        with pytest.warns(UserWarning, match="'HULL'"):
            load_run(folder).predict(frame)


def test_a_forecast_that_is_not_finite_is_no_forecast(run, own_csv, monkeypatch):
    _, argv = own_csv
    folder = run(*argv).folder
    monkeypatch.setattr("models.DLinear.Model.forecast", lambda _, contexts: contexts[:, :4] * np.inf)
    assert_one_line(run(*argv, "--is_training", "0", "--predict"), "is not finite")
    assert not (folder / "forecast.csv").exists()


def test_a_channel_that_is_named_like_a_bound_is_refused(run, own_csv):
    path, argv = own_csv
    frame = pd.read_csv(path).rename(columns={"HULL": "HUFL-lo-80"})
    frame.to_csv(path, index=False)
    assert_one_line(run(*argv, "--level", "80"), "'HUFL-lo-80'", "rename")
    assert run(*argv, "--level", "50").code == 0


@pytest.mark.parametrize(("cell", "refused"), [(1e20, True), (1e9, False)])
def test_a_covariate_that_is_no_reading(run, flags, own_csv, cell, refused):
    path, argv = own_csv
    argv = [*argv, "--covariates", "promo", "--covariate_model", "linear"]  # trees do not extrapolate
    frame = pd.read_csv(path)
    frame["promo"] = np.arange(len(frame)) % 7
    frame.loc[len(frame) - 8 :, frame.columns[1:8]] = np.nan
    frame.to_csv(path, index=False)
    run(*argv)
    for row in (len(frame) - 7, len(frame) - 20):  # of the horizon, of the context
        changed = frame.astype({"promo": float})
        changed.loc[row, "promo"] = cell
        changed.to_csv(path, index=False)
        done = run(*argv, "--is_training", "0", "--predict")
        if refused:
            assert_one_line(done, "what its covariates explain is too far")
        else:
            assert done.code == 0 and "what its covariates explain is" in done.out


@pytest.mark.parametrize(("cell", "refused"), [(1e20, True), (1e6, False)])
def test_a_last_cell_of_an_unseen_series_that_is_no_reading(run, own_csv, cell, refused):
    path, argv = own_csv
    long = pd.read_csv(path).melt("date", var_name="unique_id", value_name="y").rename(columns={"date": "ds"})
    long[long["unique_id"] != "OT"].to_csv(path, index=False)
    run(*argv)
    long.loc[len(long) - 1, "y"] = cell
    long.to_csv(path, index=False)
    done = run(*argv, "--is_training", "0", "--predict")
    if refused:
        assert_one_line(done, "'OT'", "too far from the other rows' mean")
    else:
        assert done.code == 0 and "Warning: 'OT'" in done.out


@pytest.mark.parametrize(("channels", "rows"), [(862, 300), (3000, 40)])
def test_rows_trained_on_are_found_in_wide_and_in_long_data(channels, rows):
    values = np.random.default_rng(0).normal(size=channels * rows)
    dates = pd.date_range("2024-01-01", periods=rows, freq="h")
    table = Table(Path("x.csv"), dates, values, tuple(map(str, range(channels))), Spans.of_table(rows, channels))
    begin, half, end = (np.full(channels, place) for place in (0, rows // 2, rows))
    kept = sample_fingerprints(table, half)
    assert len(kept) <= 4096
    assert estimate_overlap(table, begin, half, kept) == 1
    assert estimate_overlap(table, begin, end, kept) == pytest.approx(0.5, abs=0.05)
    assert estimate_overlap(table, half, end, kept) == 0


def test_a_path_may_be_a_path(run, own_csv):
    path, argv = own_csv
    folder = run(*argv).folder
    assert len(load_run(folder, root_path=Path(), pred_len=np.int64(4)).predict(pd.read_csv(path)))


def test_the_best_weights_of_another_run_are_not_resumed_with(run, flags):
    argv = [*flags, *DLINEAR]
    folder, *_ = run(*argv).folders
    run(*argv, "--seed", "7", "--des", "other")
    other = next(Path("checkpoints").glob("*_other_*"))
    shutil.copy(other / "checkpoint", folder / "checkpoint")
    assert_one_line(run(*argv, "--resume", "--max_steps", "6"), "is from another run", "--seed 7")
