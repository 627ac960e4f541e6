"""Columns that are known in advance: what they explain of each channel is taken off before a model sees it.

As in TimesFM's XReg (Das et al., 2024): a ridge regression explains each channel from the covariates of the same row, a
model forecasts what is left, and both are added.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import TimeSeriesSplit

from data_provider.windows import Spans
from utils.errors import UserError, listed
from utils.exact import HUGE

# Texts that a column may have: each becomes a column of its own.
MOST_TEXTS = 30

_PENALTIES = np.logspace(-2, 5, 15)
_FOLDS = 5

# Of more channels, so many choose the penalty for all: a search takes a tenth of a second.
_CHANNELS_SEARCHED = 40

# A share of a channel's variance that a covariate explains only if it says what it should help to forecast.
_TOO_GOOD = 0.999


@dataclass(frozen=True)
class Covariates:
    """The covariates of a table, and of rows behind its last ones.

    Attributes:
        rows: a row a date of the table.
        future: rows behind the last known one of each channel, with their dates as index.
        spans: which of `future` are a channel's, (channels,): `first` and `rows` of it.
    """

    rows: pd.DataFrame
    future: pd.DataFrame
    spans: Spans


@dataclass(frozen=True)
class Column:
    """How a covariate becomes numbers: a text is 1 or 0 for each of `texts`; then less `mean`, in units of `scale`.

    `texts` is None for a column of numbers.
    """

    name: str
    texts: list[str] | None
    mean: list[float]
    scale: list[float]

    @property
    def features(self) -> list[str]:
        """Return what to call the numbers."""
        return [self.name] if self.texts is None else [f"{self.name}={text}" for text in self.texts]

    def encode(self, values: pd.Series) -> np.ndarray:
        """Return the numbers, (rows, features); a text that training has not seen is none of those."""
        if self.texts is None:
            try:
                numbers = values.to_numpy(np.float64)[:, None]
            except ValueError as problem:
                raise UserError(f"covariate {self.name!r} was numbers in training: {problem}") from problem
        else:
            numbers = (values.astype(str).to_numpy()[:, None] == np.array(self.texts)).astype(np.float64)
        return (numbers - self.mean) / self.scale


@dataclass(frozen=True)
class Explainer:
    """What the covariates explain of each channel.

    Attributes:
        columns: how the covariates become numbers.
        channels: the channels' names.
        coefficients: (channels, features): of the scaled channel.
        shares: of each channel's variance in its training rows that is explained.
    """

    columns: list[Column]
    channels: list[str]
    coefficients: list[list[float]]
    shares: list[float]

    def as_dict(self) -> dict:
        """Return plain values, as a checkpoint keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: dict) -> Self:
        """Return what `as_dict` was made of."""
        return cls(**{**kept, "columns": [Column(**column) for column in kept["columns"]]})

    def explain(self, frame: pd.DataFrame, of_rows: Sequence[slice], channels: Sequence[str]) -> np.ndarray:
        """Return what the covariates explain of scaled channels, one channel behind the other.

        Args:
            frame: the covariates.
            of_rows: the rows of it that are each channel's.
            channels: their names; one that was not there in training takes the others' mean coefficients.
        """
        features = np.hstack([column.encode(frame[column.name]) for column in self.columns])
        known = dict(zip(self.channels, np.array(self.coefficients), strict=True))
        usual = np.mean(self.coefficients, axis=0)
        return np.concatenate(
            [features[rows] @ known.get(name, usual) for rows, name in zip(of_rows, channels, strict=True)]
        )

    def lines(self) -> list[str]:
        """Return what to print of it, a line each of the first channels."""
        names = [feature for column in self.columns for feature in column.features]
        lines = []
        for channel, weights, share in zip(self.channels, self.coefficients, self.shares, strict=True):
            told = ", ".join(f"{name} {weight:+.3g}" for name, weight in zip(names, weights, strict=True))
            lines.append(f"Covariates | {channel}: {told} (explain {share:.1%} of its training rows)")
        more = [f"Covariates | and of {len(lines) - 8} more channels"] if len(lines) > 8 else []
        return lines[:8] + more

    def warnings(self) -> list[str]:
        """Return the channels that are explained too well."""
        leaks = [name for name, share in zip(self.channels, self.shares, strict=True) if share > _TOO_GOOD]
        if not leaks:
            return []
        return [
            f"the covariates explain {listed(leaks)} almost wholly: a covariate that is the target itself, or is"
            " known only with it, makes a test mean nothing"
        ]


