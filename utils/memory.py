"""What a training step will need of memory, worked out from the LLM's config, before any weight is loaded.

The step is run as it is, on tensors that have a shape and no contents (torch's device "meta"), and the bytes that
would be alive are counted. So the plan follows the code by itself, for any architecture.
"""

import argparse
import copy
import re
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import psutil
import torch
from accelerate import PartialState
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModel
from transformers.integrations.sdpa_attention import repeat_kv, use_gqa_in_sdpa

from models.TimeLLM import Model
from utils.errors import UserError
from utils.llm import LLMChoice, LLMIdentity, LoadedLLM, choose_dtype, choose_llm, share_keys_on_cpu

# Of NF4 with double quantisation: half a byte, a byte a block of 64, four bytes a block of 256 such blocks.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

# Bytes of optimiser state for each trained number.
STATE_BYTES = {"adam": 8, "adamw": 8, "adamw8bit": 2 + 8 / 256, "paged_adamw8bit": 2 + 8 / 256}

# What a run holds beside the tensors where it computes on the CPU: the tokenizer by its words, the data and the
# buffers of the libraries, and what the heap cannot give away, by the memory that a step uses. Measured.
_WORD_BYTES = 650
_LIBRARIES = 165 * 2**20
_HEAP = 0.25

# Layers that the step is tried with; what each further layer adds is the difference.
_FEW, _MORE = 2, 3


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a training step needs.

    Attributes:
        device: where.
        llm: the frozen layers.
        embedding: the word embeddings, where the device needs them.
        trainable, gradients, optimizer: the trained layers, their gradients, the optimiser's state.
        activations: what the step keeps on its way forward.
        cache: keys and values of the prompts.
        workspace: what else there is at the worst moment.
        process: where the device is the CPU, what a run holds beside the tensors.
        total: all that is there at the worst moment. Gradients grow while activations shrink, so the parts may
            add up to more.
        host: word embeddings that stay in host memory beside a GPU.
        free: what the device has for us.
    """

    device: str
    llm: int
    embedding: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    cache: int
    workspace: int
    process: int
    total: int
    host: int
    free: int

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.total <= self.free


class NoPlan(Exception):  # noqa: N818 - the run may go well without
    """The step of this LLM cannot be run on tensors without contents."""


def plan_memory(args: argparse.Namespace) -> MemoryPlan:
    """Return what the run that the flags describe will need.

    Raises:
        UserError: if the LLM's config is not there or does not fit the flags.
        NoPlan: if the LLM's code looks at values.
    """
    device = PartialState().device
    choice = choose_llm(args)
    share_keys_on_cpu(device)
    try:
        with torch.random.fork_rng(devices=[]):  # the weights to come must not depend on what is planned
            steps = [_try_step(args, choice, device, layers) for layers in _layers_to_try(choice)]
    except UserError:
        raise
    except Exception as problem:  # of whatever kind: it is the LLM's code that runs
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise NoPlan(f"{choice.config.model_type}: {reason[0]}") from problem
    few, more = steps[0], steps[-1]
    further = choice.text_config.num_hidden_layers - few.layers
    step = {name: getattr(few, name) + (getattr(more, name) - getattr(few, name)) * further for name in _Step.EXTENSIVE}
    in_host = few.embedding if args.mapping == "compact" and device.type != "cpu" else 0
    optimizer = round(few.trainable / 4 * STATE_BYTES[args.optimizer])
    fixed = step["llm"] + few.embedding - in_host + few.trainable + few.constants + optimizer
    moment = max(step["llm_moment"], step["end_moment"], few.trainable) + few.dequantized
    process = 0
    if device.type == "cpu":
        process = _LIBRARIES + _WORD_BYTES * choice.text_config.vocab_size + round(_HEAP * moment)
    return MemoryPlan(
        device=str(device),
        llm=step["llm"],
        embedding=few.embedding - in_host,
        trainable=few.trainable,
        gradients=few.trainable,
        optimizer=optimizer,
        activations=step["kept"] - step["cache"],
        cache=step["cache"],
        workspace=max(moment - step["kept"], 0) + few.constants,
        process=process,
        total=fixed + moment + process,
        host=in_host,
        free=free_bytes(device),
    )


def describe_plan(plan: MemoryPlan) -> str:
    """Return a plan in one line."""
    parts = {"LLM": plan.llm + plan.embedding, "activations": plan.activations + plan.cache, "rest": 0}
    parts["rest"] = max(plan.total - sum(parts.values()), 0)
    named = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    return f"Memory: about {_gib(plan.total)} GiB of {_gib(plan.free)} free on {plan.device} ({named}; see --plan)"


def memory_in_short(args: argparse.Namespace) -> str:
    """Return what the run needs in one line, and one more if that is not there."""
    try:
        plan = plan_memory(args)
        if plan.fits:
            return describe_plan(plan)
        return f"{describe_plan(plan)}\nWarning: that may be too much: {advice(args, plan)}"
    except NoPlan as problem:
        return f"Memory: no plan for this LLM ({problem})"


def plan_table(plan: MemoryPlan) -> str:
    """Return a plan as a table."""
    rows = [
        ("LLM, frozen layers", plan.llm),
        ("word embeddings", plan.embedding),
        ("trained layers", plan.trainable),
        ("their gradients", plan.gradients),
        ("optimiser", plan.optimizer),
        ("activations", plan.activations),
        ("keys and values of the prompts", plan.cache),
        ("workspace", plan.workspace),
        *([("tokenizer, data, heap", plan.process)] if plan.process else []),
        ("at the worst moment of a step", plan.total),
        ("free", plan.free),
    ]
    if plan.host:
        rows.append(("in host memory: word embeddings", plan.host))
    lines = [f"Memory that a training step needs on {plan.device}, GiB (estimated; not all parts at one time)"]
    lines += [f"  {name:<34}{_gib(size):>8}" for name, size in rows]
    return "\n".join(lines)


def savings(args: argparse.Namespace, plan: MemoryPlan) -> list[tuple[str, int]]:
    """Return what would make a run smaller, with the bytes that each change alone saves, the largest first.

    Args:
        args: the run's flags.
        plan: what it needs with them.
    """
    layers = choose_llm(args).text_config.num_hidden_layers
    changes = {
        "--gradient_checkpointing": {"gradient_checkpointing": True},
        "--mapping compact": {"mapping": "compact"},
        **({"--optimizer adamw8bit": {"optimizer": "adamw8bit"}} if plan.device != "cpu" else {}),
        "--load_in_4bit": {"load_in_4bit": True},
        f"--llm_layers {layers // 2}": {"llm_layers": max(layers // 2, 1)},
    }
    if args.batch_size % 2 == 0:
        half, twice = args.batch_size // 2, 2 * args.grad_accum
        changes[f"--batch_size {half} --grad_accum {twice}"] = {"batch_size": half, "grad_accum": twice}
    saved = [
        (words, plan.total - plan_memory(argparse.Namespace(**{**vars(args), **change})).total)
        for words, change in changes.items()
    ]
    worthwhile = [(words, size) for words, size in saved if size > plan.total / 100]
    return sorted(worthwhile, key=lambda change: -change[1])


def advice(args: argparse.Namespace, plan: MemoryPlan) -> str:
    """Return what to change for a smaller run, in part of a sentence."""
    changes = [f"{words} (saves {_gib(size)} GiB)" for words, size in savings(args, plan)]
    return "try " + ", ".join(changes) if changes else "take a smaller LLM"


def memory_error(args: argparse.Namespace) -> UserError:
    """Return the one line for a device that is full."""
    try:
        plan = plan_memory(args)
        what_helps = advice(args, plan)
    except NoPlan:
        return UserError("out of memory: try --gradient_checkpointing, --load_in_4bit, --llm_layers or --batch_size 1")
    return UserError(
        f"out of memory on {plan.device}: a training step needs about {_gib(plan.total)} GiB,"
        f" {_gib(plan.free)} are free: {what_helps}"
    )


def nearly_full(device: torch.device) -> str:
    """Return a warning if this process has used a GPU to its last 5%, else nothing."""
    if device.type != "cuda":
        return ""
    used, there = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    if used < 0.95 * there:
        return ""
    return (
        f"Warning: {_gib(used)} of the {_gib(there)} GiB of {device} have been in use. Under Windows the driver moves"
        " what does not fit to host memory, and every step is many times slower: see --plan"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def free_bytes(device: torch.device) -> int:
    """Return what a device has for us, what we hold of it already included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available


