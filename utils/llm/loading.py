"""Load a frozen LLM and its tokenizer, with the layers, the precision and the device that the flags choose."""

import copy
import importlib.util
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from torch import nn
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

from layers.Float32Attention import use_float32_attention
from layers.FrozenLinear import freeze_linears
from utils.errors import UserError
from utils.llm.choice import LLMChoice, LLMFlags, choose_dtype, choose_llm, load_pretrained, quiet_transformers
from utils.llm.identity import LLMIdentity, LLMTraces, identify, probe_layers, relevant_fields, sketch_embeddings

# How --ablation changes the LLM, in words.
_ABLATIONS = {"none": "", "no_llm": "not run, only its token embeddings are used", "random_llm": "random weights"}


@dataclass(frozen=True)
class LoadedLLM:
    """A frozen LLM on its device, ready to run.

    Attributes:
        backbone: the LLM without its head, in evaluation mode, with no trainable parameter.
        pad_id: id of the token that pads prompts.
        source: folder or Hub id.
        total_layers: number of layers of the whole LLM, of which `identity.layers` are in use.
        folder: absolute path of the folder, None for a Hub id.
        context: maximum number of positions, None for no limit.
        note: how --ablation changed the LLM, empty if it did not.
    """

    backbone: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    pad_id: int
    device: torch.device
    source: str
    total_layers: int
    identity: LLMIdentity
    traces: LLMTraces
    folder: str | None = None
    context: int | None = None
    note: str = ""

    @property
    def dtype(self) -> str:
        """The name of the dtype in which the LLM computes."""
        return str(self.backbone.dtype).removeprefix("torch.")

    def describe(self) -> str:
        """Describe the LLM in one line."""
        precision = f"NF4, computing in {self.dtype}" if self.identity.quantization == "nf4" else self.dtype
        return (
            f"LLM: {self.identity.model_type}, {self.identity.layers} of {self.total_layers} layers,"
            f" hidden size {self.identity.hidden_size}, {precision}" + (f" ({self.note})" if self.note else "")
        )

    def as_dict(self) -> dict:
        """Convert source, folder, precision and identity to plain values."""
        return {"source": self.source, "folder": self.folder, "dtype": self.dtype, **asdict(self.identity)}


def load_llm(flags: LLMFlags) -> LoadedLLM:
    """Load the LLM that the flags name and freeze it on this process's device.

    With --mapping compact the token embeddings are kept in host memory, where prompts are looked up.

    Raises:
        UserError: if the LLM does not exist, is damaged or not supported, or does not have the layers or the hidden
            size that the flags ask for.
    """
    state = PartialState()
    state.print(f"Loading generic model from: {flags.choose_source()[0]}")
    choice = choose_llm(flags)
    source, text_config = choice.source, choice.text_config
    tokenizer, pad_id = _load_tokenizer(source, text_config.vocab_size, flags.prompt_padding)
    seed = flags.seed if flags.ablation == "random_llm" else None
    is_run = flags.ablation != "no_llm"
    if is_run and flags.llm_dtype == "auto" and state.device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        # Not the default: the same forecast on every machine comes first.
        state.print("Note: this CPU computes bfloat16 several times faster than float32: --llm_dtype bfloat16 takes it")
    backbone = _load_backbone(choice, choose_dtype(flags.llm_dtype, state.device), state, seed)
    embeddings = backbone.get_input_embeddings().weight
    if embeddings.shape[1] != text_config.hidden_size:
        raise UserError(
            f"{source} has token embeddings of width {embeddings.shape[1]} and hidden states of"
            f" {text_config.hidden_size}: use an LLM where both are the same"
        )
    probe = None if flags.ablation == "no_llm" else probe_layers(backbone, state.device)
    traces = LLMTraces(relevant_fields(text_config), sketch_embeddings(embeddings), probe)
    if flags.mapping == "compact":
        backbone.get_input_embeddings().to("cpu")
    context = getattr(text_config, "max_position_embeddings", None) or 0
    return LoadedLLM(
        backbone=backbone,
        tokenizer=tokenizer,
        pad_id=pad_id,
        device=state.device,
        source=source,
        total_layers=choice.total_layers,
        identity=identify(text_config, embeddings, tokenizer, choice.in_4bit),
        traces=traces,
        folder=str(Path(source).absolute()) if Path(source).is_dir() else None,
        context=context if context > 0 else None,
        note=_ABLATIONS[flags.ablation],
    )


