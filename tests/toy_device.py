"""A GPU that is none: its tensors hold real numbers, in host memory, but torch takes them for those of a device.

What goes wrong on a GPU alone goes wrong here, on any machine. An operation on tensors of two devices raises; whatever
makes the host wait for the device is taken down with its place, or raises; memory is counted, and can be short; random
numbers can come from a generator of the device's own.

torch knows one such device in a process and does not forget it: from then on it is the accelerator of whoever asks for
one. So it is set up in a process of its own, see test_toy_device.py. It stands on a function that is private to torch,
and nothing else in this repository does.

What it cannot show: time, streams, float16's rounding in a GPU's kernels, bitsandbytes' Linear4bit, several processes.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import FrameType, SimpleNamespace

import torch
from torch.nn.attention import SDPBackend
from torch.utils import backend_registration

NAME = "toy"
_PRIVATE = "_setup_privateuseone_for_python_backend"
_ROOT = Path(__file__).resolve().parents[1]
_ROOMS = ("layers", "utils", "data_provider", "models", "run_main.py")
_GIB = 2**30

aten = torch.ops.aten

# What reads a number back, or needs one to know the size of its result.
_READING = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten._linalg_check_errors.default,
}
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
# What GPUs and the CPU have a kernel for, and torch does in several steps elsewhere, rounded otherwise.
_IN_ONE_KERNEL = (aten.silu_backward.default,)
# A choice of those that autocast does in half precision on any GPU.
_IN_HALF_PRECISION = ("linear", "matmul", "conv1d", "scaled_dot_product_attention")
_COPYING = {aten._to_copy.default, aten.copy_.default}


class DeviceWaitError(RuntimeError):
    """The host waited for the device where it must not."""


class MixedDevicesError(RuntimeError):
    """An operation got tensors of two devices."""


class ToyGPU:
    """The device: what torch asks of it, by the names that `torch.cuda` has, and what tests do.

    Attributes:
        device: as torch knows it.
        waits: where the host has waited, as `utils/training/trainer.py:_report_progress aten.item`, in order.
        capacity: bytes that it has; None for no end.
        has_bfloat16: what it says of its hardware.
    """

    def __init__(self):
        self.waits: list[str] = []
        self.capacity: int | None = None
        self.has_bfloat16 = False
        self._allowed_in: tuple[str, ...] | None = None  # None: everywhere
        self._storages: set[int] = set()  # that are alive, by address
        self._taken = self._peak = 0  # bytes of those
        self._share = 1.0  # of the capacity, that may be taken
        self._failed: Exception | None = None  # in the backward pass at hand
        self._own_state: torch.Tensor | None = None  # of its generator; None: it draws from the CPU's

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)

    # What tests do.

    def reset(self) -> None:
        """Forget what earlier tests did."""
        self.waits.clear()
        self.capacity, self.has_bfloat16, self._share = None, False, 1.0
        self._allowed_in = self._own_state = self._failed = None
        self.reset_peak_memory_stats()

    @contextlib.contextmanager
    def never_waited_for(self, but_in: tuple[str, ...] = ()) -> Iterator[None]:
        """Let each wait raise, but for those below functions of these names."""
        before, self._allowed_in = self._allowed_in, but_in
        try:
            yield
        finally:
            self._allowed_in = before

    def draws_its_own_numbers(self) -> None:
        """From here on random numbers are drawn from a generator of the device's own, as on any GPU."""
        self._own_state = torch.Generator().get_state()

    # What torch and the code under test ask.

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def set_device(self, _device: object) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return self.has_bfloat16 or including_emulation

    def manual_seed_all(self, seed: int) -> None:
        if self._own_state is not None:
            self._own_state = torch.Generator().manual_seed(seed + 1).get_state()  # not the CPU's numbers again

    def get_rng_state(self, _device: object = None) -> torch.Tensor:
        return torch.get_rng_state() if self._own_state is None else self._own_state.clone()

    def set_rng_state(self, state: torch.Tensor, _device: object = None) -> None:
        if self._own_state is None:
            torch.set_rng_state(state)
        else:
            self._own_state = state.clone()

    def get_device_properties(self, _device: object = None) -> SimpleNamespace:
        return SimpleNamespace(name="toy", total_memory=self._there)

    def mem_get_info(self, _device: object = None) -> tuple[int, int]:
        return self._there - self.memory_reserved(), self._there

    def memory_reserved(self, _device: object = None) -> int:
        return self._taken

    memory_allocated = memory_reserved

    def max_memory_allocated(self, _device: object = None) -> int:
        return self._peak

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, _device: object = None) -> None:
        self._peak = self.memory_reserved()

    def set_per_process_memory_fraction(self, share: float, _device: object = None) -> None:
        self._share = share

    def empty_cache(self) -> None:
        pass

    def synchronize(self, _device: object = None) -> None:
        pass

    @property
    def _there(self) -> int:
        return 64 * _GIB if self.capacity is None else self.capacity

    # What its tensors tell.

    def take(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, until it is gone; fail if it is beyond what there is."""
        address, size = storage._cdata, storage.nbytes()
        if address in self._storages:
            return
        if self._taken + size > self._there * self._share:
            self.fail(torch.OutOfMemoryError(f"{NAME} out of memory. Tried to take {size} bytes more."))
        self._storages.add(address)
        self._taken += size
        self._peak = max(self._peak, self._taken)
        weakref.finalize(storage, self._give_back, address, size)

    def _give_back(self, address: int, size: int) -> None:
        self._storages.discard(address)
        self._taken -= size

    def wait(self, operation: object) -> None:
        """Take down that the host waits; fail if it must not."""
        frames = list(_our_frames())
        self.waits.append(f"{frames[0] if frames else 'elsewhere'} {operation}")
        functions = {place.rpartition(":")[2] for place in frames}
        if self._allowed_in is not None and functions.isdisjoint(self._allowed_in):
            self.fail(DeviceWaitError(f"{operation} makes the host wait for the device, in {' <- '.join(frames[:3])}"))

    def fail(self, problem: Exception) -> None:
        """Raise an exception, in backward as soon as that is over."""
        try:
            if torch._C._current_graph_task_id() == -1:
                raise problem
            self._failed = self._failed or problem
        finally:
            del problem  # else it and this frame keep each other, and the tensors of all frames below, alive

    def raise_what_failed(self) -> None:
        """Raise what failed first in backward, if anything did."""
        problem, self._failed = self._failed, None
        try:
            if problem:
                raise problem
        finally:
            del problem

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Let the CPU's generator stand for the device's."""
        if self._own_state is None:
            yield
            return
        of_cpu = torch.get_rng_state()
        torch.set_rng_state(self._own_state)
        try:
            yield
            self._own_state = torch.get_rng_state()
        finally:
            torch.set_rng_state(of_cpu)


GPU = ToyGPU()


def _our_frames() -> Iterator[str]:
    """Yield where in the code under test we are, `file:function`, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame:
        if file := _our_file(frame.f_code.co_filename):
            yield f"{file}:{frame.f_code.co_name}"
        frame = frame.f_back


@cache
def _our_file(name: str) -> str:
    """Return the path of a file of the code under test, nothing for another file."""
    path = Path(name)
    if not path.is_relative_to(_ROOT) or path.relative_to(_ROOT).parts[0] not in _ROOMS:
        return ""
    return path.relative_to(_ROOT).as_posix()


class ToyTensor(torch.Tensor):
    """A tensor of the toy GPU.

    Args:
        values: its numbers, on the CPU.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=GPU.device,
        )

    def __init__(self, values: torch.Tensor):
        GPU.take(values.untyped_storage())
        self.values_on_host = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _carry_out(function, *args, **(kwargs or {}))

    def __repr__(self, **_options) -> str:
        return f"ToyTensor({self.values_on_host})"

    def __reduce_ex__(self, protocol: int):
        """A file has numbers; the device is that of the reader's choice."""
        GPU.wait("pickle")
        return self.values_on_host.detach().clone().__reduce_ex__(protocol)


