import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Subset

from data_provider.data_factory import data_provider, load_series
from data_provider.windows import Spans, WindowDataset, WindowSizes, evenly_spaced
from dataset.demo import demo_frame
from tests.conftest import SHARED, needs_shared
from utils.cli.options import get_parser

CASES = SHARED / "golden" / "data"


@needs_shared("golden", "data")
@needs_shared("ETT-small")
@pytest.mark.parametrize("number", range(4))
def test_windows_equal_those_of_time_llm(number):
    case = json.loads((CASES / "cases.json").read_text(encoding="utf-8"))[number]
    gold = np.load(CASES / f"case{number}.npz")
    args = get_parser().parse_args(
        [
            *("--data", case["data"], "--root_path", str(SHARED / "ETT-small")),
            *("--seq_len", str(case["seq"]), "--label_len", str(case["lab"]), "--pred_len", str(case["pred"])),
            *("--features", case.get("features", "M"), "--freq", case.get("freq", "h")),
            *("--percent", str(case.get("percent", 100))),
            *("--embed", "timeF" if case.get("timeenc", 1) else "fixed"),
        ]
    )
    scaler = load_series(args).scaler
    np.testing.assert_allclose(scaler.mean_, gold["mean"], rtol=1e-12)
    np.testing.assert_allclose(scaler.scale_, gold["std"], rtol=1e-12)
    for split, length in case["lengths"].items():
        dataset, _ = data_provider(args, split)
        assert len(dataset) == length
        for row, index in enumerate(gold[f"{split}_index"]):
            for part, name in zip(dataset[int(index)], ("x", "y", "x_mark", "y_mark"), strict=True):
                np.testing.assert_allclose(part, gold[f"{split}_{name}"][row], atol=1e-6, err_msg=f"{split} {name}")


def write(folder, rows=100, **columns):
    """Write rows of the channels a, b, OT, c, each counting from a base of its own."""
    frame = pd.DataFrame({"date": pd.date_range("2024-02-27", periods=rows, freq="h")})
    for base, name in enumerate(("a", "b", "OT", "c")):
        frame[name] = np.arange(rows) + 1000.0 * base
    frame = frame.assign(**columns)
    frame.to_csv(folder / "custom.csv", index=False)
    return frame


def options(folder, *more):
    command = ["--data", "custom", "--root_path", str(folder), "--seq_len", "16", "--label_len", "4", "--pred_len", "3"]
    return get_parser().parse_args([*command, *more])


def in_csv_units(args, window):
    """Undo the scaling of one channel's window; channels differ by 1000, so the base tells the channel."""
    series = load_series(args)
    return [window * scale + mean for mean, scale in zip(series.scaler.mean_, series.scaler.scale_, strict=True)]


def test_custom_is_split_70_10_20_with_the_target_last(tmp_path):
    write(tmp_path)
    args = options(tmp_path)
    series = load_series(args)
    assert series.channels == ("a", "b", "c", "OT")
    assert series.ends.tolist() == [[70, 80, 100]] * 4
    lengths = {split: len(data_provider(args, split)[0]) for split in ("train", "val", "test")}
    assert lengths == {"train": 4 * (70 - 18), "val": 4 * (26 - 18), "test": 4 * (36 - 18)}


def test_first_forecast_of_a_split_is_of_its_first_row(tmp_path):
    write(tmp_path)
    args = options(tmp_path)
    for split, first_row in (("train", 16), ("val", 70), ("test", 80)):
        seq_x, seq_y, *_ = data_provider(args, split)[0][0]
        np.testing.assert_allclose(in_csv_units(args, seq_x)[0][:, 0], np.arange(first_row - 16, first_row), atol=1e-4)
        np.testing.assert_allclose(
            in_csv_units(args, seq_y)[0][:, 0], np.arange(first_row - 4, first_row + 3), atol=1e-4
        )


def test_scaler_has_seen_the_training_rows_alone(tmp_path):
    frame = write(tmp_path)
    frame.loc[70:, "a"] = 1e6
    frame.to_csv(tmp_path / "custom.csv", index=False)
    scaler = load_series(options(tmp_path)).scaler
    assert scaler.mean_[0] == pytest.approx(np.arange(70).mean())
    assert scaler.scale_[0] == pytest.approx(StandardScaler().fit(np.arange(70)[:, None]).scale_[0])


