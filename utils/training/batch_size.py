"""Find the batch size that fits into memory."""

import argparse
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch.nn import functional

from models.forecaster import Forecaster
from utils.memory.plan import STATE_BYTES
from utils.system.gpu import forbid_host_fallback, fork_random


def fit_batch_size(args: argparse.Namespace, accelerator: Accelerator, model: Forecaster) -> argparse.Namespace:
    """Halve the batch size, and raise the gradient accumulation as much, until a training step fits into memory.

    A step is tried with random windows, beside the memory that the optimiser will need. The weights and the random
    generators stay as they are; an optimiser step has as many windows as before.

    Args:
        args: the parsed flags.
        accelerator: of the run; told of the change.
        model: not prepared yet.

    Returns:
        The flags with the batch size that fits.

    Raises:
        torch.OutOfMemoryError: if not even the smallest batch fits.
    """
    with fork_random(accelerator.device), forbid_host_fallback(accelerator.device):
        fitting = _largest_fitting(args, model)
    # All processes take as many steps; and where nothing fits into one, none goes on to wait for it.
    fitting = int(accelerator.gather(torch.tensor([fitting], device=accelerator.device)).min())
    if fitting == 0:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    if fitting == args.batch_size:
        return args
    fitted = with_batches(args, accelerator, fitting, args.grad_accum * (args.batch_size // fitting))
    accelerator.print(f"Memory is short: --batch_size {fitting} --grad_accum {fitted.grad_accum} from here on")
    return fitted


def with_batches(
    args: argparse.Namespace, accelerator: Accelerator, batch_size: int, grad_accum: int
) -> argparse.Namespace:
    """Return the flags with another batch size, for an evaluation too if it is smaller; tell the accelerator."""
    eval_batch_size = args.eval_batch_size
    if batch_size < args.batch_size:
        eval_batch_size = min(eval_batch_size, batch_size)
    accelerator.gradient_accumulation_steps = grad_accum
    changes = {"batch_size": batch_size, "grad_accum": grad_accum, "eval_batch_size": eval_batch_size}
    return argparse.Namespace(**{**vars(args), **changes})


def _largest_fitting(args: argparse.Namespace, model: Forecaster) -> int:
    """Return the largest of the batch sizes that a step fits with, 0 if there is none."""
    sizes = _sizes(args.batch_size)
    trial = find_executable_batch_size(_try_step, next(sizes), lambda: next(sizes, 0))
    try:
        return trial(args, model)
    except RuntimeError as problem:
        if "No executable batch size" not in str(problem):
            raise
        return 0


def _sizes(size: int) -> Iterator[int]:
    """Yield a batch size and smaller ones that it is a multiple of, each at most half of the one before."""
    whole = size
    while size:
        yield size
        size = next((part for part in range(size // 2, 0, -1) if whole % part == 0), 0)


def _try_step(batch_size: int, args: argparse.Namespace, model: Forecaster) -> int:
    """Train on one batch, without an update; return its size."""
    model.train()
    model.zero_grad()  # of a step that did not fit
    # PatchTST keeps means over its batches: these random windows must not be in them.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = sum(parameter.numel() for parameter in model.parameters())
    state = torch.empty(round(trained * STATE_BYTES[args.optimizer]), dtype=torch.uint8, device=model.device)
    forecast = model(torch.randn(batch_size, args.seq_len, 1))
    functional.mse_loss(forecast, torch.zeros_like(forecast)).backward()
    model.zero_grad()
    model.load_state_dict(buffers, strict=False)
    del state
    return batch_size
