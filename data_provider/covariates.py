"""Covariates: columns known in advance, whose effect on each channel is removed before a model sees the channel.

This is the XReg of TimesFM (Das et al., 2024): a ridge regression predicts each channel from the covariates of the same
row, a model forecasts the residual, and the forecast is the sum of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from data_provider.notes import is_empty
from data_provider.tables import Table, TableOptions
from data_provider.windows import evenly_spaced
from utils.errors import UserError, listed
from utils.exact import HUGE

# A text column is one-hot encoded: each different text adds a feature.
_MAX_TEXTS = 30

_PENALTIES = np.logspace(-2, 5, 15)
_FOLDS = 5

# With more channels, this many choose the penalty for all: one search takes 0.1 seconds.
_SEARCHED_CHANNELS = 40

# Covariates that explain a larger share of a channel's variance probably leak the target.
_LEAKAGE_SHARE = 0.999

_PRINTED_CHANNELS = 8


@dataclass(frozen=True)
class Column:
    """The encoding of a covariate as standardized features.

    Attributes:
        texts: the texts of a one-hot encoded column; None for a numeric column.
        mean, scale: one number per feature.
    """

    name: str
    texts: list[str] | None
    mean: list[float]
    scale: list[float]

    @property
    def features(self) -> list[str]:
        """The features' names."""
        return [self.name] if self.texts is None else [f"{self.name}={text}" for text in self.texts]

    def encode(self, values: pd.Series) -> np.ndarray:
        """Encode and standardize values, (rows, features); a text unseen in training matches no feature."""
        try:
            features = _unscaled_features(values, self.texts)
        except ValueError as problem:
            raise UserError(f"covariate {self.name!r} was numeric in training: {problem}") from problem
        return (features - self.mean) / self.scale


def encode(columns: Sequence[Column], frame: pd.DataFrame) -> np.ndarray:
    """Encode the columns of a frame as standardized features, (rows, features); NaN where a number is missing."""
    return np.hstack([column.encode(frame[column.name]) for column in columns] or [np.zeros((len(frame), 0))])


def _repeat_last(features: np.ndarray) -> np.ndarray:
    """Let a missing number be the last known one of the series, or the mean before the first."""
    if not np.isnan(features).any():
        return features
    return pd.DataFrame(features).ffill().fillna(0).to_numpy()


@dataclass(frozen=True)
class Explainer:
    """The linear effect of the covariates on each channel.

    Attributes:
        coefficients: (channels, features), for scaled channels.
        shares: the share of each channel's training variance that the covariates explain.
    """

    columns: list[Column]
    channels: list[str]
    coefficients: list[list[float]]
    shares: list[float]

    @classmethod
    def from_dict(cls, kept: dict) -> Self:
        """Restore an explainer from the dictionary that `dataclasses.asdict` made of it."""
        return cls(**kept | {"columns": [Column(**column) for column in kept["columns"]]})

    def explain(self, frame: pd.DataFrame, rows: Sequence[slice], channels: Sequence[str]) -> np.ndarray:
        """Compute the effect of the covariates in `frame` on scaled channels, one channel after the other.

        `rows` are each channel's rows of `frame`. A channel unseen in training takes the others' mean coefficients.
        """
        features = encode(self.columns, frame)
        known = dict(zip(self.channels, np.array(self.coefficients), strict=True))
        mean = np.mean(self.coefficients, axis=0)
        return np.concatenate(
            [_repeat_last(features[own]) @ known.get(name, mean) for own, name in zip(rows, channels, strict=True)]
        )

    def lines(self) -> list[str]:
        """Format the coefficients for the console, one line per channel."""
        names = [feature for column in self.columns for feature in column.features]
        lines = []
        for channel, weights, share in zip(self.channels, self.coefficients, self.shares, strict=True):
            if not any(weights):  # a channel without a linear effect
                continue
            effects = ", ".join(f"{name} {weight:+.3g}" for name, weight in zip(names, weights, strict=True))
            lines.append(f"Covariates | {channel}: {effects} (explain {share:.1%} of its training rows)")
        hidden = len(lines) - _PRINTED_CHANNELS
        return lines[:_PRINTED_CHANNELS] + ([f"Covariates | and {hidden} more channels"] if hidden > 0 else [])

    def warnings(self) -> list[str]:
        """Warn of channels that the covariates explain so well that target leakage is likely."""
        leaks = [name for name, share in zip(self.channels, self.shares, strict=True) if share > _LEAKAGE_SHARE]
        warning = (
            f"the covariates explain {listed(leaks)} almost completely: a covariate that is the target itself, or is"
            " known only together with it, is target leakage and makes a test meaningless"
        )
        return [warning] if leaks else []


