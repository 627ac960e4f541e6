"""The seasonal naive forecast: a baseline for series with a daily or weekly cycle."""

import argparse
import math

import torch

from models.forecaster import Forecaster
from utils.errors import UserError


class Model(Forecaster):
    """Repeat the last season.

    Args:
        season: number of rows in a season, used if --season is not given.

    Raises:
        UserError: if the season is unknown or longer than a window.
    """

    def __init__(self, configs: argparse.Namespace, device: torch.device | None = None, season: int = 0):
        super().__init__(device)
        self.season = configs.season or season
        if not self.season:
            raise UserError("SeasonalNaive needs the rows of a season: give --season")
        if self.season > configs.seq_len:
            raise UserError(f"--seq_len {configs.seq_len} is shorter than a season: give at least {self.season}")
        self.pred_len = configs.pred_len

    def forecast(self, contexts: torch.Tensor) -> torch.Tensor:
        """(B, seq_len, N) -> (B, pred_len, N)."""
        repeats = math.ceil(self.pred_len / self.season)
        return contexts[:, -self.season :].repeat(1, repeats, 1)[:, : self.pred_len]
