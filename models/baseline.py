"""What the forecasters without an LLM share."""

import torch
from accelerate import PartialState
from torch import nn


class Baseline(nn.Module):
    """A forecaster, called as TimeLLM is; what it forecasts, a subclass says.

    Args:
        device: where it is to be; None: this process's device.
    """

    def __init__(self, device: torch.device | None = None):
        super().__init__()
        self.device = device or PartialState().device

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