def fit_explainer(table: Table, scaled: np.ndarray, training_rows: np.ndarray) -> Explainer:
    """Fit a ridge regression of each scaled channel on the covariates of its training rows.

    Time-ordered cross-validation chooses the penalty of each channel; with many channels, a sample chooses it for all.

    Args:
        table: a CSV with covariates.
        scaled: its scaled values, (all rows,), NaN where a cell is empty.
        training_rows: the number of training rows at the start of each channel, (channels,).

    Raises:
        UserError: if a covariate cannot be encoded.
    """
    training, covariates = table.spans.part(0, training_rows), table.covariates.rows
    columns = fit_encodings(table, training_rows, table.covariates.known)
    features = encode(columns, covariates)
    pairs = []
    for rows, dates in zip(training.slices(), training.date_slices(), strict=True):
        is_known = ~np.isnan(scaled[rows])
        pairs.append((_repeat_last(features[dates])[is_known], scaled[rows][is_known]))
    penalties = {number: _best_penalty(*pairs[number]) for number in evenly_spaced(len(pairs), _SEARCHED_CHANNELS)}
    common = np.exp(np.median(np.log(list(penalties.values()))))
    fits = [_fit_ridge(*pair, penalties.get(number, common)) for number, pair in enumerate(pairs)]
    coefficients, shares = map(list, zip(*fits, strict=True))
    return Explainer(columns, list(table.channels), coefficients, shares)


def training_rows(table: Table, rows: np.ndarray, name: str) -> pd.Series:
    """Select the values of a covariate in the first `rows`, (channels,), of the channels."""
    in_training = np.zeros(len(table.covariates.rows), bool)
    for dates in table.spans.part(0, rows).date_slices():
        in_training[dates] = True
    return table.covariates.rows[name][in_training]


def fit_encodings(table: Table, rows: np.ndarray, names: Sequence[str]) -> list[Column]:
    """Fit the encodings of some columns to their training rows; raise a UserError if one has no value there."""
    return [_fit_encoding(table.source, training_rows(table, rows, name)) for name in names]


def _fit_ridge(features: np.ndarray, target: np.ndarray, penalty: float) -> tuple[list[float], float]:
    """Fit a ridge regression; return its coefficients and the share of the target's variance that it explains."""
    if not len(target):
        return [0.0] * features.shape[1], 0.0
    x, y = features - features.mean(axis=0), target - target.mean()
    # Not with scikit-learn, whose checks would take minutes for thousands of series.
    coefficients = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    total, residual = np.square(y).sum(), np.square(y - x @ coefficients).sum()
    return coefficients.tolist(), float(1 - residual / total) if total else 0.0


def _best_penalty(features: np.ndarray, target: np.ndarray) -> float:
    """Choose a penalty by time-ordered cross-validation; the largest if there are too few rows."""
    if len(target) < 2 * (_FOLDS + 1):
        return float(_PENALTIES[-1])
    from sklearn.linear_model import RidgeCV  # takes a second, and only covariates need it
    from sklearn.model_selection import TimeSeriesSplit

    search = RidgeCV(alphas=_PENALTIES, cv=TimeSeriesSplit(_FOLDS), scoring="neg_mean_squared_error")
    return float(search.fit(features, target).alpha_)


