"""Optimisers by name."""

import importlib.util
from collections.abc import Iterable, Mapping

import torch
from torch import nn

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


def parameter_groups(model: nn.Module, learning_rate: float, shares: Mapping[str, float]) -> list[dict]:
    """Return the parameters of a model with the rates of the first step; some layers may have their own.

    One step of Adam changes all weights of a layer at once: those of all tokens of the vocabulary in a prototype, or
    of all values of a window in a value to forecast.

    Args:
        model: possibly wrapped by accelerate.
        learning_rate: of all other parameters, and of the first group.
        shares: of that rate, by the layer's name in the model; with 1 a layer stays in the first group.
    """
    # An optimiser and its schedule want something to hold, also of a model without parameters.
    others = dict(model.named_parameters()) or {"nothing": torch.zeros(1, requires_grad=True)}
    own_groups = []
    for layer, share in shares.items():
        names = [name for name in others if share != 1 and f"{layer}." in name]
        if names:
            own_groups.append({"params": [others.pop(name) for name in names], "lr": learning_rate * share})
    return [{"params": list(others.values()), "lr": learning_rate}, *own_groups]


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
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return (AdamW8bit if name == "adamw8bit" else PagedAdamW8bit)(parameters, lr=learning_rate)
