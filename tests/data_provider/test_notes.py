"""--notes: free text that is known in advance, which an LLM reads."""

import numpy as np
import pandas as pd
import pytest

from data_provider.note_effect import fit_note_effect
from data_provider.notes import NoteColumn, NoteStates, split_sentences
from tests.data_provider.conftest import FLAGS
from utils.runs import load_run

SALES = ["A big sale starts.", "Everything is reduced today.", "Sale! Half price on all shoes.", "The sale goes on."]
QUIET = ["The shop is open as usual.", "Nothing special.", "An ordinary day.", "Regular opening hours."]


def shop(rows=1500, future=12):
    """A shop that sells 8 more in hours with a note about a sale; some hours have no note."""
    drawn, count = np.random.default_rng(11), rows + future
    wave, blocks = np.sin(2 * np.pi * np.arange(count) / 24), np.repeat(drawn.random(-(-count // 6)) < 0.3, 6)[:count]
    blocks[rows:] = np.arange(future) < 6
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=count, freq="h")})
    frame["sold"] = 20 + 3 * wave + 8 * blocks + drawn.normal(size=count)
    frame.loc[rows:, "sold"] = np.nan
    texts = [drawn.choice(SALES if sale else QUIET) for sale in blocks]
    silent = (drawn.random(count) < 0.1) & ~blocks
    return frame.assign(note=np.where(silent, None, np.array(texts, object)))


@pytest.fixture
def noted(trained, tiny_llm):
    """Return a function that trains on a frame with notes, and an LLM that can read them."""
    return lambda name, frame, *more: trained(name, frame, "--llm_model_path", tiny_llm("qwen2"), *more)


def test_notes_say_what_digits_cannot(noted):
    plain = noted("plain", shop()[["date", "sold"]].head(1500)).metrics()["mse"]
    done = noted("noted", shop(), "--notes", "note", "--predict")
    assert "Notes: 8 texts of 9 sentences, 9 of them read" in done.out
    assert "Known in advance | sold: boosted | validation MSE 0." in done.out and "| note " in done.out
    assert done.metrics()["mse"] < 0.4 * plain
    forecast, is_sale = pd.read_csv(done.folder / "forecast.csv"), shop()["note"].tail(12).isin(SALES).to_numpy()
    assert 0 < is_sale.sum() < 12
    wave = 20 + 3 * np.sin(2 * np.pi * np.arange(1500, 1512) / 24)
    assert forecast["sold"][is_sale].sub(wave[is_sale]).mean() == pytest.approx(8, abs=1.5)
    from_python = load_run(done.folder, device="cpu").predict(shop())
    np.testing.assert_array_equal(from_python["sold"], forecast["sold"])
    last = shop().tail(1)
    behind = last.assign(date=last["date"] + pd.Timedelta("1h"), note=SALES[0])  # behind the horizon
    further = load_run(done.folder, device="cpu").predict(pd.concat([shop(), behind], ignore_index=True))
    np.testing.assert_array_equal(further["sold"], forecast["sold"])
    changed = shop().assign(note=lambda f: f["note"].where(f.index != 1511, SALES[0]))
    assert (load_run(done.folder, device="cpu").predict(changed)["sold"] != forecast["sold"]).any()
    again = noted("again", shop(), "--notes", "note")
    assert "Notes: 8 texts of 9 sentences, 0 of them read" in again.out
    assert again.metrics()["mse"] == done.metrics()["mse"]


def test_the_llm_of_the_patches_reads_the_notes_with_its_own_depth(noted):
    """--llm_layers is for the patches; and what the LLM reads does not change the weights that are drawn."""
    frame = shop(1000)
    flags = ["--model", "TimeLLM", "--d_model", "8", "--n_heads", "2", "--d_ff", "4", "--content", "A shop.",
             "--residual", "linear", "--max_steps", "4", "--eval_windows", "60"]  # fmt: skip
    plain = noted("plain", frame[["date", "sold"]].head(1000), *flags).metrics()["mse"]
    one, two = (noted(f"layers{n}", frame, "--notes", "note", *flags, "--llm_layers", n) for n in (1, 2))
    assert one.metrics()["mse"] < 0.5 * plain
    assert "0 of them read" in two.out


def test_another_llm_and_a_damaged_store_get_one_line(noted, run, tmp_path, tiny_llm):
    folder = noted("store", shop(), "--notes", "note").folder
    here = ["--root_path", tmp_path, "--data_path", "store.csv", "--model", "DLinear", "--notes", "note"]
    test = [*FLAGS, *here, "--is_training", "0", "--checkpoint", folder, "--model_id", "other", "--predict"]
    other = run(*test, "--llm_model_path", tiny_llm("gpt2"))
    assert other.code == 2 and "notes were read by another LLM in training" in other.err
    store = min((tmp_path / "checkpoints").glob("notes-*"), key=lambda path: path.stat().st_mtime_ns)  # the first LLM's
    store.write_bytes(store.read_bytes()[:-40])
    damaged = run(*test, "--llm_model_path", tiny_llm("qwen2"))
    assert damaged.code == 2 and "is damaged" in damaged.err and damaged.err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (lambda f: f.assign(note=range(len(f))), [], ["notes 'note' are numbers", "--covariates"]),
        (lambda f: f.assign(note=" "), [], ["notes 'note' has no value"]),
        (lambda f: f, ["--covariates", "note"], ["--covariates and --notes name note twice"]),
        (lambda f: f, ["--covariate_model", "linear"], ["reads no notes"]),
        (lambda f: f, ["--model", "LastValue"], ["--notes needs a forecaster that is trained"]),
        (lambda f: f, ["--llm_model_path", ""], ["--notes needs an LLM"]),
        (lambda f: f, ["--llm_model_path", "./nowhere"], ["no LLM in ./nowhere"]),
        (lambda f: f.rename(columns={"note": "text"}), [], ["no column 'note' for --notes"]),
    ],
)
def test_wrong_notes_get_one_line(assert_refused, tmp_path_factory, tiny_llm, change, more, words):
    folder = tmp_path_factory.mktemp("wrong")
    change(shop(400, future=0)).to_csv(folder / "x.csv", index=False)
    here = ["--root_path", folder, "--data_path", "x.csv", "--notes", "note", "--model", "DLinear"]
    assert_refused([*FLAGS, *here, "--llm_model_path", tiny_llm("qwen2"), *more], *words)


