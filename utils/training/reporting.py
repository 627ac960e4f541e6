"""Report the progress of a run: TensorBoard by accelerate's tracker, and progress bars on stderr."""

import time
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import is_tensorboard_available
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.errors import UserError

# A progress bar reads the loss once in this many batches, because each read waits for the device.
_READ_LOSS_EVERY = 10


def check_reporting(report_to: str) -> None:
    """Raise a UserError if the tracker's package is not installed."""
    if report_to == "tensorboard" and not is_tensorboard_available():
        raise UserError("--report_to tensorboard needs the package tensorboard: pip install tensorboard")


def start_reporting(accelerator: Accelerator, report_to: str, folder: Path, flags: dict) -> None:
    """Log the flags, and all later calls of `accelerator.log`, to `tensorboard` in the run folder."""
    if report_to == "none":
        return
    # A run that is resumed within a second must not replace the file of that second.
    suffix = f".{time.time_ns() % 10**9}"
    accelerator.log_with = [TensorBoardTracker("tensorboard", folder, filename_suffix=suffix)]
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in flags.items()}
    accelerator.init_trackers("tensorboard", plain)


def stop_reporting(accelerator: Accelerator) -> None:
    """Close the trackers."""
    for tracker in accelerator.trackers:
        tracker.finish()


def windows_bar(loader: DataLoader, title: str, whole: DataLoader | None = None) -> tqdm:
    """Wrap a loader in a progress bar that counts windows; only a terminal shows it.

    If `loader` continues an epoch, `whole` is the loader of the whole epoch.
    """
    whole = whole or loader
    return tqdm(
        loader,
        desc=title,
        total=len(whole),
        initial=len(whole) - len(loader),
        disable=None if PartialState().is_main_process else True,
        leave=False,
        unit=" windows",
        unit_scale=getattr(whole, "total_batch_size", whole.batch_size),
    )


def rounds_bar(rounds: int, title: str) -> tqdm:
    """Show a progress bar that counts rounds; only a terminal shows it."""
    is_hidden = None if PartialState().is_main_process else True
    return tqdm(desc=title, total=rounds, disable=is_hidden, leave=False, unit=" rounds")


def show_loss(bar: tqdm, number: int, losses: torch.Tensor) -> None:
    """Show the mean loss of batch `number` beside a progress bar, once every few batches."""
    if not bar.disable and number % _READ_LOSS_EVERY == 0:
        bar.set_postfix_str(f"loss {losses.mean().item():.4f}", refresh=False)
