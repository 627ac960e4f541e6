"""What the forecasters without an LLM share."""

import torch
from accelerate import PartialState
from torch import nn


class Baseline(nn.Module):
    """A forecaster on this process's device, called as TimeLLM is; what it forecasts, a subclass says."""

    def __init__(self):
        super().__init__()
        self.device = PartialState().device

    def forward(
        self,
        x_enc: torch.Tensor,
        x_mark_enc: torch.Tensor | None = None,
        x_dec: torch.Tensor | None = None,
        x_mark_dec: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Forecast: (B, seq_len, N) -> (B, pred_len, N). The other arguments are not looked at."""
        return self.forecast(x_enc.to(self.device, non_blocking=True))

    def forecast(self, contexts: torch.Tensor) -> torch.Tensor:
        """Forecast what follows windows on the device, (B, seq_len, N) -> (B, pred_len, N)."""
        raise NotImplementedError