def _carry_out(function: Callable, *args, **kwargs):
    """Do an operation on the CPU; what comes of tensors of the toy GPU is one of its, too."""
    if torch.Tag.inplace_view in function.tags and function is not aten.detach_.default:
        raise NotImplementedError(f"{function} changes the shape of a tensor in place")
    if _is_made_of_others(function):
        return function.decompose(*args, **kwargs)
    given: list[tuple[torch.Tensor, torch.Tensor]] = []  # each with its numbers

    def on_host(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value
        given.append((value, _on_host(value)))
        return given[-1][1]

    args_on_host, kwargs_on_host = _map(on_host, args), _map(on_host, kwargs)
    tensors = [tensor for tensor, _ in given]
    has_toys = any(map(_is_toy, tensors))
    if function in _COPYING:
        _note_copy(function, args, kwargs)
    elif has_toys:
        _note_reading(function, args, kwargs)
        _check_devices(function, args, tensors)
    if function is aten._fused_sdp_choice.default:
        return SDPBackend.MATH.value  # the CPU's own kernel is for tensors that say they are the CPU's
    is_on_gpu = kwargs["device"].type == NAME if kwargs.get("device") else has_toys
    with GPU.drawing() if torch.Tag.nondeterministic_seeded in function.tags else contextlib.nullcontext():
        result = function(*args_on_host, **kwargs_on_host)

    def on_device(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        for tensor, numbers in given:
            if numbers is value:
                return tensor  # what was changed in place is given back itself
        if not is_on_gpu:
            return value
        with torch.inference_mode(value.is_inference()):  # there a view of a tensor from outside is none of inference
            return ToyTensor(value)

    return _map(on_device, result)


def _map(change: Callable, value: object) -> object:
    """Change what stands in the lists, tuples and dictionaries that operations take and return."""
    if isinstance(value, (list, tuple)):
        return type(value)([_map(change, part) for part in value])
    if isinstance(value, dict):
        return {name: _map(change, part) for name, part in value.items()}
    return change(value)


@cache
def _is_made_of_others(function: Callable) -> bool:
    """Return whether torch does an operation by means of others alone; in inference mode it comes as it is."""
    kernels = [
        torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), key)
        for key in ("CompositeImplicitAutograd", "CPU")
    ]
    return kernels == [True, False]


