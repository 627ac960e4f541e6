"""Device, precision, processes and random seeds, through accelerate."""

import argparse
import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed

from utils.errors import UserError


def start_processes(args: argparse.Namespace, seed: int) -> Accelerator:
    """Return the accelerator of this run and seed every random generator.

    Args:
        args: the parsed flags.
        seed: of the weights, of dropout and of the order of the training windows.

    Raises:
        UserError: if several processes were started that would not work together.
    """
    # accelerate keeps its settings for the life of the interpreter and refuses others; `main` may be called
    # again with another precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=_half_precision() if args.use_amp else None,
        gradient_accumulation_steps=args.grad_accum,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed, non_blocking=True),
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and accelerator.num_processes == 1:
        raise UserError(
            f"{started} processes were started, and each takes itself for the only one: start them with accelerate"
            " launch, or, on the CPU, set ACCELERATE_USE_CPU=1"
        )
    set_seed(seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's first product is made
    # Where a kernel has no deterministic form, torch warns and names it.
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    return accelerator


def _half_precision() -> str:
    has_bfloat16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bfloat16 else "fp16"
