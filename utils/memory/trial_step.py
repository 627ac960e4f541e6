"""Measure the memory of a training step on meta tensors; this runs the model's own code, so any architecture works."""

import argparse
import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import build
from utils.errors import NoPlanError, UserError, first_line
from utils.llm.choice import LLMChoice, LLMFlags, choose_dtype, choose_llm
from utils.llm.loading import share_keys_on_cpu
from utils.llm.meta import llm_without_weights

# NF4 with double quantization: 4 bits per weight, 1 byte per block of 64 weights, 4 bytes per 256 such blocks.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

# The numbers of layers to run the step with; their difference shows what each further layer adds.
_FEW, _MORE = 2, 3


@dataclass(frozen=True)
class Step:
    """The memory of a step with a few of the LLM's layers, in bytes; the values in `PER_LAYER` grow with the layers.

    Attributes:
        constants: the basis of the text prototypes.
        dequantized: the largest matrix that is unpacked from 4 bits.
        cache: the keys and values of the prompts.
        saved: the activations at the end of the forward pass, including `cache`.
        llm_peak: the peak until the backward pass has left the LLM.
        last_peak: the peak after that.
    """

    PER_LAYER = ("llm", "cache", "saved", "llm_peak", "last_peak")

    llm: int
    embedding: int
    trainable: int
    constants: int
    dequantized: int
    cache: int
    saved: int
    llm_peak: int
    last_peak: int


@dataclass(frozen=True)
class Trial:
    """A step with a few of an LLM's layers and one with more, the same step twice if the LLM has too few layers.

    Attributes:
        layers: the number of the LLM's layers in use.
        missing: how many of them the step with few layers lacks.
        vocab_size: the number of the LLM's tokens.
    """

    few: Step
    more: Step
    layers: int
    missing: int
    vocab_size: int

    def of_all_layers(self) -> dict[str, int]:
        """Extrapolate the values that grow with the layers to all of them."""
        few, more = self.few, self.more
        return {
            name: getattr(few, name) + (getattr(more, name) - getattr(few, name)) * self.missing
            for name in Step.PER_LAYER
        }


def try_steps(args: argparse.Namespace, device: torch.device) -> Trial:
    """Run training steps of the model that the flags describe, with few and with more layers of its LLM.

    Raises:
        UserError: if the LLM's config is missing or does not fit the flags.
        NoPlanError: if the LLM's code depends on the values of tensors.
    """
    choice = choose_llm(LLMFlags.of(args))
    share_keys_on_cpu(device)
    try:
        with torch.random.fork_rng(devices=[]):  # the initial weights must not depend on the plan
            steps = [try_step(args, choice, device, layers) for layers in trial_layers(choice)]
    except UserError:
        raise
    except Exception as problem:  # the LLM's own code can raise anything
        raise NoPlanError(f"{choice.config.model_type}: {first_line(problem)}") from problem
    config = choice.text_config
    layers = config.num_hidden_layers
    return Trial(steps[0], steps[-1], layers, layers - trial_layers(choice)[0], config.vocab_size)


def trial_layers(choice: LLMChoice) -> tuple[int, ...]:
    """Return the numbers of layers to run the step with."""
    available = choice.text_config.num_hidden_layers
    return (_FEW, _MORE) if available > _MORE else (available,)


def try_step(args: argparse.Namespace, choice: LLMChoice, device: torch.device, layers: int) -> Step:
    """Run a training step of the model that the flags describe, with the first `layers` layers of its LLM.

    The tensors have no device memory; `device` only determines the LLM's data type.
    """
    dtype = choose_dtype(args.llm_dtype, device)
    model = build(args, llm_without_weights(choice, layers, dtype))
    backbone = model.llm_info.backbone
    embeddings = backbone.get_input_embeddings().weight
    matrices = [module.weight for module in backbone.modules() if type(module) is nn.Linear] if choice.in_4bit else []
    quantized = sum(matrix.numel() for matrix in matrices)
    unquantized = backbone.num_parameters() - embeddings.numel() - quantized
    basis = getattr(model.mapping_layer, "basis", None)
    tokens = [len(prompt) for prompt in model.tokenize(_windows(args)[..., 0])]
    return Step(
        llm=round(unquantized * dtype.itemsize + quantized * NF4_BYTES),
        embedding=embeddings.nbytes,
        trainable=4 * sum(parameter.numel() for parameter in model.parameters()),
        constants=0 if basis is None else basis.nbytes,
        dequantized=max((matrix.nbytes for matrix in matrices), default=0),
        cache=model.llm.prefix_bytes(max(tokens) * len(tokens)) if model.llm.uses_prefix else 0,
        **_run_step(model, args, [] if basis is None else [basis]),
    )


def _run_step(model: nn.Module, args: argparse.Namespace, buffers: list[torch.Tensor]) -> dict[str, int]:
    """Run a training step and measure `saved`, `llm_peak` and `last_peak`, without the parameters and `buffers`."""
    live = _LiveBytes([*model.parameters(), *model.llm_info.backbone.parameters(), *buffers])
    llm_peaks = []

    def record_peak(_gradient: torch.Tensor) -> None:
        llm_peaks.append(live.peak)
        live.peak = live.now

    def register(_module: nn.Module, _inputs: tuple, patches: torch.Tensor) -> None:
        patches.register_hook(record_peak)

    model.reprogramming_layer.register_forward_hook(register)
    model.train()
    with live:
        forecast = model(_windows(args))
        loss = functional.mse_loss(forecast, torch.empty_like(forecast))
        saved = live.now
        loss.backward()
    return {"saved": saved, "llm_peak": llm_peaks[0], "last_peak": live.peak}


def _windows(args: argparse.Namespace) -> torch.Tensor:
    """Draw windows whose prompts have a typical length."""
    return torch.randn(args.batch_size, args.seq_len, 1, generator=torch.Generator().manual_seed(0))


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of live tensors, except for `constants`."""

    def __init__(self, constants: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._counted = {tensor.untyped_storage()._cdata for tensor in constants}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._counted:
            return
        self._counted.add(address)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._counted.discard(address)
        self.now -= size
