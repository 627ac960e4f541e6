"""Set up the device, the precision, the processes and the random seeds with accelerate."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
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
from utils.system.gpu import default_device, has_bfloat16, is_gpu

# Processes vote on stopping about once a second, because each vote is a blocking collective operation, but at least
# once in this many polls.
_MAX_POLLS_PER_VOTE = 10


def start_processes(
    seed: int, grad_accum: int, use_amp: bool, deterministic: bool, shares_buffers: bool
) -> Accelerator:
    """Build the accelerator of a run and seed all random generators; see `build_accelerator`."""
    accelerator = build_accelerator(seed, grad_accum, use_amp, shares_buffers)
    set_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it before its first product
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler for a second
        # PyTorch warns of a kernel that has no deterministic form.
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    return accelerator


def build_accelerator(seed: int, grad_accum: int, use_amp: bool, shares_buffers: bool) -> Accelerator:
    """Build the accelerator of a run; `seed` is only that of the windows' order.

    If `shares_buffers`, all processes copy the buffers of the first one before each batch, which PatchTST's running
    means need; TimeLLM's only buffer, the basis of the prototypes, never changes.

    Raises:
        UserError: if several processes were started but cannot communicate.
    """
    # accelerate refuses to change its settings, but `main` may be called again with another precision.
    AcceleratorState._reset_state()
    mixed_precision = "no"
    if use_amp:
        device = default_device()
        mixed_precision = "fp16" if is_gpu(device) and not has_bfloat16(device) else "bf16"
    # Makes accelerate pass device_ids=None to DistributedDataParallel, which would otherwise move the windows to the
    # device, from where `forward` would have to copy them back to write the prompts.
    os.environ.setdefault("ACCELERATE_BYPASS_DEVICE_MAP", "true")
    with reraise_environment_errors():
        accelerator = Accelerator(
            mixed_precision=mixed_precision,  # without these three arguments accelerate reads the environment
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


def end_processes() -> None:
    """Wait for the other processes and close the connections to them, whose threads may else abort at exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        PartialState().wait_for_everyone()
        torch.distributed.destroy_process_group()
        PartialState._reset_state()


@contextlib.contextmanager
def reraise_environment_errors() -> Iterator[None]:
    """Reraise the errors of accelerate and PyTorch about invalid environment variables as a UserError."""
    try:
        yield
    except (ValueError, RuntimeError, ImportError) as problem:
        raise UserError(
            f"the environment does not let accelerate start ({first_line(problem)}): unset its variables"
            " (ACCELERATE_*, RANK, MASTER_ADDR), or start with accelerate launch"
        ) from problem


def check_same_on_all_ranks(value: str, what: str) -> None:
    """Raise a UserError that names `what`, unless all processes have the same value."""
    if len(set(gather_object([value]))) > 1:
        raise UserError(f"{what} is not the same for all processes: give all machines the same file")


def seed_rank(accelerator: Accelerator, seed: int) -> None:
    """Seed each process but the first differently, so that dropout differs between them as their windows do.

    Call it after the weights were initialized, which all processes must draw from the same seed.
    """
    if accelerator.process_index > 0:
        set_seed(seed + accelerator.process_index)


def exists_on_all_ranks(path: Path) -> bool:
    """Return whether a file exists; raise a UserError if only some processes see it."""
    found = gather_object([path.is_file()])
    if len(set(found)) > 1:
        raise UserError(
            f"{path} is there for some processes only: --checkpoints names a folder that all machines share"
        )
    return found[0]


class StopVote:
    """A vote on whether to stop: all processes must poll equally often, and get the same answer."""

    def __init__(self, interrupts: Interrupts, accelerator: Accelerator):
        self._interrupts = interrupts
        self._accelerator = accelerator
        self._polls, self._polls_per_vote = 0, 1
        self._voted_at = time.monotonic()

    def poll(self) -> bool:
        """Return whether to stop."""
        if self._accelerator.num_processes == 1:
            return self._interrupts.is_requested
        self._polls += 1
        if self._polls < self._polls_per_vote:
            return False
        seconds = (time.monotonic() - self._voted_at) / self._polls
        vote = torch.tensor([float(self._interrupts.is_requested), seconds], device=self._accelerator.device)
        requests, seconds_per_poll = self._accelerator.reduce(vote, "mean").tolist()
        polls_per_second = max(round(1 / max(seconds_per_poll, 1e-3)), 1)
        self._polls, self._polls_per_vote = 0, min(polls_per_second, _MAX_POLLS_PER_VOTE)
        self._voted_at = time.monotonic()
        return requests > 0
