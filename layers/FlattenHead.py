"""The output projection (section 3.1 of the paper, "Output Projection")."""

import torch
from torch import nn


class FlattenHead(nn.Module):
    """Read the forecast off all patch positions with one linear map.

    Args:
        features: columns kept of a hidden state.
        patches: patch positions.
        pred_len: values to forecast.
        dropout: dropout of the forecast.
    """

    def __init__(self, features: int, patches: int, pred_len: int, dropout: float):
        super().__init__()
        self.linear = nn.Linear(features * patches, pred_len)
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def start_at_zero(self) -> None:
        """Forget the random weights, so that a forecast begins as 0."""
        self.linear.weight.zero_()
        self.linear.bias.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, P, features) -> (B, pred_len)."""
        # Time-LLM's weights count the patches of the first feature first.
        return self.dropout(self.linear(hidden.transpose(1, 2).flatten(1)))
