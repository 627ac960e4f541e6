"""Load a frozen LLM and its tokenizer: names, folders, layers, precision, device, all in one place."""

import contextlib
import copy
import importlib.util
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig

from layers.FrozenLinear import freeze_linears
from utils.cli.options import FlagGroup
from utils.cli.places import BASE_MODELS, is_local, looks_like_a_path
from utils.errors import UserError
from utils.llm.identity import LLMIdentity, LLMTraces, acting_fields, identify, probe_layers, sketch_embeddings
from utils.llm.quiet import quiet_transformers
from utils.system.gpu import has_bfloat16

# What --ablation does to the LLM, in words.
ABLATIONS = {"none": "", "no_llm": "not run, only its token embeddings are used", "random_llm": "random weights"}

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
class LoadedLLM:
    """A frozen LLM on its device, ready to be run.

    Attributes:
        backbone: the model without head, in eval mode, no parameter trainable.
        tokenizer: its tokenizer.
        pad_id: the token that prompts are padded with.
        device: where it is.
        source: the folder or Hub id that it came from.
        folder: that folder's absolute path, None for a Hub id.
        layers_there: the layers of the whole model; `identity.layers` are in use.
        context: positions it has, None for no limit.
        identity, traces: what tells it from others.
        note: what --ablation has done to it, empty for nothing.
    """

    backbone: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    pad_id: int
    device: torch.device
    source: str
    folder: str | None
    layers_there: int
    context: int | None
    identity: LLMIdentity
    traces: LLMTraces
    note: str = ""

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return str(self.backbone.dtype).removeprefix("torch.")

    def describe(self) -> str:
        """Return one line that names the LLM."""
        precision = f"NF4, computing in {self.dtype}" if self.identity.quantization == "nf4" else self.dtype
        return (
            f"LLM: {self.identity.model_type}, {self.identity.layers} of {self.layers_there} layers,"
            f" hidden size {self.identity.hidden_size}, {precision}" + (f" ({self.note})" if self.note else "")
        )

    def as_dict(self) -> dict:
        """Return source, folder, precision and identity as plain values."""
        return {"source": self.source, "folder": self.folder, "dtype": self.dtype, **asdict(self.identity)}


def llm_of(model: nn.Module) -> LoadedLLM | None:
    """Return the LLM inside a forecaster, None if it has none."""
    return getattr(model, "llm_info", None)


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
    # A folder may name kernels to compute with, which are fetched from the Hub and run: transformers' own are used.
    config._attn_implementation = config._experts_implementation = None
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


def load_llm(flags: LLMFlags) -> LoadedLLM:
    """Load the LLM that the flags name, frozen, on this process's device.

    With --mapping compact the token embeddings stay in host memory: prompts are looked up there.

    Raises:
        UserError: if the model is not there, is damaged, has fewer layers or another width than asked for.
    """
    state = PartialState()
    state.print(f"Loading generic model from: {choose_source(flags)[0]}")
    choice = choose_llm(flags)
    source, text_config = choice.source, choice.text_config
    tokenizer = _load_tokenizer(source, text_config.vocab_size)
    pad_id = _padding_token(tokenizer, flags.prompt_padding, text_config.vocab_size, source)
    seed = flags.seed if flags.ablation == "random_llm" else None
    backbone = _load_backbone(choice, choose_dtype(flags.llm_dtype, state.device), state, seed)
    embeddings = backbone.get_input_embeddings().weight
    if embeddings.shape[1] != text_config.hidden_size:
        raise UserError(
            f"{source} has token embeddings of width {embeddings.shape[1]} and hidden states of"
            f" {text_config.hidden_size}: take an LLM where both are the same"
        )
    traces = LLMTraces(
        acting_fields(text_config),
        sketch_embeddings(embeddings),
        None if flags.ablation == "no_llm" else probe_layers(backbone, state.device),
    )
    if flags.mapping == "compact":
        backbone.get_input_embeddings().to("cpu")
    context = getattr(text_config, "max_position_embeddings", None) or 0
    return LoadedLLM(
        backbone=backbone,
        tokenizer=tokenizer,
        pad_id=pad_id,
        device=state.device,
        source=source,
        folder=str(Path(source).absolute()) if is_local(source) else None,
        layers_there=choice.layers_there,
        context=context if context > 0 else None,
        identity=identify(text_config, embeddings, tokenizer, choice.in_4bit),
        traces=traces,
        note=ABLATIONS[flags.ablation],
    )


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
    return text_config


def _load_tokenizer(source: str, vocab_size: int) -> transformers.PreTrainedTokenizerBase:
    """Return the tokenizer; without its files, transformers makes an empty one and says nothing."""
    tokenizer = load_pretrained(AutoTokenizer, source)
    ids = tokenizer("Input statistics: min value -1.25", add_special_tokens=False).input_ids
    if not ids or ids.count(tokenizer.unk_token_id) > len(ids) / 2 or max(ids) >= vocab_size:
        raise UserError(f"{source} has no tokenizer that fits its model: add its tokenizer files (tokenizer.json, ...)")
    return tokenizer


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


