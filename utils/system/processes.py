"""Device, precision, processes and random seeds, through accelerate."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
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

from utils.cli.environment import overruled_variables
from utils.errors import UserError
from utils.system.gpu import has_bfloat16, is_gpu, of_this_machine


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
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise UserError(
            f"the environment does not let accelerate start ({reason[0]}): unset its variables (ACCELERATE_*, RANK,"
            " MASTER_ADDR), or start with accelerate launch"
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


@contextlib.contextmanager
def spawn_missing_ranks(script: Path, argv: Sequence[str]) -> Iterator[None]:
    """Start the processes that `accelerate launch --cpu --num_processes N` promises and does not start.

    It starts one, and tells it where the others would meet. This process becomes the first of the N; the others
    run the same command line and end with it.

    Args:
        script: that was launched.
        argv: its command line.
    """
    count = _promised_processes()
    if count == 1:
        yield
        return
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **ranks[0]}
    command = [sys.executable, str(script), *argv]
    others = [subprocess.Popen(command, env={**os.environ, **rank}) for rank in ranks[1:]]
    try:
        yield
    except BaseException:
        for other in others:
            other.terminate()
        raise
    finally:
        for other in others:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # One that waits for this process in torch's own code does not hear a signal.
                other.wait(None if sys.exception() is None else 10)
            other.kill()
            other.wait()


def _promised_processes() -> int:
    """Return how many processes `accelerate launch` was told to start, 1 if it has started them or is not there."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if not on_cpu or "MASTER_ADDR" not in os.environ or "WORLD_SIZE" in os.environ:
        return 1
    from accelerate.commands.launch import launch_command_parser

    words = _what_started_us()
    # `accelerate launch`, `accelerate-launch`, `python -m accelerate.commands.launch`
    launcher = next((place for place, word in enumerate(words) if word.endswith(("launch", "launch.py"))), None)
    if launcher is None:
        return 1
    told, _ = launch_command_parser().parse_known_args(words[launcher + 1 :])
    return told.num_processes or 1


def _what_started_us() -> list[str]:
    """Return the command line of the process that started this one.

    Under Windows the python.exe of a virtual environment stands between: it starts the real one with the same words.
    """
    this = psutil.Process()
    words = this.cmdline()[1:]
    return next((theirs for parent in this.parents() if (theirs := parent.cmdline())[1:] != words), [])
