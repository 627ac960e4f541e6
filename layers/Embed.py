"""Patch embedding (section 3.1 of the paper, "Input Embedding")."""

import torch
from torch import nn


class TokenEmbedding(nn.Module):
    """A circular convolution over neighboring patches."""

    def __init__(self, patch_len: int, d_model: int):
        super().__init__()
        self.tokenConv = nn.Conv1d(patch_len, d_model, kernel_size=3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.tokenConv.weight, mode="fan_in", nonlinearity="leaky_relu")

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, P, patch_len) -> (B, P, d_model)."""
        return self.tokenConv(patches.transpose(1, 2)).transpose(1, 2)


class PatchEmbedding(nn.Module):
    """Cut windows into patches and embed them.

    Args:
        d_model: size of the embedding.
        patch_len: number of values in a patch.
        stride: offset between patches; the last value of a window is repeated this number of times as padding.
        dropout: dropout of the embedding.
    """

    def __init__(self, d_model: int, patch_len: int, stride: int, dropout: float):
        super().__init__()
        self.patch_len = patch_len
        self.stride = stride
        self.pad = nn.ReplicationPad1d((0, stride))
        self.value_embedding = TokenEmbedding(patch_len, d_model)
        self.dropout = nn.Dropout(dropout)

    def count(self, seq_len: int) -> int:
        """Compute P, the number of patches in a window of `seq_len` values."""
        return (seq_len - self.patch_len) // self.stride + 2

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """(B, seq_len) -> (B, P, d_model)."""
        patches = self.pad(windows).unfold(-1, self.patch_len, self.stride)  # (B, P, patch_len)
        return self.dropout(self.value_embedding(patches))