@dataclass(frozen=True)
class _Step:
    """A step on few layers, in bytes.

    `kept`: alive when the way forward ends, the prompts' keys and values (`cache`) among it. `llm_moment`: the most
    until the gradient has come back through the LLM. `end_moment`: the most from there on. `constants`: the basis
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


def _layers_to_try(choice: LLMChoice) -> tuple[int, ...]:
    there = choice.text_config.num_hidden_layers
    return (_FEW, _MORE) if there > _MORE else (there,)


def _try_step(args: argparse.Namespace, choice: LLMChoice, device: torch.device, layers: int) -> _Step:
    dtype = choose_dtype(args.llm_dtype, device)
    model = Model(args, _shapes_of(choice, layers, dtype))
    backbone = model.llm_info.backbone
    words = backbone.get_input_embeddings().weight
    matrices = [module.weight for module in backbone.modules() if type(module) is nn.Linear] if choice.in_4bit else []
    in_matrices = sum(matrix.numel() for matrix in matrices)
    basis = getattr(model.mapping_layer, "basis", None)
    tokens = [len(prompt) for prompt in model.tokenize(_windows(args)[..., 0])]
    return _Step(
        layers=layers,
        llm=round((backbone.num_parameters() - words.numel() - in_matrices) * dtype.itemsize + in_matrices * NF4_BYTES),
        embedding=words.nbytes,
        trainable=4 * sum(parameter.numel() for parameter in model.parameters()),
        constants=0 if basis is None else basis.nbytes,
        dequantized=max((matrix.nbytes for matrix in matrices), default=0),
        cache=_bytes_of_cache(model, max(tokens) * len(tokens)) if model.llm and model.llm.uses_prefix else 0,
        **_moments(model, args),
    )


def _moments(model: Model, args: argparse.Namespace) -> dict[str, int]:
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


def _bytes_of_cache(model: Model, tokens: int) -> int:
    """Return the size of the keys and values of so many tokens."""
    llm = model.llm
    one = llm._extend(
        llm._no_prefix(),
        torch.zeros(1, 1, dtype=torch.long),
        torch.ones(1, 1, dtype=torch.bool, device="meta"),
        torch.zeros(1, 1, dtype=torch.long, device="meta"),
    )
    return tokens * sum(layer.keys.nbytes + layer.values.nbytes for layer in one.layers)


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


class _KernelAttention(torch.autograd.Function):
    """An attention that keeps what the fused kernels keep: queries, keys, values, their result, a sum a query."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _plan_attention(module: nn.Module, query, key, value, attention_mask, **_kwargs) -> tuple[torch.Tensor, None]:
    """Stand for transformers' sdpa attention: (B, heads, n, width) -> (B, n, heads, width)."""
    if hasattr(module, "num_key_value_groups") and not use_gqa_in_sdpa(attention_mask, key, value):
        key, value = (repeat_kv(tensor, module.num_key_value_groups) for tensor in (key, value))
    return _KernelAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("memory_plan", _plan_attention)


