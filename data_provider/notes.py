"""Notes: free text that is known in advance, as the hidden states of an LLM that read it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
import torch

# The most principal components of the hidden states, and those that trees see besides the linear effect.
COMPONENTS, _TREE_COMPONENTS = 96, 16

# The most groups of neighboring steps, each with weights of its own.
GROUPS = 24

# The effect on the training windows is estimated without the windows of the same period, so that trees can trust it.
_FOLDS = 5
_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

# Values of gathered components that are computed at a time.
_CHUNK = 2**24


@dataclass(frozen=True, eq=False)
class NoteStates:
    """What an LLM read.

    Attributes:
        states: a vector for each text, (d_llm,) float32.
        llm: a fingerprint of the LLM, see `utils.llm.notes`.
    """

    states: Mapping[str, np.ndarray]
    llm: str


def is_empty(values: pd.Series) -> np.ndarray:
    """Return for each cell whether it says nothing."""
    return values.isna().to_numpy() | (values.astype(str).str.strip() == "").to_numpy()


@dataclass(frozen=True, eq=False)
class NoteColumn:
    """The encoding of a column of notes by the principal components of their states.

    Attributes:
        mean: of the states of the training rows' texts, (d_llm,).
        projection: to components of unit variance, (d_llm, components).
    """

    name: str
    mean: np.ndarray
    projection: np.ndarray

    @classmethod
    def fit(cls, values: pd.Series, states: NoteStates) -> Self:
        """Fit the components of the distinct texts in a column's training rows."""
        texts = values[~is_empty(values)].astype(str).unique()
        rows = np.stack([states.states[text] for text in texts]).astype(np.float64)
        mean, deviation = rows.mean(axis=0), rows.std(axis=0)
        scale = np.where(deviation > 0, deviation, 1)
        _, singular, directions = np.linalg.svd((rows - mean) / scale, full_matrices=False)
        kept = min(COMPONENTS, int((singular > 1e-6 * singular[0]).sum())) if singular[0] > 0 else 0
        unit = directions[:kept].T / singular[:kept] * np.sqrt(len(rows))
        return cls(str(values.name), mean, unit / scale[:, None])

    def encode(self, values: pd.Series, states: NoteStates) -> np.ndarray:
        """Encode notes, (rows, components); NaN for an empty cell."""
        codes, texts = pd.factorize(values.astype(str).where(~is_empty(values)))
        encoded = np.full((len(texts) + 1, self.projection.shape[1]), np.nan)  # the last row is that of empty cells
        if len(texts):
            encoded[:-1] = (np.stack([states.states[text] for text in texts]) - self.mean) @ self.projection
        return encoded[codes]

    def as_dict(self) -> dict:
        """Convert to tensors, as a checkpoint stores them."""
        return {"name": self.name, "mean": torch.from_numpy(self.mean), "projection": torch.from_numpy(self.projection)}

    @classmethod
    def from_dict(cls, kept: Mapping) -> Self:
        """Restore a column from `as_dict`."""
        return cls(kept["name"], kept["mean"].numpy(), kept["projection"].numpy())


