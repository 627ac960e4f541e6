"""A linear map of the scaled window, added to the forecast: the LLM learns the residual of a linear forecast."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from layers.StandardNorm import Normalize

# Contexts (B, seq_len) and what followed them, (B, pred_len), NaN where that is not known; from the start at each call.
Pairs = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]

# Strengths of the ridge penalty that are tried, as shares of the mean square of a value.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


# With gaps: passes over the training pairs at most.
_MOST_ROUNDS = 20


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
        taken that does best on the validation pairs. The bias stays. Targets that are not known do not count; to choose
        the strength, they are taken for their window's mean.
        """
        squares, products, has_gaps = _moments(training)
        # Where nothing ever changes, any penalty will do: the map stays 0.
        unit = torch.eye(len(squares), dtype=squares.dtype) * (squares.trace() / len(squares) or 1.0)
        maps = [torch.linalg.solve(squares + ridge * unit, products) for ridge in RIDGES]  # (seq_len, pred_len) each
        errors = _errors(maps, validation)
        best = int(errors.argmin())
        chosen, error = maps[best], errors[best]
        if has_gaps:
            chosen = _fit_known(chosen, products, squares, RIDGES[best] * unit, training)
            (error,) = _errors([chosen], validation)
        self.linear.weight.copy_(chosen.T)
        return error.item()


class NoResidual(nn.Module):
    """Leave the forecast as it is: Time-LLM as in the paper."""

    def forward(self, forecast: torch.Tensor, _windows: torch.Tensor) -> torch.Tensor:
        """Return the forecast."""
        return forecast


def _moments(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return W'W and W'T of windows W and targets T, unknown ones taken for 0, and whether there are such."""
    squares = products = torch.zeros(())
    has_gaps = False
    for windows, targets in _scaled(pairs):
        if targets.isnan().any():
            has_gaps, targets = True, targets.nan_to_num()
        squares, products = squares + windows.T @ windows, products + windows.T @ targets
    return squares, products, has_gaps


def _fit_known(
    start: torch.Tensor, products: torch.Tensor, squares: torch.Tensor, penalty: torch.Tensor, pairs: Pairs
) -> torch.Tensor:
    """Return the ridge regression on the known targets alone: a system of its own for each step to forecast.

    Solved together, a pass over the pairs a round, by conjugate gradients, preconditioned with what would hold if all
    targets were known.

    Args:
        start: a first guess, (seq_len, pred_len).
        products: W'T, unknown targets taken for 0.
        squares, penalty: W'W and what is added to it.
        pairs: the windows and targets.
    """

    def apply(weights: torch.Tensor) -> torch.Tensor:
        return penalty @ weights + sum(
            windows.T @ (windows @ weights).masked_fill(targets.isnan(), 0) for windows, targets in _scaled(pairs)
        )

    inverse = torch.linalg.inv(squares + penalty)
    weights, left = start, products - apply(start)
    direction = better = inverse @ left
    gain = (left * better).sum(0)
    for _ in range(_MOST_ROUNDS):
        if left.norm() <= 1e-6 * products.norm():
            break
        applied = apply(direction)
        length = gain / (direction * applied).sum(0).clamp(min=torch.finfo(gain.dtype).tiny)
        weights, left = weights + length * direction, left - length * applied
        better = inverse @ left
        gain, before = (left * better).sum(0), gain
        direction = better + gain / before.clamp(min=torch.finfo(gain.dtype).tiny) * direction
    return weights


def _errors(maps: Sequence[torch.Tensor], pairs: Pairs) -> torch.Tensor:
    """Return the mean squared error of each map on the targets that are known."""
    errors, count = torch.zeros(len(maps), dtype=torch.float64), 0
    for windows, targets in _scaled(pairs):
        errors += torch.stack([(windows @ weights - targets).square().nansum() for weights in maps])
        count += int((~targets.isnan()).sum())
    return errors / count


def _scaled(pairs: Pairs) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Yield windows and targets without the window's mean, float64: in the units that the error is taken in."""
    for contexts, targets in pairs():
        windows, statistics = Normalize()(contexts.double())
        yield windows * statistics.deviation, targets.double() - statistics.mean
