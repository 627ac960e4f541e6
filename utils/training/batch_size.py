"""Find out how many windows fit into memory at one time."""

import argparse
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch import nn
from torch.nn import functional

from utils.memory.plan import STATE_BYTES
from utils.runs.checkpoint import Checkpoint
from utils.system.gpu import no_spilling, random_kept


def fit_batch_size(args: argparse.Namespace, accelerator: Accelerator, model: nn.Module) -> None:
    """Halve `args.batch_size`, and raise `args.grad_accum` as much, until a training step fits into memory.

    A step is tried with random windows, beside what the optimiser will need. The weights, and the random numbers
    to come, stay as they are; windows an optimiser step stay as many.

    Args:
        args: the parsed flags; changed.
        accelerator: of the run; told of the change.
        model: not prepared yet.

    Raises:
        torch.OutOfMemoryError: if not even the smallest batch fits.
    """
    with random_kept(accelerator.device), no_spilling(accelerator.device):
        fitting = _largest_fitting(args, model)
    # All processes take as many steps; and where nothing fits into one, none goes on to wait for it.
    fitting = int(accelerator.gather(torch.tensor([fitting], device=accelerator.device)).min())
    if fitting == 0:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    if fitting < args.batch_size:
        take_batches(args, accelerator, fitting, args.grad_accum * (args.batch_size // fitting))
        accelerator.print(f"Memory is short: --batch_size {fitting} --grad_accum {args.grad_accum} from here on")


def choose_batch_size(
    args: argparse.Namespace, accelerator: Accelerator, model: nn.Module, last: Checkpoint | None
) -> None:
    """Set the batch size to what fits into memory, or to that of the state `last` that the run goes on from."""
    if last is None:
        fit_batch_size(args, accelerator, model)
    else:
        take_batches(args, accelerator, last.flags["batch_size"], last.flags["grad_accum"])


def take_batches(args: argparse.Namespace, accelerator: Accelerator, batch_size: int, grad_accum: int) -> None:
    """Set the windows at one time, in an evaluation too if they are fewer than before, and the batches a step."""
    if batch_size < args.batch_size:
        args.eval_batch_size = min(args.eval_batch_size, batch_size)
    args.batch_size, args.grad_accum = batch_size, grad_accum
    accelerator.gradient_accumulation_steps = grad_accum


def _largest_fitting(args: argparse.Namespace, model: nn.Module) -> int:
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


def _try_step(batch_size: int, args: argparse.Namespace, model: nn.Module) -> int:
    """Train on one batch, without an update; return its size."""
    model.train()
    model.zero_grad()  # of a step that did not fit
    # PatchTST's means of its batches must not hold what is made up here.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = sum(parameter.numel() for parameter in model.parameters())
    state = torch.empty(round(trained * STATE_BYTES[args.optimizer]), dtype=torch.uint8, device=model.device)
    forecast = model(torch.randn(batch_size, args.seq_len, 1))
    functional.mse_loss(forecast, torch.zeros_like(forecast)).backward()
    model.zero_grad()
    model.load_state_dict(buffers, strict=False)
    del state
    return batch_size