@dataclass(frozen=True, eq=False)
class NoteEffect:
    """A linear effect of the notes of a horizon on each of its steps.

    Attributes:
        weights: (groups of steps, 3 * components + 1), of the note of the step, the mean up to it, the mean of the
            horizon, and the intercept.
    """

    weights: np.ndarray

    def estimate(self, notes: np.ndarray, horizon: np.ndarray) -> np.ndarray:
        """Estimate the effect on horizons, given by the indices of their rows in `notes`, (B, pred_len)."""
        weights = self.weights[_groups(horizon.shape[1])]
        size = max(_CHUNK // weights.size, 1)
        parts = [np.einsum("bpk,pk->bp", _inputs(notes, rows), weights) for rows in _split(horizon, size)]
        return np.concatenate(parts) if parts else np.zeros(horizon.shape)


def fit_note_effect(notes: np.ndarray, horizon: np.ndarray, residuals: np.ndarray) -> tuple[NoteEffect, np.ndarray]:
    """Fit the effect of notes on what a linear forecast leaves, by ridge regression.

    Args:
        notes: (dates, components), NaN where there is no note.
        horizon: the indices of the rows of each training window's horizon, (B, pred_len).
        residuals: what the linear forecast leaves, (B, pred_len), NaN where unknown.

    Returns:
        the effect, and its estimates for the training windows, each without the windows of the same period.
    """
    order = np.argsort(horizon[:, 0], kind="stable")
    folds = np.empty(len(order), int)
    folds[order] = np.arange(len(order)) * _FOLDS // max(len(order), 1)
    systems = [_normal_equations(notes, horizon[folds == fold], residuals[folds == fold]) for fold in range(_FOLDS)]
    gram, moments = (sum(parts) for parts in zip(*systems, strict=True))
    outside = [(gram - own_gram, moments - own_moments) for own_gram, own_moments in systems]
    best, estimates, error = _PENALTIES[-1], np.zeros_like(residuals), np.inf
    for penalty in _PENALTIES:
        found = np.zeros_like(residuals)
        for fold, system in enumerate(outside):
            found[folds == fold] = NoteEffect(_solve(*system, penalty)).estimate(notes, horizon[folds == fold])
        if (found_error := np.nanmean(np.square(residuals - found))) < error:
            best, estimates, error = penalty, found, found_error
    return NoteEffect(_solve(gram, moments, best)), estimates


def tree_components(notes: np.ndarray) -> np.ndarray:
    """Select the components that trees see."""
    return notes[:, :_TREE_COMPONENTS]


def _split(rows: np.ndarray, size: int) -> Sequence[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _inputs(notes: np.ndarray, horizon: np.ndarray) -> np.ndarray:
    """Gather the inputs of the effect, (B, pred_len, 3 * components + 1); a missing note counts as the mean note."""
    own = np.nan_to_num(notes[horizon])
    so_far = own.cumsum(axis=1) / np.arange(1, horizon.shape[1] + 1)[:, None]
    whole = np.broadcast_to(so_far[:, -1:], own.shape)
    return np.concatenate([own, so_far, whole, np.ones((*horizon.shape, 1))], axis=2)


def _groups(steps: int) -> np.ndarray:
    """Number the group of each step."""
    return np.arange(steps) * min(steps, GROUPS) // steps


def _normal_equations(notes: np.ndarray, horizon: np.ndarray, residuals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum the products of inputs with inputs and with known residuals, for each group of steps."""
    group_of, width = _groups(horizon.shape[1]), 3 * notes.shape[1] + 1
    gram, moments = np.zeros((group_of[-1] + 1, width, width)), np.zeros((group_of[-1] + 1, width))
    size = max(_CHUNK // (horizon.shape[1] * width), 1)
    for rows, left in zip(_split(horizon, size), _split(residuals, size), strict=True):
        inputs = _inputs(notes, rows)
        for group in range(len(gram)):
            own, targets = inputs[:, group_of == group].reshape(-1, width), left[:, group_of == group].ravel()
            is_known = ~np.isnan(targets)
            gram[group] += own[is_known].T @ own[is_known]
            moments[group] += own[is_known].T @ targets[is_known]
    return gram, moments


def _solve(gram: np.ndarray, moments: np.ndarray, penalty: float) -> np.ndarray:
    """Solve ridge regressions, (groups, width); the intercept, the last input, has no penalty."""
    counts = gram[:, -1, -1]
    strength = penalty * np.maximum(counts, 1)[:, None] * np.r_[np.ones(gram.shape[1] - 1), 1e-9]
    return np.linalg.solve(gram + strength[:, None, :] * np.eye(gram.shape[1]), moments[..., None])[..., 0]
