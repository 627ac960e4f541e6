"""Whole runs through the command line, on a tiny LLM."""

import errno
import json
import math
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import run_main
from base_models.make_tiny_llm import make_tiny_llm
from dataset.demo import write_demo_csv
from layers import Reprogramming
from tests.conftest import names_in
from utils.cli.options import get_parser
from utils.runs import records
from utils.system import files

ROOT = Path(run_main.__file__).parent
NUMBER = r"\d+\.\d{7}"


def test_a_run_prints_and_leaves_what_the_contract_says(run, flags, tiny_llm):
    done = run(*flags)
    assert (done.code, done.err) == (0, "")
    memory, *lines = done.out.splitlines()
    assert re.fullmatch(r"Memory: about [\d.]+ GiB of [\d.]+ free on cpu \(.*; see --plan\)", memory)
    assert lines[0] == f"Loading generic model from: {tiny_llm('qwen2')}"
    assert lines[1] == "LLM: qwen2, 2 of 2 layers, hidden size 64, float32"
    assert re.fullmatch(r"Parameters: [\d,]+ trainable, 107,072 frozen", lines[2])
    # 280 training rows, 40 and 80 after them; 56 rows a window
    assert lines[3] == "Windows: train 1575, val 231, test 511, of 7 channels"
    assert "at most 40 evenly spaced windows" in lines[4]
    assert "<|start_prompt|>Dataset description: Demo.  Task description: forecast the next 8 steps" in lines[5]
    text = "\n".join(lines[6:])
    assert re.search(r"^Epoch: 1 cost time: \d+\.\d\d$", text, re.M)
    losses = rf"Train Loss: {NUMBER} Vali Loss: {NUMBER} Test Loss: {NUMBER} MAE Loss: {NUMBER}"
    assert re.search(rf"^Epoch: 1 \| {losses}$", text, re.M)
    assert re.search(r"^Validation loss decreased \(inf --> \d+\.\d{6}\)\.  Saving model \.\.\.$", text, re.M)
    assert re.search(rf"^Test \| MSE: {NUMBER} MAE: {NUMBER} \| 40 windows of 511$", text, re.M)
    assert re.search(r"^In the CSV's units \| RMSE: [\d.]+ MASE: \d\.\d{4} sMAPE: \d+\.\d\d%$", text, re.M)

    assert done.folder.name == (
        "long_term_forecast_custom_48_8_TimeLLM_custom_ftM_sl48_ll8_pl8_dm8_nh2_el2_dl1_df8_fc1_ebtimeF_test_0-none"
    )
    assert names_in(done.folder) == [
        *("args.json", "checkpoint", "errors.png", "history.csv", "history.png", "last", "metrics.json"),
    ]
    args = json.loads((done.folder / "args.json").read_text(encoding="utf-8"))
    assert set(vars(get_parser().parse_args(flags))) < set(args)
    assert args["content"] == "Demo.  "
    assert args["device"] in ("cpu", "cuda", "cuda:0")
    assert args["versions"]["torch"] == torch.__version__
    metrics = done.metrics()
    assert metrics["split"] == "test"
    assert metrics["windows"] == 40
    assert metrics["llm"]["model_type"] == "qwen2"
    assert list(metrics["per_channel"]) == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    (row,) = done.history()
    columns = "epoch,steps,lr,train_loss,vali_loss,vali_mae,test_loss,test_mae,seconds,attention_entropy,prototype_rms"
    assert ",".join(row) == columns
    assert (row["epoch"], row["steps"], float(row["lr"])) == ("1", "4", 0.01)
    assert float(row["test_loss"]) == pytest.approx(metrics["mse"])


def test_testing_alone_gives_the_same_metrics(run, flags):
    trained = run(*flags).metrics()
    done = run(*flags, "--is_training", "0")
    assert done.code == 0
    assert done.metrics()["mse"] == trained["mse"]
    assert done.metrics()["per_channel"] == trained["per_channel"]
    assert len(done.history()) == 1, "a test must not touch the training's files"
    written = (done.folder / "args.json").read_bytes()
    assert run(*flags, "--is_training", "0", "--checkpoint", done.folder).code == 0
    assert (done.folder / "args.json").read_bytes() == written