def test_percent_shortens_the_training_split_alone(tmp_path):
    write(tmp_path)
    few, all_ = options(tmp_path, "--percent", "50"), options(tmp_path)
    assert len(data_provider(few, "train")[0]) == 4 * ((70 - 16) * 50 // 100 + 16 - 18)
    assert len(data_provider(few, "test")[0]) == len(data_provider(all_, "test")[0])
    assert load_series(few).scaler.mean_.tolist() == load_series(all_).scaler.mean_.tolist()


def test_features_s_is_the_target_alone_and_ms_is_every_channel(tmp_path):
    write(tmp_path)
    assert load_series(options(tmp_path, "--features", "S", "--target", "b")).channels == ("b",)
    assert load_series(options(tmp_path, "--features", "MS", "--target", "b")).channels == ("a", "OT", "c", "b")


def test_a_csv_without_ot_is_fine_where_no_target_is_asked_for(tmp_path):
    write(tmp_path).drop(columns="OT").to_csv(tmp_path / "custom.csv", index=False)
    assert load_series(options(tmp_path)).channels == ("a", "b", "c")


def test_a_batch_is_its_windows_one_by_one(tmp_path):
    write(tmp_path)
    dataset, _ = data_provider(options(tmp_path), "train")
    indices = [0, 51, 52, 207, 3]
    for part, batched in enumerate(dataset.__getitems__(indices)):
        one_by_one = np.stack([dataset[index][part] for index in indices])
        assert batched.dtype == torch.float32
        np.testing.assert_array_equal(batched.numpy(), one_by_one)
    assert dataset.channel_of(indices).tolist() == [0, 0, 1, 3, 0]
    np.testing.assert_array_equal(dataset[-1][0], dataset[207][0])
    with pytest.raises(IndexError):
        dataset[208]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_evaluation_loaders_give_every_window_once_in_order(tmp_path, workers):
    write(tmp_path)
    args = options(tmp_path, "--eval_batch_size", "7", "--num_workers", workers)
    dataset, loader = data_provider(args, "test")
    batches = list(loader)
    assert [len(batch[0]) for batch in batches] == [7] * 10 + [2]
    gathered = torch.cat([batch[0] for batch in batches])
    np.testing.assert_array_equal(gathered, np.stack([dataset[index][0] for index in range(len(dataset))]))


def test_training_loader_shuffles_and_drops_the_last_partial_batch(tmp_path):
    write(tmp_path)
    _, loader = data_provider(options(tmp_path, "--batch_size", "50"), "train")
    torch.manual_seed(0)
    batches = list(loader)
    assert [len(batch[0]) for batch in batches] == [50] * 4
    assert not torch.equal(batches[0][0][0], torch.from_numpy(loader.dataset[0][0]))
    _, loader = data_provider(options(tmp_path, "--batch_size", "500"), "train")
    assert [len(batch[0]) for batch in loader] == [208]


def test_eval_windows_are_evenly_spaced_over_all_channels(tmp_path):
    write(tmp_path)
    dataset, loader = data_provider(options(tmp_path, "--eval_windows", "8"), "test")
    assert isinstance(loader.dataset, Subset)
    assert loader.dataset.indices == [0, 10, 20, 30, 41, 51, 61, 71]
    assert set(dataset.channel_of(loader.dataset.indices)) == {0, 1, 2, 3}
    _, loader = data_provider(options(tmp_path, "--eval_windows", "72"), "test")
    assert loader.dataset is not None
    assert not isinstance(loader.dataset, Subset)


def test_evenly_spaced_has_first_and_last_and_no_double():
    assert evenly_spaced(5, 9).tolist() == [0, 1, 2, 3, 4]
    spaced = evenly_spaced(1000, 7)
    assert (spaced[0], spaced[-1], len(set(spaced))) == (0, 999, 7)


def test_windows_are_not_written_out_when_sent_to_a_worker(tmp_path):
    values, marks = np.zeros(70_000, np.float32), np.zeros((10_000, 4), np.float32)
    dataset = WindowDataset(values, values, marks, Spans.of_table(10_000, 7), "abcdefg", WindowSizes(500, 10, 100))
    dataset.__getitems__([0, 1])
    sent = len(pickle.dumps(dataset))
    assert values.nbytes + marks.nbytes < sent < values.nbytes + marks.nbytes + 2000


@pytest.mark.parametrize(
    ("make", "more", "words"),
    [
        (lambda f: f.drop(columns="date"), [], ["date"]),
        (lambda f: f.drop(columns="OT"), ["--features", "S"], ["OT", "--target"]),
        (lambda f: f, ["--target", "oil"], ["oil", "--target"]),
        (lambda f: f.assign(b=f.b.astype(object).where(f.index != 41, "x7")), [], ["row 42", "'b'", "x7"]),
        (lambda f: f.assign(b=np.nan), [], ["'b'", "no number"]),
        (lambda f: f.assign(b=f.b.where(f.index >= 70)), [], ["'b'", "no number in its training rows"]),
        (
            lambda f: f.set_index("date").where(np.tile(np.arange(100)[:, None] // 10 != 7, 4)).reset_index(),
            [],
            ["every cell of the val split is empty"],
        ),
        (lambda f: f.assign(b=f.b.where(f.index != 41, np.inf)), [], ["row 42", "'b'", "inf"]),
        (lambda f: f.assign(date=f.date.astype(str).where(f.index != 9, "soon")), [], ["row 10", "soon"]),
        (lambda f: f[["date"]], [], ["nothing to forecast"]),
        (lambda f: f.head(40), ["--seq_len", "26"], ["train split", "29 rows needed", "28 available"]),
        (lambda f: f.head(0), [], ["0 data rows"]),
        (lambda f: f, ["--data", "ETTh1", "--data_path", "custom.csv"], ["14400 rows needed", "100 available"]),
        (lambda f: f, ["--pred_len", "30"], ["val split", "46 rows needed", "26 available"]),
        (lambda f: f.assign(b=f.b.where(f.index != 90, 1e300)), [], ["row 91", "'b'", "1e+300"]),
        (
            lambda f: f.assign(
                date=[f"2024-03-31T{h:02}:00:00+0{1 + (h > 1)}:00" for h in range(24)] * 4 + ["2024-04-01"] * 4
            ),
            [],
            ["'date'"],
        ),
        (lambda f: f.set_axis(f["date"]).assign(date=1).rename_axis(None), [], ["date"]),
        (lambda f: f, ["--features", "MS", "--target", "a", "--eval_windows", "1"], ["--target a", "--eval_windows"]),
        (lambda f: f, ["--freq", "fortnight"], ["--freq", "fortnight"]),
    ],
)
def test_wrong_csvs_get_one_line(assert_refused, tmp_path_factory, tiny_llm, make, more, words):
    folder = tmp_path_factory.mktemp("wrong")
    make(write(folder)).to_csv(folder / "custom.csv", index=False)
    command = ["--data", "custom", "--root_path", str(folder), "--seq_len", "16", "--label_len", "4", "--pred_len", "3"]
    assert_refused([*command, "--llm_model_path", tiny_llm("qwen2"), *more], *words)


def test_an_empty_or_foreign_file_is_named(assert_refused, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    command = ["--data", "custom", "--root_path", str(folder)]
    (folder / "custom.csv").write_bytes(b"")
    assert_refused(command, "custom.csv", "not a CSV")
    (folder / "custom.csv").write_bytes("date,温度\n2024-01-01,1\n".encode("gbk"))
    assert_refused(command, "custom.csv", "UTF-8")
    (folder / "custom.csv").write_text("date,a\n2024-01-01,1,2\n2024-01-02,1,2\n", encoding="utf-8")
    assert_refused(command, "custom.csv", "more cells than its header")
    (folder / "custom.csv.gz").write_bytes(b"no archive")
    assert_refused([*command, "--data_path", "custom.csv.gz"], "custom.csv.gz", "not a CSV")


def test_midnight_may_be_written_without_a_time(tmp_path):
    frame = write(tmp_path)
    frame["date"] = frame["date"].dt.strftime("%Y-%m-%d %H:%M:%S").str.removesuffix(" 00:00:00")
    frame.to_csv(tmp_path / "custom.csv", index=False)
    assert load_series(options(tmp_path)).marks.shape == (100, 4)


def test_a_changed_file_is_read_again(tmp_path):
    demo_frame(rows=100).to_csv(tmp_path / "custom.csv", index=False)
    first = load_series(options(tmp_path))
    demo_frame(rows=120).to_csv(tmp_path / "custom.csv", index=False)
    assert len(load_series(options(tmp_path)).values) == 7 * 120
    assert len(first.values) == 7 * 100


@pytest.mark.parametrize(("embed", "mark"), [("timeF", 3 / 23 - 0.5), ("fixed", 3.0)])
def test_the_windows_to_come_end_with_the_csv(tmp_path, embed, mark):
    write(tmp_path, rows=99)  # until 2024-03-02 02:00
    args = options(tmp_path, "--embed", embed, "--eval_windows", "1")
    dataset, loader = data_provider(args, "pred")
    assert (len(dataset), len(loader.dataset)) == (4, 4), "one a channel, whatever --eval_windows"
    series = load_series(args)
    for number, item in enumerate(dataset[index] for index in range(4)):
        seq_x, seq_y, seq_x_mark, seq_y_mark = item
        assert (seq_x.shape, seq_y.shape) == ((16, 1), (7, 1))
        np.testing.assert_array_equal(seq_x[:, 0], series.values[series.table.rows_of(number)][-16:])
        np.testing.assert_array_equal(seq_y[:4, 0], series.values[series.table.rows_of(number)][-4:])
        assert np.isnan(seq_y[4:]).all(), "what is to come is not known"
        np.testing.assert_array_equal(seq_x_mark, series.marks[-16:])
        hour = 0 if embed == "timeF" else 3
        assert seq_y_mark[4, hour] == pytest.approx(mark)
    (batch,) = loader
    assert batch[0].shape == (4, 16, 1)
