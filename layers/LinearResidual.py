"""A linear map of the scaled window, added to the forecast, so that the LLM learns what a line cannot say."""

from collections.abc import Iterable

import torch
from torch import nn

from layers.StandardNorm import Normalize

# Contexts (B, seq_len) and what followed them, (B, pred_len).
Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]

# Strengths of the ridge penalty that are tried, as shares of the mean square of a value.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class LinearResidual(nn.Module):
    """Add a linear map of the scaled window to the forecast. All channels share it; until `fit` it adds nothing.

    Args:
        seq_len: values of a window.
        pred_len: values to forecast.
    """

    def __init__(self, seq_len: int, pred_len: int):
        super().__init__()
        self.linear = nn.Linear(seq_len, pred_len)
        nn.init.zeros_(self.linear.weight)  # the mean of a scaled window is 0
        nn.init.zeros_(self.linear.bias)

    def forward(self, forecast: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """(B, pred_len) and the scaled windows, (B, seq_len) -> (B, pred_len)."""
        return forecast + self.linear(windows)

    @torch.no_grad()
    def fit(self, training: Pairs, validation: Pairs) -> float:
        """Set the map to the one that alone has the least squared error, and return that of the validation pairs.

        Ridge regression: solved, not trained, in float64 on the CPU. Of several strengths of the penalty the one is
        taken that does best on the validation pairs. The bias stays.
        """
        squares = products = torch.zeros(())
        for windows, targets in _scaled(training):
            squares, products = squares + windows.T @ windows, products + windows.T @ targets
        # Where nothing ever changes, any penalty will do: the map stays 0.
        unit = torch.eye(len(squares), dtype=squares.dtype) * (squares.trace() / len(squares) or 1.0)
        maps = [torch.linalg.solve(squares + ridge * unit, products) for ridge in RIDGES]  # (seq_len, pred_len) each
        errors, count = torch.zeros(len(maps), dtype=squares.dtype), 0
        for windows, targets in _scaled(validation):
            errors += torch.stack([(windows @ weights - targets).square().sum() for weights in maps])
            count += targets.numel()
        best = int(errors.argmin())
        self.linear.weight.copy_(maps[best].T)
        return (errors[best] / count).item()


class NoResidual(nn.Module):
    """Leave the forecast as it is: Time-LLM as in the paper."""

    def forward(self, forecast: torch.Tensor, _windows: torch.Tensor) -> torch.Tensor:
        """Return the forecast."""
        return forecast


def _scaled(pairs: Pairs) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Yield windows and targets without the window's mean, float64: in the units that the error is taken in."""
    for contexts, targets in pairs:
        windows, statistics = Normalize()(contexts.double())
        yield windows * statistics.deviation, targets.double() - statistics.mean