def test_a_run_is_repeatable_to_the_bit(run, flags):
    one, two, other = (run(*flags, *more).metrics()["mse"] for more in ([], [], ["--seed", "7"]))
    assert one == two
    assert other != one


@pytest.mark.parametrize("batch_size", [7, 64])
def test_metrics_do_not_depend_on_the_evaluation_batch(run, flags, batch_size):
    flags = [*flags, "--eval_windows", "30"]
    run(*flags)
    alone = run(*flags, "--is_training", "0", "--eval_batch_size", 1).metrics()
    together = run(*flags, "--is_training", "0", "--eval_batch_size", batch_size).metrics()
    for name in ("mse", "mae"):
        assert together[name] == pytest.approx(alone[name], rel=1e-6)


def test_the_best_checkpoint_is_the_one_that_is_tested(run, flags):
    flags = [*flags, "--max_steps", 8, "--eval_steps", 2, "--learning_rate", 0.3, "--lradj", "constant"]
    done = run(*flags)
    best = min(done.history(), key=lambda row: float(row["vali_loss"]))
    assert best is not done.history()[-1]
    progress = torch.load(done.folder / "checkpoint", weights_only=True)["progress"]
    assert progress["steps"] == int(best["steps"])
    assert done.metrics()["mse"] == pytest.approx(float(best["test_loss"]))


def test_validation_every_few_steps(run, flags):
    done = run(*flags, "--max_steps", 5, "--eval_steps", 2, "--skip_epoch_test")
    rows = done.history()
    assert [row["steps"] for row in rows] == ["2", "4", "5"], "the last steps are validated too"
    assert all(row["test_loss"] == "" for row in rows)
    assert re.search(rf"^Epoch: 1, step: 4 \| Train Loss: {NUMBER} Vali Loss: {NUMBER}$", done.out, re.M)
    assert "Test Loss" not in done.out
    assert "Test | MSE" in done.out


def test_a_test_while_training_changes_no_weight(run, flags):
    flags = [*flags, "--max_steps", 4, "--eval_steps", 1, "--dropout", 0.5]
    watched, unwatched = (run(*flags, *more).history() for more in ((), ("--skip_epoch_test",)))
    assert [row["vali_loss"] for row in watched] == [row["vali_loss"] for row in unwatched]


def test_the_training_loss_is_that_since_the_last_validation(run, flags):
    flags = [*flags, "--max_steps", 2, "--skip_epoch_test", "--learning_rate", 1e-12, "--dropout", 0]
    each, both = (run(*flags, "--eval_steps", steps).history() for steps in (1, 2))
    first, second = (float(row["train_loss"]) for row in each)
    assert float(both[0]["train_loss"]) == pytest.approx((first + second) / 2, rel=1e-5)
    assert first != pytest.approx(second, rel=1e-3)


def test_patience_counts_validations(run, flags):
    flags = [*flags, "--max_steps", 60, "--eval_steps", 1, "--patience", 2, "--learning_rate", 2, "--skip_epoch_test"]
    done = run(*flags, "--eval_windows", 7)
    assert "EarlyStopping counter: 2 out of 2\n" in done.out
    assert "\nEarly stopping\n" in done.out
    assert len(done.history()) < 60


def test_epochs_steps_and_schedule(run, flags):
    # 20 % of the training rows make 39 windows a channel, 273 in all: two batches of 100
    flags = [*flags, "--max_steps", 0, "--percent", 20, "--batch_size", 100, "--train_epochs", 3, "--eval_windows", 7]
    rows = run(*flags).history()
    assert [(row["epoch"], row["steps"]) for row in rows] == [("1", "2"), ("2", "4"), ("3", "6")]
    assert [float(row["lr"]) for row in rows] == [0.01, 0.01, 0.005]


def test_one_cycle_moves_with_every_step(run, flags):
    rows = run(*flags, "--lradj", "TST", "--max_steps", 10, "--eval_steps", 2, "--skip_epoch_test").history()
    rates = [float(row["lr"]) for row in rows]
    assert max(rates) == rates[0] == pytest.approx(0.01, rel=0.1)  # --pct_start 0.2: the peak is at step 2 of 10
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1e-4


