"""The base class of the forecasters: what training, testing and checkpoints need from one."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import torch
from accelerate import PartialState
from torch import nn

from data_provider.windows import WindowDataset

if TYPE_CHECKING:
    from utils.llm.loading import LoadedLLM


class Forecaster(nn.Module):
    """Forecast windows, (B, seq_len, N) -> (B, pred_len, N); each of the N channels is a window of its own.

    A subclass without an LLM needs to define only `forecast`.

    Args:
        device: its device, None for that of this process.

    Attributes:
        llm_info: the LLM, None without one.
        description: the description of the data set in the prompts, None without prompts.
        layer_rates: learning rates of some layers as multiples of --learning_rate, by the layer's name.
        starts_fitted: whether `fit_residual` fits a forecast before training. Training then begins with a validation,
            and the best checkpoint is never worse than the fit.
    """

    llm_info: "LoadedLLM | None" = None
    description: str | None = None
    layer_rates: Mapping[str, float] = {}
    starts_fitted = False

    def __init__(self, device: torch.device | None = None):
        super().__init__()
        self.device = device or PartialState().device

    @classmethod
    def without_weights(cls, configs: argparse.Namespace) -> Self:
        """Build the model that the flags describe from meta tensors, which have shapes but no data."""
        with torch.device("meta") as meta:
            return cls(configs, meta)

    def forward(
        self,
        x_enc: torch.Tensor,
        x_mark_enc: torch.Tensor | None = None,
        x_dec: torch.Tensor | None = None,
        x_mark_dec: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Forecast: (B, seq_len, N) -> (B, pred_len, N). The other arguments are Time-LLM's and are ignored."""
        return self.forecast(x_enc.to(self.device, non_blocking=True))

    def forecast(self, contexts: torch.Tensor) -> torch.Tensor:
        """Forecast contexts on the device, (B, seq_len, N) -> (B, pred_len, N)."""
        raise NotImplementedError

    def fit_residual(self, training: WindowDataset, validation: WindowDataset) -> float | None:
        """Fit layers by least squares before training; choose the regularization by `validation`.

        Returns:
            the mean squared error on the validation windows, None if nothing is fitted.
        """

    def start_from_line(self, line: torch.Tensor) -> None:
        """Start from a linear forecast of the scaled window, (pred_len, seq_len), if the model can."""

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """Group the trained parameters by their initial learning rates, in the format of torch's optimizers.

        A step of Adam changes all weights of a layer by about the same amount: in a prototype those of the whole
        vocabulary, in a forecast value those of the whole window. So some layers need their own rates, `layer_rates`.
        """
        # An optimizer and its schedule need a parameter, even if the model has none.
        others = dict(self.named_parameters()) or {"nothing": torch.zeros(1, requires_grad=True)}
        groups = []
        for layer, rate in self.layer_rates.items():
            names = [name for name in others if rate != 1 and name.startswith(f"{layer}.")]
            if names:
                groups.append({"params": [others.pop(name) for name in names], "lr": learning_rate * rate})
        return [{"params": list(others.values()), "lr": learning_rate}, *groups]

    def diagnostics(self, contexts: torch.Tensor) -> dict[str, float]:
        """Measure on windows (B, seq_len, N) what history.csv records to monitor training."""
        return {}

    def describe(self) -> list[str]:
        """Describe the model in printable lines."""
        return []

    def describe_prompt(self, context: torch.Tensor) -> list[str]:
        """Quote the prompt of a window, (1, seq_len), in a printable line; no line without prompts."""
        return []
