"""Make a tiny LLM with random weights, for tests, CI and --demo.

    python -m base_models.make_tiny_llm qwen2 base_models/tiny-qwen2

It has the layout of its big relative and a real byte-level BPE tokenizer that splits digits one by one. The
same family and seed give the same files, well under 1 MB.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from utils.cli.command import OneLineParser, exit_code_of
from utils.cli.signals import leave
from utils.errors import UserError
from utils.llm.choice import quiet_transformers
from utils.system.files import read_json, rename, write_text

HIDDEN_SIZE = 64
LAYERS = 2
HEADS = 4
CONTEXT = 1024
VOCABULARY = 512

# What the tokenizer learns its merges from: words that prompts are made of.
_CORPUS = (
    "<|start_prompt|>Dataset description: Task description: Input statistics: <|<end_prompt>|>",
    "forecast the next steps given the previous steps information; the trend of input is upward downward,",
    "min value, max value, median value, top lags are : the electricity transformer temperature is recorded",
    "hourly, daily and weekly readings of load, oil, traffic and weather; a series, a station, a sensor",
)

# Special tokens of each family: those it has, and what it puts around a text ($A).
_SPECIAL_TOKENS = {
    "qwen2": ({"eos_token": "<|endoftext|>"}, "$A"),
    "gpt2": ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}, "$A"),
    "llama": ({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "<s> $A"),
    "bert": (
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "[CLS] $A [SEP]",
    ),
}
FAMILIES = tuple(_SPECIAL_TOKENS)


def make_tiny_llm(
    family: str, folder: str | os.PathLike, seed: int = 0, layers: int = LAYERS, hidden_size: int = HIDDEN_SIZE
) -> Path:
    """Write a tiny LLM as a Hugging Face folder, unless one with the same recipe is there.

    Args:
        family: qwen2, gpt2, llama or bert.
        folder: where to; made if need be.
        seed: of the weights.
        layers, hidden_size: of the network.

    Returns:
        The folder.

    Raises:
        UserError: if the folder holds something else.
    """
    folder = Path(folder)
    recipe = {"family": family, "seed": seed, "layers": layers, "width": hidden_size, "torch": torch.__version__}
    receipt = folder / "tiny_llm.json"
    if receipt.is_file() and read_json(receipt) == recipe:
        return folder
    if not receipt.is_file() and (folder / "config.json").is_file():
        raise UserError(f"{folder} holds another LLM: name an empty folder")
    tokenizer = _make_tokenizer(family)
    config = _make_config(family, layers, hidden_size, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    folder.mkdir(parents=True, exist_ok=True)
    # Made elsewhere and moved in: no link that lies in the folder is written through.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as workshop:
        with quiet_transformers():
            model.to(torch.float16).save_pretrained(workshop)
        tokenizer.save_pretrained(workshop)
        for file in Path(workshop).iterdir():
            rename(file, folder / file.name)
    write_text(receipt, json.dumps(recipe))  # last: a folder with a receipt is whole
    return folder


def _make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    named, around = _SPECIAL_TOKENS[family]
    special = list(dict.fromkeys(named.values()))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(token, tokenizer.token_to_id(token)) for token in special]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _make_config(family: str, layers: int, hidden_size: int, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    shared = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.08,  # four times the usual: so narrow a network would hardly react to its input
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    wide = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
    }
    if family == "gpt2":
        return GPT2Config(n_embd=hidden_size, n_layer=layers, n_head=HEADS, n_positions=CONTEXT, **shared)
    if family == "bert":
        return BertConfig(**wide, **shared)
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[family]
    return config(num_key_value_heads=HEADS // 2, **wide, **shared)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 2 with one line if the input is wrong, 130 interrupted."""
    parser = OneLineParser(prog="python -m base_models.make_tiny_llm", description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", help="where to")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the network")

    def work() -> None:
        args = parser.parse_args(argv)
        print(make_tiny_llm(args.family, args.folder, args.seed, args.layers))

    return exit_code_of(work, "the folder is not whole")


if __name__ == "__main__":
    leave(main)