def test_progress_is_reported_every_hundred_batches(run, flags):
    done = run(*flags, "--batch_size", 2, "--max_steps", 101, "--eval_windows", 7, "--skip_epoch_test")
    assert re.search(
        rf"^\titers: 100, epoch: 1 \| loss: {NUMBER}\n\tspeed: \d+\.\d{{4}}s/iter; left time: \d+\.\d{{4}}s$",
        done.out,
        re.M,
    )


def test_accumulated_gradients_are_those_of_the_whole_batch(run, flags):
    flags = [*flags, "--dropout", 0, "--percent", 20, "--eval_windows", 21]
    whole = run(*flags, "--batch_size", 16, "--max_steps", 3).metrics()
    parts = run(*flags, "--batch_size", 4, "--grad_accum", 4, "--max_steps", 3)
    assert parts.metrics()["mse"] == pytest.approx(whole["mse"], rel=1e-5)
    assert parts.history()[-1]["steps"] == "3"


def test_a_tight_clip_holds_the_weights(run, flags):
    def moved(*more):
        folder = run(*flags, *more).folder
        return torch.load(folder / "checkpoint", weights_only=True)["weights"]["output_projection.linear.weight"]

    # Adam does not mind the gradient's length, unless it is shorter than its epsilon.
    start, free, held = (
        moved("--max_steps", 1, *more) for more in (["--learning_rate", 1e-12], [], ["--grad_clip", 1e-12])
    )
    assert (held - start).abs().max() < 0.1 * (free - start).abs().max()


def test_repetitions_have_their_own_seeds_and_folders(run, flags):
    done = run(*flags, "--itr", 2)
    assert [folder.name[-6:] for folder in done.folders] == ["0-none", "1-none"]
    first, second = (json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in done.folders)
    assert first["mse"] != second["mse"]
    alone = run(*flags, "--seed", 2022, "--des", "alone")
    (folder,) = (folder for folder in alone.folders if "alone" in folder.name)
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["mse"] == second["mse"]


@pytest.mark.parametrize("features", ["S", "MS"])
def test_the_target_is_the_headline(run, flags, features):
    metrics = run(*flags, "--features", features, "--target", "HULL").metrics()
    assert metrics["mse"] == metrics["per_channel"]["HULL"]["mse"]
    assert len(metrics["per_channel"]) == (1 if features == "S" else 7)
    assert metrics["windows"] == metrics["per_channel"]["HULL"]["windows"]


def test_a_checkpoint_is_tested_on_other_data(run, flags, tmp_path_factory):
    trained = run(*flags).folder
    other = write_demo_csv(tmp_path_factory.mktemp("other") / "other.csv", rows=500, seed=9)
    elsewhere = ["--root_path", other.parent, "--data_path", other.name, "--model_id", "zero_shot"]
    done = run(*flags, *elsewhere, "--is_training", 0, "--checkpoint", trained)
    assert done.code == 0
    (folder,) = (folder for folder in done.folders if "zero_shot" in folder.name)
    assert sorted(file.name for file in folder.iterdir()) == ["args.json", "errors.png", "metrics.json"]
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["checkpoint"].startswith(str(trained))


def test_a_full_checkpoint_is_tested_with_the_compact_map(run, flags):
    full = run(*flags, "--mapping", "full").metrics()
    done = run(*flags, "--is_training", 0)
    assert done.code == 0
    assert done.metrics()["mse"] == pytest.approx(full["mse"], rel=1e-5)
    assert "full mapping layer of the checkpoint" in done.out
    run(*flags)
    back = run(*flags, "--is_training", 0, "--mapping", "full")
    assert back.code == 2
    assert "was trained with --mapping compact, not full" in back.err


def test_a_checkpoint_of_another_llm_is_refused(run, flags, tiny_llm):
    run(*flags)
    done = run(*flags, "--is_training", 0, "--llm_model_path", tiny_llm("llama"))
    assert done.code == 2
    assert "another LLM" in done.err


@pytest.mark.parametrize(("eval_steps", "which"), [(1, "validation"), (3, "training")])
def test_a_loss_that_is_not_finite_stops_the_run(run, flags, eval_steps, which):
    done = run(*flags, "--eval_steps", eval_steps, "--max_steps", 50, "--learning_rate", 1e25)
    assert done.code == 2
    assert re.search(rf"error: the {which} loss is (nan|inf) after {eval_steps} steps .*--learning_rate", done.err)
    assert done.err.count("\n") == 1
    assert "no checkpoint of this run" in done.err


