"""Choose an LLM by the flags: where it is, its config, the layers in use, its precision."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from utils.cli.options import FlagGroup
from utils.cli.places import BASE_MODELS, is_local, looks_like_a_path
from utils.errors import UserError, first_line
from utils.llm.quiet import quiet_transformers
from utils.system.gpu import has_bfloat16

# Far beyond any LLM: sizes that a damaged or foreign config would have memory or minutes for.
_LARGEST_SIZES = {
    "num_hidden_layers": 1_000,
    "hidden_size": 100_000,
    "vocab_size": 10_000_000,
    "intermediate_size": 10_000_000,
    "max_position_embeddings": 1_000_000_000,
}


@dataclass(frozen=True)
class KnownLLM:
    """An LLM that `--llm_model` names: its folder under base_models/, its Hub id, Time-LLM's layer count."""

    folder: str
    hub_id: str
    layers: int | None


KNOWN_LLMS = {
    "LLAMA": KnownLLM("llama-7b", "huggyllama/llama-7b", 6),
    "GPT2": KnownLLM("gpt2", "openai-community/gpt2", 6),
    "BERT": KnownLLM("bert-base-uncased", "google-bert/bert-base-uncased", 6),
    "QWEN": KnownLLM("Qwen2.5-3B", "Qwen/Qwen2.5-3B-Instruct", None),
}


@dataclass(frozen=True)
class LLMFlags(FlagGroup):
    """Which LLM, and how to run it."""

    llm_model: str
    llm_model_path: str
    llm_layers: int | None
    llm_dim: int
    llm_dtype: str
    load_in_4bit: bool
    prompt_padding: str
    mapping: str
    ablation: str
    seed: int


@dataclass(frozen=True)
class LLMChoice:
    """The LLM that the flags name, as far as its config tells.

    Attributes:
        source: folder or Hub id.
        config: its config, cut to the layers in use.
        layers_there: the layers of the whole model.
        in_4bit: whether its linear layers are, or will be, NF4.
        is_quantized: whether they are so in its files already.
    """

    source: str
    config: PretrainedConfig
    layers_there: int
    in_4bit: bool
    is_quantized: bool

    @property
    def text_config(self) -> PretrainedConfig:
        """The part of the config that is about the language model."""
        return self.config.get_text_config()


def choose_llm(flags: LLMFlags) -> LLMChoice:
    """Read the config of the LLM that the flags name.

    Raises:
        UserError: if the model is not there, has fewer layers or another width than asked for.
    """
    source, layers = choose_source(flags)
    layers = flags.llm_layers or layers
    config = load_pretrained(AutoConfig, source)
    text_config = _text_config(config, source)
    layers_there = text_config.num_hidden_layers
    layers = layers or layers_there
    if layers > layers_there:
        raise UserError(f"--llm_layers {layers} is more than {source} has: give at most {layers_there}")
    if flags.ablation != "no_llm":
        _use_first_layers(text_config, layers, source)
    else:
        with contextlib.suppress(UserError):  # its embeddings are needed; whatever layers there are, none is run
            _use_first_layers(text_config, 1, source)
    if flags.llm_dim not in (0, text_config.hidden_size):
        raise UserError(
            f"--llm_dim {flags.llm_dim} is not the hidden size of {source}: give {text_config.hidden_size},"
            " or 0 to read it from the model"
        )
    is_quantized = _is_nf4(config, source)
    return LLMChoice(source, config, layers_there, flags.load_in_4bit or is_quantized, is_quantized)


def _text_config(config: PretrainedConfig, source: str) -> PretrainedConfig:
    """Return the part of a config that is about the language model, if it has what we need."""
    text_config = config.get_text_config()
    if config.is_encoder_decoder:
        raise UserError(f"{source} is an encoder-decoder: take a decoder-only or an encoder-only LLM")
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if not isinstance(getattr(text_config, name, None), int):
            raise UserError(f"{source} is no language model that we know how to run: its config has no {name}")
    for name, largest in _LARGEST_SIZES.items():
        size = getattr(text_config, name, None)
        if isinstance(size, int) and not 0 <= size <= largest:
            raise UserError(f"{source} is damaged: its config has {name} {size}, no LLM has more than {largest}")
    _check_files(text_config, source)
    return text_config


