"""Load a frozen LLM and its tokenizer: layers, precision, device."""

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

from layers.FrozenLinear import freeze_linears
from utils.cli.places import is_local
from utils.errors import UserError
from utils.llm.choice import LLMChoice, LLMFlags, choose_dtype, choose_llm, choose_source, load_pretrained
from utils.llm.identity import LLMIdentity, LLMTraces, acting_fields, identify, probe_layers, sketch_embeddings
from utils.llm.quiet import quiet_transformers

# What --ablation does to the LLM, in words.
ABLATIONS = {"none": "", "no_llm": "not run, only its token embeddings are used", "random_llm": "random weights"}


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


def _load_tokenizer(source: str, vocab_size: int) -> transformers.PreTrainedTokenizerBase:
    """Return the tokenizer; without its files, transformers makes an empty one and says nothing."""
    tokenizer = load_pretrained(AutoTokenizer, source)
    ids = tokenizer("Input statistics: min value -1.25", add_special_tokens=False).input_ids
    if not ids or ids.count(tokenizer.unk_token_id) > len(ids) / 2 or max(ids) >= vocab_size:
        raise UserError(f"{source} has no tokenizer that fits its model: add its tokenizer files (tokenizer.json, ...)")
    return tokenizer


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
        _prepare_4bit(backbone, dtype, copy_unquantized=state.device.type == "cpu" and not choice.is_quantized)
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


def _prepare_4bit(backbone: nn.Module, dtype: torch.dtype, copy_unquantized: bool) -> None:
    """Compute in `dtype`, whatever precision the files were written in, and keep gradients right.

    On CPUs with AVX512-BF16 bitsandbytes repacks weights on the first forward without gradient, and from then on
    the gradient to a layer's input is wrong, in silence.

    Args:
        backbone: the model.
        dtype: to compute in.
        copy_unquantized: copy what is not quantised. On a CPU it is a view of files that are four times as large.
    """
    for module in backbone.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
            module.weight.quant_state.dtype = dtype
    for parameter in backbone.parameters():
        if parameter.is_floating_point():  # not one of 4 bits: those are packed into bytes
            parameter.data = parameter.data.to(dtype, copy=copy_unquantized)


def _padding_token(tokenizer: transformers.PreTrainedTokenizerBase, padding: str, vocab_size: int, source: str) -> int:
    """Return the token to pad with: Time-LLM's choice, the end of text, else ``[PAD]``, where pads are seen."""
    if padding == "left":
        return 0  # masked: any token does
    tokenizer.add_special_tokens({"pad_token": tokenizer.eos_token or "[PAD]"})
    if tokenizer.pad_token_id >= vocab_size:
        raise UserError(f"{source} has no token to pad with: leave out --prompt_padding right")
    return tokenizer.pad_token_id
