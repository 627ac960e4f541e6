import argparse
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import run_main
from data_provider.data_factory import load_series
from layers.Reprogramming import CompactMappingLayer, MappingLayer, ReprogrammingLayer
from scripts import prototypes
from scripts.prototypes import Prototype, Window, choose_window, draw, main, quote_token
from tests.conftest import largest_difference


@pytest.fixture(scope="module")
def words():
    return torch.randn(300, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained(csv_folder, tiny_llm, tmp_path_factory):
    checkpoints = tmp_path_factory.mktemp("prototypes")
    flags = [
        *("--data", "custom", "--root_path", csv_folder, "--data_path", "small.csv", "--checkpoints", checkpoints),
        *("--seq_len", "48", "--label_len", "8", "--pred_len", "8", "--d_model", "8", "--n_heads", "2", "--d_ff", "8"),
        *("--llm_model_path", tiny_llm("qwen2"), "--max_steps", "4", "--eval_windows", "8", "--learning_rate", "0.01"),
    ]
    assert run_main.main([str(word) for word in flags]) == 0
    return next(checkpoints.iterdir())


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """The folder of a run, in an empty one that tests are run in."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, Path("run"))


@pytest.fixture
def show(capsys):
    """Return a function that runs the script and returns exit code, output and errors."""

    def run_script(*argv):
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run_script


def rows_of(printed):
    """Return number, share of the attention and first token of each prototype."""
    rows = re.findall(r"^ +(\d+) +([\d.]+)%  ([+-])[\d.e-]+ (.+?)(?:  |$)", printed, re.MULTILINE)
    return [(int(number), float(share), sign + token) for number, share, sign, token in rows]


def edit_checkpoint(folder, change):
    contents = torch.load(folder / "checkpoint", weights_only=True)
    change(contents)
    torch.save(contents, folder / "checkpoint")
    return contents


def test_attention_is_what_the_layer_mixes_by():
    torch.manual_seed(0)
    layer = ReprogrammingLayer(d_model=6, n_heads=2, d_keys=5, d_llm=7, dropout=0.5).eval()
    patches, prototypes = torch.randn(3, 4, 6), 5 * torch.randn(11, 7)
    attention = layer.attention(patches, prototypes)
    values = layer.value_projection(prototypes).unflatten(-1, (2, 5))
    mixed = torch.einsum("bhps,she->bphe", attention, values).flatten(2)
    assert attention.shape == (3, 2, 4, 11)
    assert largest_difference(layer.out_projection(mixed), layer(patches, prototypes)) < 1e-5


def test_the_words_weights_make_the_prototype_and_no_smaller_ones_do(words):
    layer = MappingLayer(words, num_tokens=5)
    weights = layer.token_weights([3, 1])
    made = weights.float() @ words + layer.bias[[3, 1], None]
    assert largest_difference(made, layer()[[3, 1]]) < 1e-5
    # The least weights have no part that cancels out: they are a product with the words themselves.
    solved = torch.linalg.lstsq(words.double(), weights.T).solution
    assert largest_difference(words.double() @ solved, weights.T) < 1e-9


def test_both_kinds_of_map_give_the_same_weights_for_the_same_prototypes(words):
    words = torch.cat([words, words[:, :1]], dim=1)  # of less than full rank
    full, compact = MappingLayer(words, num_tokens=5), CompactMappingLayer(words, num_tokens=5)
    compact.load_state_dict(full.state_dict())
    assert largest_difference(compact.token_weights([0, 4]), full.token_weights([0, 4])) < 1e-4


def test_prototypes_are_printed_the_strongest_first_and_drawn(folder, show):
    # A run of an earlier version has not all flags.
    edit_checkpoint(folder, lambda contents: contents["flags"].pop("load_in_4bit"))
    code, out, err = show(folder, "--prototypes", 12, "--tokens", 3)
    shares = [share for _, share, _ in rows_of(out)]
    assert (code, err) == (0, "")
    assert len(shares) == 12 and shares == sorted(shares, reverse=True)
    assert "48 rows, 6 patches" in out and f"Picture: {folder / 'prototypes.png'}" in out
    assert (folder / "prototypes.png").read_bytes().startswith(b"\x89PNG")
    assert show(folder, "--prototypes", 12, "--tokens", 3)[1] == out  # nothing is dropped at random


def test_the_token_that_a_prototype_was_made_of_weighs_most(run, flags, show, tiny_llm):
    def one_token_each(contents):
        weight = contents["weights"]["mapping_layer.weight"].zero_()
        numbers = torch.arange(len(weight))
        weight[numbers, numbers % 400] = (-1.0) ** numbers

    folder = run(*flags, "--mapping", "full").folder
    edit_checkpoint(folder, one_token_each)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm("qwen2"))
    code, out, err = show(folder)
    rows = rows_of(out)
    assert (code, err, len(rows)) == (0, "", 10)
    for number, _, token in rows:
        assert token == "+-"[number % 2] + quote_token(tokenizer, number % 400)


def test_a_long_embedding_counts_for_more(folder, show, tiny_llm, monkeypatch):
    monkeypatch.setattr(CompactMappingLayer, "token_weights", lambda self, numbers: torch.ones(len(numbers), 512))
    lengths = AutoModel.from_pretrained(tiny_llm("qwen2")).get_input_embeddings().weight.norm(dim=1)
    longest = quote_token(AutoTokenizer.from_pretrained(tiny_llm("qwen2")), lengths.argmax().item())
    assert show(folder, "--tokens", 2)[1].count(f"%  {lengths.max():+.3g} {longest}  ") == 10


def test_the_window_is_scaled_as_in_training_and_ends_with_the_row_asked_for(folder, show):
    contents = torch.load(folder / "checkpoint", weights_only=True)
    args = argparse.Namespace(**contents["flags"])
    series = load_series(args)
    for channel, row, number, end in ((None, None, 6, 400), ("MUFL", 100, 2, 100), ("MUFL", 48, 2, 48)):
        window = choose_window(args, series.facts(), channel, row)
        np.testing.assert_allclose(
            window.scaled, series.values[series.table.rows_of(number)][end - 48 : end], rtol=1e-6
        )
    first = show(folder, "--channel", "MUFL", "--row", 100)[1]
    assert "Window: MUFL, 2020-01-03 04:00:00 to 2020-01-05 03:00:00" in first
    assert rows_of(first) != rows_of(show(folder, "--channel", "MUFL", "--row", 60)[1])


def test_each_patch_shares_its_attention_out_among_all_prototypes(folder, show, monkeypatch):
    monkeypatch.setattr(prototypes, "draw", lambda path, window, shown, *_: all_shown.extend(shown))
    all_shown = []
    assert show(folder, "--prototypes", 1000, "--tokens", 1)[0] == 0
    attention = np.array([prototype.attention for prototype in all_shown])
    np.testing.assert_allclose(attention.sum(0), 1, rtol=1e-5)
    assert (np.diff(attention.mean(1)) <= 1e-9).all()  # the strongest first


def test_files_that_were_moved_since_the_run_are_found_where_they_are_said_to_be(
    run, flags, show, csv_folder, tiny_llm
):
    shutil.copy(csv_folder / "small.csv", "here.csv")
    shutil.copytree(tiny_llm("qwen2"), "llm")
    folder = run(
        *flags, "--root_path", ".", "--data_path", "here.csv", "--llm_model_path", "./llm", "--resume", "auto"
    ).folder
    Path("here.csv").rename("there.csv")
    Path("llm").rename("moved")
    assert "here.csv: check --root_path and --data_path" in show(folder)[2]
    assert "/llm: --llm_model_path" in show(folder, "--data_path", "there.csv")[2]
    assert show(folder, "--data_path", "there.csv", "--llm_model_path", "moved")[0] == 0


def test_what_cannot_be_shown_is_refused_in_one_line(folder, show, tmp_path):
    baseline, damaged, demo = Path("baseline"), Path("damaged"), Path("demo")
    for copy in (baseline, damaged, demo):
        shutil.copytree(folder, copy)
    edit_checkpoint(baseline, lambda contents: contents.update(llm=None))
    edit_checkpoint(demo, lambda contents: contents["flags"].update(demo=True, data_path="demo.csv"))
    (damaged / "checkpoint").write_bytes(b"PK")
    for argv, words in (
        ((tmp_path,), "no checkpoint in"),
        ((baseline,), "without an LLM"),
        ((damaged,), "damaged"),
        ((demo,), "demo.csv: check --root_path and --data_path"),
        ((folder, "--channel", "nothing"), "no channel 'nothing' in common: --channel takes one of ['HUFL',"),
        ((folder, "--row", "47"), "--row 47 must be 48 to 400"),
        ((folder, "--row", "401"), "--row 401 must be 48 to 400"),
        ((folder, "--prototypes", "0"), "--prototypes 0 must be 1 to 1000"),
        ((folder, "--tokens", "9999"), "--tokens 9999 must be 1 to 512"),
        ((folder, "--rows", "9"), "unrecognized arguments: --rows 9"),
    ):
        code, _, err = show(*argv)
        assert code == 2
        assert err.startswith("error: ") and words in err and err.count("\n") == 1, err
    assert not list(tmp_path.rglob("prototypes.png*"))


def test_a_csv_shorter_than_a_window_is_refused(folder, show, csv_folder):
    lines = (csv_folder / "small.csv").read_text(encoding="utf-8").splitlines()
    Path("few.csv").write_text("\n".join(lines[:48]), encoding="utf-8")
    code, _, err = show(folder, "--root_path", ".", "--data_path", "few.csv")
    assert (code, err) == (2, "error: few.csv has 47 rows: a window of the run needs 48\n")


def test_an_interrupt_leaves_one_line(folder, show, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prototypes, "build_trained", interrupted)
    assert show(folder) == (130, "", "interrupted: nothing was written\n")


def test_tokens_are_quoted_so_that_spaces_show(tiny_llm):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm("qwen2"))
    (electricity,) = tokenizer(" electricity").input_ids
    assert quote_token(tokenizer, electricity) == "' electricity'"
    assert quote_token(tokenizer, tokenizer("分").input_ids[0]) == f"<{tokenizer('分').input_ids[0]}>"
    assert quote_token(tokenizer, 511) == "<511>"  # of the model, not of the tokenizer


def test_a_space_in_sentencepiece_shows_too():
    pieces = Tokenizer(models.WordLevel({"▁the": 0, "re": 1}, unk_token="re"))
    pieces.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)
    assert [quote_token(tokenizer, token) for token in (0, 1)] == ["' the'", "'re'"]


def test_any_token_and_channel_can_be_drawn(tmp_path):
    tokens = [(1.0, "'分析'"), (-1.0, r"'$\frac$'"), (0.5, repr("-" * 64))]
    shown = [Prototype(number, np.full(6, number / 10), tokens) for number in range(2)]
    window = Window(r"温度 in °C, $\frac$", np.zeros(48), np.zeros(48, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a glyph that the font lacks
        draw(tmp_path / "picture.png", window, shown, patch_len=16, stride=8)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
