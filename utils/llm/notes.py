"""Read notes with the frozen LLM: the mean hidden state of each sentence's tokens at four fifths of the depth.

Sentence by sentence, since most sentences of a column occur often and are read once, and their order does not matter.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tqdm import tqdm
from transformers.utils import cached_file

from data_provider.notes import NoteStates, split_sentences
from utils.errors import UserError
from utils.llm.choice import LLMFlags, choose_llm, quiet_transformers
from utils.llm.loading import LoadedLLM, load_llm
from utils.system.files import atomic_write
from utils.system.gpu import is_gpu

# The share of the layers that read, see docs/experiments.md.
_DEPTH = 0.8

# Longer notes are cut.
_MAX_TOKENS = 512

_BATCH = 32

# Bytes at the beginning and the end of each file of weights that tell LLMs apart.
_SAMPLED_BYTES = 2**20


class ReadSentence(NamedTuple):
    """The state of a sentence, (d_llm,) float32, and its number of tokens, more than _MAX_TOKENS if it was cut."""

    state: np.ndarray
    tokens: int


def read_notes(texts: Sequence[str], flags: LLMFlags, store: Path) -> NoteStates:
    """Read texts; what was read before by the same LLM is taken from the store.

    Args:
        texts: distinct, none of them empty.
        flags: of the LLM, whose depth is used whatever --llm_layers says.
        store: the folder that keeps what was read.

    Raises:
        UserError: if there is no such LLM, or the store cannot be written.
    """
    flags = replace(flags, ablation="random_llm" if flags.ablation == "random_llm" else "none", mapping="full")
    flags = replace(flags, llm_dim=0, llm_layers=None, prompt_padding="left", llm_dtype=_dtype(flags.llm_dtype))
    depth = choose_llm(replace(flags, llm_layers=1)).total_layers
    flags = replace(flags, llm_layers=max(round(_DEPTH * depth), 1))
    llm = fingerprint(flags)
    path = store / f"notes-{hashlib.sha256(f'sentences {llm} {flags.llm_dtype}'.encode()).hexdigest()[:16]}.safetensors"
    known = _load(path)
    parts = {text: split_sentences(text) for text in texts}
    sentences = list(dict.fromkeys(sentence for part in parts.values() for sentence in part))
    unread = [sentence for sentence in sentences if _key(sentence) not in known]
    if unread:
        known |= dict(zip(map(_key, unread), _read(unread, load_llm(flags)), strict=True))
        if PartialState().is_main_process:
            _keep(path, known)
    others = f", the others from {path}" if len(unread) < len(sentences) else f" and kept in {path}"
    PartialState().print(f"Notes: {len(texts)} texts of {len(sentences)} sentences, {len(unread)} of them read{others}")
    read = {sentence: known[_key(sentence)] for sentence in sentences}
    kept = {text: _first_sentences(part, read) for text, part in parts.items()}
    if cut := sum(sum(read[one].tokens for one in part) > _MAX_TOKENS for part in parts.values()):
        PartialState().print(f"Warning: {cut} of {len(texts)} notes are longer than {_MAX_TOKENS} tokens: they are cut")
    return NoteStates({sentence: own.state for sentence, own in read.items()}, kept, llm)


def _first_sentences(sentences: Sequence[str], read: Mapping[str, ReadSentence]) -> list[str]:
    """Select the sentences of a note up to its limit of tokens, one at least."""
    ends = np.cumsum([read[sentence].tokens for sentence in sentences])
    return list(sentences[: max(int((ends <= _MAX_TOKENS).sum()), 1)])


def fingerprint(flags: LLMFlags) -> str:
    """Hash the config, the tokenizer and samples of the weights of the LLM of the flags, without loading it."""
    source, _ = flags.choose_source()
    folder = Path(source)
    if not folder.is_dir():
        with quiet_transformers():
            folder = Path(cached_file(source, "config.json")).parent
    digest = hashlib.sha256(f"{flags.load_in_4bit} {flags.llm_layers}".encode())
    if flags.ablation == "random_llm":
        digest.update(f"random {flags.seed}".encode())
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".model") and file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as content:
                digest.update(content.read(_SAMPLED_BYTES))
                content.seek(max(file.stat().st_size - _SAMPLED_BYTES, 0))
                digest.update(content.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def _dtype(name: str) -> str:
    """Choose the precision: bfloat16 where the machine computes it fast, unless the flags say otherwise."""
    device = PartialState().device
    if name == "auto" and not is_gpu(device) and torch.cpu._is_amx_tile_supported():
        return "bfloat16"
    return name


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _load(path: Path) -> dict[bytes, ReadSentence]:
    """Load what was read before; nothing if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        kept = load_file(path)
        keys, states, tokens = kept["keys"], kept["states"], kept["tokens"]
        if keys.shape != (len(states), 32) or states.dtype != np.float32 or not np.isfinite(states).all():
            raise ValueError("its states are not finite or have another shape")
        if tokens.shape != (len(states),) or tokens.dtype != np.int64 or (tokens < 0).any():
            raise ValueError("its numbers of tokens are wrong")
    except (SafetensorError, OSError, KeyError, ValueError) as problem:
        raise UserError(f"{path} is damaged ({problem}): delete it, and the notes are read again") from problem
    return dict(zip(map(bytes, keys.astype(np.uint8)), map(ReadSentence, states, tokens.tolist()), strict=True))


def _keep(path: Path, known: dict[bytes, ReadSentence]) -> None:
    keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 32)
    states, tokens = zip(*known.values(), strict=True)
    content = save({"keys": keys, "states": np.stack(states), "tokens": np.array(tokens, np.int64)})
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(content))


@torch.inference_mode()
def _read(sentences: Sequence[str], llm: LoadedLLM) -> list[ReadSentence]:
    """Run the LLM over sentences, shortest first, and take the mean of each one's hidden states.

    The first token is left out: many LLMs attend to it whatever it is, so its state is an outlier.
    """
    most = min(_MAX_TOKENS, llm.context or _MAX_TOKENS)
    ids = [llm.tokenizer(sentence, verbose=False).input_ids for sentence in sentences]
    read: list[ReadSentence | None] = [None] * len(sentences)
    order = sorted(range(len(sentences)), key=lambda number: len(ids[number]))
    is_hidden = None if PartialState().is_main_process else True
    with tqdm(total=len(sentences), desc="Notes", unit=" sentences", leave=False, disable=is_hidden) as bar:
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            states = _mean_states([ids[number][:most] or [llm.pad_id] for number in batch], llm)
            for number, state in zip(batch, states, strict=True):
                is_cut = len(ids[number]) > most
                read[number] = ReadSentence(state, _MAX_TOKENS + 1 if is_cut else len(ids[number]))
            bar.update(len(batch))
    return read


def _mean_states(ids: Sequence[Sequence[int]], llm: LoadedLLM) -> np.ndarray:
    """Run one batch of token ids, padded on the right."""
    longest = max(map(len, ids))
    tokens = torch.tensor([[*own, *[llm.pad_id] * (longest - len(own))] for own in ids])
    lengths = torch.tensor([len(own) for own in ids])[:, None]
    mask = (torch.arange(longest) < lengths).long()
    hidden = llm.backbone(
        tokens.to(llm.device), attention_mask=mask.to(llm.device), use_cache=False
    ).last_hidden_state.float()
    counted = (mask * ((torch.arange(longest) > 0) | (lengths == 1))).to(llm.device)
    return ((hidden * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)).cpu().numpy()
