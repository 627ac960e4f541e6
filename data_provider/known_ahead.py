"""The effect of what is known in advance on forecasts: linear in the columns of a row, or by boosted trees.

The linear effect is subtracted from every row before a model sees it, see `data_provider.covariates`. The trees learn
what a linear forecast of the window leaves; their effect is subtracted from the horizon of each window. Either effect
is added to the forecast again, so that a model learns the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
import pandas as pd
import torch

from data_provider.boosting import Trees
from data_provider.covariates import Column, Explainer, encode
from data_provider.forecast_features import KnownRows, calendar_of, row_features
from data_provider.tables import Table
from layers.StandardNorm import Normalize

NONE, LINEAR, BOOSTED = WAYS = ("none", "linear", "boosted")


def forecast_line(weight: torch.Tensor, contexts: np.ndarray) -> np.ndarray:
    """Forecast windows, (B, seq_len), with a linear map of the scaled window, (pred_len, seq_len), to (B, pred_len)."""
    normalize = Normalize()
    windows, statistics = normalize(torch.as_tensor(contexts).double())
    return normalize.inverse(windows @ weight.T, statistics).numpy()


@dataclass(frozen=True, eq=False)
class BoostedEffect:
    """The effect of known columns on forecasts, as trees learned it from what a linear forecast leaves.

    Attributes:
        channels: the channels' names in training.
        tree_of: the position in `trees` for each channel, -1 for a channel without an effect.
        known, past: the encodings of the columns known in advance, and of those known up to the origin.
        line: the linear forecast, (pred_len, seq_len) float64, see `forecast_line`.
        lags: the rows of a season, and of the next longer one.
        step_in_days: the step of the data.
    """

    channels: list[str]
    tree_of: list[int]
    known: list[Column]
    past: list[Column]
    line: torch.Tensor
    lags: list[int]
    step_in_days: float
    trees: list[Trees]

    def as_dict(self) -> dict:
        """Convert to the plain values and tensors that a checkpoint stores."""
        columns = {name: [asdict(column) for column in getattr(self, name)] for name in ("known", "past")}
        return {**vars(self), **columns, "trees": [trees.as_dict() for trees in self.trees]}

    @classmethod
    def from_dict(cls, kept: Mapping) -> Self:
        """Restore an effect from `as_dict`; raise ValueError if its trees are damaged."""
        columns = {name: [Column(**column) for column in kept[name]] for name in ("known", "past")}
        return cls(**{**kept, **columns, "trees": [Trees.from_dict(trees) for trees in kept["trees"]]})

    def rows_of(self, frame: pd.DataFrame, dates: pd.DatetimeIndex) -> KnownRows:
        """Encode what is known of rows; columns that are missing in the frame are unknown."""
        return KnownRows(encode(self.known, frame), encode(self.past, frame), calendar_of(dates, self.step_in_days))

    def effect(self, contexts: np.ndarray, channels: Sequence[str], rows: KnownRows, first: np.ndarray) -> np.ndarray:
        """Compute the effect on the horizons of windows, (B, pred_len).

        Args:
            contexts: (B, seq_len), scaled, without gaps.
            channels: the name of each window's channel; one unseen in training takes the mean of all trees' effects.
            rows: what is known of the table's rows, see `rows_of`.
            first: the index in `rows` of each window's first date, (B,).
        """
        line = forecast_line(self.line, contexts)
        numbers = dict(zip(self.channels, self.tree_of, strict=True))
        tree_of = np.array([numbers.get(name, len(self.trees)) for name in channels])
        result = np.zeros_like(line)
        for number in np.unique(tree_of[tree_of >= 0]):
            own = tree_of == number
            features = row_features(contexts[own].astype(np.float64), line[own], rows, first[own], self.lags)
            chosen = self.trees[number : number + 1] or self.trees
            result[own] = np.mean([trees.predict(features) for trees in chosen], axis=0).reshape(-1, line.shape[1])
        return result


@dataclass(frozen=True, eq=False)
class TableEffect:
    """A boosted effect on the windows of a table, as `WindowDataset` takes it."""

    effect: BoostedEffect
    rows: KnownRows
    channels: tuple[str, ...]

    @classmethod
    def of(cls, effect: BoostedEffect, table: Table) -> Self:
        """Encode a table's rows."""
        return cls(effect, effect.rows_of(table.covariates.rows, table.dates), table.channels)

    def __call__(self, contexts: np.ndarray, channels: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Compute the effect on windows, see `WindowEffect`."""
        return self.effect.effect(contexts, [self.channels[number] for number in channels], self.rows, first)


@dataclass(frozen=True)
class KnownAhead:
    """The effect of what is known in advance: linear for some channels, boosted for others; None for no channel."""

    linear: Explainer | None
    boosted: BoostedEffect | None

    @classmethod
    def of(cls, explainer: dict | None, boosted: dict | None) -> Self:
        """Restore an effect from the facts that a checkpoint stores."""
        return cls(
            Explainer.from_dict(explainer) if explainer else None, BoostedEffect.from_dict(boosted) if boosted else None
        )

    @property
    def line(self) -> torch.Tensor | None:
        """The linear forecast that the trees start from, (pred_len, seq_len); None without trees."""
        return self.boosted.line if self.boosted else None