def _load_backbone(choice: LLMChoice, dtype: torch.dtype, state: PartialState, seed: int | None) -> nn.Module:
    """Return the frozen LLM; with a seed, its weights are drawn from that instead of read."""
    share_keys_on_cpu(state.device)
    options = {
        "config": choice.config,
        "dtype": dtype,
        "device_map": {"": state.device},
        "output_loading_info": True,
    }
    if choice.in_4bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("an LLM in 4 bits needs the package bitsandbytes: pip install bitsandbytes")
        state.print("Enabling 4-bit quantization...")
    if choice.in_4bit and not (choice.is_quantized and seed is None):
        options["quantization_config"] = nf4(dtype)
    if seed is None:
        backbone, loading = load_pretrained(AutoModel, choice.source, **options)
    else:
        backbone, loading = _draw(dtype, seed, options)
    # A pooler stands beside the hidden states that we read; many checkpoints have none.
    missing = sorted(name for name in loading["missing_keys"] if "pooler" not in name)
    if missing:
        raise UserError(
            f"{choice.source} lacks {len(missing)} weights of its model, {missing[0]} first: fetch it again"
        )
    if choice.in_4bit:
        _prepare_4bit(backbone, dtype, lets_files_go=state.device.type == "cpu" and not choice.is_quantized)
    backbone.requires_grad_(False).eval()
    freeze_linears(backbone)
    return backbone


def _draw(dtype: torch.dtype, seed: int, options: dict) -> tuple[nn.Module, dict]:
    """Return what `from_pretrained` does, with weights as the LLM's makers drew them before they trained it."""
    config = copy.deepcopy(options["config"])
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that seeds a GPU's generator, too
        drawn = AutoModel.from_config(config, dtype=dtype, trust_remote_code=False)
        # Once more through the loader, which quantises and moves them like weights from files.
        return type(drawn).from_pretrained(None, state_dict=drawn.state_dict(), **{**options, "config": config})


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the way we quantise: NF4, double quantisation, computing in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def share_keys_on_cpu(device: torch.device) -> None:
    """Let query heads that share keys and values share them in memory, too.

    Else transformers copies them for every head. The CPU's attention shares them by itself; a GPU's fast kernels
    do not where there is a mask, so there it stays off.
    """
    if device.type == "cpu":
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")


def _prepare_4bit(backbone: nn.Module, dtype: torch.dtype, lets_files_go: bool) -> None:
    """Compute in `dtype`, whatever precision the files were written in, and keep gradients right.

    On CPUs with AVX512-BF16 bitsandbytes repacks weights on the first forward without gradient, and from then on
    the gradient to a layer's input is wrong, in silence.

    Args:
        backbone: the model.
        dtype: to compute in.
        lets_files_go: copy what is not quantised. On a CPU it is a view of files that are four times as large.
    """
    for module in backbone.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
            module.weight.quant_state.dtype = dtype
    for parameter in backbone.parameters():
        if parameter.is_floating_point():  # not one of 4 bits: those are packed into bytes
            parameter.data = parameter.data.to(dtype, copy=lets_files_go)


def _padding_token(tokenizer: transformers.PreTrainedTokenizerBase, padding: str, vocab_size: int, source: str) -> int:
    """Return the token to pad with: Time-LLM's choice, the end of text, else ``[PAD]``, where pads are seen."""
    if padding == "left":
        return 0  # masked: any token does
    tokenizer.add_special_tokens({"pad_token": tokenizer.eos_token or "[PAD]"})
    if tokenizer.pad_token_id >= vocab_size:
        raise UserError(f"{source} has no token to pad with: leave out --prompt_padding right")
    return tokenizer.pad_token_id


def load_pretrained(auto: type, source: str, **options):
    """Call `from_pretrained`: files on this disk first, then, for a Hub id, the Hub. Code in them is never run.

    Raises:
        UserError: if the source is not there, is damaged or foreign.
    """

    def load(**further: object) -> object:
        return auto.from_pretrained(source, trust_remote_code=False, **further, **options)

    with quiet_transformers():
        if looks_like_a_path(source):
            return explained(source, lambda: load(local_files_only=True))
        try:
            return load(local_files_only=True)
        except OSError:
            return explained(source, load)


def explained(source: str, load: Callable[[], object]):
    """Return `load()`, what it raises in one line that names the LLM."""
    try:
        return load()
    except Exception as problem:  # a damaged or foreign folder can make transformers raise anything
        if "out of memory" in str(problem):  # transformers may put another error on top of torch's
            raise torch.OutOfMemoryError("CUDA out of memory.") from problem
        if "trust_remote_code" in str(problem):
            raise UserError(
                f"{source} comes with code of its own, which is never run: take an LLM of a kind that transformers has"
            ) from problem
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise UserError(
            f"cannot load the LLM {source}: {reason[0]} (--llm_model_path takes a folder with config.json,"
            " weights and tokenizer, or a Hub id; python scripts/fetch.py qwen2.5-3b or smollm2 fetches one)"
        ) from problem
