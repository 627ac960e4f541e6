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
    """Halve the batch size until a training step fits into memory, and increase gradient accumulation to compensate.

    Each trial step uses random windows and allocates as much memory as the optimizer state will need. The weights and
    the random generators are left unchanged. `model` is not prepared by accelerate yet.

    Returns:
        The flags with the batch size that fits; an optimizer step still sees as many windows.

    Raises:
        torch.OutOfMemoryError: if not even the smallest batch fits.
    """
    with fork_random(accelerator.device), forbid_host_fallback(accelerator.device):
        fitting = _largest_fitting(args, model)
    # All processes use the smallest of their sizes. If one has none, all stop; otherwise the others would wait for it.
    fitting = int(accelerator.gather(torch.tensor([fitting], device=accelerator.device)).min())
    if fitting == 0:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    if fitting == args.batch_size:
        return args
    fitted = with_batch_size(args, accelerator, fitting, args.grad_accum * (args.batch_size // fitting))
    accelerator.print(f"Memory is short: --batch_size {fitting} --grad_accum {fitted.grad_accum} from here on")
    return fitted


def with_batch_size(
    args: argparse.Namespace, accelerator: Accelerator, batch_size: int, grad_accum: int
) -> argparse.Namespace:
    """Replace the batch size in the flags, limit the evaluation batch to a smaller one, and update the accelerator."""
    eval_batch_size = args.eval_batch_size
    if batch_size < args.batch_size:
        eval_batch_size = min(eval_batch_size, batch_size)
    accelerator.gradient_accumulation_steps = grad_accum
    changes = {"batch_size": batch_size, "grad_accum": grad_accum, "eval_batch_size": eval_batch_size}
    return argparse.Namespace(**{**vars(args), **changes})


def _largest_fitting(args: argparse.Namespace, model: Forecaster) -> int:
    """Find the largest batch size whose training step fits into memory; 0 if none does."""
    sizes = _sizes(args.batch_size)
    trial = find_executable_batch_size(_try_step, next(sizes), lambda: next(sizes, 0))
    try:
        return trial(args, model)
    except RuntimeError as problem:
        if "No executable batch size" not in str(problem):
            raise
        return 0


def _sizes(size: int) -> Iterator[int]:
    """Yield a batch size and its divisors in descending order, each at most half of the previous one."""
    whole = size
    while size:
        yield size
        size = next((part for part in range(size // 2, 0, -1) if whole % part == 0), 0)


def _try_step(batch_size: int, args: argparse.Namespace, model: Forecaster) -> int:
    """Run the forward and the backward pass on one batch, without an update, and return its size."""
    model.train()
    model.zero_grad()  # gradients of a step that did not fit
    # PatchTST keeps running means of its batches; these random windows must not change them.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trainable = sum(parameter.numel() for parameter in model.parameters())
    state = torch.empty(round(trainable * STATE_BYTES[args.optimizer]), dtype=torch.uint8, device=model.device)
    forecast = model(torch.randn(batch_size, args.seq_len, 1))
    functional.mse_loss(forecast, torch.zeros_like(forecast)).backward()
    model.zero_grad()
    model.load_state_dict(buffers, strict=False)
    del state
    return batch_size
