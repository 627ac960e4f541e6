"""covariates.png and notes.csv: what the values of a column and the words of a note do to forecasts."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from data_provider import effects
from data_provider.effects import column_effects, note_effects
from data_provider.fit_known_ahead import fit_known_ahead
from data_provider.notes import NoteStates
from data_provider.reading import read_table
from data_provider.series import series_of
from utils.cli.options import get_parser

pytestmark = pytest.mark.draws

SIZES = ["--data", "custom", "--seq_len", "48", "--label_len", "8", "--pred_len", "12"]
TEXTS = [f"text {number}" for number in range(6)]


def demand(rows=1500):
    """A U of temperature around 15 degrees in `a`, half of it upside down in `b`; a closed shop takes 4 from `a`."""
    drawn, hours = np.random.default_rng(3), np.arange(rows)
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=rows, freq="h")})
    heat, door = drawn.normal(15, 6, rows).round(1), drawn.choice(["open", "closed", "half"], rows, p=[0.6, 0.2, 0.2])
    wave = 3 * np.sin(2 * np.pi * hours / 24)
    bend = 0.1 * (heat - 15) ** 2
    frame["a"] = 50 + wave + bend - 4 * (door == "closed") + 0.3 * drawn.normal(size=rows)
    frame["b"] = 500 + 5 * wave - bend / 2 + 0.3 * drawn.normal(size=rows)
    return frame.assign(heat=heat, door=door, noise=drawn.normal(size=rows))


def fitted(folder, frame, way, *flags, states=None):
    """Return the series with the effect of its columns, and how it was chosen."""
    frame.to_csv(folder / "x.csv", index=False)
    args = get_parser().parse_args([*SIZES, "--root_path", str(folder), "--data_path", "x.csv", *flags])
    table = read_table(args)
    series = series_of(table.with_states(states) if states else table, args)
    known, choice = fit_known_ahead(series, way, can_boost=True)
    return series.with_known_ahead(known), choice


@pytest.fixture(scope="module")
def boosted(tmp_path_factory):
    flags = ["--covariates", "noise,door,heat"]
    return fitted(tmp_path_factory.mktemp("boosted"), demand(2600), "boosted", *flags)  # each channel has its own trees


def test_a_bend_is_found_where_it_is_in_the_units_of_the_channel(boosted):
    heat, door, noise = column_effects(boosted[0], boosted[1].rises)
    assert (heat.name, door.name, noise.name) == ("heat", "door", "noise")  # the most important first
    assert len(heat.values) == 20 and (np.diff(heat.values) > 0).all() and heat.values[-1] > 25
    truth = 0.1 * (heat.values - 15) ** 2
    for name, size in (("a", 1), ("b", -0.5)):
        curve = heat.curves[name] / size
        # Trees know little of the most extreme values.
        np.testing.assert_allclose(curve[2:-2] - curve.min(), truth[2:-2], atol=1.2)
        assert curve[[0, -1]].min() - curve.min() > 0.6 * truth[[0, -1]].min()
        assert heat.curves[name].mean() == pytest.approx(0, abs=1e-6)
    assert abs(heat.values[heat.curves["a"].argmin()] - 15) < 2.5
    assert door.values == ["closed", "half", "open"]
    np.testing.assert_allclose(door.curves["a"], [-8 / 3, 4 / 3, 4 / 3], atol=0.6)
    assert np.abs(door.curves["b"]).max() < 0.6 > np.abs(noise.curves["a"]).max()


def test_only_the_rows_to_forecast_change(boosted, monkeypatch):
    """A table whose cells are set by hand in the horizon of a window gives the same effects."""
    series, choice = boosted
    monkeypatch.setattr(effects, "_WINDOWS", 1)
    heat = column_effects(series, choice.rises)[0]
    covariates, windows = series.table.covariates, series.windows("val")
    for channel, first in (("a", 0), ("b", windows.counts[0])):
        found, (date,) = [], windows.first_dates([first])
        for value in heat.values:
            rows = covariates.rows.copy()
            rows.iloc[date + 48 : date + 60, rows.columns.get_loc("heat")] = value
            table = replace(series.table, covariates=replace(covariates, rows=rows))
            changed = replace(series, table=table).with_known_ahead(series.known_ahead).windows("val")
            found.append(changed.with_covariate_effect([first], np.zeros((1, 12))).mean())
        scale = series.scaler.scale_[series.channels.index(channel)]
        np.testing.assert_allclose(heat.curves[channel], scale * (found - np.mean(found)), atol=1e-4)


def test_a_linear_effect_is_a_straight_line(tmp_path):
    frame = demand().assign(price=lambda f: f["noise"] + 5, wet=lambda f: (f.index % 10 == 0).astype(int))
    frame["b"] += 3 * frame["price"] + 2 * frame["wet"]
    flags = ["--covariates", "price,door,wet", "--past_covariates", "heat"]
    series, choice = fitted(tmp_path, frame[["date", "a", "b", "price", "door", "wet", "heat"]], "linear", *flags)
    found = {effect.name: effect for effect in column_effects(series, choice.rises)}
    assert sorted(found) == ["door", "price", "wet"]
    price, wet, door = found["price"], found["wet"], found["door"]
    np.testing.assert_allclose(np.diff(price.curves["b"]) / np.diff(price.values), 3, rtol=0.1)
    assert wet.values.tolist() == [0, 1]  # all values, where they are few
    np.testing.assert_allclose(wet.curves["b"], [-1, 1], atol=0.4)
    np.testing.assert_allclose(door.curves["a"], [-8 / 3, 4 / 3, 4 / 3], atol=1)


def test_the_value_of_a_past_column_changes_at_the_origin(tmp_path):
    """A column that leads by a row: it matters at the origin, and what comes after is not looked at."""
    frame, rows = demand()[["date", "a"]], 1500
    signal = np.random.default_rng(8).normal(size=-(-rows // 30)).repeat(30)[:rows]
    frame["a"] += 5 * np.r_[np.zeros(12), signal[:-12]]
    series, choice = fitted(tmp_path, frame.assign(signal=signal), "boosted", "--past_covariates", "signal")
    (effect,) = column_effects(series, choice.rises)
    assert effect.is_past and effect.name == "signal"
    assert effect.curves["a"][-1] - effect.curves["a"][0] > 3


def test_rare_values_are_shown_and_no_effect_has_no_picture(tmp_path):
    frame = demand()[["date", "a", "b", "noise"]]
    series, choice = fitted(tmp_path, frame, "none", "--covariates", "noise")
    assert column_effects(series, choice.rises) == []
    rain = np.where(np.arange(1500) % 25 == 0, 1 + np.arange(1500) / 100, 0.0)
    frame["a"] += rain
    series, choice = fitted(tmp_path, frame.assign(noise=rain), "boosted", "--covariates", "noise")
    assert (column_effects(series, choice.rises)[0].values > 0).sum() > 10


def noted(rows=1500):
    """Most rows say nothing; "text 0" adds 2 to `a`, "text 1" takes 30 from `rows`, the others do nothing."""
    drawn, frame = np.random.default_rng(4), demand(rows)[["date"]]
    number = np.where(drawn.random(rows) < 0.4, drawn.integers(0, 5, rows), -1)
    number[700] = 5  # a text of one training row
    wave = np.sin(2 * np.pi * np.arange(rows) / 24)
    frame["a"] = 20 + wave + 2 * (number == 0) + 0.1 * drawn.normal(size=rows)
    frame["rows"] = 900 + 20 * wave - 30 * (number == 1) + 2 * drawn.normal(size=rows)
    frame["note"] = [TEXTS[own] if own >= 0 else None for own in number]
    drawn = np.random.default_rng(6)
    states = NoteStates(
        {text: drawn.normal(size=16).astype(np.float32) for text in TEXTS}, {text: [text] for text in TEXTS}, "llm"
    )
    return frame, states


@pytest.fixture(scope="module")
def with_notes(tmp_path_factory):
    frame, states = noted()
    return fitted(tmp_path_factory.mktemp("notes"), frame, "boosted", "--notes", "note", states=states)[0]


def test_what_a_note_adds_is_told_in_the_units_of_each_channel(with_notes):
    found, (frame, _) = note_effects(with_notes), noted()
    assert found.columns.tolist() == ["text", "rows", "a", "rows"]  # the last is a channel
    assert set(found["text"]) == set(TEXTS)
    assert found.iloc[:, 1].tolist() == [(frame["note"] == text).sum() for text in found["text"]]
    values = pd.DataFrame(found.iloc[:, 2:].to_numpy(), index=found["text"], columns=["a", "rows"])
    assert set(values.index[:2]) == {"text 0", "text 1"}  # the most effective first
    assert values.loc["text 0", "a"] == pytest.approx(2, abs=0.4)
    assert values.loc["text 1", "rows"] == pytest.approx(-30, abs=6)
    assert values.loc[["text 2", "text 3", "text 4"], "a"].abs().max() < 0.4
    assert values.loc[["text 2", "text 3", "text 4"], "rows"].abs().max() < 6


def test_a_rare_note_is_measured_though_rows_are_few(with_notes, monkeypatch):
    monkeypatch.setattr(effects, "_NOTE_ROWS", 6 * 12)
    assert note_effects(with_notes).set_index("text").loc["text 5"].notna().all()


def test_notes_without_an_effect_and_many_channels(with_notes, tmp_path, monkeypatch):
    frame, states = noted()
    without, _ = fitted(tmp_path, frame, "none", "--notes", "note", states=states)
    found = note_effects(without)
    assert found.columns.tolist() == ["text", "rows", "a", "rows"]
    assert (found.iloc[:, 2:] == 0).all(axis=None)
    assert found["text"].iloc[-1] == "text 5"  # then by the number of rows
    monkeypatch.setattr(effects, "_NOTE_CHANNELS", 1)
    assert note_effects(with_notes).columns.tolist() == ["text", "rows", "a"]


def test_a_run_writes_both_and_keeps_those_of_an_earlier_one(run, tmp_path, tiny_llm):
    frame = noted()[0].merge(demand().drop(columns=["a", "b"]), on="date")
    long = "sale, \u201chalf price\u201d\n" + 300 * "x"
    frame["note"] = frame["note"].replace("text 0", long)
    frame["a"] += 0.01 * (frame["heat"] - 15) ** 2
    frame.to_csv(tmp_path / "x.csv", index=False)
    train = [*SIZES, "--root_path", tmp_path, "--data_path", "x.csv", "--model", "DLinear", "--max_steps", "2",
             "--eval_windows", "30", "--covariates", "heat,door", "--notes", "note", "--llm_model_path",
             tiny_llm("qwen2")]  # fmt: skip
    done = run(*train)
    assert done.code == 0, done.err
    (folder,) = (path for path in done.folders if path.is_dir())
    assert (folder / "covariates.png").read_bytes().startswith(b"\x89PNG")
    notes = pd.read_csv(folder / "notes.csv")
    assert long in notes["text"].tolist()[:2]
    assert notes.loc[notes["text"] == long, "a"].item() == pytest.approx(2, abs=0.6)
    again = run(*train, "--covariate_model", "none")
    assert again.code == 0, again.err
    assert (folder / "covariates.png.old").exists() and (folder / "notes.csv.old").exists()
    assert not (folder / "covariates.png").exists()  # nothing has an effect now


def test_two_columns_of_notes_are_told_apart(tmp_path):
    frame, states = noted()
    drawn = np.random.default_rng(9)
    number = drawn.integers(2, 5, len(frame))
    frame["a"] -= 3.0 * (number == 3)
    frame["more"] = [TEXTS[own] for own in number]
    flags = ["--notes", "note,more"]
    series, _ = fitted(tmp_path, frame[["date", "a", "note", "more"]], "boosted", *flags, states=states)
    found = note_effects(series).set_index("text")["a"]
    assert found["text 0"] == pytest.approx(2, abs=0.5)  # of `note` alone
    assert -3 < found["text 3"] < -1  # in `more`; in `note` it says nothing
