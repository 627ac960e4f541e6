"""The base class of the forecasters: what training, testing and checkpoints ask of one."""

from collections.abc import Mapping

import torch
from accelerate import PartialState
from torch import nn

from data_provider.windows import WindowDataset
from utils.llm.loading import LoadedLLM


class Forecaster(nn.Module):
    """Forecast windows, (B, seq_len, N) -> (B, pred_len, N); each of the N channels is a window of its own.

    A subclass without an LLM defines `forecast`, and needs nothing else.

    Args:
        device: where it is to be; None: this process's device.

    Attributes:
        llm_info: the LLM that it is built around; None if it has none.
        description: the description of the data set in its prompts; None if it has none.
        layer_rates: the learning rates of some layers, by name, as shares of --learning_rate.
        starts_fitted: whether it forecasts before it is trained, once `fit_residual` was called: then training begins
            with a validation, and weights that are worse are never kept.
    """

    llm_info: LoadedLLM | None = None
    description: str | None = None
    layer_rates: Mapping[str, float] = {}
    starts_fitted = False

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
        """Forecast: (B, seq_len, N) -> (B, pred_len, N). The other arguments are Time-LLM's and are not read."""
        return self.forecast(x_enc.to(self.device, non_blocking=True))

    def forecast(self, contexts: torch.Tensor) -> torch.Tensor:
        """Forecast what follows windows on the device, (B, seq_len, N) -> (B, pred_len, N)."""
        raise NotImplementedError

    def fit_residual(self, training: WindowDataset, validation: WindowDataset) -> float | None:
        """Fit what is solved rather than trained, before training.

        Args:
            training: windows to fit to.
            validation: windows to choose the regularisation by.

        Returns:
            The mean squared error of the fit on the validation windows; None if nothing is fitted.
        """

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """Return the trained parameters with their learning rates in the first step, as torch's optimisers take them.

        One step of Adam changes all weights of a layer at once: those of all tokens of the vocabulary in a prototype,
        or of all values of a window in a value to forecast. So some layers have a rate of their own, see `layer_rates`.
        """
        # An optimiser and its schedule need a parameter, also for a model without any.
        others = dict(self.named_parameters()) or {"nothing": torch.zeros(1, requires_grad=True)}
        groups = []
        for layer, share in self.layer_rates.items():
            names = [name for name in others if share != 1 and name.startswith(f"{layer}.")]
            if names:
                groups.append({"params": [others.pop(name) for name in names], "lr": learning_rate * share})
        return [{"params": list(others.values()), "lr": learning_rate}, *groups]

    def diagnostics(self, contexts: torch.Tensor) -> dict[str, float]:
        """Return figures for history.csv that tell whether training is sound, of windows (B, seq_len, N)."""
        return {}

    def describe(self) -> list[str]:
        """Return the lines that tell what it is built around."""
        return []

    def describe_prompt(self, context: torch.Tensor) -> list[str]:
        """Return a line with the prompt of a window, (1, seq_len), if it has prompts."""
        return []
