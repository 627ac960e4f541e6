"""The naive forecast: a baseline that others must beat."""

import argparse

import torch

from models.forecaster import Forecaster


class Model(Forecaster):
    """Repeat the last value."""

    def __init__(self, configs: argparse.Namespace, device: torch.device | None = None):
        super().__init__(device)
        self.pred_len = configs.pred_len

    def forecast(self, contexts: torch.Tensor) -> torch.Tensor:
        """(B, seq_len, N) -> (B, pred_len, N)."""
        return contexts[:, -1:].repeat(1, self.pred_len, 1)
