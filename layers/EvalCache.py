"""Keep what is computed from parameters alone, as long as they stay as they are."""

import operator
from collections.abc import Callable, Sequence

import torch


class EvalCache:
    """Keep one result while gradients are disabled, so that an evaluation computes it once and not per batch."""

    def __init__(self):
        self._sources: list[torch.Tensor] = []
        self._versions: list[tuple] = []
        self._result = None

    def __call__(self, sources: Sequence[torch.Tensor], compute: Callable[[], object]) -> object:
        """Return `compute()`, or what it returned last time if `sources` have not changed since.

        Args:
            sources: all tensors that the result depends on.
            compute: what to compute from them.
        """
        if torch.is_grad_enabled():
            self._sources, self._result = [], None  # training needs the graph, and its memory
            return compute()
        versions = [_version(tensor) for tensor in sources]
        same = len(sources) == len(self._sources) and all(map(operator.is_, sources, self._sources))
        if not same or versions != self._versions:
            self._result = compute()
            # The tensors themselves, not their addresses: an address may be given to another tensor.
            self._sources, self._versions = list(sources), versions
        return self._result


def _version(tensor: torch.Tensor) -> tuple:
    """Return what changes when a tensor is changed in place: by an optimiser step, by loaded weights."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version
