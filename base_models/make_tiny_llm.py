"""Make a tiny LLM with random weights, for tests, CI and --demo.

    python -m base_models.make_tiny_llm qwen2 base_models/tiny-qwen2

It has the architecture of its family and a byte-level BPE tokenizer that splits numbers into digits. The same family
and seed give the same files, less than 1 MB.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedTokenizerFast

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

# The tokenizer is trained on the words of prompts.
_CORPUS = (
    "<|start_prompt|>Dataset description: Task description: Input statistics: <|<end_prompt>|>",
    "forecast the next steps given the previous steps information; the trend of input is upward downward,",
    "min value, max value, median value, top lags are : the electricity transformer temperature is recorded",
    "hourly, daily and weekly readings of load, oil, traffic and weather; a series, a station, a sensor",
)

# The special tokens of each family, and the template of a text ($A).
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
    """Write a tiny LLM to a folder in Hugging Face format and return the folder.

    A folder that was written with the same arguments and the same torch is left unchanged.

    Args:
        family: one of `FAMILIES`.
        folder: created if it does not exist.
        seed: the random seed of the weights.

    Raises:
        UserError: if the folder contains another LLM.
    """
    folder = Path(folder)
    recipe = {"family": family, "seed": seed, "layers": layers, "width": hidden_size, "torch": torch.__version__}
    recipe_file = folder / "tiny_llm.json"
    if recipe_file.is_file() and read_json(recipe_file) == recipe:
        return folder
    if not recipe_file.is_file() and (folder / "config.json").is_file():
        raise UserError(f"{folder} holds another LLM: name an empty folder")
    tokenizer = _make_tokenizer(family)
    config = _make_config(family, layers, hidden_size, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    folder.mkdir(parents=True, exist_ok=True)
    # Written elsewhere and moved, because a file in the folder may be a link.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as temporary:
        with quiet_transformers():
            model.to(torch.float16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            rename(file, folder / file.name)
    write_text(recipe_file, json.dumps(recipe))  # last: a folder with a recipe is complete
    return folder


def _make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    named, template = _SPECIAL_TOKENS[family]
    special = list(dict.fromkeys(named.values()))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
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
        single=template, special_tokens=[(token, tokenizer.token_to_id(token)) for token in special]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _make_config(family: str, layers: int, hidden_size: int, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    options = {} if family == "gpt2" else {"intermediate_size": 2 * hidden_size}
    if family in ("qwen2", "llama"):
        options["num_key_value_heads"] = HEADS // 2
    return AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=0.08,  # four times the usual, because so small a network would hardly react to its input
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code, see `exit_code_of`."""
    parser = OneLineParser(prog="python -m base_models.make_tiny_llm", description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", help="output folder")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the weights")
    parser.add_argument("--layers", type=int, default=LAYERS, help="number of layers")

    def work() -> None:
        args = parser.parse_args(argv)
        print(make_tiny_llm(args.family, args.folder, args.seed, args.layers))

    return exit_code_of(work, "the folder is not whole")


if __name__ == "__main__":
    leave(main)