def _check_files(config: PretrainedConfig, source: str) -> None:
    """Refuse a folder whose files are far smaller than its config says: the model would be built for minutes first."""
    files = sum(file.stat().st_size for file in Path(source).glob("*.safetensors")) if is_local(source) else 0
    # No model here has fewer weights, and none takes less than half a byte for one.
    weights = config.hidden_size * (
        config.vocab_size + config.num_hidden_layers * (getattr(config, "intermediate_size", None) or 0)
    )
    if files and weights > 1e8 and weights / 2 > 8 * files:
        raise UserError(
            f"{source} is damaged: its config asks for {weights / 1e9:.1f} billion weights, its files hold"
            f" {files / 1e9:.3f} GB"
        )


def choose_source(flags: LLMFlags) -> tuple[str, int | None]:
    """Return the folder or Hub id of the LLM and the layers to use by default, None for all."""
    if not flags.llm_model_path:
        known = KNOWN_LLMS[flags.llm_model]
        folder = Path(BASE_MODELS) / known.folder
        return (str(folder) if folder.is_dir() else known.hub_id), known.layers
    return flags.llm_model_path, None


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return what the LLM computes in; `auto` picks by what the device has in hardware."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


def _use_first_layers(config: PretrainedConfig, layers: int, source: str) -> None:
    if layers == config.num_hidden_layers:
        return
    try:
        config.num_hidden_layers = layers
    except (NotImplementedError, AttributeError) as problem:
        raise UserError(f"{source} cannot be cut to --llm_layers {layers}: leave it out") from problem
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def _is_nf4(config: PretrainedConfig, source: str) -> bool:
    """Return whether a model's files hold NF4 weights (scripts/quantize_llm.py writes such)."""
    how = getattr(config, "quantization_config", None)
    if how is None:
        return False
    how = how if isinstance(how, dict) else how.to_dict()
    if how.get("quant_method") != "bitsandbytes" or how.get("bnb_4bit_quant_type") != "nf4":
        raise UserError(f"{source} is quantised otherwise than by NF4: take the model itself, with --load_in_4bit")
    return True


def load_pretrained(auto: type, source: str, **options):
    """Call `from_pretrained`: files on this disk first, then, for a Hub id, the Hub. Code in them is never run.

    Raises:
        UserError: if the source is not there, is damaged or foreign.
    """

    def load(**further: object) -> object:
        loaded = auto.from_pretrained(source, trust_remote_code=False, **further, **options)
        if isinstance(loaded, PretrainedConfig):
            # A config may name kernels, which would be fetched from the Hub and run: transformers' own are used.
            loaded._attn_implementation = loaded._experts_implementation = None
        return loaded

    with quiet_transformers():
        if looks_like_a_path(source):
            return reraise_as_user_error(source, lambda: load(local_files_only=True))
        try:
            return load(local_files_only=True)
        except OSError:
            return reraise_as_user_error(source, load)


def reraise_as_user_error(source: str, load: Callable[[], object]):
    """Return `load()`; an exception becomes one line that names the LLM."""
    try:
        return load()
    except Exception as problem:  # a damaged or foreign folder can make transformers raise anything
        if "out of memory" in str(problem):  # transformers may put another error on top of torch's
            raise torch.OutOfMemoryError("CUDA out of memory.") from problem
        if "trust_remote_code" in str(problem):
            raise UserError(
                f"{source} comes with code of its own, which is never run: take an LLM of a kind that transformers has"
            ) from problem
        raise UserError(
            f"cannot load the LLM {source}: {first_line(problem)} (--llm_model_path takes a folder with config.json,"
            " weights and tokenizer, or a Hub id; python scripts/fetch.py qwen2.5-3b or smollm2 fetches one)"
        ) from problem
