"""Whatever a user gets wrong: exit code 2, one line that names it, nothing written."""

import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import names_in
from utils.cli import checks

GOOD = "date,a,b\n" + "".join(f"2024-01-{1 + h // 24:02} {h % 24:02}:00:00,{h % 7},{h % 5}\n" for h in range(400))


LONG = "unique_id,ds,y\n" + "".join(
    f"{name},2024-01-{1 + h // 24:02} {h % 24:02}:00:00,{h % 7}\n" for name in ("p", "q") for h in range(400)
)


def edited(old, new, count=1):
    return GOOD.replace(old, new, count)


# name, the CSV's contents, words of the message
WRONG_CSVS = [
    ("empty", b"", "not a CSV"),
    ("header only", b"date,a,b\n", "data rows"),
    ("date alone", "".join(line.split(",")[0] + "\n" for line in GOOD.splitlines()), "nothing to forecast"),
    ("no date column", re.sub("^[^,]*", "x", GOOD, flags=re.MULTILINE), "no column 'date'"),
    ("UTF-16", GOOD.encode("utf-16"), "UTF-16"),
    ("GBK", edited("a,b", "温度,油温").encode("gbk"), "GBK"),
    ("binary", bytes(range(256)) * 50, "is not"),
    ("a zip", b"PK\x03\x04" + bytes(100), "no column 'date'"),
    ("text in a cell", edited(",3,", ",three,"), "'three' is not a finite number"),
    ("a column without a number", GOOD.replace("date,a,b", "date,a,b,c").replace("\n2", ",\n2"), "'c' holds no number"),
    ("infinity", edited(",3,", ",inf,"), "not a finite number"),
    ("a decimal comma", edited(",3,", ',"3,5",'), "'3,5' is not a finite number"),
    ("too many cells", edited(",3,3", ",3,3,9"), "not a CSV"),
    ("more cells than names", edited("date,a,b", "date,a"), "more cells than its header"),
    ("a first date that is none", edited("2024-01-01 00", "the first 00"), "is not a date"),
    ("dates of no one format", "date,a\n1/2/24 9am,1\n2/2/24 9am,2\n13/2/24 9am,3\n", "not a date in a common format"),
    ("a date that is none", edited("2024-01-01 05", "2024-13-01 05"), "is not a date"),
    ("numbers as dates", "date,a\n" + "".join(f"{row},{row % 9}\n" for row in range(400)), "are not dates"),
    ("unsorted", edited("2024-01-02 05", "2024-01-01 05"), "is before the row above it"),
    ("offsets from UTC that change", edited("05:00:00", "05:00:00+02:00"), "column 'date'"),
    ("too short", "\n".join(GOOD.splitlines()[:60]) + "\n", "too short"),
    ("one row", "\n".join(GOOD.splitlines()[:2]) + "\n", "data rows"),
    ("a huge number after the training rows", GOOD.rstrip()[:-1] + "1e300\n", "too far from"),
    ("a huge number in the training rows", edited(",3,", ",1e200,"), "too large to be a reading"),
    ("beyond float64", edited(",3,", ",1e999,"), "not a finite number"),
    ("long: a date twice", LONG.replace("01-02 05", "01-02 04", 1), "series 'p': 2024-01-02 04:00:00 occurs twice"),
    ("long: a date twice, apart", LONG.replace("01-02 05", "01-01 05", 1), "series 'p': 2024-01-01 05:00:00 occurs"),
    ("long: a series of text", LONG.replace(",3\n", ",three\n"), "'three' is not a finite number"),
    ("long: no name", LONG.replace("q,", ",", 1), "'unique_id' is empty"),
    ("long: a row a series", LONG.splitlines()[0] + "\na,2024-01-01,1\nb,2024-01-01,1\n", "none of 2 series"),
    ("long: steps that differ", LONG + "".join(f"r,20{y}-01-01,1\n" for y in range(10, 99)), "different steps"),
    ("long: a huge number", LONG.rstrip() + "1e300\n", "too far from"),
]


@pytest.mark.parametrize(("contents", "words"), [case[1:] for case in WRONG_CSVS], ids=[case[0] for case in WRONG_CSVS])
def test_a_wrong_csv(assert_refused, flags, tmp_path_factory, recwarn, contents, words):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "small.csv").write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    assert_refused([*flags, "--root_path", folder], "small.csv", words)
    assert not [warning.message for warning in recwarn if warning.category is UserWarning]


