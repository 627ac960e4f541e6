"""PatchTST (Nie et al., "A Time Series is Worth 64 Words", ICLR 2023), the implementation of transformers."""

import argparse

import torch
from torch import nn
from transformers import PatchTSTConfig, PatchTSTForPrediction

from layers.StandardNorm import Normalize
from models.forecaster import Forecaster


class Model(Forecaster):
    """A transformer encoder over the patches of a window; each channel is a window of its own, with shared weights.

    Configured like the authors' supervised model: scaled windows, one more patch with copies of the last value, batch
    normalization after the residual connection, learned positional encodings, and a head on all patches.
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
        # transformers initializes the positional encodings as large as the patches; the authors do not.
        nn.init.uniform_(self.transformer.model.encoder.positional_encoder.position_enc, -0.02, 0.02)
        self.to(self.device)

    def forecast(self, contexts: torch.Tensor) -> torch.Tensor:
        """(B, seq_len, N) -> (B, pred_len, N)."""
        windows, statistics = self.normalize(contexts.transpose(1, 2).flatten(0, 1))  # (B*N, seq_len)
        padded = self.pad(windows).unsqueeze(-1)  # (B*N, seq_len + stride, 1)
        forecast = self.transformer(past_values=padded).prediction_outputs.squeeze(-1)  # (B*N, pred_len)
        forecast = self.normalize.inverse(forecast, statistics)
        return forecast.unflatten(0, (len(contexts), -1)).transpose(1, 2)
