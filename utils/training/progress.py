"""Progress bars: on stderr, of one process, and only in a terminal."""

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm import tqdm

# Batches from one look at the loss to the next: each look waits for the device.
_LOOK_EVERY = 10


def windows_bar(loader: DataLoader, title: str, whole: DataLoader | None = None) -> tqdm:
    """Return a bar over a loader's batches that counts windows.

    Args:
        loader: of batches, prepared by accelerate or not.
        title: of the bar.
        whole: the loader that `loader` is the rest of; None if it is all.
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


def show_loss(bar: tqdm, number: int, losses: torch.Tensor) -> None:
    """Write the mean of the last losses beside a bar, now and then; `number` counts the calls."""
    if not bar.disable and number % _LOOK_EVERY == 0:
        bar.set_postfix_str(f"loss {losses.mean().item():.4f}", refresh=False)
