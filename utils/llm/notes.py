"""Read notes with the frozen LLM: the mean hidden state of a text's tokens at four fifths of the depth."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tqdm import tqdm
from transformers.utils import cached_file

from data_provider.notes import NoteStates
from utils.errors import UserError
from utils.llm.choice import LLMFlags, choose_llm, quiet_transformers
from utils.llm.loading import LoadedLLM, load_llm
from utils.system.files import atomic_write
from utils.system.gpu import is_gpu

# The share of the layers that read: on weather reports layers hardly differ, deep ones carry over to other words best.
_DEPTH = 0.8

# Longer notes are cut.
_MAX_TOKENS = 512

_BATCH = 32

# Bytes at the beginning and the end of each file of weights that tell LLMs apart.
_SAMPLED_BYTES = 2**20


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
    path = store / f"notes-{hashlib.sha256(f'{llm} {flags.llm_dtype}'.encode()).hexdigest()[:16]}.safetensors"
    known = _load(path)
    unread = [text for text in texts if _key(text) not in known]
    if unread:
        states = _read(unread, load_llm(flags))
        known |= dict(zip(map(_key, unread), states, strict=True))
        if PartialState().is_main_process:
            _keep(path, known)
    PartialState().print(f"Notes: {len(texts)} texts, {len(unread)} of them read, the others from {path}")
    return NoteStates({text: known[_key(text)] for text in texts}, llm)


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


def _load(path: Path) -> dict[bytes, np.ndarray]:
    """Load what was read before; nothing if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        kept = load_file(path)
        keys, states = kept["keys"], kept["states"]
        if keys.shape != (len(states), 32) or states.dtype != np.float32 or not np.isfinite(states).all():
            raise ValueError("its states are not finite or have another shape")
    except (SafetensorError, OSError, KeyError, ValueError) as problem:
        raise UserError(f"{path} is damaged ({problem}): delete it, and the notes are read again") from problem
    return dict(zip(map(bytes, keys.astype(np.uint8)), states, strict=True))


def _keep(path: Path, known: dict[bytes, np.ndarray]) -> None:
    keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 32)
    content = save({"keys": keys, "states": np.stack(list(known.values()))})
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(content))


@torch.inference_mode()
def _read(texts: Sequence[str], llm: LoadedLLM) -> list[np.ndarray]:
    """Run the LLM over texts, shortest first, and take the mean of each one's hidden states, (d_llm,) float32.

    The first token is left out: many LLMs attend to it whatever it is, so its state is an outlier.
    """
    most = min(_MAX_TOKENS, llm.context or _MAX_TOKENS)
    ids = [llm.tokenizer(text, verbose=False).input_ids for text in texts]
    if cut := sum(len(own) > most for own in ids):
        PartialState().print(f"Warning: {cut} of {len(texts)} notes are longer than {most} tokens: they are cut")
    states: list[np.ndarray] = [np.empty(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda number: len(ids[number]))
    is_hidden = None if PartialState().is_main_process else True
    with tqdm(total=len(texts), desc="Notes", unit=" texts", leave=False, disable=is_hidden) as bar:
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            found = _mean_states([ids[number][:most] or [llm.pad_id] for number in batch], llm)
            for number, state in zip(batch, found, strict=True):
                states[number] = state
            bar.update(len(batch))
    return states


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
