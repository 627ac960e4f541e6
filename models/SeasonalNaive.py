"""The seasonal-naive forecast: what a forecast of a series with a daily or weekly course must beat."""

import argparse
import math

import torch

from data_provider.reading import read_table
from models.baseline import Baseline
from utils.errors import UserError


class Model(Baseline):
    """The last season, repeated. Nothing to train.

    Args:
        configs: the parsed flags; season, seq_len, pred_len and those that name the CSV are read.
        season: rows of a season; None: as the flag says, or as the dates of the CSV do.

    Raises:
        UserError: if a window does not hold a season.
    """

    def __init__(self, configs: argparse.Namespace, device: torch.device | None = None, season: int | None = None):
        super().__init__(device)
        self.season = season or configs.season or read_table(configs).rows_of_a_season()
        if self.season > configs.seq_len:
            raise UserError(f"--seq_len {configs.seq_len} is shorter than a season: give at least {self.season}")
        self.pred_len = configs.pred_len

    def forecast(self, contexts: torch.Tensor) -> torch.Tensor:
        """(B, seq_len, N) -> (B, pred_len, N)."""
        repeats = math.ceil(self.pred_len / self.season)
        return contexts[:, -self.season :].repeat(1, repeats, 1)[:, : self.pred_len]