class _WordCounter:
    """Stands for a tokenizer: a token a digit, a mark, a word. Its ids mean nothing, only their number counts."""

    def __call__(self, texts: list[str], **_kwargs) -> SimpleNamespace:
        words = [re.findall(r"\d|[^\W\d]+|[^\w\s]", text) for text in texts]
        return SimpleNamespace(input_ids=[[hash(word) % 97 for word in row] for row in words])

    def num_special_tokens_to_add(self) -> int:
        return 0


def _shapes_of(choice: LLMChoice, layers: int, dtype: torch.dtype) -> LoadedLLM:
    """Return an LLM of so many layers, without weights."""
    config = copy.deepcopy(choice.config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = layers
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:layers]
    if choice.is_quantized:
        del config.quantization_config
    with torch.device("meta"):
        backbone = AutoModel.from_config(config, dtype=dtype, attn_implementation="memory_plan")
    identity = LLMIdentity(config.model_type, text_config.hidden_size, text_config.vocab_size, layers, "", "", "")
    return LoadedLLM(
        backbone=backbone.requires_grad_(False).eval(),
        tokenizer=_WordCounter(),
        pad_id=0,
        device=torch.device("meta"),
        source=choice.source,
        layers_there=choice.layers_there,
        context=None,
        identity=identity,
    )
