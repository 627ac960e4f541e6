"""A linear map of the scaled window, added to the forecast: the LLM learns the residual of a linear forecast."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from layers.StandardNorm import Normalize

# Each call iterates anew over batches of contexts (B, seq_len) and targets (B, pred_len), NaN where unknown.
Pairs = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]

# Candidates for the ridge penalty, in units of the mean square of a value.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)

_MAX_ITERATIONS = 20  # of conjugate gradients, each a pass over the training pairs


class LinearResidual(nn.Module):
    """Add a linear map of the scaled window to the forecast. All channels share it; until `fit` it adds zero."""

    def __init__(self, seq_len: int, pred_len: int):
        super().__init__()
        self.linear = nn.Linear(seq_len, pred_len)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, forecast: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """(B, pred_len) and the scaled windows, (B, seq_len) -> (B, pred_len)."""
        return forecast + self.linear(windows)

    @torch.no_grad()
    def fit(self, training: Pairs, validation: Pairs) -> float:
        """Fit the weights by ridge regression and return the mean squared error on the validation pairs.

        The solution is in closed form, with gaps by conjugate gradients, in float64 on the CPU; the bias stays zero.
        The penalty is the one with the least validation error. Unknown targets are left out, except that the penalty is
        chosen with the mean of the window in their place.
        """
        gram, moments, has_gaps = _normal_equations(training)
        # If all windows are constant, the trace is 0, and with any penalty the weights are 0.
        unit = torch.eye(len(gram), dtype=gram.dtype) * (gram.trace() / len(gram) or 1.0)
        candidates = [torch.linalg.solve(gram + ridge * unit, moments) for ridge in RIDGES]  # (seq_len, pred_len) each
        errors = _errors(candidates, validation)
        best = int(errors.argmin())
        weights, error = candidates[best], errors[best]
        if has_gaps:
            weights = _fit_known(weights, moments, gram, RIDGES[best] * unit, training)
            (error,) = _errors([weights], validation)
        self.linear.weight.copy_(weights.T)
        return error.item()


class NoResidual(nn.Module):
    """Stands in for a `LinearResidual` if the forecast is Time-LLM's alone, as in the paper."""

    def forward(self, forecast: torch.Tensor, _windows: torch.Tensor) -> torch.Tensor:
        """Return the forecast unchanged."""
        return forecast


def _normal_equations(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Compute W'W and W'T of windows W and targets T, with 0 for unknown targets, and whether any is unknown."""
    gram = moments = torch.zeros(())
    has_gaps = False
    for windows, targets in _centered(pairs):
        if targets.isnan().any():
            has_gaps, targets = True, targets.nan_to_num()
        gram, moments = gram + windows.T @ windows, moments + windows.T @ targets
    return gram, moments, has_gaps


def _fit_known(
    start: torch.Tensor, moments: torch.Tensor, gram: torch.Tensor, penalty: torch.Tensor, pairs: Pairs
) -> torch.Tensor:
    """Fit a ridge regression to the known targets alone by conjugate gradients, from weights (seq_len, pred_len)."""
    # Each forecast step has other known rows, but all are solved together, with the preconditioner for no gaps.

    def product(weights: torch.Tensor) -> torch.Tensor:
        return penalty @ weights + sum(
            windows.T @ (windows @ weights).masked_fill(targets.isnan(), 0) for windows, targets in _centered(pairs)
        )

    inverse, tiny = torch.linalg.inv(gram + penalty), torch.finfo(gram.dtype).tiny
    weights, residual = start, moments - product(start)
    direction = preconditioned = inverse @ residual
    squared_norm = (residual * preconditioned).sum(0)
    for _ in range(_MAX_ITERATIONS):
        if residual.norm() <= 1e-6 * moments.norm():
            break
        change = product(direction)
        length = squared_norm / (direction * change).sum(0).clamp(min=tiny)
        weights, residual = weights + length * direction, residual - length * change
        preconditioned = inverse @ residual
        squared_norm, previous = (residual * preconditioned).sum(0), squared_norm
        direction = preconditioned + squared_norm / previous.clamp(min=tiny) * direction
    return weights


def _errors(candidates: Sequence[torch.Tensor], pairs: Pairs) -> torch.Tensor:
    """Compute the mean squared error of each matrix of weights on the known targets."""
    errors, count = torch.zeros(len(candidates), dtype=torch.float64), 0
    for windows, targets in _centered(pairs):
        errors += torch.stack([(windows @ weights - targets).square().nansum() for weights in candidates])
        count += int((~targets.isnan()).sum())
    return errors / count


def _centered(pairs: Pairs) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield windows and targets minus the window's mean, float64, on the scale on which errors are measured."""
    for contexts, targets in pairs():
        windows, statistics = Normalize()(contexts.double())
        yield windows * statistics.deviation, targets.double() - statistics.mean
