"""The last value, for every step to come: what a forecast must beat."""

import argparse

import torch
from accelerate import PartialState
from torch import nn


class Model(nn.Module):
    """Nothing to train.

    Args:
        configs: the parsed flags; pred_len is read.
    """

    def __init__(self, configs: argparse.Namespace):
        super().__init__()
        self.device = PartialState().device
        self.pred_len = configs.pred_len

    def forward(
        self,
        x_enc: torch.Tensor,
        x_mark_enc: torch.Tensor | None = None,
        x_dec: torch.Tensor | None = None,
        x_mark_dec: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Forecast: (B, seq_len, N) -> (B, pred_len, N). The other arguments are not looked at."""
        return x_enc[:, -1:].to(self.device, non_blocking=True).repeat(1, self.pred_len, 1)
