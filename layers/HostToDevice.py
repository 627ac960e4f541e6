"""Asynchronous copies from the host to a GPU."""

import torch


def is_reached_from_pinned_memory(device: torch.device) -> bool:
    """Return whether copies from pinned memory to a device are asynchronous."""
    # Apple's GPU shares the host's memory, and meta tensors have no values.
    return device.type not in ("cpu", "mps", "meta")


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device without waiting for it; from the CPU to a GPU through pinned memory."""
    if values.device.type == "cpu" and is_reached_from_pinned_memory(device):
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
