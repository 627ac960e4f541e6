"""What a training step will need of memory, worked out from the LLM's config, before any weight is loaded."""

import argparse
from dataclasses import dataclass

import torch
from accelerate import PartialState

from utils.cli.options import has_llm
from utils.errors import UserError, first_line
from utils.llm.choice import LLMChoice, LLMFlags, choose_llm
from utils.llm.loading import share_keys_on_cpu
from utils.memory.trial_step import Step, layers_to_try, try_step
from utils.system.gpu import free_bytes, is_gpu, peak_reserved, total_bytes

# Bytes of optimiser state for each trainable parameter.
STATE_BYTES = {"adam": 8, "adamw": 8, "adamw8bit": 2 + 8 / 256, "paged_adamw8bit": 2 + 8 / 256}

# What a run holds beside the tensors where it computes on the CPU: the tokenizer by its tokens, the data and the
# buffers of the libraries, and what the heap cannot give away, by the memory that a step uses. Measured.
_TOKEN_BYTES = 650
_LIBRARIES = 165 * 2**20
_HEAP = 0.25


# What the plan does not know of: fragments between tensors, workspaces of CUDA's libraries.
MARGIN = 0.1


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a training step needs.

    Attributes:
        device: where.
        llm: the frozen layers.
        embedding: the token embeddings, where the device needs them.
        trainable, gradients, optimizer: the trained layers, their gradients, the optimiser's state.
        activations: what the step keeps on its way forward.
        cache: keys and values of the prompts.
        workspace: everything else at the peak.
        process: where the device is the CPU, what a run holds beside the tensors.
        total: the peak. Gradients grow while activations shrink, so the parts may
            add up to more.
        host: token embeddings that stay in host memory beside a GPU.
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
    def needed(self) -> int:
        """The total, and some to spare."""
        return round(self.total * (1 + MARGIN))

    @property
    def fits(self) -> bool:
        """Whether there is room for that."""
        return self.needed <= self.free


class NoPlan(Exception):  # noqa: N818 - the run may go well without
    """The step of this LLM cannot be run on meta tensors."""


def plan_memory(args: argparse.Namespace) -> MemoryPlan:
    """Plan the memory of the run that the flags describe.

    Args:
        args: the parsed flags.

    Raises:
        UserError: if the LLM's config is not there or does not fit the flags.
        NoPlan: if the LLM's code looks at values.
    """
    device = PartialState().device
    choice = choose_llm(LLMFlags.of(args))
    few, more = _try_steps(args, choice, device)
    further = choice.text_config.num_hidden_layers - few.layers
    step = {name: getattr(few, name) + (getattr(more, name) - getattr(few, name)) * further for name in Step.EXTENSIVE}
    in_host = few.embedding if args.mapping == "compact" and device.type != "cpu" else 0
    optimizer = round(few.trainable / 4 * STATE_BYTES[args.optimizer])
    fixed = step["llm"] + few.embedding - in_host + few.trainable + few.constants + optimizer
    moment = max(step["llm_moment"], step["end_moment"], few.trainable) + few.dequantized
    process = 0
    if device.type == "cpu":
        process = _LIBRARIES + _TOKEN_BYTES * choice.text_config.vocab_size + round(_HEAP * moment)
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


def _try_steps(args: argparse.Namespace, choice: LLMChoice, device: torch.device) -> tuple[Step, Step]:
    """Return a step with few of the LLM's layers and one with more, or the same where it has so few."""
    share_keys_on_cpu(device)
    try:
        with torch.random.fork_rng(devices=[]):  # the weights to come must not depend on what is planned
            steps = [try_step(args, choice, device, layers) for layers in layers_to_try(choice)]
    except UserError:
        raise
    except Exception as problem:  # of whatever kind: it is the LLM's code that runs
        raise NoPlan(f"{choice.config.model_type}: {first_line(problem)}") from problem
    return steps[0], steps[-1]


def describe_plan(plan: MemoryPlan) -> str:
    """Return a plan in one line."""
    parts = {"LLM": plan.llm + plan.embedding, "activations": plan.activations + plan.cache, "rest": 0}
    parts["rest"] = max(plan.total - sum(parts.values()), 0)
    named = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    return f"Memory: about {_gib(plan.total)} GiB of {_gib(plan.free)} free on {plan.device} ({named}; see --plan)"


