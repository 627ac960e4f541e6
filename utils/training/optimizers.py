"""Optimisers by name."""

import importlib.util
from collections.abc import Iterable

import torch

from utils.errors import UserError
from utils.system.gpu import has_fused_8bit_optimizers


def check_optimizer(name: str, device: torch.device) -> None:
    """Refuse an optimiser that this machine cannot run.

    Raises:
        UserError: if it needs a package or a device that is not there.
    """
    if name in ("adam", "adamw"):
        return
    if not has_fused_8bit_optimizers(device):
        raise UserError(f"--optimizer {name} saves memory on a CUDA device only, and there is none: give adamw")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--optimizer {name} needs the package bitsandbytes: pip install bitsandbytes")


def build_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter] | list[dict], learning_rate: float
) -> torch.optim.Optimizer:
    """Return the optimiser that `--optimizer` names, checked before.

    Args:
        name: adam, adamw, adamw8bit or paged_adamw8bit.
        parameters: to train, float32; or groups of them.
        learning_rate: of the first step, for those whose group names none.
    """
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        # Fused: one pass over the weights instead of a dozen; of the full map's many that is felt.
        return kind(parameters, lr=learning_rate, fused=True)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit  # only where a GPU has them

    return (AdamW8bit if name == "adamw8bit" else PagedAdamW8bit)(parameters, lr=learning_rate)
