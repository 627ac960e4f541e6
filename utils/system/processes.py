"""Device, precision, processes and random seeds, through accelerate."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    gather_object,
    set_seed,
)

from utils.cli.checks import overruled_variables
from utils.cli.signals import Interrupts
from utils.errors import UserError, first_line
from utils.system.gpu import has_bfloat16, is_gpu, of_this_machine

# Several processes agree on stopping about once a second, but at least every so many steps: each poll is a blocking
# collective.
AGREE_EVERY = 10


def start_processes(
    seed: int, grad_accum: int, use_amp: bool, deterministic: bool, shares_buffers: bool
) -> Accelerator:
    """Return the accelerator of this run and seed every random generator.

    Args:
        seed: of the weights, of dropout and of the order of the windows.
        grad_accum, use_amp, deterministic: the flags of these names.
        shares_buffers: whether all processes take the first one's buffers before each batch: PatchTST keeps means of
            its batches. TimeLLM's one buffer, the basis of the prototypes, never changes.

    Raises:
        UserError: if several processes were started that would not work together.
    """
    accelerator = build_accelerator(seed, grad_accum, use_amp, shares_buffers)
    set_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's first product is made
    # Where a kernel has no deterministic form, torch warns and names it.
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    return accelerator


def build_accelerator(seed: int, grad_accum: int, use_amp: bool, shares_buffers: bool) -> Accelerator:
    """Return the accelerator of a run, and leave the random generators alone.

    Raises:
        UserError: as in `start_processes`.
    """
    # accelerate keeps its settings for the life of the interpreter and refuses others; `main` may be called
    # again with another precision.
    AcceleratorState._reset_state()
    mixed_precision = _half_precision(of_this_machine()) if use_amp else "no"
    # So that accelerate gives torch's data parallelism device_ids=None. With a device it moves the windows there, and
    # `forward` would wait to have them back: the prompts are written on the host.
    os.environ.setdefault("ACCELERATE_BYPASS_DEVICE_MAP", "true")
    with refused_environment():
        accelerator = Accelerator(
            mixed_precision=mixed_precision,  # left out, the environment would be asked for each of these three
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=grad_accum),
            dynamo_backend="no",
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed, non_blocking=True),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=shares_buffers)],
        )
    for line in overruled_variables(mixed_precision, grad_accum):
        accelerator.print(line)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and accelerator.num_processes == 1:
        raise UserError(
            f"{started} processes were started, and each takes itself for the only one: start them with accelerate"
            " launch, or, on the CPU, set ACCELERATE_USE_CPU=1"
        )
    return accelerator


@contextlib.contextmanager
def refused_environment() -> Iterator[None]:
    """Turn what accelerate and torch say of variables that make no sense into one line.

    Raises:
        UserError: if they cannot start.
    """
    try:
        yield
    except (ValueError, RuntimeError, ImportError) as problem:
        raise UserError(
            f"the environment does not let accelerate start ({first_line(problem)}): unset its variables"
            " (ACCELERATE_*, RANK, MASTER_ADDR), or start with accelerate launch"
        ) from problem


def check_same_on_all_ranks(value: str, what: str) -> None:
    """Refuse a value that the processes should share and do not.

    Args:
        value: this process's.
        what: it is of, as the message calls it.

    Raises:
        UserError: if they differ.
    """
    if len(set(gather_object([value]))) > 1:
        raise UserError(f"{what} is not the same for all processes: give all machines the same file")


def seed_rank(accelerator: Accelerator, seed: int) -> None:
    """Let each process draw random numbers of its own from here on: their windows differ, so must their dropout.

    The first goes on as a single process would. The weights are drawn before, from one seed for all.
    """
    if accelerator.process_index > 0:
        set_seed(seed + accelerator.process_index)


def exists_on_all_ranks(path: Path) -> bool:
    """Return whether a file is there.

    Raises:
        UserError: if it is for some processes and not for others.
    """
    found = gather_object([path.is_file()])
    if len(set(found)) > 1:
        raise UserError(
            f"{path} is there for some processes only: --checkpoints names a folder that all machines share"
        )
    return found[0]


def _half_precision(device: torch.device) -> str:
    return "fp16" if is_gpu(device) and not has_bfloat16(device) else "bf16"


class StopVote:
    """Tells when to stop; all processes get the same answer, if all ask equally often.

    Args:
        interrupts: of this process.
        accelerator: of the run.
    """

    def __init__(self, interrupts: Interrupts, accelerator: Accelerator):
        self._interrupts = interrupts
        self._accelerator = accelerator
        self._polls = 0
        self._next = 1
        self._agreed = (0, time.monotonic())  # when the processes last agreed, by polls and by the clock

    def poll(self) -> bool:
        """Return whether to stop."""
        if self._accelerator.num_processes == 1:
            return self._interrupts.is_requested
        self._polls += 1
        if self._polls < self._next:
            return False
        before, since = self._agreed
        seconds = (time.monotonic() - since) / max(self._polls - before, 1)
        votes = torch.tensor([float(self._interrupts.is_requested), seconds], device=self._accelerator.device)
        requests, seconds_each = self._accelerator.reduce(votes, "mean").tolist()
        self._next = self._polls + min(max(round(1 / max(seconds_each, 1e-3)), 1), AGREE_EVERY)
        self._agreed = (self._polls, time.monotonic())
        return requests > 0
