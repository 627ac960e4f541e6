"""Run a 16-bit or 4-bit model in float32, to tell its errors from rounding."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_HALF = (torch.float16, torch.bfloat16)


class InFloat32(TorchDispatchMode):
    """A context in which operations on 16-bit tensors are computed in float32.

    Weights are not replaced: each is converted for the operation that reads it, an embedding table only in the rows
    that are looked up. Writing to a 16-bit tensor raises an error, because it would change a copy.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten.embedding.default:
            return _to_float32(function(*args, **kwargs))
        if function._schema.is_mutable and isinstance(args[0], torch.Tensor) and args[0].dtype in _HALF:
            raise NotImplementedError(f"{function} writes to a tensor of 16 bits")
        return function(*tree_map(_to_float32, args), **tree_map(_to_float32, kwargs))


def _to_float32(value: object) -> object:
    """Convert a 16-bit tensor or dtype; return anything else unchanged."""
    if isinstance(value, torch.Tensor) and value.dtype in _HALF:
        return value.float()
    return torch.float32 if value in _HALF else value
