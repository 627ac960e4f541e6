"""A training step on meta tensors, its bytes counted.

It is the model's own code that runs, so the count follows it by itself, for any architecture.
"""

import argparse
import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import build
from utils.llm.choice import LLMChoice, choose_dtype
from utils.llm.meta import llm_without_weights

# Of NF4 with double quantisation: half a byte, a byte a block of 64, four bytes a block of 256 such blocks.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

# Layers that the step is tried with; what each further layer adds is the difference.
_FEW, _MORE = 2, 3


@dataclass(frozen=True)
class Step:
    """A step on few layers, in bytes; `EXTENSIVE` names what grows with the layers.

    `kept`: alive when the way forward ends, the prompts' keys and values (`cache`) among it. `llm_moment`: the most
    until backward leaves the LLM. `end_moment`: the most from there on. `constants`: the basis
    of the text prototypes. `dequantized`: the largest matrix that is unpacked from 4 bits at one time.
    """

    EXTENSIVE = ("llm", "cache", "kept", "llm_moment", "end_moment")

    layers: int
    llm: int
    embedding: int
    trainable: int
    constants: int
    dequantized: int
    cache: int
    kept: int
    llm_moment: int
    end_moment: int


def layers_to_try(choice: LLMChoice) -> tuple[int, ...]:
    """Return the numbers of layers to try the step with: what each further layer adds is the difference."""
    there = choice.text_config.num_hidden_layers
    return (_FEW, _MORE) if there > _MORE else (there,)


def try_step(args: argparse.Namespace, choice: LLMChoice, device: torch.device, layers: int) -> Step:
    """Run a training step of the model that the flags describe, with so many layers of its LLM.

    Args:
        args: the parsed flags.
        choice: their LLM.
        device: that the step is planned for.
        layers: of the LLM.
    """
    dtype = choose_dtype(args.llm_dtype, device)
    model = build(args, llm_without_weights(choice, layers, dtype))
    backbone = model.llm_info.backbone
    embeddings = backbone.get_input_embeddings().weight
    matrices = [module.weight for module in backbone.modules() if type(module) is nn.Linear] if choice.in_4bit else []
    in_matrices = sum(matrix.numel() for matrix in matrices)
    others = backbone.num_parameters() - embeddings.numel() - in_matrices
    basis = getattr(model.mapping_layer, "basis", None)
    tokens = [len(prompt) for prompt in model.tokenize(_windows(args)[..., 0])]
    return Step(
        layers=layers,
        llm=round(others * dtype.itemsize + in_matrices * NF4_BYTES),
        embedding=embeddings.nbytes,
        trainable=4 * sum(parameter.numel() for parameter in model.parameters()),
        constants=0 if basis is None else basis.nbytes,
        dequantized=max((matrix.nbytes for matrix in matrices), default=0),
        cache=model.llm.prefix_bytes(max(tokens) * len(tokens)) if model.llm.uses_prefix else 0,
        **_moments(model, args),
    )


def _moments(model: nn.Module, args: argparse.Namespace) -> dict[str, int]:
    """Run a training step and return `kept`, `llm_moment` and `end_moment`."""
    constants = [*model.parameters(), *model.llm_info.backbone.parameters()]
    constants += [basis for basis in [getattr(model.mapping_layer, "basis", None)] if basis is not None]
    live = _LiveBytes(constants)
    moments = []

    def through_the_llm(_gradient: torch.Tensor) -> None:
        moments.append(live.peak)
        live.peak = live.now

    def watch(_module: nn.Module, _inputs: tuple, patches: torch.Tensor) -> None:
        patches.register_hook(through_the_llm)

    model.reprogramming_layer.register_forward_hook(watch)
    model.train()
    with live:
        forecast = model(_windows(args))
        loss = functional.mse_loss(forecast, torch.empty_like(forecast))
        kept = live.now
        loss.backward()
    return {"kept": kept, "llm_moment": moments[0], "end_moment": live.peak}


def _windows(args: argparse.Namespace) -> torch.Tensor:
    """Return windows whose prompts are as long as others."""
    return torch.randn(args.batch_size, args.seq_len, 1, generator=torch.Generator().manual_seed(0))


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are alive; those of `constants` are not counted."""

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
