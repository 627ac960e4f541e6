"""Check that an LLM is the one a checkpoint was trained with; with another, its forecasts would be meaningless."""

import hashlib
import json
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from layers.InFloat32 import InFloat32
from utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_SHAPE_OF_AN_LLM = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)

# Fields of a config that change no hidden state in evaluation mode, besides those on dropout, token ids and labels.
# The number of layers is compared as part of `LLMIdentity`, randomly drawn weights by the probe.
_WITHOUT_EFFECT = {
    *("transformers_version", "architectures", "dtype", "torch_dtype", "return_dict", "use_cache", "tokenizer_class"),
    *("output_hidden_states", "output_attentions", "problem_type", "initializer_range", "tie_word_embeddings"),
    *("chunk_size_feed_forward", "quantization_config", "num_hidden_layers", "task_specific_params"),
    *("gradient_checkpointing", "name_or_path"),
}

# Token embeddings are summed over blocks of rows, along random directions; a chunk is converted to float32 at once.
_BLOCK_ROWS, _DIRECTIONS = 64, 4
_CHUNK_ROWS = 128 * _BLOCK_ROWS

# A sample of prompt words and numbers: the vocabulary alone does not show how a tokenizer splits a text.
_SAMPLE = (
    "<|start_prompt|>Dataset description: hourly readings. Task description: forecast the next 96 steps given the "
    "previous 512 steps information; Input statistics: min value -1.7905428409576416, max value 3.985621452331543, "
    "median value 1.1920928955078125e-07, the trend of input is upward, top 5 lags are : [0, 1, 95, 48, 2]"
    f"<|<end_prompt>|> {' '.join(map(str, range(1000)))}"
)


@dataclass(frozen=True)
class LLMIdentity:
    """The properties of an LLM that must equal those in the checkpoint exactly.

    Attributes:
        layers: number of layers in use.
        quantization: nf4 or none.
        config_hash: hash of the fields that determine the network's shape and keep their names between releases.
        embedding_hash: hash of the signs of the first 64 token embeddings, which are the same in any precision.
        tokenizer_hash: hash of the vocabulary and of a sample text's token ids.
        merges_hash: hash of the merges of a BPE tokenizer in their order; empty for other tokenizers.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    layers: int
    quantization: str
    config_hash: str
    embedding_hash: str
    tokenizer_hash: str = ""
    merges_hash: str = ""


@dataclass(frozen=True)
class LLMTraces:
    """The properties of an LLM that must equal those in the checkpoint up to rounding.

    Attributes:
        config: fields that affect the hidden states, as plain values; only fields that both sides have are compared.
        embeddings: (blocks, 5) float32, sums over all token embeddings, see `sketch_embeddings`.
        probe: (tokens, d_llm) float32, hidden states, see `probe_layers`; None if the LLM is not run.
    """

    config: dict
    embeddings: torch.Tensor
    probe: torch.Tensor | None = None


def identify(
    config: "PretrainedConfig", embeddings: torch.Tensor, tokenizer: "PreTrainedTokenizerBase", in_4bit: bool
) -> LLMIdentity:
    """Build the identity of an LLM from the language model's part of its config."""
    shape = {name: getattr(config, name, None) for name in _SHAPE_OF_AN_LLM}
    signs = (embeddings[:64].detach().float().cpu() > 0).numpy()
    return LLMIdentity(
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=config.num_hidden_layers,
        quantization="nf4" if in_4bit else "none",
        config_hash=_hash(json.dumps(shape, sort_keys=True).encode()),
        embedding_hash=_hash(signs.tobytes()),
        tokenizer_hash=_hash_tokenizer(tokenizer),
        merges_hash=_hash_merges(tokenizer),
    )


