import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from layers.FrozenLLM import FrozenLLM
from layers.StandardNorm import Normalize
from tests.conftest import SHARED, needs_shared
from utils.options import get_parser
from utils.prompt import DEFAULT_DESCRIPTION, PromptBuilder, load_description, render, window_statistics

GOLDEN = ("qwen2_ETTh1", "gpt2_ETTm1", "bert_ETTh2")


def scaled(windows):
    return Normalize()(torch.as_tensor(windows))[0]


def text_of(windows, pred_len=24, decimals=-1, description=DEFAULT_DESCRIPTION):
    windows = scaled(windows)
    return [render(s, description, windows.shape[1], pred_len, decimals) for s in window_statistics(windows)]


@needs_shared("golden")
@pytest.mark.parametrize("name", GOLDEN)
def test_prompts_are_those_of_time_llm(name):
    folder = SHARED / "golden" / name
    flags = json.loads((folder / "train.json").read_text(encoding="utf-8"))["flags"]
    gold = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))["prompts"]
    assert text_of(np.load(folder / "eval.npz")["x"][..., 0], flags["pred_len"]) == gold


def test_a_known_window_is_described_in_full():
    window = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0, 1.0, 0.0, 2.0]])
    (statistics,) = window_statistics(window)
    assert statistics == (statistics.__class__)(0.0, 3.0, 0.0, True, statistics.lags)
    # Circular autocorrelations 15, 0, 11, 0, 14, ...: lags 2 and 6 are equal, so either may come first.
    assert statistics.lags[:2] == (0, 4)
    assert set(statistics.lags[2:4]) == {2, 6}
    assert render(statistics, "Loads. ", 8, 2).startswith(
        "<|start_prompt|>Dataset description: Loads. Task description: forecast the next 2 steps given the previous 8"
        " steps information; Input statistics: min value 0.0, max value 3.0, median value 0.0, the trend of input is"
        " upward, top 5 lags are : [0, 4, "
    )
    assert render(statistics, "Loads.", 8, 2).endswith("]<|<end_prompt>|>")


def test_a_falling_or_flat_window_is_downward():
    assert not window_statistics(torch.tensor([[2.0, 1.0, 0.0]]))[0].is_upward
    assert not window_statistics(torch.ones(1, 12))[0].is_upward


@pytest.mark.parametrize("seq_len", [63, 64, 96, 336, 512])
def test_a_prompt_does_not_depend_on_its_batch(seq_len):
    windows = torch.randn(64, seq_len, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    together = text_of(windows)
    assert [text_of(window[None])[0] for window in windows] == together
    assert text_of(windows[:7]) == together[:7]
    assert text_of(windows.flip(0))[::-1] == together


def test_decimals_round_the_numbers():
    (text,) = text_of(torch.arange(16.0)[None].sin(), decimals=2)
    assert all(len(word.split(".")[1]) == 2 for word in text.replace(",", "").split() if word.strip("-")[0].isdigit()
               and "." in word)  # fmt: skip
    assert "min value -1." in text


class WholeWords(PreTrainedTokenizerFast):
    """Tells the beginning of a text from its rest: the parts of a prompt do not make up the whole."""

    def __call__(self, texts, **more):
        marked = [text if text.startswith("<|start") else f"? {text}" for text in texts]
        return super().__call__(marked, **more)


def builder(folder, kind=AutoTokenizer, patches=8, context=None, decimals=-1):
    tokenizer = kind.from_pretrained(folder)
    return PromptBuilder(tokenizer, DEFAULT_DESCRIPTION, 96, 24, decimals, patches, context)


@pytest.mark.parametrize("kind", [AutoTokenizer, WholeWords])
@pytest.mark.parametrize("family", ["qwen2", "llama", "bert"])
def test_token_ids_are_those_of_the_whole_text(tiny_llm, family, kind):
    prompts = builder(tiny_llm(family), kind)
    assert (prompts._frame is None) == (kind is WholeWords)
    windows = scaled(torch.randn(40, 96, generator=torch.Generator().manual_seed(2)))
    whole = AutoTokenizer.from_pretrained(tiny_llm(family))
    assert prompts(windows) == whole(prompts.texts(windows)).input_ids


def test_only_what_differs_is_tokenised(tiny_llm):
    prompts = builder(tiny_llm("bert"))
    seen = []
    tokenizer, prompts.tokenizer = (
        prompts.tokenizer,
        lambda texts, **more: seen.extend(texts) or tokenizer(texts, **more),
    )
    prompts(scaled(torch.randn(3, 96)))
    assert all(text.startswith(" Input statistics") for text in seen)


def test_examples_have_the_head_alone_in_common(tiny_llm):
    prompts = builder(tiny_llm("qwen2"))
    text = prompts.tokenizer.decode(FrozenLLM.common_head(prompts.examples()))
    assert text.rstrip().endswith("Input statistics: min value")


def options(*argv):
    return get_parser().parse_args(["--data", "ETTm1", *argv])


def test_descriptions_come_from_where_the_flags_say(tmp_path):
    file = tmp_path / "说明.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "Öl, 油.\n".encode())
    assert load_description(options()) == DEFAULT_DESCRIPTION
    assert load_description(options("--content", " as it is ")) == " as it is "
    assert load_description(options("--prompt_file", str(file))) == "Öl, 油.\n"
    assert "transformer" in load_description(options("--prompt_domain", "1"))
    assert load_description(options("--prompt_domain", "1", "--content", "mine")) == "mine"
    for name in ("ECL", "Traffic", "Weather"):
        assert len(load_description(get_parser().parse_args(["--data", name, "--prompt_domain", "1"]))) > 80


def test_descriptions_that_are_not_there_are_named(assert_refused, flags, tmp_path_factory):
    latin = tmp_path_factory.mktemp("prompt") / "latin.txt"
    latin.write_bytes("Öl".encode("latin-1"))
    assert_refused([*flags, "--content", "", "--prompt_file", latin], "latin.txt", "UTF-8")
    assert_refused([*flags, "--content", "", "--prompt_domain", "1"], "custom.txt", "--prompt_domain")


def test_a_prompt_longer_than_the_context_names_both_numbers(assert_refused, flags):
    assert_refused([*flags, "--content", "watt " * 600], "positions", "has 1024")