def _load_tokenizer(source: str, vocab_size: int, padding: str) -> tuple[transformers.PreTrainedTokenizerBase, int]:
    """Load the tokenizer and choose the padding token: any if padding is masked, else Time-LLM's."""
    tokenizer = load_pretrained(AutoTokenizer, source)
    ids = tokenizer("Input statistics: min value -1.25", add_special_tokens=False).input_ids
    # Without tokenizer files, transformers silently creates an empty tokenizer.
    if not ids or ids.count(tokenizer.unk_token_id) > len(ids) / 2 or max(ids) >= vocab_size:
        raise UserError(f"{source} has no tokenizer that fits its model: add its tokenizer files (tokenizer.json, ...)")
    if padding == "left":
        return tokenizer, 0
    tokenizer.add_special_tokens({"pad_token": tokenizer.eos_token or "[PAD]"})
    if tokenizer.pad_token_id >= vocab_size:
        raise UserError(f"{source} has no padding token: leave out --prompt_padding right")
    return tokenizer, tokenizer.pad_token_id


def _load_backbone(choice: LLMChoice, dtype: torch.dtype, state: PartialState, seed: int | None) -> nn.Module:
    """Load the frozen backbone; with a seed, draw its weights at random instead of reading them."""
    share_keys_on_cpu(state.device)
    options = {"config": choice.config, "dtype": dtype, "device_map": {"": state.device}, "output_loading_info": True}
    if choice.in_4bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("an LLM in 4 bits needs the package bitsandbytes: pip install bitsandbytes")
        state.print("Enabling 4-bit quantization...")
    if choice.in_4bit and not (choice.is_quantized and seed is None):
        options["quantization_config"] = nf4(dtype)
    if seed is None:
        backbone, report = load_pretrained(AutoModel, choice.source, **options)
    else:
        backbone, report = _draw_backbone(seed, options)
    # Many LLMs come without the weights of the pooler, which does not affect the hidden states.
    if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name):
        raise UserError(f"{choice.source} lacks {len(missing)} weights, {missing[0]} first: download it again")
    if choice.in_4bit:
        _prepare_4bit(backbone, dtype, copy_unquantized=state.device.type == "cpu" and not choice.is_quantized)
    freeze_linears(backbone.requires_grad_(False).eval())
    use_float32_attention(backbone)
    return backbone


def _draw_backbone(seed: int, options: dict) -> tuple[nn.Module, dict]:
    """Call `from_pretrained` with weights drawn from the LLM's own random initialization."""
    config = copy.deepcopy(options["config"])
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPU's generator
        drawn = AutoModel.from_config(config, dtype=options["dtype"], trust_remote_code=False)
        # `from_pretrained` quantizes and moves the weights as it does with those from files.
        return type(drawn).from_pretrained(None, state_dict=drawn.state_dict(), **{**options, "config": config})


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Build the config for NF4 with double quantization, computing in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def share_keys_on_cpu(device: torch.device) -> None:
    """Let transformers' attention on a CPU use grouped keys and values without a copy for each query head.

    On a GPU the setting stays off, because the fast kernels there do not support grouped keys with an attention mask.
    """
    if device.type == "cpu":
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")


def _prepare_4bit(backbone: nn.Module, dtype: torch.dtype, copy_unquantized: bool) -> None:
    """Compute in `dtype`, whatever the files' precision; `copy_unquantized` frees the files behind CPU views."""
    for module in backbone.modules():
        # With AVX512-BF16, bitsandbytes repacks the weights in the first forward pass without gradients; after that,
        # the gradient of a layer's input is silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
            module.weight.quant_state.dtype = dtype
    for parameter in backbone.parameters():
        if parameter.is_floating_point():  # 4-bit weights are packed into bytes
            parameter.data = parameter.data.to(dtype, copy=copy_unquantized)
