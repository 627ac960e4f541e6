"""Empty cells of a CSV: what windows see, what is scored, what is said."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from data_provider.data_factory import data_provider, load_series
from data_provider.tables import fill
from data_provider.windows import Spans
from dataset.demo import demo_frame
from utils.cli.options import get_parser
from utils.training.evaluation import _errors
from utils.training.trainer import Trainer

NAN = np.nan


@pytest.fixture
def holes(tmp_path_factory):
    """Two channels of 20 rows, a counting on from 0 and b from 100, with gaps at every kind of place."""
    a, b = np.arange(20.0), np.arange(100.0, 120.0)
    a[[0, 1, 5, 13, 14, 19]] = NAN  # at the start, amid, across the border from training to validation, at the end
    b[[16]] = NAN
    folder = tmp_path_factory.mktemp("holes")
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=20, freq="h"), "a": a, "b": b})
    frame.to_csv(folder / "x.csv", index=False)
    return folder


def options(folder, *more):
    command = ["--data", "custom", "--root_path", str(folder), "--data_path", "x.csv"]
    return get_parser().parse_args([*command, "--seq_len", "4", "--label_len", "1", "--pred_len", "2", *more])


def in_units(series, channel, values):
    return (values * series.scaler.scale_[channel] + series.scaler.mean_[channel]).round(3)


def test_a_gap_takes_the_value_before_it_and_is_no_target(holes):
    args = options(holes)
    series = load_series(args)
    known = [2, 3, 4, 6, 7, 8, 9, 10, 11, 12]  # of the 14 training rows
    assert series.scaler.mean_[0] == pytest.approx(np.mean(known))
    assert series.scaler.scale_[0] == pytest.approx(np.std(known))
    expected = np.array([2, 2, 2, 3, 4, 4, 6, 7, 8, 9, 10, 11, 12, 12, 12, 15, 16, 17, 18, 18], float)
    np.testing.assert_array_equal(in_units(series, 0, series.values[series.table.rows_of(0)]), expected)
    unknown = np.isnan(series.targets)
    assert np.flatnonzero(unknown[:20]).tolist() == [0, 1, 5, 13, 14, 19]
    assert np.flatnonzero(unknown[20:]).tolist() == [16]
    seq_x, seq_y, *_ = data_provider(args, "train")[0][3]  # rows 3 to 6, then 7 and 8
    np.testing.assert_array_equal(in_units(series, 0, seq_x[:, 0]), [3, 4, 4, 6])
    np.testing.assert_array_equal(in_units(series, 0, seq_y[:, 0]), [6, 7, 8])
    _, seq_y, *_ = data_provider(args, "train")[0][8]  # rows 8 to 11, then 12 and 13
    np.testing.assert_array_equal(in_units(series, 0, seq_y[:, 0]), [11, 12, NAN])
    seq_x, seq_y, *_ = data_provider(args, "val")[0][0]  # rows 10 to 13, then 14 and 15
    np.testing.assert_array_equal(in_units(series, 0, seq_x[:, 0]), [10, 11, 12, 12])
    np.testing.assert_array_equal(in_units(series, 0, seq_y[:, 0]), [NAN, NAN, 15])


def test_no_gap_no_copy(tmp_path):
    demo_frame(rows=100).to_csv(tmp_path / "x.csv", index=False)
    series = load_series(options(tmp_path))
    assert series.targets is series.values
    assert not data_provider(options(tmp_path), "train")[0].has_gaps
    values = np.arange(5.0)
    assert fill(values, Spans.of_table(5, 1)) is values


def test_a_gap_is_not_filled_from_another_channel():
    values = np.array([1, 2, NAN, NAN, NAN, 5, NAN, 6, NAN, 7])
    spans = Spans(np.array([0, 3, 6]), np.array([3, 3, 4]), np.array([0, 3, 6]))
    assert fill(values, spans).tolist() == [1, 2, 2, 5, 5, 5, 6, 6, 6, 7]


def test_every_number_of_a_test_counts_what_is_known(run, holes):
    """LastValue repeats what it sees, so each error can be written down by hand."""
    flags = ["--data", "custom", "--root_path", holes, "--data_path", "x.csv", "--model", "LastValue", "--season", "2"]
    done = run(*flags, "--seq_len", "4", "--label_len", "1", "--pred_len", "2", "--save_predictions")
    assert done.code == 0, done.err
    warning = "7 of 40 cells are empty; longest gap in rows: a 2, b 1; 2 at the very beginning take the first value"
    assert f"Warning: {holes / 'x.csv'}: {warning}\n" in done.out
    metrics = done.metrics()
    # The test's four rows are 16 to 19: its windows forecast 16 and 17, 17 and 18, 18 and 19. What a window sees last
    # is 15, 16 and 17 of a; 115, then 115 again for the gap, then 117 of b.
    a, b = [(1, 2), (1, 2), (1, None)], [(None, 2), (2, 3), (1, 2)]
    known = {name: [e for pair in errors for e in pair if e is not None] for name, errors in (("a", a), ("b", b))}
    scales = dict(zip(("a", "b"), load_series(options(holes)).scaler.scale_, strict=True))
    for name, errors in known.items():
        own = metrics["per_channel"][name]
        assert own["known"] == len(errors) == 5 and own["windows"] == 3
        assert own["mse"] == pytest.approx(np.mean(np.square(errors)) / scales[name] ** 2)
        assert own["mae"] == pytest.approx(np.mean(errors) / scales[name])
        assert own["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
        # Training rows two apart differ by 2 wherever both are known.
        assert own["mase"] == pytest.approx(np.mean(errors) / 2)
    scaled = [(e / scales[name]) ** 2 for name, errors in known.items() for e in errors]
    assert metrics["mse"] == pytest.approx(np.mean(scaled))
    assert metrics["windows"] == 6
    steps = [[(pair[step], name) for name, w in (("a", a), ("b", b)) for pair in w if pair[step]] for step in (0, 1)]
    expected = [np.mean([(error / scales[name]) ** 2 for error, name in step]) for step in steps]
    assert metrics["mse_by_step"] == pytest.approx(expected)
    truth = np.load(done.folder / "true.npy")
    assert np.isnan(truth).sum() == 2


def test_the_loss_is_of_known_targets_alone():
    trainer = Trainer.__new__(Trainer)
    trainer.loss = torch.nn.functional.mse_loss
    windows = type("Windows", (), {"has_gaps": True})
    trainer.splits = {"train": type("Split", (), {"windows": windows})}
    forecast = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss = trainer._loss(forecast, torch.tensor([[0.0, NAN], [NAN, 7.0]]))
    loss.backward()
    assert loss.item() == (1 + 9) / 2
    assert forecast.grad.tolist() == [[1, 0], [0, -3]]
    assert trainer._loss(forecast, torch.full((2, 2), NAN)).item() == 0


def test_intervals_do_not_count_gaps(run, tmp_path):
    whole = demo_frame(rows=1500)
    gaps = whole.set_index("date").mask(np.random.default_rng(1).random((1500, 7)) < 0.2).reset_index()
    found = {}
    for name, frame in (("whole", whole), ("gaps", gaps)):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
        flags = ["--data", "custom", "--root_path", tmp_path, "--data_path", f"{name}.csv", "--model_id", name]
        done = run(*flags, "--model", "SeasonalNaive", "--seq_len", "48", "--pred_len", "12", "--level", "80")
        assert done.code == 0, done.err
        folder = next(folder for folder in done.folders if f"_{name}_" in folder.name)
        (found[name],) = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["intervals"]
    assert found["gaps"]["coverage"] == pytest.approx(found["whole"]["coverage"], abs=0.03)
    assert found["gaps"]["width"] == pytest.approx(found["whole"]["width"], rel=0.1)


@pytest.mark.parametrize("model", ["DLinear", "TimeLLM"])
def test_a_tenth_missing_costs_little(run, flags, tmp_path, model):
    drawn = np.random.default_rng(0)
    whole = demo_frame(rows=1500).set_index("date")
    whole += whole.std().to_numpy() * drawn.normal(size=whole.shape)  # what cannot be known, as real series have it
    gaps = whole.mask(drawn.random(whole.shape) < 0.1)
    scores = {}
    for name, frame in (("whole", whole), ("gaps", gaps)):
        (tmp_path / name).mkdir()
        frame.to_csv(tmp_path / name / "small.csv")
        more = ["--root_path", tmp_path / name, "--model_id", name, "--model", model, "--save_predictions"]
        more += ["--residual", "linear"] if model == "TimeLLM" else ["--max_steps", "150", "--lradj", "constant"]
        done = run(*flags, *more, "--predict")
        assert done.code == 0, done.err
        folder = next(folder for folder in done.folders if f"_{name}_" in folder.name)
        truth, forecast = np.load(folder / "true.npy"), np.load(folder / "pred.npy")
        known = ~np.isnan(truth)
        scores[name] = np.square(forecast - truth)[known].mean()
        assert np.isfinite(pd.read_csv(folder / "forecast.csv").iloc[:, 1:].to_numpy()).all()
    assert scores["gaps"] == pytest.approx(scores["whole"], rel=0.05)


def test_what_is_likely_too_much_is_named(tmp_path):
    frame = demo_frame(rows=300)
    frame.loc[10:40, "HUFL"] = NAN
    frame.loc[100:299, "OT"] = NAN
    frame.to_csv(tmp_path / "x.csv", index=False)
    (note,) = load_series(options(tmp_path, "--seq_len", "24")).notes
    assert "longest gap in rows: OT 200, HUFL 31" in note
    assert "more than half empty: OT" in note
    assert "a gap longer than --seq_len 24: HUFL, OT" in note


def test_a_headline_of_which_nothing_is_known_is_refused(assert_refused, tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    frame = demo_frame(rows=300)
    frame.loc[210:239, "OT"] = NAN  # all its validation rows
    frame.to_csv(folder / "x.csv", index=False)
    flags = ["--data", "custom", "--root_path", folder, "--data_path", "x.csv", "--seq_len", "24", "--label_len", "8"]
    flags += ["--pred_len", "8", "--model", "DLinear"]
    assert_refused([*flags, "--features", "MS"], "no evaluated window of --target OT has a known value")
    assert_refused([*flags, "--level", "80"], "--level 80 needs 4 validation windows of each channel, but there are 0")


def test_a_forecast_that_is_no_number_is_not_taken_for_a_gap():
    target = torch.tensor([[[0.0], [NAN]], [[1.0], [2.0]]])
    forecast = torch.tensor([[[NAN], [1.0]], [[1.0], [4.0]]])
    errors = _errors(forecast, target, has_gaps=True)
    assert errors[0].isnan().tolist() == [True, True, False]
    assert errors[1].tolist() == [2.0, 1.0, 2.0]
