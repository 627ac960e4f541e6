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
from data_provider.note_effect import NoteEffect
from data_provider.notes import NoteColumn, NoteStates
from data_provider.tables import Table
from layers.StandardNorm import Normalize
from utils.errors import UserError

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
        notes: the encodings of the notes.
        note_effects: for each of `trees`, the linear effect of the notes that they build on; empty without notes.
        llm: a fingerprint of the LLM that read the notes; empty without notes.
    """

    channels: list[str]
    tree_of: list[int]
    known: list[Column]
    past: list[Column]
    line: torch.Tensor
    lags: list[int]
    step_in_days: float
    trees: list[Trees]
    notes: list[NoteColumn]
    note_effects: list[NoteEffect]
    llm: str

    def as_dict(self) -> dict:
        """Convert to the plain values and tensors that a checkpoint stores."""
        columns = {name: [asdict(column) for column in getattr(self, name)] for name in ("known", "past")}
        parts = {name: [part.as_dict() for part in getattr(self, name)] for name in ("trees", "notes")}
        effects = [torch.from_numpy(effect.weights) for effect in self.note_effects]
        return {**vars(self), **columns, **parts, "note_effects": effects}

    @classmethod
    def from_dict(cls, kept: Mapping) -> Self:
        """Restore an effect from `as_dict`; raise ValueError if its trees are damaged."""
        columns = {name: [Column(**column) for column in kept[name]] for name in ("known", "past")}
        trees, notes = map(Trees.from_dict, kept["trees"]), map(NoteColumn.from_dict, kept["notes"])
        effects = [NoteEffect(weights.numpy()) for weights in kept["note_effects"]]
        return cls(**{**kept, **columns, "trees": [*trees], "notes": [*notes], "note_effects": effects})

    def _note_order(self) -> np.ndarray:
        """Order the components of all columns: the first ones of each come first, since trees see only some."""
        return np.argsort(np.concatenate([np.arange(column.width) for column in self.notes]), kind="stable")

    def places_of_notes(self) -> list[np.ndarray]:
        """List the places of each column's components among those of `KnownRows.notes`."""
        owner = np.repeat(np.arange(len(self.notes)), [column.width for column in self.notes])[self._note_order()]
        return [np.flatnonzero(owner == number) for number in range(len(self.notes))]

    def rows_of(self, frame: pd.DataFrame, dates: pd.DatetimeIndex, states: NoteStates | None) -> KnownRows:
        """Encode what is known of rows.

        Raises:
            UserError: if a column has values of another kind, or another LLM read the notes.
        """
        notes = np.zeros((len(frame), 0))
        if self.notes:
            if states.llm != self.llm:
                raise UserError("the notes were read by another LLM in training: give the flags of that LLM")
            notes = np.hstack([column.encode(frame[column.name], states) for column in self.notes])
            notes = notes[:, self._note_order()]
        calendar = calendar_of(dates, self.step_in_days)
        return KnownRows(encode(self.known, frame), encode(self.past, frame), calendar, notes)

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
            chosen = [number] if number < len(self.trees) else range(len(self.trees))
            windows = contexts[own].astype(np.float64), line[own], rows, first[own]
            result[own] = np.mean([self._effect_of_trees(one, *windows) for one in chosen], axis=0)
        return result

    def _effect_of_trees(
        self, number: int, contexts: np.ndarray, line: np.ndarray, rows: KnownRows, first: np.ndarray
    ) -> np.ndarray:
        note_effect = None
        if self.notes:
            horizon = first[:, None] + contexts.shape[1] + np.arange(line.shape[1])
            note_effect = self.note_effects[number].estimate(rows.notes, horizon)
        features = row_features(contexts, line, rows, first, self.lags, note_effect)
        return self.trees[number].predict(features).reshape(line.shape)


@dataclass(frozen=True, eq=False)
class TableEffect:
    """A boosted effect on the windows of a table, as `WindowDataset` takes it."""

    effect: BoostedEffect
    rows: KnownRows
    channels: tuple[str, ...]

    @classmethod
    def of(cls, effect: BoostedEffect, table: Table) -> Self:
        """Encode a table's rows."""
        covariates = table.covariates
        return cls(effect, effect.rows_of(covariates.rows, table.dates, covariates.states), table.channels)

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