def _fit_encoding(source: Path, values: pd.Series) -> Column:
    """Fit the encoding of a covariate to its training rows."""
    texts = None
    if not pd.api.types.is_numeric_dtype(values):
        texts = sorted(values.dropna().astype(str).unique())
        are_numbers = pd.to_numeric(pd.Series(texts), errors="coerce").notna().to_numpy()
        if len(texts) / 2 < are_numbers.sum() < len(texts):
            odd = texts[int(are_numbers.argmin())]
            raise UserError(f"{source}, covariate {values.name!r}: {odd!r} is text in a column of numbers: correct it")
        if len(texts) > _MAX_TEXTS:
            raise UserError(
                f"{source}, covariate {values.name!r} has {len(texts)} different texts, such as {texts[0]!r}: name it"
                f" in --notes, and the LLM reads them (at most {_MAX_TEXTS} are categories)"
            )
    features = _unscaled_features(values, texts)
    features = features[~np.isnan(features).any(axis=1)]
    if not len(features):
        raise UserError(f"{source}, covariate {values.name!r} has no value in the training rows: leave it out")
    scale = features.std(axis=0)
    return Column(str(values.name), texts, features.mean(axis=0).tolist(), np.where(scale > 0, scale, 1).tolist())


def _unscaled_features(values: pd.Series, texts: list[str] | None) -> np.ndarray:
    """Convert a covariate to float64, (rows, features): numbers as they are, text one-hot over `texts`."""
    if texts is None:
        return values.to_numpy(np.float64, na_value=np.nan)[:, None]
    features = (values.astype(str).to_numpy()[:, None] == np.array(texts)).astype(np.float64)
    return np.where(values.isna().to_numpy()[:, None], np.nan, features)


def check_covariates(source: Path, frame: pd.DataFrame, options: TableOptions, reserved: Sequence[str]) -> None:
    """Raise a UserError for a covariate that is missing, named twice or to be forecast, or has an invalid cell."""
    flag_of = {}
    for flag, names in zip(("--covariates", "--past_covariates", "--notes"), options.column_names, strict=True):
        for name in names:
            if name not in frame.columns:
                raise UserError(f"{source} has no column {name!r} for {flag}: it has {list(frame.columns)}")
            if name in reserved:
                raise UserError(
                    f"{flag} {name}: this column of {source} is to be forecast, or holds dates or the series' names:"
                    " leave it out"
                )
            if name in flag_of:
                named = f"{flag} names" if flag == flag_of[name] else f"{flag_of[name]} and {flag} name"
                raise UserError(f"{named} {name} twice")
            flag_of[name] = flag
    for name, flag in flag_of.items():
        _check_cells(source, frame[name], is_text=flag == "--notes", first=frame.index)


def _check_cells(source: Path, values: pd.Series, is_text: bool, first: pd.Index) -> None:
    """Refuse a column without a value, notes that are numbers, and numbers that are too large."""
    if len(values) and is_empty(values).all():
        raise UserError(f"{source}, {'notes' if is_text else 'covariate'} {values.name!r} has no value: leave it out")
    if is_text and pd.api.types.is_numeric_dtype(values):
        raise UserError(f"{source}, notes {values.name!r} are numbers: name the column in --covariates")
    is_huge = np.zeros(len(values), bool)
    if pd.api.types.is_float_dtype(values):
        is_huge = np.abs(values.to_numpy(np.float64, na_value=np.nan)) >= HUGE
    if is_huge.any():
        row = is_huge.argmax()
        raise UserError(
            f"{source} data row {first[row] + 1}, covariate {values.name!r} is {values.iloc[row]}: a number must be"
            f" below {HUGE:g} ({is_huge.sum()} rows)"
        )