def memory_in_short(args: argparse.Namespace) -> str:
    """Describe the plan in one line, and add a warning with advice if too little memory is free."""
    try:
        plan = plan_memory(args)
        if plan.fits:
            return describe_plan(plan)
        what_helps = advice(args, plan)
        return f"{describe_plan(plan)}\nWarning: with {MARGIN:.0%} to spare that may be too much: {what_helps}"
    except NoPlan as problem:
        return f"Memory: no plan for this LLM ({problem})"


def full_report(args: argparse.Namespace) -> str:
    """Format the memory plan as a table and, if too little memory is free, add advice.

    Raises:
        UserError: if the LLM is not there, or there is no plan for it.
    """
    if not has_llm(args):
        return f"{args.model} has no LLM: it fits wherever the data fit."
    try:
        plan = plan_memory(args)
    except NoPlan as problem:
        raise UserError(f"there is no plan for this LLM ({problem}): run without --plan") from problem
    verdict = "It fits." if plan.fits else f"It does not fit: {advice(args, plan)}"
    return f"{plan_table(plan)}\n{verdict}"


def plan_table(plan: MemoryPlan) -> str:
    """Return a plan as a table."""
    rows = [
        ("LLM, frozen layers", plan.llm),
        ("token embeddings", plan.embedding),
        ("trained layers", plan.trainable),
        ("their gradients", plan.gradients),
        ("optimiser", plan.optimizer),
        ("activations", plan.activations),
        ("keys and values of the prompts", plan.cache),
        ("workspace", plan.workspace),
        *([("tokenizer, data, heap", plan.process)] if plan.process else []),
        ("peak of a step", plan.total),
        (f"with {MARGIN:.0%} for what cannot be planned", plan.needed),
        ("free", plan.free),
    ]
    if plan.host:
        rows.append(("in host memory: token embeddings", plan.host))
    lines = [f"Memory that a training step needs on {plan.device}, GiB (estimated; not all parts at one time)"]
    lines += [f"  {name:<34}{_gib(size):>8}" for name, size in rows]
    return "\n".join(lines)


def savings(args: argparse.Namespace, plan: MemoryPlan) -> list[tuple[str, int]]:
    """List the changes of flags that save memory, with the bytes that each one alone saves, the largest first.

    Args:
        args: the run's flags.
        plan: what it needs with them.
    """
    layers = choose_llm(LLMFlags.of(args)).text_config.num_hidden_layers
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
        (flags, plan.total - plan_memory(argparse.Namespace(**{**vars(args), **change})).total)
        for flags, change in changes.items()
    ]
    worthwhile = [(flags, size) for flags, size in saved if size > plan.total / 100]
    return sorted(worthwhile, key=lambda change: -change[1])


def advice(args: argparse.Namespace, plan: MemoryPlan) -> str:
    """Phrase the advice for a smaller run as a part of a sentence."""
    changes = [f"{flags} (saves {_gib(size)} GiB)" for flags, size in savings(args, plan)]
    return "try " + ", ".join(changes) if changes else "take a smaller LLM"


def memory_error(args: argparse.Namespace) -> UserError:
    """Return the one line for a device that is full."""
    if not has_llm(args):
        return UserError("out of memory: give a smaller --batch_size or --eval_batch_size")
    try:
        plan = plan_memory(args)
        what_helps = advice(args, plan)
    except NoPlan:
        return UserError("out of memory: try --gradient_checkpointing, --load_in_4bit, --llm_layers or --batch_size 1")
    return UserError(
        f"out of memory on {plan.device}: a training step needs about {_gib(plan.needed)} GiB,"
        f" {_gib(plan.free)} are free: {what_helps}"
    )


def nearly_full(device: torch.device) -> str:
    """Return a warning if this process has used a GPU to its last 5%, else nothing."""
    if not is_gpu(device):
        return ""
    used, there = peak_reserved(device), total_bytes(device)
    if used < 0.95 * there:
        return ""
    return (
        f"Warning: {_gib(used)} of the {_gib(there)} GiB of {device} have been in use. Under Windows the driver moves"
        " what does not fit to host memory, and every step is many times slower: see --plan"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
