"""Plan the memory of a training step from the LLM's config, before any weights are loaded."""

import argparse
from dataclasses import dataclass

import torch
from accelerate import PartialState

from utils.cli.options import has_llm
from utils.errors import NoPlanError, UserError
from utils.system.gpu import free_bytes, is_gpu, peak_reserved, total_bytes

# Bytes of optimizer state per trainable parameter.
STATE_BYTES = {"adam": 8, "adamw": 8, "adamw8bit": 2 + 8 / 256, "paged_adamw8bit": 2 + 8 / 256}

# Measured memory of a run on the CPU beside the tensors: bytes per token of the tokenizer, bytes of the data and the
# libraries, and memory that the heap cannot return to the system, as a share of the memory of a step.
_TOKEN_BYTES = 650
_LIBRARIES = 165 * 2**20
_HEAP = 0.25

# The share to add for what the plan leaves out, such as fragmentation and the workspaces of CUDA's libraries.
MARGIN = 0.1


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a training step, in bytes.

    Attributes:
        llm: the frozen layers.
        embedding: the token embeddings, if the device holds them.
        trainable: the trained layers; their gradients are as large.
        optimizer: the optimizer state.
        activations: the activations that the forward pass saves.
        cache: the keys and values of the prompts.
        workspace: everything else at the peak.
        process: on a CPU, the process's memory beside the tensors; else 0.
        total: the peak. The parts may add up to more, because activations are freed while gradients are allocated.
        host: token embeddings that stay in host memory instead of a GPU's.
        free: the memory available on the device.
        layers: the number of the LLM's layers in use.
    """

    device: str
    llm: int
    embedding: int
    trainable: int
    optimizer: int
    activations: int
    cache: int
    workspace: int
    process: int
    total: int
    host: int
    free: int
    layers: int

    @property
    def needed(self) -> int:
        """The total with the margin."""
        return round(self.total * (1 + MARGIN))

    @property
    def fits(self) -> bool:
        """Whether the device has enough free memory."""
        return self.needed <= self.free


def plan_memory(args: argparse.Namespace) -> MemoryPlan:
    """Plan the memory of the run that the flags describe.

    Raises:
        UserError: if the LLM's config is missing or does not fit the flags.
        NoPlanError: if the LLM's code depends on the values of tensors.
    """
    from utils.memory.trial_step import try_steps  # imports transformers, which a run without an LLM does not need

    device = PartialState().device
    trial = try_steps(args, device)
    few, step = trial.few, trial.of_all_layers()
    in_host = few.embedding if args.mapping == "compact" and device.type != "cpu" else 0
    optimizer = round(few.trainable / 4 * STATE_BYTES[args.optimizer])
    fixed = step["llm"] + few.embedding - in_host + few.trainable + few.constants + optimizer
    varying = max(step["llm_peak"], step["last_peak"], few.trainable) + few.dequantized
    process = 0
    if device.type == "cpu":
        process = _LIBRARIES + _TOKEN_BYTES * trial.vocab_size + round(_HEAP * varying)
    return MemoryPlan(
        device=str(device),
        llm=step["llm"],
        embedding=few.embedding - in_host,
        trainable=few.trainable,
        optimizer=optimizer,
        activations=step["saved"] - step["cache"],
        cache=step["cache"],
        workspace=max(varying - step["saved"], 0) + few.constants,
        process=process,
        total=fixed + varying + process,
        host=in_host,
        free=free_bytes(device),
        layers=trial.layers,
    )


def memory_summary(args: argparse.Namespace) -> str:
    """Describe the plan in one line, and add a warning with advice if too little memory is free."""
    try:
        plan = plan_memory(args)
        spare = f"with {MARGIN:.0%} to spare that may be too much"
        warning = "" if plan.fits else f"\nWarning: {spare}: {advice(args, plan)}"
    except NoPlanError as problem:
        return f"Memory: no plan for this LLM ({problem})"
    parts = {"LLM": plan.llm + plan.embedding, "activations": plan.activations + plan.cache}
    parts["rest"] = max(plan.total - sum(parts.values()), 0)
    named = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    needed = f"about {_gib(plan.total)} GiB of {_gib(plan.free)} free on {plan.device}"
    return f"Memory: {needed} ({named}; see --plan){warning}"


def memory_report(args: argparse.Namespace) -> str:
    """Format the memory plan as a table and, if too little memory is free, add advice.

    Raises:
        UserError: if the LLM is missing, or its memory cannot be planned.
    """
    if not has_llm(args):
        return f"{args.model} has no LLM: it fits wherever the data fit."
    try:
        plan = plan_memory(args)
        verdict = "It fits." if plan.fits else f"It does not fit: {advice(args, plan)}"
    except NoPlanError as problem:
        raise UserError(f"there is no plan for this LLM ({problem}): run without --plan") from problem
    rows = [
        ("LLM, frozen layers", plan.llm),
        ("token embeddings", plan.embedding),
        ("trained layers", plan.trainable),
        ("their gradients", plan.trainable),
        ("optimizer", plan.optimizer),
        ("activations", plan.activations),
        ("keys and values of the prompts", plan.cache),
        ("workspace", plan.workspace),
        *([("tokenizer, data, heap", plan.process)] if plan.process else []),
        ("peak of a step", plan.total),
        (f"with {MARGIN:.0%} for what cannot be planned", plan.needed),
        ("free", plan.free),
        *([("in host memory: token embeddings", plan.host)] if plan.host else []),
    ]
    lines = [f"Memory that a training step needs on {plan.device}, GiB (estimated; not all parts at one time)"]
    lines += [f"  {name:<34}{_gib(size):>8}" for name, size in rows]
    return "\n".join([*lines, verdict])


def savings(args: argparse.Namespace, plan: MemoryPlan) -> list[tuple[str, int]]:
    """List the changes of flags that save memory, with the bytes that each of them saves alone, largest first.

    `plan` is the plan of the unchanged flags.
    """
    changes = {
        "--gradient_checkpointing": {"gradient_checkpointing": True},
        "--mapping compact": {"mapping": "compact"},
        **({"--optimizer adamw8bit": {"optimizer": "adamw8bit"}} if plan.device != "cpu" else {}),
        "--load_in_4bit": {"load_in_4bit": True},
        f"--llm_layers {plan.layers // 2}": {"llm_layers": max(plan.layers // 2, 1)},
    }
    if args.batch_size % 2 == 0:
        half, twice = args.batch_size // 2, 2 * args.grad_accum
        changes[f"--batch_size {half} --grad_accum {twice}"] = {"batch_size": half, "grad_accum": twice}
    saved = [
        (flags, plan.total - plan_memory(argparse.Namespace(**{**vars(args), **change})).total)
        for flags, change in changes.items()
    ]
    worthwhile = [(flags, size) for flags, size in saved if size > plan.total / 100]
    return sorted(worthwhile, key=lambda change: -change[1])


def advice(args: argparse.Namespace, plan: MemoryPlan) -> str:
    """Phrase the advice for saving memory as part of a sentence."""
    changes = [f"{flags} (saves {_gib(size)} GiB)" for flags, size in savings(args, plan)]
    return "try " + ", ".join(changes) if changes else "take a smaller LLM"


def memory_error(args: argparse.Namespace) -> UserError:
    """Build the error for a run that is out of memory."""
    if not has_llm(args):
        return UserError("out of memory: give a smaller --batch_size or --eval_batch_size")
    try:
        plan = plan_memory(args)
        saving = advice(args, plan)
    except NoPlanError:
        return UserError("out of memory: try --gradient_checkpointing, --load_in_4bit, --llm_layers or --batch_size 1")
    return UserError(
        f"out of memory on {plan.device}: a training step needs about {_gib(plan.needed)} GiB,"
        f" {_gib(plan.free)} are free: {saving}"
    )


def memory_warning(device: torch.device) -> str:
    """Build a warning if this process has used more than 95% of a GPU's memory; else return an empty string."""
    if not is_gpu(device):
        return ""
    used, total = peak_reserved(device), total_bytes(device)
    if used < 0.95 * total:
        return ""
    return (
        f"Warning: {_gib(used)} of the {_gib(total)} GiB of {device} have been in use. Under Windows the driver moves"
        " what does not fit to host memory, and every step is many times slower: see --plan"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
