"""Choose an LLM by the flags: its source, its config, its layers and its precision."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig

from utils.cli.options import FlagGroup
from utils.cli.places import BASE_MODELS, looks_like_a_path
from utils.errors import UserError, first_line
from utils.system.gpu import has_bfloat16

# Limits far above any LLM: larger sizes, from a damaged or foreign config, would exhaust memory or take minutes.
_LARGEST_SIZES = {
    "num_hidden_layers": 1_000,
    "hidden_size": 100_000,
    "vocab_size": 10_000_000,
    "intermediate_size": 10_000_000,
    "max_position_embeddings": 1_000_000_000,
}

# The LLMs of --llm_model: folder in base_models/, Hub id and Time-LLM's number of layers, None for all.
KNOWN_LLMS = {
    "LLAMA": ("llama-7b", "huggyllama/llama-7b", 6),
    "GPT2": ("gpt2", "openai-community/gpt2", 6),
    "BERT": ("bert-base-uncased", "google-bert/bert-base-uncased", 6),
    "QWEN": ("Qwen2.5-3B", "Qwen/Qwen2.5-3B-Instruct", None),
}


@dataclass(frozen=True)
class LLMFlags(FlagGroup):
    """The flags that choose an LLM and say how to run it."""

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

    def choose_source(self) -> tuple[str, int | None]:
        """Choose the folder or Hub id of the LLM and its default number of layers, None for all."""
        if self.llm_model_path:
            return self.llm_model_path, None
        name, hub_id, layers = KNOWN_LLMS[self.llm_model]
        folder = Path(BASE_MODELS) / name
        return (str(folder) if folder.is_dir() else hub_id), layers


@dataclass(frozen=True)
class LLMChoice:
    """The LLM that the flags name, before its weights are loaded.

    Attributes:
        source: folder or Hub id.
        config: the LLM's config, cut to the layers in use.
        total_layers: number of layers before the cut.
        in_4bit: whether the linear layers are NF4 once loaded.
        is_quantized: whether the files already hold NF4 weights.
    """

    source: str
    config: PretrainedConfig
    total_layers: int
    in_4bit: bool
    is_quantized: bool

    @property
    def text_config(self) -> PretrainedConfig:
        """The language model's part of the config."""
        return self.config.get_text_config()


def choose_llm(flags: LLMFlags) -> LLMChoice:
    """Read the config of the LLM that the flags name.

    Raises:
        UserError: if the LLM does not exist, or does not have the layers or the hidden size that the flags ask for.
    """
    source, default_layers = flags.choose_source()
    config = load_pretrained(AutoConfig, source)
    _check_config(config, source)
    text_config = config.get_text_config()
    total_layers = text_config.num_hidden_layers
    layers = flags.llm_layers or default_layers or total_layers
    if layers > total_layers:
        raise UserError(f"--llm_layers {layers} is more than {source} has: give at most {total_layers}")
    if flags.ablation != "no_llm":
        use_first_layers(text_config, layers, source)
    else:
        with contextlib.suppress(UserError):  # no layer is run, so an LLM that cannot be cut may keep all of them
            use_first_layers(text_config, 1, source)
    if flags.llm_dim not in (0, text_config.hidden_size):
        raise UserError(
            f"--llm_dim {flags.llm_dim} is not the hidden size of {source}: give {text_config.hidden_size}, or 0 to"
            " read the size from the LLM"
        )
    is_quantized = _is_nf4(config, source)
    return LLMChoice(source, config, total_layers, flags.load_in_4bit or is_quantized, is_quantized)


def _check_config(whole: PretrainedConfig, source: str) -> None:
    """Refuse a config with missing, wrong or huge sizes, before a model of these sizes is built for minutes."""
    config = whole.get_text_config()
    if whole.is_encoder_decoder:
        raise UserError(f"{source} is an encoder-decoder: use a decoder-only or an encoder-only LLM")
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if not isinstance(getattr(config, name, None), int):
            raise UserError(f"{source} is not a supported language model: its config has no {name}")
    for name, largest in _LARGEST_SIZES.items():
        size = getattr(config, name, None)
        if isinstance(size, int) and not 0 <= size <= largest:
            raise UserError(f"{source} is damaged: its config has {name} {size}, not 0 to {largest}")
    files = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))  # 0 for a Hub id
    # A lower bound of the number of weights; each takes at least half a byte.
    rows_in_a_layer = getattr(config, "intermediate_size", None) or 0
    weights = config.hidden_size * (config.vocab_size + config.num_hidden_layers * rows_in_a_layer)
    if files and weights > 1e8 and weights / 2 > 8 * files:
        raise UserError(
            f"{source} is damaged: its config asks for {weights / 1e9:.1f} billion weights, its files hold"
            f" {files / 1e9:.3f} GB"
        )


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Choose the dtype in which the LLM computes; `auto` is the best one that the device supports in hardware."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


def use_first_layers(config: PretrainedConfig, layers: int, source: str) -> None:
    """Cut an LLM's config to its first layers, or raise a UserError if this kind of LLM cannot be cut."""
    if layers == config.num_hidden_layers:
        return
    try:
        config.num_hidden_layers = layers
    except (NotImplementedError, AttributeError) as problem:
        raise UserError(f"{source} cannot be cut to --llm_layers {layers}: leave it out") from problem
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def _is_nf4(config: PretrainedConfig, source: str) -> bool:
    """Return whether an LLM's files hold NF4 weights, as scripts/quantize_llm.py writes them."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return False
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("quant_method") != "bitsandbytes" or settings.get("bnb_4bit_quant_type") != "nf4":
        raise UserError(f"{source} is quantized, but not to NF4: use the original LLM with --load_in_4bit")
    return True


def load_pretrained(auto: type, source: str, **options):
    """Call `from_pretrained` on local files or, failing that, a Hub id on the Hub, without running any code in them.

    Raises:
        UserError: if the source does not exist, is damaged or is not supported.
    """
    options["trust_remote_code"] = False
    with quiet_transformers(), _failures_as_user_errors(source):
        try:
            loaded = auto.from_pretrained(source, local_files_only=True, **options)
        except OSError:
            if looks_like_a_path(source):
                raise
            loaded = auto.from_pretrained(source, **options)
        if isinstance(loaded, PretrainedConfig):
            # A config may name kernels that transformers downloads from the Hub and runs: use the built-in ones.
            loaded._attn_implementation = loaded._experts_implementation = None
        return loaded


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' messages, and its progress bars unless stderr is a terminal.

    Its load report lists the layers that were left out on purpose; the caller checks for missing weights.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _failures_as_user_errors(source: str) -> Iterator[None]:
    """Turn every exception but out of memory into a one-line error that names the LLM."""
    try:
        yield
    except Exception as problem:  # transformers can raise anything on a damaged or foreign folder
        if "out of memory" in str(problem):  # transformers may wrap torch's error in another
            raise torch.OutOfMemoryError("CUDA out of memory.") from problem
        if "trust_remote_code" in str(problem):
            raise UserError(
                f"{source} comes with code of its own, which is never run: use an LLM that transformers supports"
            ) from problem
        raise UserError(
            f"cannot load the LLM {source}: {first_line(problem)} (--llm_model_path needs a folder with config.json,"
            " weights and tokenizer, or a Hub id; python scripts/fetch.py qwen2.5-3b or smollm2 downloads one)"
        ) from problem
