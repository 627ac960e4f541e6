"""Attention with dropout on a CPU: faster than torch's, and without a matrix of all attention weights."""

import numpy as np
import torch
from torch.autograd.function import once_differentiable

# Attention weights that are computed at a time: few enough to stay in a core's cache (1 MiB in float32).
_WEIGHTS_AT_A_TIME = 2**18

# Dropout probabilities are multiples of 1 / 2^16, because each weight is dropped by 16 random bits.
_LEVELS = 2**16


def attention_with_dropout(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, dropout: float, scale: float
) -> torch.Tensor:
    """Compute softmax(scale * queries keys^T) with dropout, times values.

    torch's kernels for a CPU have no dropout, so `scaled_dot_product_attention` falls back to single operations, and
    draws one random number at a time for each weight. Here, as in FlashAttention, the weights are computed for a few
    queries at a time, and again in the backward pass; of the whole matrix only the dropped entries are kept, a byte
    each. The random bits come from numpy's SFC64, seeded by torch's generator: the same seed drops the same weights
    on every machine.

    Args:
        queries: (heads, N, d).
        keys, values: (heads, S, d).
        dropout: probability to drop a weight, rounded to a multiple of 1 / 65536, below 1.

    Returns:
        (heads, N, d), in the precision of the queries; computed in float32.
    """
    shape = (*queries.shape[:2], keys.shape[1])
    dropped_levels = min(round(dropout * _LEVELS), _LEVELS - 1)
    kept = _draw_kept(shape, dropped_levels, queries.device)
    share_kept = 1 - dropped_levels / _LEVELS
    inputs = (queries.float() * scale, keys.float(), values.float() / share_kept)
    return _Attention.apply(*inputs, kept).to(queries.dtype)


def _draw_kept(shape: tuple[int, ...], dropped_levels: int, device: torch.device) -> torch.Tensor:
    """Draw which weights are kept, 1 or 0 as uint8."""
    if device.type == "meta":  # a memory plan
        return torch.empty(shape, dtype=torch.uint8, device=device)
    generator = np.random.Generator(np.random.SFC64(torch.randint(2**63 - 1, ()).item()))
    count = int(np.prod(shape))
    words = generator.integers(2**64 - 1, size=-(-count // 4), dtype=np.uint64, endpoint=True)
    # Little-endian on every machine.
    bits = words.astype("<u8", copy=False).view("<u2")[:count]
    return torch.from_numpy(bits >= dropped_levels).view(torch.uint8).view(shape)


class _Attention(torch.autograd.Function):
    """softmax(queries keys^T) * kept, times values; shapes as in `attention_with_dropout`, kept (heads, N, S)."""

    @staticmethod
    def forward(ctx, queries, keys, values, kept):
        mixed = torch.empty_like(queries)
        for rows in _chunks(kept):
            weights = torch.bmm(queries[:, rows], keys.mT).softmax(-1)
            weights *= kept[:, rows].float()
            mixed[:, rows] = torch.bmm(weights, values)
        ctx.save_for_backward(queries, keys, values, kept, mixed)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        queries, keys, values, kept, mixed = ctx.saved_tensors
        of_queries, of_keys, of_values = map(torch.zeros_like, (queries, keys, values))
        # The sum over a row of weights times their gradients, which the softmax's gradient subtracts.
        inner = (gradient * mixed).sum(-1, keepdim=True)
        for rows in _chunks(kept):
            weights = torch.bmm(queries[:, rows], keys.mT).softmax(-1)
            is_kept = kept[:, rows].float()
            of_scores = torch.bmm(gradient[:, rows], values.mT).mul_(is_kept).sub_(inner[:, rows]).mul_(weights)
            of_values.baddbmm_(weights.mul_(is_kept).mT, gradient[:, rows])
            of_queries[:, rows] = torch.bmm(of_scores, keys)
            of_keys.baddbmm_(of_scores.mT, queries[:, rows])
        return of_queries, of_keys, of_values, None


def _chunks(kept: torch.Tensor) -> list[slice]:
    """Split the queries of `kept`, (heads, N, S), into slices."""
    heads, count, keys = kept.shape
    rows = max(_WEIGHTS_AT_A_TIME // (heads * keys), 1)
    return [slice(start, start + rows) for start in range(0, count, rows)]
