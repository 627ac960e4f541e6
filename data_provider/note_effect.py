"""The linear effect of notes on forecasts, from the components that encode them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The first components are features of the trees, too, besides the linear effect.
_TREE_COMPONENTS = 16

# The most groups of neighboring steps, each with weights of its own.
GROUPS = 24

# The effect on the training windows is estimated without the windows of the same period, so that trees can trust it.
_FOLDS = 5
_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

# Values of gathered components that are computed at a time.
_CHUNK = 2**24


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
