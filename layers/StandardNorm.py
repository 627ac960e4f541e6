"""Reversible instance normalization (section 3.1 of the paper; RevIN without its affine parameters)."""

from typing import NamedTuple

import torch

EPS = 1e-5  # added to the variance, so that a constant window stays finite


class Statistics(NamedTuple):
    """Mean and standard deviation of windows, (B, 1) each."""

    mean: torch.Tensor
    deviation: torch.Tensor


class Normalize:
    """Scale windows to zero mean and unit variance, and back."""

    def __call__(self, windows: torch.Tensor) -> tuple[torch.Tensor, Statistics]:
        """(B, seq_len) -> scaled windows, (B, seq_len), and the statistics that `inverse` needs."""
        mean = windows.mean(-1, keepdim=True)
        deviation = torch.sqrt(windows.var(-1, keepdim=True, unbiased=False) + EPS)
        return (windows - mean) / deviation, Statistics(mean, deviation)

    def inverse(self, scaled: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """Undo the scaling, (B, any length) -> the same shape."""
        return scaled * statistics.deviation + statistics.mean
