"""Query the GPU, if there is one: its memory, its random generator and its data types.

PyTorch has a module with the same functions for each kind of GPU: `torch.cuda` (NVIDIA, AMD) and `torch.xpu` (Intel).
Apple's GPU shares the host's memory, and its module counts no bytes; here it is treated like the CPU.
"""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import psutil
import torch

from layers.HostToDevice import is_reached_from_pinned_memory


def _module_of(device: torch.device) -> ModuleType | None:
    """Return PyTorch's module for a GPU with its own memory, None for any other device."""
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    return module if hasattr(module, "mem_get_info") else None


def is_gpu(device: torch.device) -> bool:
    """Return whether a device is a GPU with its own memory."""
    return _module_of(device) is not None


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device; on a GPU this includes the memory that this process has reserved."""
    if gpu := _module_of(device):
        return gpu.mem_get_info(device)[0] + gpu.memory_reserved(device)
    return psutil.virtual_memory().available


def total_bytes(device: torch.device) -> int:
    """Return the total memory of a GPU."""
    return _module_of(device).get_device_properties(device).total_memory


def peak_allocated(device: torch.device) -> int:
    """Return the peak memory of the tensors on a GPU so far."""
    return _module_of(device).max_memory_allocated(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of a GPU's peak memory."""
    _module_of(device).reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all queued work; a CPU has no queue."""
    torch.get_device_module(device).synchronize()


def peak_reserved(device: torch.device) -> int:
    """Return the peak memory of a GPU that this process has reserved so far."""
    return _module_of(device).max_memory_reserved(device)


def limit_memory(device: torch.device, size: int) -> None:
    """Let this process use at most `size` bytes of a GPU."""
    _module_of(device).set_per_process_memory_fraction(min(size / total_bytes(device), 1.0), device)


@contextlib.contextmanager
def forbid_host_fallback(device: torch.device) -> Iterator[None]:
    """Let a full GPU raise an error; otherwise, on Windows, its driver would move tensors to host memory."""
    gpu = _module_of(device)
    if gpu is None:
        yield
        return
    gpu.set_per_process_memory_fraction(min(free_bytes(device) / total_bytes(device), 1.0), device)
    try:
        yield
    finally:
        gpu.set_per_process_memory_fraction(1.0, device)


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of PyTorch's random generators on the CPU and on a GPU, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if gpu := _module_of(device):
        states[device.type] = gpu.get_rng_state(device)
    return states


def restore_random(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the random generators from `random_states`, ignoring a state of another device type."""
    torch.set_rng_state(states["cpu"])
    gpu = _module_of(device)
    if gpu and device.type in states:
        gpu.set_rng_state(states[device.type], device)


def fork_random(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context that restores the random generators of the CPU and of a GPU when it ends."""
    if _module_of(device):
        return torch.random.fork_rng([device], device_type=device.type)
    return torch.random.fork_rng([])


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device is a GPU that computes in bfloat16 in hardware."""
    gpu = _module_of(device)
    return gpu is not None and gpu.is_bf16_supported(including_emulation=False)


def has_fused_8bit_optimizers(device: torch.device) -> bool:
    """Return whether bitsandbytes updates an 8-bit state in place; elsewhere it unpacks the state in every step."""
    return device.type == "cuda"


def default_device() -> torch.device:
    """Return the type of device that is used by default: a GPU if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def should_pin_batches() -> bool:
    """Return whether batches should be in pinned memory, from which a GPU copies them asynchronously."""
    return is_reached_from_pinned_memory(default_device())