def fit_explainer(
    source: Path, rows: pd.DataFrame, scaled: Sequence[np.ndarray], of_rows: Sequence[slice], channels: Sequence[str]
) -> Explainer:
    """Explain scaled channels by their covariates: ridge regression on training rows alone.

    Its strength is chosen for each channel on folds in the order of time; of many channels, for all by some of them.

    Args:
        source: the CSV, as messages call it.
        rows: the covariates.
        scaled: the training rows of each channel, NaN where a cell is empty.
        of_rows: the rows of the covariates that are each channel's training rows.
        channels: the channels' names.

    Raises:
        UserError: if a text column has too many texts.
    """
    in_training = np.zeros(len(rows), bool)
    for part in of_rows:
        in_training[part] = True
    training = rows[in_training]
    columns = [_column(source, training[name]) for name in rows.columns]
    features = np.hstack([column.encode(rows[column.name]) for column in columns])
    pairs = []
    for part, target in zip(of_rows, scaled, strict=True):
        is_known = ~np.isnan(target)
        pairs.append((features[part][is_known], target[is_known]))
    searched = np.linspace(0, len(pairs) - 1, min(len(pairs), _CHANNELS_SEARCHED)).round().astype(int)
    penalties = {number: _best_penalty(*pairs[number]) for number in searched}
    usual = np.exp(np.median(np.log(list(penalties.values()))))
    fitted = [_fit(*pair, penalties.get(number, usual)) for number, pair in enumerate(pairs)]
    coefficients, shares = ([one[part] for one in fitted] for part in (0, 1))
    return Explainer(columns, list(channels), coefficients, shares)


def _fit(features: np.ndarray, target: np.ndarray, penalty: float) -> tuple[list[float], float]:
    """Return the coefficients of a ridge regression, and the share of the target's variance that it explains.

    Solved here: for thousands of series scikit-learn's checks would take minutes.
    """
    if not len(target):
        return [0.0] * features.shape[1], 0.0
    apart, wanted = features - features.mean(axis=0), target - target.mean()
    coefficients = np.linalg.solve(apart.T @ apart + penalty * np.eye(apart.shape[1]), apart.T @ wanted)
    variance, left = np.square(wanted).sum(), np.square(wanted - apart @ coefficients).sum()
    return coefficients.tolist(), float(1 - left / variance) if variance else 0.0


def _best_penalty(features: np.ndarray, target: np.ndarray) -> float:
    """Return the penalty that does best on folds in the order of time; the largest if there are too few rows."""
    if len(target) < 2 * (_FOLDS + 1):
        return float(_PENALTIES[-1])
    folds = TimeSeriesSplit(_FOLDS)
    search = RidgeCV(alphas=_PENALTIES, cv=folds, scoring="neg_mean_squared_error").fit(features, target)
    return float(search.alpha_)


def _column(source: Path, values: pd.Series) -> Column:
    """Return how a covariate becomes numbers, by its training rows."""
    texts = None
    if pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        numbers = values.to_numpy(np.float64)[:, None]
    else:
        texts = sorted(values.astype(str).unique())
        are_numbers = pd.to_numeric(pd.Series(texts), errors="coerce").notna().to_numpy()
        if len(texts) / 2 < are_numbers.sum() < len(texts):
            odd = texts[int(are_numbers.argmin())]
            raise UserError(f"{source}, covariate {values.name!r}: {odd!r} stands among numbers: correct it")
        if len(texts) > MOST_TEXTS:
            raise UserError(
                f"{source}, covariate {values.name!r} has {len(texts)} different texts, such as {texts[0]!r}: it may"
                f" have {MOST_TEXTS}, or be numbers"
            )
        numbers = (values.astype(str).to_numpy()[:, None] == np.array(texts)).astype(np.float64)
    scale = numbers.std(axis=0)
    return Column(str(values.name), texts, numbers.mean(axis=0).tolist(), np.where(scale > 0, scale, 1).tolist())


def check_covariates(source: Path, columns: Sequence[str], names: Sequence[str], forecast: Sequence[str]) -> None:
    """Refuse covariates that are not there, are named twice, or are to be forecast.

    Args:
        source: the CSV, as messages call it.
        columns: its columns.
        names: of the covariates.
        forecast: columns that cannot be covariates.

    Raises:
        UserError: names the covariate.
    """
    for number, name in enumerate(names):
        if name not in columns:
            raise UserError(f"{source} has no column {name!r} for --covariates, but {list(columns)}")
        if name in forecast:
            raise UserError(
                f"--covariates {name}: {source} has it as what is forecast, or as date or name: leave it out"
            )
        if name in names[:number]:
            raise UserError(f"--covariates names {name} twice")


def check_cells(source: Path, frame: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuse empty cells and infinite numbers of covariates.

    Raises:
        UserError: names the row.
    """
    for name in names:
        column = frame[name]
        wrong = column.isna().to_numpy()
        if pd.api.types.is_float_dtype(column):
            wrong = wrong | ~(np.abs(column.to_numpy(np.float64)) < HUGE)
        if wrong.any():
            first = wrong.argmax()
            raise UserError(
                f"{source} data row {frame.index[first] + 1}, covariate {name!r} is {column.iloc[first]}: it must be"
                f" a known number or text in every row, those to come, too ({wrong.sum()} are not)"
            )