def test_a_loss_that_is_not_finite_between_validations_is_found_at_the_next_report(run, flags):
    done = run(*flags, "--batch_size", 2, "--max_steps", 150, "--eval_steps", 150, "--learning_rate", 1e25)
    assert "the training loss is nan after 99 steps" in done.err


def test_the_best_checkpoint_survives_a_loss_that_is_not_finite(run, flags, monkeypatch):
    monkeypatch.setattr(
        "utils.training.optimization.rate_of_epoch", lambda name, rate, epoch: rate if epoch == 1 else 1e25
    )
    flags = [*flags, "--max_steps", 0, "--percent", 20, "--batch_size", 100, "--train_epochs", 3]
    done = run(*flags)
    assert done.code == 2
    assert "the best checkpoint is kept" in done.err
    (row,) = done.history()
    assert run(*flags, "--is_training", 0).metrics()["mse"] == pytest.approx(float(row["test_loss"]))


def test_a_second_run_keeps_the_files_of_the_first(run, flags):
    first = run(*flags).metrics()
    done = run(*flags, "--learning_rate", 1e25)
    assert done.code == 2
    names = set(names_in(done.folder))
    assert names == {
        "args.json",
        "history.csv",
        *(f"{n}.old" for n in ("args.json", "history.csv", "last", "metrics.json", "checkpoint")),
        *(f"{n}.png.old" for n in ("errors", "history")),
    }
    kept = json.loads((done.folder / "metrics.json.old").read_text(encoding="utf-8"))
    assert kept["mse"] == first["mse"]
    assert "train first" in run(*flags, "--is_training", 0).err


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_every_kind_of_llm_trains(run, flags, tiny_llm, family):
    done = run(*flags, "--llm_model_path", tiny_llm(family), "--llm_layers", 1, "--eval_windows", 7)
    assert done.code == 0
    assert f"LLM: {family}, 1 of 2 layers" in done.out


def test_four_bit_right_padding_and_mixed_precision_train(run, flags, monkeypatch):
    precisions = set()
    forward = Qwen2MLP.forward

    def remember(self, hidden):
        precisions.add((torch.is_autocast_enabled("cpu"), hidden.dtype, (result := forward(self, hidden)).dtype))
        return result

    monkeypatch.setattr(Qwen2MLP, "forward", remember)
    plain = run(*flags, "--eval_windows", 7).metrics()["mse"]
    done = run(*flags, "--eval_windows", 7, "--use_amp")
    assert done.metrics()["mse"] != plain, "the layers around the LLM compute in half precision"
    assert precisions == {(False, torch.float32, torch.float32)}, "the LLM does not"
    done = run(*flags, "--load_in_4bit", "--prompt_padding", "right", "--use_amp", "--eval_windows", 7)
    assert done.code == 0
    assert "NF4" in done.out
    # And the precision of one call does not stick to the next.
    assert run(*flags, "--eval_windows", 7).code == 0


def test_a_cache_that_cannot_be_trusted_is_said(run, flags, monkeypatch):
    monkeypatch.setattr("layers.FrozenLLM._allclose", lambda one, other: len(one) == 1)
    done = run(*flags, "--eval_windows", 7)
    assert done.code == 0
    assert "No prefix cache (it gives other hidden states)" in done.out


def test_a_table_that_a_viewer_keeps_locked_costs_a_record_and_nothing_else(run, flags, monkeypatch):
    """As Excel does under Windows; it is let go before the last validation."""
    validations, rename = [], files.rename

    def locked(unfinished, path):
        if path.name == "checkpoint":
            validations.append(path)
        if path.name == "history.csv" and len(validations) < 2:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        rename(unfinished, path)

    monkeypatch.setattr(files, "rename", locked)
    done = run(*flags, "--eval_steps", 2, "--learning_rate", 1e-3)
    assert done.code == 0, done.err
    assert done.out.count("Warning: cannot write ") == 1 and "history.csv" in done.out
    assert {"checkpoint", "last", "metrics.json"} <= {file.name for file in done.folder.iterdir()}
    assert [row["steps"] for row in done.history()] == ["2", "4"]