# flags, words of the message
WRONG_FLAGS = [
    (["--data", "ETTh9"], "ETTh9"),
    (["--data_path", "missing.csv"], "missing.csv"),
    (["--root_path", "no such folder"], "no such folder"),
    (["--seq_len", "0"], "--seq_len 0"),
    (["--seq_len", "abc"], "--seq_len"),
    (["--seq_len", "100000"], "too short"),
    (["--pred_len", "0"], "--pred_len 0"),
    (["--pred_len", "-5"], "--pred_len -5"),
    (["--pred_len", "300"], "too short"),
    (["--label_len", "49"], "--label_len 49"),
    (["--patch_len", "49"], "shorter than one patch"),
    (["--stride", "0"], "--stride 0"),
    (["--d_model", "0"], "--d_model 0"),
    (["--d_ff", "65"], "--d_ff 65"),
    (["--n_heads", "0"], "--n_heads 0"),
    (["--dropout", "1"], "--dropout 1.0"),
    (["--mapping_rate", "0"], "--mapping_rate 0.0"),
    (["--mapping_rate", "inf"], "--mapping_rate inf"),
    (["--residual", "cubic"], "--residual"),
    (["--residual_rate", "-1"], "--residual_rate -1.0"),
    (["--series", "p"], "--series p"),
    (["--covariates", "price"], "no column 'price' for --covariates"),
    (["--covariates", "date"], "--covariates date"),
    (["--covariates", "HUFL, HUFL"], "names HUFL twice"),
    (["--covariates", "HUFL", "--predict"], "rows after the last known one"),
    (["--residual_rate", "nan"], "--residual_rate nan"),
    (["--test_windows", "-2"], "--test_windows -2"),
    (["--e_layers", "0"], "--e_layers 0"),
    (["--level", "-5"], "--level -5"),
    (["--level", "high"], "--level"),
    (["--level"], "--level"),
    (["--report_to", "wandb"], "--report_to"),
    (["--model", "PatchTST", "--patch_len", "49"], "shorter than one patch"),
    (["--batch_size", "0"], "--batch_size 0"),
    (["--eval_batch_size", "-1"], "--eval_batch_size -1"),
    (["--learning_rate", "0"], "--learning_rate 0.0"),
    (["--learning_rate", "nan"], "--learning_rate nan"),
    (["--train_epochs", "0"], "--train_epochs 0"),
    (["--patience", "0"], "--patience 0"),
    (["--percent", "0"], "--percent 0"),
    (["--percent", "101"], "--percent 101"),
    (["--percent", "1"], "too short"),
    (["--itr", "0"], "--itr 0"),
    (["--seed", "-1"], "--seed -1"),
    (["--grad_accum", "0"], "--grad_accum 0"),
    (["--grad_clip", "-1"], "--grad_clip -1.0"),
    (["--max_steps", "-1"], "--max_steps -1"),
    (["--save_steps", "-1"], "--save_steps -1"),
    (["--loss", "huber"], "huber"),
    (["--lradj", "type9"], "type9"),
    (["--optimizer", "sgd"], "sgd"),
    (["--features", "X"], "--features"),
    (["--features", "S", "--target", "none"], "no column 'none'"),
    (["--freq", "fortnight"], "--freq 'fortnight'"),
    (["--model", "Informer"], "Informer"),
    (["--model_id", "a/b"], "--model_id"),
    (["--des", "x" * 300], "shorten"),
    (["--prompt_decimals", "-2"], "--prompt_decimals -2"),
    (["--prompt_file", "missing.txt"], "--prompt_file"),
    (["--llm_model_path", "./no such model"], "no such model"),
    (["--llm_layers", "0"], "--llm_layers 0"),
    (["--llm_layers", "3"], "at most 2"),
    (["--llm_dim", "7"], "--llm_dim 7"),
    (["--llm_dtype", "int8"], "int8"),
    (["--is_training", "2"], "--is_training"),
    (["--is_training", "0"], "train first"),
    (["--is_training", "0", "--checkpoint", "nowhere"], "nowhere"),
    (["--checkpoint", "somewhere"], "--is_training 0"),
    (["--resume"], "--resume auto"),
    (["--resume", "maybe"], "--resume"),
    (["--batchsize", "3"], "did you mean --batch_size"),
    (["--checkpoints", __file__], "is a file"),
]


@pytest.mark.parametrize(("extra", "words"), WRONG_FLAGS, ids=lambda value: " ".join(value)[:40] if value else "")
def test_wrong_flags(assert_refused, flags, extra, words):
    keep = [word for word in flags if word != "Demo.  "] if "--prompt_file" in extra else flags
    if "--prompt_file" in extra:
        keep = [word for word in keep if word != "--content"]
    assert_refused([*keep, *extra], words)


def test_prompt_files_that_are_not_utf8(assert_refused, flags, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompt") / "about.txt"
    path.write_bytes("油温".encode("gbk"))
    keep = [word for word in flags if word not in ("--content", "Demo.  ")]
    assert_refused([*keep, "--prompt_file", path], "about.txt is not UTF-8")


def sharded(folder, tiny_llm):
    from transformers import AutoModel

    shutil.copytree(tiny_llm("qwen2"), folder)
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_model_folders_with_a_missing_or_truncated_shard(assert_refused, flags, tiny_llm, tmp_path_factory):
    for number, damage in enumerate(
        (
            lambda shards: shards[1].unlink(),
            lambda shards: shards[1].write_bytes(shards[1].read_bytes()[:-50]),
            lambda shards: shards[0].write_bytes(b""),
            lambda shards: shards[0].write_bytes(b"\xff" * 64),
        )
    ):
        folder = tmp_path_factory.mktemp("shards") / str(number)
        damage(sharded(folder, tiny_llm))
        assert_refused([*flags, "--llm_model_path", folder], str(folder))


def test_checkpoints_that_are_none(run, flags):
    trained = run(*flags)
    path = trained.folder / "checkpoint"
    whole = path.read_bytes()
    others = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "a pickle": b"cos\nsystem\n(S'touch ran'\ntR.",
        "json": json.dumps({"format": 1}).encode(),
    }
    for contents in others.values():
        path.write_bytes(contents)
        refused = run(*flags, "--is_training", "0")
        assert refused.code == 2 and refused.err.count("\n") == 1 and "damaged or not a checkpoint" in refused.err
    torch.save({"format": 1, "weights": {}}, path)
    assert "not a checkpoint of this program" in run(*flags, "--is_training", "0").err


