"""Reversible instance normalisation (section 3.1 of the paper; RevIN without its affine part)."""

from typing import NamedTuple

import torch

# Added to the variance, so that a constant window stays finite.
EPS = 1e-5


class Statistics(NamedTuple):
    """Mean and deviation of each window, (B, 1) each."""

    mean: torch.Tensor
    deviation: torch.Tensor


class Normalize:
    """Scale windows to mean 0 and deviation 1, and back. Keeps no state: what it took off, it returns."""

    def __call__(self, windows: torch.Tensor) -> tuple[torch.Tensor, Statistics]:
        """(B, seq_len) -> the scaled windows, (B, seq_len), and what was taken off."""
        mean = windows.mean(-1, keepdim=True)
        deviation = torch.sqrt(windows.var(-1, keepdim=True, unbiased=False) + EPS)
        return (windows - mean) / deviation, Statistics(mean, deviation)

    def inverse(self, windows: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """(B, any length) -> the same in the units of the windows that `statistics` are of."""
        return windows * statistics.deviation + statistics.mean
