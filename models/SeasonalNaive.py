"""The last season once more: what a forecast of a series with a daily or weekly course must beat."""

import argparse
import math

import torch
from accelerate import PartialState
from torch import nn

from data_provider.series import read_table
from utils.errors import UserError


class Model(nn.Module):
    """Nothing to train. A season is `season` rows, or what `rows_of_a_season` says of the CSV's dates.

    Args:
        configs: the parsed flags; season, seq_len, pred_len and those that name the CSV are read.

    Raises:
        UserError: if a window does not hold a season.
    """

    def __init__(self, configs: argparse.Namespace):
        super().__init__()
        self.device = PartialState().device
        self.season = configs.season or read_table(configs).rows_of_a_season()
        if self.season > configs.seq_len:
            raise UserError(f"--seq_len {configs.seq_len} is shorter than a season: give at least {self.season}")
        self.pred_len = configs.pred_len

    def forward(
        self,
        x_enc: torch.Tensor,
        x_mark_enc: torch.Tensor | None = None,
        x_dec: torch.Tensor | None = None,
        x_mark_dec: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Forecast: (B, seq_len, N) -> (B, pred_len, N). The other arguments are not looked at."""
        last = x_enc[:, -self.season :].to(self.device, non_blocking=True)
        return last.repeat(1, math.ceil(self.pred_len / self.season), 1)[:, : self.pred_len]