def relevant_fields(config: "PretrainedConfig") -> dict:
    """Select the fields of a config that affect the hidden states, as plain values."""
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _WITHOUT_EFFECT
        and not name.startswith("_")
        and not name.endswith(("_token_id", "pdrop", "dropout_prob"))
        and not any(word in name for word in ("dropout", "label"))
    }
    return json.loads(json.dumps(fields, default=str))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _hash_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash the behavior of a tokenizer, independent of its files and of the release that wrote them."""
    tokens, ids = zip(*sorted(tokenizer.get_vocab().items(), key=itemgetter(1)), strict=True)
    numbers = np.array([*ids, *tokenizer(_SAMPLE, verbose=False).input_ids], np.int64)
    return _hash("\n".join(tokens).encode("utf-8", "surrogatepass") + numbers.tobytes())


def _hash_merges(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash the merges of a BPE tokenizer; return an empty string for other tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    _, is_bpe, merges = (backend.to_str() if backend else "").rpartition('"merges":')
    # Releases write a merge as "a b" or as ["a", "b"]; parsing the JSON would take longer than everything else.
    plain = merges.translate(dict.fromkeys(map(ord, '[]{}", \n'))) if is_bpe else ""
    return _hash(plain.encode()) if plain else ""


@torch.no_grad()
def sketch_embeddings(embeddings: torch.Tensor) -> torch.Tensor:
    """Sketch token embeddings, (V, d_llm), by sums that change if any row changes or moves: (blocks, 5) float32.

    For each block of rows, the sketch has the sums along four random directions, with a random sign for each row, and
    the norm of the block.
    """
    rows, width = embeddings.shape
    generator = torch.Generator().manual_seed(0)
    directions = (torch.randint(2, (width, _DIRECTIONS), generator=generator) * 2.0 - 1).to(embeddings.device)
    signs = torch.randint(2, (rows, 1), generator=generator) * 2.0 - 1
    chunks = [embeddings[start : start + _CHUNK_ROWS].float() for start in range(0, rows, _CHUNK_ROWS)]
    sums = torch.cat([(chunk @ directions).cpu() for chunk in chunks]) * signs
    squares = torch.cat([chunk.square().sum(1, keepdim=True).cpu() for chunk in chunks])
    parts = torch.cat([sums, squares], dim=1).double().split(_BLOCK_ROWS)
    sketch = torch.stack([block.sum(0) for block in parts])
    sketch[:, -1].sqrt_()
    return sketch.float()


@torch.no_grad()
def probe_layers(backbone: nn.Module, device: torch.device) -> torch.Tensor:
    """Run the LLM on a few tokens of its vocabulary and return the hidden states, (16, d_llm) float32 on the CPU.

    They depend on every weight in use. They are computed in float32, so that they depend on the weights alone and not
    on the precision in which the LLM computes.
    """
    ids = torch.linspace(0, backbone.get_input_embeddings().num_embeddings - 1, 16).long()
    with InFloat32():
        return backbone(ids[None].to(device), use_cache=False).last_hidden_state[0].cpu()


def check_same_llm(path: Path, saved: dict, saved_traces: LLMTraces, present: dict, traces: LLMTraces) -> None:
    """Refuse an LLM other than the one a checkpoint was trained with.

    Args:
        path: the checkpoint's path, for messages.
        saved, saved_traces: the checkpoint's LLM; in files of earlier versions, values may be missing or empty.
        present, traces: the loaded LLM.

    Raises:
        UserError: names what differs.
    """
    # A folder may be moved, and the user may try another precision.
    for name in sorted(saved.keys() - {"source", "folder", "dtype"}):
        if saved[name] != present.get(name):
            _refuse(path, f"{name} {saved[name]}, here {present.get(name)}")
    _check_fields(path, saved_traces.config, traces.config)
    same_dtype = saved["dtype"] == present["dtype"]
    _check_embeddings(path, saved_traces.embeddings, traces.embeddings, same_dtype)
    _check_probe(path, saved_traces.probe, traces.probe, same_dtype, present["quantization"] == "nf4")


def _refuse(path: Path, difference: str) -> None:
    raise UserError(f"{path} was trained with another LLM ({difference}): use the LLM of its run")


def _check_fields(path: Path, saved: dict, present: dict, prefix: str = "") -> None:
    """Compare the fields that both configs have; another release of transformers may have other fields."""
    for name in sorted(saved.keys() & present.keys()):
        before, now = saved[name], present[name]
        if isinstance(before, dict) and isinstance(now, dict):
            _check_fields(path, before, now, f"{prefix}{name}.")
        elif before != now:
            _refuse(path, f"its config has {prefix}{name} {before}, here {now}")


def _check_embeddings(path: Path, saved: torch.Tensor, present: torch.Tensor, same_dtype: bool) -> None:
    if not saved.numel():  # the checkpoint of an earlier version
        return
    if saved.shape != present.shape:
        _refuse(path, "its token embeddings differ")
    # A replaced row changes the sums by about a fifth of the block's norm, rounding to bfloat16 by a thousandth.
    tolerance = 1e-4 if same_dtype else 0.02
    difference = (present - saved).abs().amax(1) / saved[:, -1].clamp(min=torch.finfo(saved.dtype).tiny)
    if changed := int((~(difference <= tolerance)).sum()):  # the negation also counts NaN
        _refuse(path, f"its token embeddings differ, in {changed} of {len(saved)} blocks of {_BLOCK_ROWS} rows")


def _check_probe(
    path: Path, saved: torch.Tensor | None, present: torch.Tensor | None, same_dtype: bool, in_4bit: bool
) -> None:
    """Refuse an LLM of the same shape and vocabulary with other weights."""
    # With weights in the same precision, probes differ by float32's rounding only, and in 4 bits by weights halfway
    # between two of the 16 levels. With bfloat16 on one side only, the tested LLMs (tiny ones, SmolLM2-135M) differed
    # by up to 1%, and in 4 bits, where many weights then round to another level, by up to 8%. Noise of 1% and 5% of
    # the weights' standard deviation changed the probe by 4% and 17%, randomly drawn matrices by more than 100%.
    if saved is None or present is None:  # the checkpoint of an earlier version, or an LLM that is not run
        return
    if saved.shape != present.shape:
        _refuse(path, "its hidden states have another width")
    tolerance = (0.03 if in_4bit else 1e-3) if same_dtype else (0.2 if in_4bit else 0.02)
    difference = ((present - saved).norm() / saved.norm()).item()
    if not difference <= tolerance:  # the negation also catches NaN
        _refuse(path, f"its hidden states differ by {difference:.1%}")
