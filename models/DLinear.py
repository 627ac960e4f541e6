"""DLinear (Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023)."""

import argparse

import torch
from torch import nn
from torch.nn import functional

from models.forecaster import Forecaster


class Model(Forecaster):
    """A linear layer for the trend, which is a moving average, and one for the rest; all channels share both."""

    def __init__(self, configs: argparse.Namespace, device: torch.device | None = None):
        super().__init__(device)
        self.moving_avg = configs.moving_avg
        self.trend = nn.Linear(configs.seq_len, configs.pred_len)
        self.rest = nn.Linear(configs.seq_len, configs.pred_len)
        for linear in (self.trend, self.rest):
            nn.init.constant_(linear.weight, 1 / configs.seq_len)  # initially, the forecast is the window's mean
        self.to(self.device)

    def start_from_line(self, line: torch.Tensor) -> None:
        """Start from a linear forecast of the scaled window; see `Forecaster`."""
        self.starts_fitted = True
        # The forecast of a window x with mean m is m + line (x - m): the deviation cancels out.
        centered = line - line.mean(dim=1, keepdim=True) + 1 / line.shape[1]
        for linear in (self.trend, self.rest):
            linear.weight.data.copy_(centered)
            nn.init.zeros_(linear.bias)

    def forecast(self, contexts: torch.Tensor) -> torch.Tensor:
        """(B, seq_len, N) -> (B, pred_len, N)."""
        windows = contexts.transpose(1, 2)  # (B, N, seq_len)
        trend = moving_average(windows, self.moving_avg)
        return (self.trend(trend) + self.rest(windows - trend)).transpose(1, 2)


def moving_average(windows: torch.Tensor, rows: int) -> torch.Tensor:
    """Average `rows` values around each value, padding with the first and last, (B, N, T) -> (B, N, T)."""
    before = (rows - 1) // 2
    padded = functional.pad(windows, (before, rows - 1 - before), mode="replicate")
    return functional.avg_pool1d(padded, rows, stride=1)
