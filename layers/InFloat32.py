"""Run a model of 16 or 4 bits in float32, to tell its mistakes from its rounding."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_HALF = (torch.float16, torch.bfloat16)


class InFloat32(TorchDispatchMode):
    """While it is entered, every operation that would be done in 16 bits is done in float32.

    The weights stay as they are: each is converted for the one operation that reads it, of a table of embeddings only
    the rows that are looked up. What is computed is exact but for float32's own rounding, in 5 decimal digits instead
    of 2 or 3. Writing to a tensor of 16 bits is refused: it would reach a copy.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten.embedding.default:
            return _widened(function(*args, **kwargs))
        if function._schema.is_mutable and isinstance(args[0], torch.Tensor) and args[0].dtype in _HALF:
            raise NotImplementedError(f"{function} writes to a tensor of 16 bits")
        return function(*tree_map(_widened, args), **tree_map(_widened, kwargs))


def _widened(value: object) -> object:
    if isinstance(value, torch.Tensor) and value.dtype in _HALF:
        return value.float()
    return torch.float32 if value in _HALF else value
