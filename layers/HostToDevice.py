"""Copies from the host to a GPU that nobody waits for."""

import torch

# Apple's GPU reads the host's memory, and meta tensors have no numbers.
_NOTHING_TO_PIN = ("cpu", "mps", "meta")


def is_reached_from_pinned_memory(device: torch.device) -> bool:
    """Return whether a device takes what lies in pinned memory while the host goes on."""
    return device.type not in _NOTHING_TO_PIN


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device; from the CPU through pinned memory, so that a GPU is not waited for."""
    through_pinned = values.device.type == "cpu" and is_reached_from_pinned_memory(device)
    return (values.pin_memory() if through_pinned else values).to(device, non_blocking=True)
