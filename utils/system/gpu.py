"""The GPU, if there is one: its memory, its random numbers, what it computes in. Nobody else asks for it by name.

What torch says of one stands in a module of its own (`torch.cuda`, also for AMD's; `torch.xpu`), with the same names
in each. Apple's GPU shares the host's memory, and its module counts none: here it is treated like the CPU.
"""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import psutil
import torch

from layers.HostToDevice import is_reached_from_pinned_memory


def _module_of(device: torch.device) -> ModuleType | None:
    """Return torch's module of a GPU that has memory of its own, None for any other device."""
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    return module if hasattr(module, "mem_get_info") else None


def is_gpu(device: torch.device) -> bool:
    """Return whether a device is a GPU with memory of its own."""
    return _module_of(device) is not None


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free for this process, including what it holds already."""
    if gpu := _module_of(device):
        return gpu.mem_get_info(device)[0] + gpu.memory_reserved(device)
    return psutil.virtual_memory().available


def total_bytes(device: torch.device) -> int:
    """Return the memory that a GPU has."""
    return _module_of(device).get_device_properties(device).total_memory


def peak_allocated(device: torch.device) -> int:
    """Return the peak bytes of tensors on a GPU so far."""
    return _module_of(device).max_memory_allocated(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of a GPU's peak memory."""
    _module_of(device).reset_peak_memory_stats(device)


def wait_until_done(device: torch.device) -> None:
    """Wait until a device has done all that it was told; the CPU always has."""
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize()


def peak_reserved(device: torch.device) -> int:
    """Return the peak bytes of a GPU that this process has reserved so far."""
    return _module_of(device).max_memory_reserved(device)


@contextlib.contextmanager
def forbid_host_fallback(device: torch.device) -> Iterator[None]:
    """Let a GPU that is full raise an error: under Windows its driver would move tensors to host memory instead."""
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
    """Return the states of torch's generators, that of the CPU and that of a GPU, by the kind of device."""
    states = {"cpu": torch.get_rng_state()}
    if gpu := _module_of(device):
        states[device.type] = gpu.get_rng_state(device)
    return states


def restore_random(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put the generators where `random_states` found them; one of another kind of device is left out."""
    torch.set_rng_state(states["cpu"])
    gpu = _module_of(device)
    if gpu and device.type in states:
        gpu.set_rng_state(states[device.type], device)


def fork_random(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context that leaves the random generators of the CPU and of a GPU as they were."""
    if _module_of(device):
        return torch.random.fork_rng([device], device_type=device.type)
    return torch.random.fork_rng([])


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a GPU computes in bfloat16 in hardware; of other devices nothing is known."""
    gpu = _module_of(device)
    return gpu is not None and gpu.is_bf16_supported(including_emulation=False)


def has_fused_8bit_optimizers(device: torch.device) -> bool:
    """Return whether bitsandbytes updates a state of 8 bits in place there; elsewhere it unpacks it at every step."""
    return device.type == "cuda"


def of_this_machine() -> torch.device:
    """Return the kind of device that is used where nobody asks for another: the GPU, if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def pins_batches() -> bool:
    """Return whether batches are to be in pinned memory: there is a GPU that takes them from there without a wait."""
    return is_reached_from_pinned_memory(of_this_machine())