def _is_toy(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, ToyTensor)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.values_on_host if isinstance(tensor, ToyTensor) else tensor


def _note_copy(function: Callable, args: tuple, kwargs: dict) -> None:
    if function is aten.copy_.default:
        target, source = args[0].device, args[1]
        at_once = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    else:
        source = args[0]
        target, at_once = kwargs.get("device") or source.device, kwargs.get("non_blocking", False)
    _note_transfer(source, target, at_once)


def _note_transfer(source: torch.Tensor, target: torch.device, non_blocking: bool) -> None:
    """A copy between devices is waited for, but for one from pinned memory that need not be done at once."""
    if source.device.type == target.type or not source.numel():
        return
    if not (non_blocking and target.type == NAME and source.is_pinned()):
        pinned = "pinned" if target.type == NAME and source.is_pinned() else "pageable"
        GPU.wait(f"copy of {tuple(source.shape)} from {pinned} {source.device.type} to {target.type} memory")


def _note_reading(function: Callable, args: tuple, kwargs: dict) -> None:
    if function is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
        return
    indices = [index for index in args[1] if index is not None] if function in _INDEXING else []
    by_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
    from_host = any(not _is_toy(index) and index.dim() for index in indices)
    if function in _READING or by_mask or from_host:
        GPU.wait(function)


def _check_devices(function: Callable, args: tuple, tensors: list[torch.Tensor]) -> None:
    """Only single numbers may be elsewhere, and what a tensor of the device is indexed by."""
    allowed = [id(index) for index in args[1]] if function in _INDEXING and _is_toy(args[0]) else []
    strangers = [one for one in tensors if not _is_toy(one) and one.dim() and id(one) not in allowed]
    if strangers:
        GPU.fail(
            MixedDevicesError(f"{function} got tensors of {NAME} and of {strangers[0].device}: {strangers[0].shape}")
        )


def why_not() -> str:
    """Return why this torch cannot have a toy GPU, else nothing."""
    needed = {
        _PRIVATE: backend_registration,
        "_engine_run_backward": torch.autograd,
        "_current_graph_task_id": torch._C,
    }
    return ", ".join(f"this torch has no {name}" for name, room in needed.items() if not hasattr(room, name))


def set_up() -> list[torch.library.Library]:
    """Make the device known to torch, for the life of the process; what is returned must live as long."""
    getattr(backend_registration, _PRIVATE)(NAME, GPU)
    torch.autograd.set_multithreading_enabled(False)  # so that a wait in backward has the step's own frames below it
    torch.autograd._engine_run_backward = partial(_run_backward, torch.autograd._engine_run_backward)
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_carry_out, "PrivateUse1")  # operations that make tensors out of nothing
    some.impl("_copy_from", _copy_from, "PrivateUse1")  # of torch.tensor, which goes past the dispatch above
    for function in _IN_ONE_KERNEL:
        some.impl(function, partial(_carry_out, function), "PrivateUse1")
    some.impl("is_pinned", _is_pinned, "CPU")
    some.impl("_pin_memory", _pin, "CPU")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _IN_HALF_PRECISION:
        some.impl(name, partial(_autocast, getattr(aten, name).default), "AutocastPrivateUse1")
    return [every, some]


def _autocast(function: Callable, *args, **kwargs):
    """Do an operation in what autocast is set to."""
    dtype = torch.get_autocast_dtype(NAME)

    def cast(value: object) -> object:
        is_wide = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(dtype) if is_wide else value

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return function(*_map(cast, args), **_map(cast, kwargs))


def _run_backward(run: Callable, *args, **kwargs):
    """Go backward, and say only then what failed: an exception from below would end the process."""
    result = run(*args, **kwargs)
    GPU.raise_what_failed()
    return result


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _note_transfer(source, target.device, non_blocking)
    _on_host(target).copy_(_on_host(source))
    return target


_pinned: set[int] = set()  # addresses of storages


def _is_pinned(tensor: torch.Tensor, _device: torch.device | None = None) -> bool:
    return tensor.untyped_storage()._cdata in _pinned


def _pin(tensor: torch.Tensor, _device: torch.device | None = None) -> torch.Tensor:
    copy = tensor.clone(memory_format=torch.contiguous_format)
    storage = copy.untyped_storage()
    _pinned.add(storage._cdata)
    weakref.finalize(storage, _pinned.discard, storage._cdata)
    return copy
