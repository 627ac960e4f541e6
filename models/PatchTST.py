"""PatchTST (Nie et al., "A Time Series is Worth 64 Words", ICLR 2023), as transformers has it."""

import argparse

import torch
from torch import nn
from transformers import PatchTSTConfig, PatchTSTForPrediction

from layers.StandardNorm import Normalize
from models.forecaster import Forecaster


class Model(Forecaster):
    """A transformer over the patches of a window; each channel is a window of its own, and all share the weights.

    Set up as the authors' supervised one: a window is scaled and its last value repeated for one more patch, layers
    normalise over the batch after they add, positions are learned, the head sees every patch.

    Args:
        configs: the parsed flags; seq_len, pred_len, patch_len, stride, d_model, n_heads, d_ff, e_layers and dropout
            are read.
    """

    def __init__(self, configs: argparse.Namespace, device: torch.device | None = None):
        super().__init__(device)
        self.normalize = Normalize()
        self.pad = nn.ReplicationPad1d((0, configs.stride))
        self.transformer = PatchTSTForPrediction(
            PatchTSTConfig(
                context_length=configs.seq_len + configs.stride,
                prediction_length=configs.pred_len,
                patch_length=configs.patch_len,
                patch_stride=configs.stride,
                d_model=configs.d_model,
                num_attention_heads=configs.n_heads,
                ffn_dim=configs.d_ff,
                num_hidden_layers=configs.e_layers,
                positional_dropout=configs.dropout,
                path_dropout=configs.dropout,
                ff_dropout=configs.dropout,
                pre_norm=False,
                positional_encoding_type="random",
                pooling_type=None,
                scaling=None,
            )
        )
        # transformers begins with positions as large as the patches; the authors do not.
        nn.init.uniform_(self.transformer.model.encoder.positional_encoder.position_enc, -0.02, 0.02)
        self.to(self.device)

    def forecast(self, contexts: torch.Tensor) -> torch.Tensor:
        """(B, seq_len, N) -> (B, pred_len, N)."""
        windows, statistics = self.normalize(contexts.transpose(1, 2).flatten(0, 1))  # (B*N, seq_len)
        padded = self.pad(windows).unsqueeze(-1)  # (B*N, seq_len + stride, 1)
        forecast = self.transformer(past_values=padded).prediction_outputs.squeeze(-1)  # (B*N, pred_len)
        forecast = self.normalize.inverse(forecast, statistics)
        return forecast.unflatten(0, (len(contexts), -1)).transpose(1, 2)
