"""Find out how many windows fit into memory at one time."""

import argparse
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch import nn
from torch.nn import functional

from utils.memory import STATE_BYTES, memory_error


def fit_batch_size(args: argparse.Namespace, accelerator: Accelerator, model: nn.Module) -> None:
    """Halve `args.batch_size`, and raise `args.grad_accum` as much, until a training step fits into memory.

    A step is tried with random windows, beside what the optimiser will need. The weights, and the random numbers
    to come, stay as they are; windows an optimiser step stay as many.

    Args:
        args: the parsed flags; changed.
        accelerator: of the run; told of the change.
        model: not prepared yet.

    Raises:
        UserError: if not even the smallest batch fits.
    """
    sizes = _sizes(args.batch_size)
    trial = find_executable_batch_size(_try_step, next(sizes), lambda: next(sizes, 0))
    try:
        with torch.random.fork_rng():
            fitting = trial(args, model)
    except RuntimeError as problem:
        if "No executable batch size" not in str(problem):
            raise
        raise memory_error(args) from problem
    # All processes take as many steps.
    fitting = int(accelerator.gather(torch.tensor([fitting], device=accelerator.device)).min())
    if fitting == args.batch_size:
        return
    args.grad_accum *= args.batch_size // fitting
    args.batch_size = fitting
    args.eval_batch_size = min(args.eval_batch_size, fitting)
    accelerator.gradient_accumulation_steps = args.grad_accum
    accelerator.print(f"Memory is short: --batch_size {args.batch_size} --grad_accum {args.grad_accum} from here on")


def _sizes(size: int) -> Iterator[int]:
    """Yield a batch size and smaller ones that it is a multiple of, each at most half of the one before."""
    whole = size
    while size:
        yield size
        size = next((part for part in range(size // 2, 0, -1) if whole % part == 0), 0)


def _try_step(batch_size: int, args: argparse.Namespace, model: nn.Module) -> int:
    """Train on one batch, without an update; return its size."""
    model.train()
    model.zero_grad()  # of a step that did not fit
    trained = sum(parameter.numel() for parameter in model.parameters())
    state = torch.empty(round(trained * STATE_BYTES[args.optimizer]), dtype=torch.uint8, device=model.device)
    forecast = model(torch.randn(batch_size, args.seq_len, 1))
    functional.mse_loss(forecast, torch.zeros_like(forecast)).backward()
    model.zero_grad()
    del state
    return batch_size