def test_the_weights_are_safe_before_the_record_is_written(run, flags, monkeypatch):
    class PowerCut(BaseException):
        pass

    def cut(*_args, **_row):
        raise PowerCut

    monkeypatch.setattr(records.History, "add", cut)
    with pytest.raises(PowerCut):
        run(*flags)
    (folder,) = Path("checkpoints").iterdir()
    assert torch.load(folder / "checkpoint", weights_only=True)["progress"]["steps"] == 4


def test_the_state_of_the_map_is_on_record(run, flags):
    rows = run(*flags, "--max_steps", 10, "--eval_steps", 1, "--skip_epoch_test").history()
    entropies, sizes = ([float(row[name]) for row in rows] for name in ("attention_entropy", "prototype_rms"))
    assert all(0 < entropy < math.log(1000) for entropy in entropies) and entropies[-1] < entropies[0]
    assert sizes[-1] > sizes[0] > 0
    (row,) = run(*flags, "--model", "LastValue", "--des", "naive").folders[0].glob("history.csv")
    assert row.read_text(encoding="utf-8").splitlines()[1].endswith(",,")


def test_the_map_can_have_a_rate_of_its_own(run, flags):
    for share in ("1", "0.01"):
        run(*flags, "--mapping_rate", share, "--des", share.replace(".", "_"), "--max_steps", 1)
    moved = {}
    for folder in Path("checkpoints").iterdir():
        contents = torch.load(folder / "last", weights_only=True)
        moved[contents["flags"]["mapping_rate"]] = [
            group["lr"] for group in contents["training"]["optimizer"]["param_groups"]
        ]
    assert moved == {1.0: [0.01], 0.01: [0.01, pytest.approx(1e-4)]}
    done = run(*flags, "--mapping_rate", "0.01", "--des", "0_01", "--max_steps", 2, "--resume")
    assert done.code == 0, done.err
    refused = run(*flags, "--mapping_rate", "0.5", "--des", "0_01", "--max_steps", 2, "--resume")
    assert "--mapping_rate 0.01, not 0.5" in refused.err


def test_the_line_has_a_rate_of_its_own(run, flags):
    flags = [*flags, "--residual", "linear", "--max_steps", 1]
    rates = {}
    for number, more in enumerate(([], ["--residual_rate", "1"], ["--residual_rate", "0.5", "--mapping_rate", "0.1"])):
        run(*flags, *more, "--des", str(number))
        (folder,) = Path("checkpoints").glob(f"*_{number}_0-none")
        groups = torch.load(folder / "last", weights_only=True)["training"]["optimizer"]["param_groups"]
        rates[number] = [(group["lr"], len(group["params"])) for group in groups]
    small = 15  # tensors: a patch's, four layers of the reprogramming, the map, the head, the line
    assert rates[0] == [(0.01, small - 2), (pytest.approx(1e-4), 2)]
    assert rates[1] == [(0.01, small)]
    assert rates[2] == [(0.01, small - 4), (pytest.approx(1e-3), 2), (pytest.approx(5e-3), 2)]


def test_the_test_at_the_end_can_take_other_windows(run, flags):
    flags = [*flags, "--eval_windows", 14, "--skip_epoch_test"]
    done = run(*flags, "--test_windows", 28)
    assert "| 28 windows of " in done.out and done.metrics()["eval_windows"] == 28
    again = run(*flags, "--is_training", 0)
    assert again.metrics()["windows"] == 14
    everything = run(*flags, "--is_training", 0, "--test_windows", 0)
    assert everything.metrics()["windows"] > 500 and everything.metrics()["eval_windows"] == 0
    alone = run(*flags, "--is_training", 0, "--eval_windows", 0)
    assert everything.metrics()["mse"] == alone.metrics()["mse"]