def test_data_that_is_odd_but_usable_gets_a_warning(run, flags, tmp_path):
    constant = np.full(400, 7)
    rows = [f"2024-01-{1 + h // 24:02} {h % 24:02}:00:00,{h % 7},{constant[h]}" for h in range(400)]
    rows[20] = rows[20].replace("20:00:00", "19:00:00")  # twice the same hour, then a gap
    (tmp_path / "small.csv").write_text("\n".join(["date,a,b", *rows]) + "\n", encoding="utf-8-sig")
    done = run(*flags, "--root_path", tmp_path)
    assert done.code == 0, done.err
    warnings = [line for line in done.out.splitlines() if line.startswith("Warning: ")]
    assert len(warnings) == 3
    assert "1 rows have the date of the row above them, data row 21 first" in warnings[0]
    assert "1 gaps in the dates, before data row 22 first" in warnings[1]
    assert "constant in the training rows, so not scaled: b" in warnings[2]


@pytest.mark.parametrize(
    "name", ["with spaces in it", "数据集", "ümlaut & more", *(["back\\slash"] if os.sep == "/" else [])]
)
def test_paths_of_any_characters(run, flags, csv_folder, tiny_llm, tmp_path, name):
    for part in ("data", "llm"):
        (tmp_path / part).mkdir()
    data = shutil.copytree(csv_folder, tmp_path / "data" / name)
    llm = shutil.copytree(tiny_llm("qwen2"), tmp_path / "llm" / name)
    (data / "small.csv").rename(data / f"{name}.csv")
    done = run(
        *flags,
        *("--root_path", data, "--data_path", f"{name}.csv", "--llm_model_path", llm),
        *("--checkpoints", tmp_path / "checkpoints" / name),
    )
    assert done.code == 0, done.err


@pytest.mark.parametrize("encoding", ["ascii", "cp936", "cp1252"])
def test_a_console_that_lacks_letters_ends_no_run(run, flags, csv_folder, tmp_path, monkeypatch, encoding):
    data = shutil.copytree(csv_folder, tmp_path / "数据 ü")
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        more = ["--model", "DLinear", "--predict", "--checkpoints", tmp_path / "检查点 한"]
        done = run(*flags, "--root_path", data, *more)
    assert (done.code, done.err) == (0, "")
    assert "forecast.csv" in console.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("change", ["grown", "gone"])
def test_a_csv_that_changes_while_it_is_read(assert_refused, flags, tmp_path_factory, monkeypatch, change):
    path, read = tmp_path_factory.mktemp("changing") / "live.csv", pd.read_csv
    path.write_text(GOOD, encoding="utf-8")

    def read_beside_a_writer(file, **options):
        frame = read(file, **options)
        if change == "grown":
            file.write_text(GOOD + "2024-01-18 00:00:00,1,", encoding="utf-8")
        else:
            file.unlink()
        return frame

    monkeypatch.setattr(pd, "read_csv", read_beside_a_writer)
    flags = [*flags, "--root_path", path.parent, "--data_path", path.name, "--model", "DLinear"]
    assert_refused(flags, "live.csv changed while it was read")


def test_a_path_that_windows_does_not_take(assert_refused, run, flags, monkeypatch):
    flags = [*flags, "--model", "DLinear", "--checkpoints", "c" * 120]
    if checks._takes_long_paths():  # this system does
        assert run(*flags).code == 0
        shutil.rmtree("c" * 120)
    monkeypatch.setattr(checks, "_takes_long_paths", lambda: False)
    assert_refused(flags, "259", "--checkpoints", "--des", "LongPathsEnabled")


def test_the_longest_path_that_windows_takes(run, flags, monkeypatch):
    flags = [*flags, "--model", "DLinear", "--des"]
    done = run(*flags, "test", "--level", "50", "--predict", "--save_predictions")
    longest = len(str(done.folder.absolute())) + max(map(len, names_in(done.folder))) + len("/.01234567.unfinished")
    monkeypatch.setattr(checks, "MAX_PATH", longest)
    monkeypatch.setattr(checks, "_takes_long_paths", lambda: False)
    assert run(*flags, "test").code == 0
    assert run(*flags, "test", "--checkpoints", "elsewhere/../checkpoints").code == 0
    for more in (["tests"], ["test", "--report_to", "tensorboard"]):
        refused = run(*flags, *more)
        assert refused.code == 2 and "LongPathsEnabled" in refused.err
