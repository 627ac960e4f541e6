import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from layers.FrozenLLM import FrozenLLM
from tests.conftest import SHARED, needs_shared
from utils.cli.options import get_parser
from utils.llm.prompt import (
    DEFAULT_DESCRIPTION,
    PromptBuilder,
    WindowStatistics,
    load_description,
    render,
    window_statistics,
)

GOLDEN = ("qwen2_ETTh1", "gpt2_ETTm1", "bert_ETTh2")


def text_of(windows, pred_len=24, decimals=-1, description=DEFAULT_DESCRIPTION):
    windows = torch.as_tensor(windows)
    return [render(s, description, windows.shape[1], pred_len, decimals) for s in window_statistics(windows)]


def meaning(prompt, seq_len):
    """Return a prompt's words, its numbers, and its lags with each named by the nearer of it and its mirror."""
    words, lags = re.fullmatch(r"(.*)\[(.*)\]<\|<end_prompt>\|>", prompt, re.DOTALL).groups()
    number = re.compile(r"(?<=value )-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
    lags = [min(lag, seq_len - lag) for lag in map(int, lags.split(","))]
    return number.sub("#", words), [float(value) for value in number.findall(words)], lags


@needs_shared("golden")
@pytest.mark.parametrize("name", GOLDEN)
def test_prompts_mean_what_those_of_time_llm_mean(name):
    """Not to the digit: the original's last digits, and which of two mirror lags it names first, are its CPU's."""
    folder = SHARED / "golden" / name
    flags = json.loads((folder / "train.json").read_text(encoding="utf-8"))["flags"]
    gold = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))["prompts"]
    windows = np.load(folder / "eval.npz")["x"][..., 0]
    for ours, theirs in zip(text_of(windows, flags["pred_len"]), gold, strict=True):
        ours, theirs = meaning(ours, windows.shape[1]), meaning(theirs, windows.shape[1])
        assert len(ours[1]) == 3
        assert ours[::2] == theirs[::2]
        assert ours[1] == pytest.approx(theirs[1], abs=1e-6)


def test_a_known_window_is_described_in_full():
    (statistics,) = window_statistics(torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0, 1.0, 0.0, 2.0]]))
    mean, deviation = 7 / 8, (71 / 64 + 1e-5) ** 0.5
    assert statistics.smallest == statistics.median == pytest.approx(-mean / deviation)  # the lower of the middle two
    assert statistics.largest == pytest.approx((3 - mean) / deviation)
    assert statistics.is_upward
    # Circular autocorrelations 15, 0, 11, 0, 14, 0, 11, 0, less 8 times the squared mean.
    assert statistics.lags == (0, 4, 2, 6, 1)


def test_a_prompt_is_in_the_words_of_time_llm():
    assert render(WindowStatistics(-1.5, 3.0, 0.25, True, (0, 4, 2, 6, 1)), "Loads. ", 8, 2) == (
        "<|start_prompt|>Dataset description: Loads. Task description: forecast the next 2 steps given the previous 8"
        " steps information; Input statistics: min value -1.5, max value 3.0, median value 0.25, the trend of input is"
        " upward, top 5 lags are : [0, 4, 2, 6, 1]<|<end_prompt>|>"
    )


def test_a_window_that_ends_no_higher_than_it_began_is_downward():
    for window in ([2.0, 1.0, 0.0], [1.0] * 12, [1.0, 5.0, 1.0]):
        assert not window_statistics(torch.tensor([window]))[0].is_upward


def test_equal_lags_are_named_from_the_nearest_on_each_with_its_mirror():
    day = torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0, 0.0]).repeat(5)  # lags 0, 6, 12 and their mirrors are all equal
    assert window_statistics(day[None])[0].lags == (0, 6, 24, 12, 18)
    assert window_statistics(torch.ones(1, 9))[0].lags == (0, 1, 8, 2, 7)
    assert window_statistics(torch.ones(1, 3))[0].lags == (0, 1, 2)


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
    windows = torch.randn(40, 96, generator=torch.Generator().manual_seed(2))
    whole = AutoTokenizer.from_pretrained(tiny_llm(family))
    assert prompts(windows) == whole(prompts.texts(windows)).input_ids


def test_only_what_differs_is_tokenised(tiny_llm):
    prompts = builder(tiny_llm("bert"))
    seen = []
    tokenizer, prompts.tokenizer = (
        prompts.tokenizer,
        lambda texts, **more: seen.extend(texts) or tokenizer(texts, **more),
    )
    prompts(torch.randn(3, 96))
    assert all(text.startswith(" Input statistics") for text in seen)


def test_examples_have_the_head_alone_in_common(tiny_llm):
    prompts = builder(tiny_llm("qwen2"))
    text = prompts.tokenizer.decode(FrozenLLM.shared_prefix_of(prompts.examples()))
    assert text.rstrip().endswith("Input statistics: min value")


def options(*argv):
    return get_parser().parse_args(["--data", "ETTm1", *argv])


def description_of(args):
    return load_description(args.content, args.prompt_file, args.prompt_domain, args.data)


def test_descriptions_come_from_where_the_flags_say(tmp_path):
    file = tmp_path / "说明.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "Öl, 油.\n".encode())
    assert description_of(options()) == DEFAULT_DESCRIPTION
    assert description_of(options("--content", " as it is ")) == " as it is "
    assert description_of(options("--prompt_file", str(file))) == "Öl, 油.\n"
    assert "transformer" in description_of(options("--prompt_domain", "1"))
    assert description_of(options("--prompt_domain", "1", "--content", "mine")) == "mine"
    for name in ("ECL", "Traffic", "Weather"):
        assert len(description_of(get_parser().parse_args(["--data", name, "--prompt_domain", "1"]))) > 80


def test_descriptions_that_are_not_there_are_named(assert_refused, flags, tmp_path_factory):
    latin = tmp_path_factory.mktemp("prompt") / "latin.txt"
    latin.write_bytes("Öl".encode("latin-1"))
    assert_refused([*flags, "--content", "", "--prompt_file", latin], "latin.txt", "UTF-8")
    assert_refused([*flags, "--content", "", "--prompt_domain", "1"], "custom.txt", "--prompt_domain")


def test_a_prompt_longer_than_the_context_names_both_numbers(assert_refused, flags):
    assert_refused([*flags, "--content", "watt " * 600], "positions", "has 1024")