def test_errors_are_told_in_the_units_of_the_csv(run, flags, csv_folder):
    flags = [*flags, "--model", "SeasonalNaive", "--eval_windows", 0]
    metrics = run(*flags).metrics()
    frame = pd.read_csv(csv_folder / "small.csv")
    squares, sizes, unit = [], [], {}
    for name, scores in metrics["per_channel"].items():
        values = frame[name].to_numpy()
        windows = np.lib.stride_tricks.sliding_window_view(values[320 - 24 :], 24 + 8)  # 80 test rows
        forecast, target = windows[:, :8], windows[:, 24:]
        unit[name] = np.abs(values[24:280] - values[: 280 - 24]).mean()  # of the training rows
        assert scores["rmse"] == pytest.approx(np.sqrt(np.square(forecast - target).mean()), rel=1e-5)
        assert scores["mase"] == pytest.approx(np.abs(forecast - target).mean() / unit[name], rel=1e-5)
        smape = (200 * np.abs(forecast - target) / (np.abs(forecast) + np.abs(target))).mean()
        assert scores["smape"] == pytest.approx(smape, rel=1e-4)
        squares.append(np.square((forecast - target) / values[:280].std()))
        sizes.append(scores["windows"])
    channels = metrics["per_channel"].values()
    for name in ("mase", "smape"):
        assert metrics[name] == pytest.approx(np.average([one[name] for one in channels], weights=sizes))
    assert metrics["rmse"] == pytest.approx(np.sqrt(np.average([one["rmse"] ** 2 for one in channels], weights=sizes)))
    assert metrics["mse_by_step"] == pytest.approx(np.concatenate(squares).mean(0).tolist(), rel=1e-5)

    of_target = run(*flags, "--features", "MS", "--des", "ms").folders
    scores = json.loads(next(f for f in of_target if "_ftMS_" in f.name).joinpath("metrics.json").read_text("utf-8"))
    for name in ("mase", "smape", "rmse", "mse"):
        assert scores[name] == pytest.approx(metrics["per_channel"]["OT"][name])
    assert scores["mse_by_step"] == pytest.approx(squares[-1].mean(0).tolist(), rel=1e-5)


def test_a_channel_that_does_not_change_has_no_mase(run, flags, csv_folder, tmp_path):
    frame = pd.read_csv(csv_folder / "small.csv").assign(OT=[1.0] * 300 + list(range(100)))
    frame.to_csv(tmp_path / "flat.csv", index=False)
    words = [*flags, "--model", "LastValue", "--root_path", tmp_path, "--data_path", "flat.csv"]
    metrics = run(*words).metrics()
    assert metrics["mase"] is None and metrics["per_channel"]["OT"]["mase"] is None
    assert metrics["per_channel"]["HUFL"]["mase"] > 0


def test_a_one_cycle_of_which_a_fifth_is_one_step(run, flags):
    assert run(*flags, "--lradj", "TST", "--max_steps", 5).code == 0


def test_bitsandbytes_is_not_needed_where_nothing_is_in_4_bits(run, flags, monkeypatch):
    def version(package):
        if package == "bitsandbytes":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(records, "version", version)
    done = run(*flags)
    assert done.code == 0
    assert json.loads((done.folder / "args.json").read_text(encoding="utf-8"))["versions"]["bitsandbytes"] is None


def test_what_a_checkpoint_knows_is_not_worked_out_again(run, flags, monkeypatch):
    trained = run(*flags).metrics()

    def work_out(words):
        assert words.is_meta, "worked out again, and not for the memory plan"
        return torch.empty(words.shape[1], words.shape[1], device="meta")

    monkeypatch.setattr(Reprogramming, "_compute_basis", work_out)
    assert run(*flags, "--is_training", 0).metrics()["mse"] == trained["mse"]
    assert run(*flags, "--is_training", 0, "--predict").code == 0
    assert run(*flags, "--resume").code == 0


@pytest.mark.parametrize("more", [[], ["--predict"]])
def test_a_checkpoint_of_another_forecaster_is_refused(run, flags, more):
    trained = run(*flags).folder
    done = run(*flags, "--is_training", 0, "--model", "DLinear", "--checkpoint", trained, *more)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "was trained with --model TimeLLM, not DLinear" in done.err


def test_a_flag_of_another_forecaster_does_not_matter(run, flags):
    flags = [*flags, "--model", "DLinear"]
    trained = run(*flags).metrics()["mse"]
    done = run(*flags, "--is_training", 0, "--mapping", "full")
    assert (done.code, done.err) == (0, "")
    assert done.metrics()["mse"] == trained