def test_many_texts_in_covariates_point_to_notes(assert_refused, tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    shop(400, future=0).assign(note=lambda f: "text " + f.index.astype(str)).to_csv(folder / "x.csv", index=False)
    here = ["--root_path", folder, "--data_path", "x.csv", "--covariates", "note", "--model", "DLinear"]
    assert_refused([*FLAGS, *here], "'note' has", "different texts", "--notes")


def test_an_empty_note_counts_as_the_mean_note():
    """Its components are missing to the trees, and 0 to the linear effect, whatever an empty text would read as."""
    drawn = np.random.default_rng(0)
    texts = [f"text {number}" for number in range(50)]
    states = NoteStates(
        {text: drawn.normal(size=16).astype(np.float32) for text in texts}, {text: [text] for text in texts}, "llm"
    )
    column = NoteColumn.fit(pd.Series(texts, name="note"), states)
    values = pd.Series([texts[3], "", None, texts[4]], name="note")
    encoded = NoteColumn.from_dict(column.as_dict()).encode(values, states)
    assert np.isnan(encoded[1:3]).all() and not np.isnan(encoded[[0, 3]]).any()
    # Where training rows have no note, the first component is 1 if there is one.
    with_empty = NoteColumn.fit(pd.Series([*texts, None], name="note"), states).encode(values, states)
    np.testing.assert_array_equal(with_empty[:, 0], [1, np.nan, np.nan, 1])
    np.testing.assert_array_equal(with_empty[:, 1:], encoded)
    notes = column.encode(pd.Series(drawn.choice(texts, 400), name="note"), states)
    horizon = np.arange(300)[:, None] + np.arange(12)
    effect, estimates = fit_note_effect(notes, horizon, notes[horizon] @ np.arange(notes.shape[1]) / 10)
    truth = notes[horizon] @ np.arange(notes.shape[1]) / 10
    assert np.square(truth - estimates).mean() < 0.1 * np.square(truth).mean()
    empty = np.full_like(notes, np.nan)
    np.testing.assert_allclose(effect.estimate(empty, horizon[:1]), effect.weights[None, :, -1])


def test_sentences_are_read_one_by_one():
    text = " Sale: 3.5 percent off. Come in! Heute geschlossen?  Ja.\n\nPlease ring 今日は休み。明日も。"
    assert split_sentences(text) == [
        *("Sale: 3.5 percent off.", "Come in!", "Heute geschlossen?", "Ja.", "Please ring 今日は休み。", "明日も。"),
    ]
    drawn = np.random.default_rng(1)
    sentences = [f"sentence {number}" for number in range(40)]
    states = {sentence: drawn.normal(size=24).astype(np.float32) for sentence in sentences}
    near = {"near": states["sentence 3"] + 0.1 * drawn.normal(size=24), "odd": 100 * drawn.normal(size=24)}
    pairs = [drawn.choice(sentences, 2, replace=False).tolist() for _ in range(60)]
    parts = {" ".join(pair): pair for pair in pairs} | {one: [one] for one in (*near, *sentences)}
    parts["turned"] = pairs[0][::-1]
    read = NoteStates(states | near, parts, "llm")
    column = NoteColumn.fit(pd.Series([" ".join(pair) for pair in pairs], name="note"), read)
    first, turned, third, new, odd = column.encode(pd.Series([" ".join(pairs[0]), "turned", "sentence 3", *near]), read)
    np.testing.assert_allclose(first, turned, atol=1e-9)  # another order says the same
    assert np.abs(new - third).max() < 0.2 * np.abs(third).max()
    known = column.encode(pd.Series(sentences), read)
    assert np.abs(odd).max() <= np.abs(known).max()  # whatever its words, it says what training has heard


def test_that_there_is_a_note_says_something_by_itself(noted):
    """A single text, and no note in the other hours."""
    frame = shop(1000).assign(note=lambda f: f["note"].isin(SALES).map({True: "Sale!", False: None}))
    frame["fixed"] = 1.0
    plain = noted("plain", frame[["date", "sold"]].head(1000)).metrics()["mse"]
    done = noted("sale", frame, "--notes", "note", "--covariates", "fixed")
    assert done.metrics()["mse"] < 0.4 * plain
    assert "column 'fixed' has a single value in all training rows" in done.out
    assert "'note' has a single value" not in done.out


def test_long_notes_are_cut(noted):
    frame = shop(400)
    frame.loc[::7, "note"] = "One two three four. " * 300 + "Never read."
    frame.loc[3, "note"] = "word " * 600
    flags = ["--notes", "note", "--max_steps", "1", "--covariate_model", "boosted"]
    done = noted("long", frame, *flags)
    assert "2 of 10 notes are longer than 512 tokens: they are cut" in done.out
    again = noted("again", frame, *flags)
    assert "2 of 10 notes are longer than 512 tokens" in again.out and " 0 of them read" in again.out
    frame["note"] = frame["note"].str.replace("Never read.", "One. Two. Big sale! " * 60)
    other = noted("other", frame, *flags)
    assert other.metrics()["mse"] == done.metrics()["mse"]
