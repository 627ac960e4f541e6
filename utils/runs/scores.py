"""What a model is scored on, and its scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class ChannelWindows(Protocol):
    """The windows of a split; each is of one channel."""

    channels: tuple[str, ...]
    pred_len: int
    is_long: bool  # whether the channels are the series of a long CSV

    @property
    def has_gaps(self) -> bool:
        """Return whether some targets may be unknown: they are NaN."""

    def __len__(self) -> int:
        """Return how many windows there are."""

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Return the windows of a batch: contexts (B, seq_len, 1), what follows them, and their time marks."""

    def explained_of(self, indices: Sequence[int]) -> np.ndarray | None:
        """Return what covariates explain of windows, (B, seq_len + pred_len); None if there are no covariates."""

    def channel_of(self, indices: Sequence[int]) -> np.ndarray:
        """Return the channel number of each window."""


@dataclass(frozen=True)
class Scores:
    """Errors of the scaled series, means over windows; where targets are unknown, over those that are known.

    Attributes:
        mse, mae: the headline: over all windows, or the target's alone.
        windows: how many windows the headline is the mean of.
        per_channel: mse, mae and windows of each channel; and `known`, the targets, where some are not.
    """

    mse: float
    mae: float
    windows: int
    per_channel: dict[str, dict[str, float]]