def test_a_table_that_stays_locked_is_said_at_the_end(run, flags, monkeypatch):
    rename = files.rename

    def locked(unfinished, path):
        if path.name == "history.csv":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        rename(unfinished, path)

    monkeypatch.setattr(files, "rename", locked)
    done = run(*flags)
    assert done.code == 0, done.err
    assert "history.csv lacks the last rows" in done.out


def test_of_an_earlier_run_all_files_are_kept_or_none(run, flags, monkeypatch):
    first = run(*flags)
    before, replace = names_in(first.folder), Path.replace

    def locked(path, target):
        if path.name == "history.csv":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", locked)
    refused = run(*flags)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "history.csv: Permission denied: close what has it open" in refused.err
    assert names_in(first.folder) == before


def test_training_lowers_the_loss(run, flags):
    done = run(*flags, "--max_steps", 30, "--eval_steps", 10, "--skip_epoch_test")
    first, *_, last = (float(row["train_loss"]) for row in done.history())
    assert last < 0.8 * first


def test_the_absolute_loss_is_another(run, flags):
    squared, absolute = (run(*flags, "--loss", loss).history()[0]["train_loss"] for loss in ("MSE", "MAE"))
    assert squared != absolute


def test_paths_with_spaces_and_chinese_characters(run, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("我的 数据")
    write_demo_csv(folder / "油 温.csv", rows=400)
    llm = make_tiny_llm("qwen2", folder / "小 模型")
    runs = folder / "运 行"
    done = run(
        *flags,
        *("--root_path", folder, "--data_path", "油 温.csv", "--llm_model_path", llm, "--checkpoints", runs),
        *("--model_id", "油温", "--eval_windows", 7),
    )
    assert (done.code, done.err) == (0, "")
    (left,) = Path(runs).iterdir()
    assert (left / "metrics.json").is_file()


def test_importing_starts_nothing():
    code = "import run_main, sys; print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_demo_needs_nothing_and_other_flags_count(run):
    demo = ["--demo", "--max_steps", "2", "--eval_windows", "14", "--batch_size", "4", "--model_comment", "mine"]
    done = run(*demo)
    assert (done.code, done.err) == (0, "")
    assert done.folder.name.endswith("-mine")
    assert Path("dataset/demo.csv").is_file()
    assert Path("base_models/tiny-qwen2/config.json").is_file()
    trained = done.metrics()["mse"]
    assert run(*demo, "--is_training", "0").metrics()["mse"] == trained


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        ("utils.training.trainer.Trainer.fit", "there is no state to resume from yet"),
        (
            "utils.training.testing.write_metrics",
            "the state is saved, the same command with --resume goes on from there",
        ),
    ],
)
def test_ctrl_c_leaves_with_130_and_a_line(run, flags, monkeypatch, where, hint):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    done = run(*flags)
    assert (done.code, done.err) == (130, f"interrupted: {hint}\n")


def test_a_refused_test_writes_nothing(run, flags):
    trained = run(*flags).folder
    done = run(*flags, "--is_training", 0, "--checkpoint", trained, "--model_id", "zs", "--d_model", 16)
    assert done.code == 2
    assert done.folders == [trained]


def test_processes_that_do_not_know_of_each_other_are_refused(assert_refused, flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(flags, "2 processes", "accelerate launch")


def test_the_last_group_of_batches_counts_in_full(run, flags):
    """Three batches, two of them a group: the third makes a step as long as if it were alone."""
    flags = [*flags, "--percent", 20, "--batch_size", 90, "--max_steps", 0, "--dropout", 0, "--grad_clip", 1e9]
    norms = []
    with pytest.MonkeyPatch.context() as patch:
        clip = torch.nn.utils.clip_grad_norm_
        patch.setattr(
            torch.nn.utils, "clip_grad_norm_", lambda *args, **more: norms.append(clip(*args, **more)) or norms[-1]
        )
        run(*flags, "--grad_accum", 2, "--learning_rate", 1e-12)
        run(*flags, "--grad_accum", 1, "--learning_rate", 1e-12)
    grouped, single = norms[:2], norms[2:]
    assert len(single) == 3
    assert grouped[1].item() == pytest.approx(single[2].item(), rel=1e-4)
