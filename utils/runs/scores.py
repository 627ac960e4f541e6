"""What a model is scored on, and its scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch


class ChannelWindows(Protocol):
    """The windows of a split; each is of one channel."""

    channels: tuple[str, ...]

    def __len__(self) -> int:
        """Return how many windows there are."""

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Return the windows of a batch: contexts (B, seq_len, 1), what follows them, and their time marks."""

    def channel_of(self, indices: Sequence[int]) -> np.ndarray:
        """Return the channel number of each window."""


@dataclass(frozen=True)
class Scores:
    """Errors of the scaled series, means over windows.

    Attributes:
        mse, mae: the headline: over all windows, or the target's alone.
        windows: how many windows the headline is the mean of.
        per_channel: mse, mae and windows of each channel; with `with_mase` mase, too.
        mase: mae in units of the seasonal-naive forecast's error on the training rows, a channel its own; None if
            one of the headline's channels has no such unit.
    """

    mse: float
    mae: float
    windows: int
    per_channel: dict[str, dict[str, float | None]]
    mase: float | None = None

    def with_mase(self, units: Mapping[str, float], target: str | None) -> Self:
        """Return the same with the mean absolute scaled error (Hyndman and Koehler, 2006).

        Args:
            units: the seasonal-naive forecast's mean absolute error on the training rows, by channel.
            target: the channel of the headline, None for all.
        """
        per_channel = {
            name: {**errors, "mase": errors["mae"] / units[name] if name in units else None}
            for name, errors in self.per_channel.items()
        }
        headline = [errors for name, errors in per_channel.items() if target in (None, name)]
        known = all(errors["mase"] is not None for errors in headline)
        total = sum(errors["mase"] * errors["windows"] for errors in headline) if known else None
        return replace(self, per_channel=per_channel, mase=None if total is None else total / self.windows)
