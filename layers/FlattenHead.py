"""The output projection (section 3.1 of the paper, "Output Projection")."""

import torch
from torch import nn


class FlattenHead(nn.Module):
    """A linear layer from the hidden states of all patches to the forecast.

    Args:
        features: number of features of a hidden state.
        patches: number of patches.
        pred_len: number of values to forecast.
        dropout: dropout of the forecast.
    """

    def __init__(self, features: int, patches: int, pred_len: int, dropout: float):
        super().__init__()
        self.linear = nn.Linear(features * patches, pred_len)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, P, features) -> (B, pred_len)."""
        # As in Time-LLM's checkpoints, the weights are ordered by feature, then by patch.
        return self.dropout(self.linear(hidden.transpose(1, 2).flatten(1)))
