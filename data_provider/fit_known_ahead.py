"""Fit the effect of what is known in advance, and choose it for each channel on the validation windows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from data_provider.boosting import ROUNDS, fit_trees
from data_provider.covariates import Explainer, fit_encodings, fit_explainer, training_rows
from data_provider.forecast_features import KnownRows, row_features
from data_provider.known_ahead import BOOSTED, LINEAR, NONE, BoostedEffect, KnownAhead, forecast_line
from data_provider.note_effect import fit_note_effect
from data_provider.notes import NoteColumn
from data_provider.scaling import scale
from data_provider.series import Series
from data_provider.windows import WindowDataset, evenly_spaced
from layers.LinearResidual import LinearResidual

# The rows that trees are fitted on at most, in total, and those that validate them.
_FITTED_ROWS, _VALIDATION_ROWS = 400_000, 50_000

# A channel has trees of its own if they are fitted on at least so many rows; the others share their trees.
_ROWS_OF_OWN_TREES = 20_000

# Another way than `none` must reduce the validation error by this share, so that noise is not chosen.
_NEEDED_GAIN = 0.01

# A column matters if the error rises by at least this share when its values are shuffled.
_USELESS = 0.002

# Validation rows that a column's importance is measured on.
_IMPORTANCE_ROWS = 40_000

# A channel with fewer validation windows takes the way that is best for all channels.
_FEW_WINDOWS = 30

_PRINTED_CHANNELS, _PRINTED_COLUMNS = 8, 8


@dataclass(frozen=True)
class Choice:
    """How the effect of the covariates was chosen.

    Attributes:
        ways: the chosen way of each channel: none, linear or boosted.
        errors: the validation MSE of a linear forecast with each way that was tried, (channels,) each; NaN where a
            channel has no validation window.
        rises: by how much the MSE of each channel rises if the values of a column are shuffled, (channels,) each.
        warnings: what the user should know, a line each.
    """

    channels: tuple[str, ...]
    ways: list[str]
    errors: dict[str, np.ndarray]
    rises: dict[str, np.ndarray]
    warnings: list[str]

    def lines(self) -> list[str]:
        """Describe the choice for the console, a line for each of the first channels."""
        lines = [self._line(number) for number in range(min(len(self.channels), _PRINTED_CHANNELS))]
        hidden = len(self.channels) - len(lines)
        return lines + ([f"Known in advance | and {hidden} more channels"] if hidden else [])

    def _line(self, number: int) -> str:
        way = self.ways[number]
        errors = {"without" if name == NONE else name: own[number] for name, own in self.errors.items() if name != way}
        parts = [
            f"validation MSE {self.errors[way][number]:.4f}",
            *(f"{name} {mse:.4f}" for name, mse in errors.items()),
        ]
        rises = sorted(((own[number], name) for name, own in self.rises.items()), reverse=True) if way != NONE else []
        columns = [f"{name} {rise:.4f}" for rise, name in rises[:_PRINTED_COLUMNS]]
        columns += [f"and {len(rises) - _PRINTED_COLUMNS} more"] if len(rises) > _PRINTED_COLUMNS else []
        line = f"Known in advance | {self.channels[number]}: {way} | {', '.join(parts)}"
        return f"{line} | {', '.join(columns)}" if columns else line

    def frame(self) -> pd.DataFrame:
        """List the rises of the validation error by channel and column; no row if nothing has an effect."""
        rows = [
            (channel, name, way, rises[number])
            for number, (channel, way) in enumerate(zip(self.channels, self.ways, strict=True))
            for name, rises in self.rises.items()
        ]
        return pd.DataFrame(rows, columns=["channel", "column", "way", "rise"])


def fit_known_ahead(
    series: Series, way: str, can_boost: bool, after_round: Callable[[], None] = lambda: None
) -> tuple[KnownAhead, Choice]:
    """Fit the effect of a series' covariates.

    Args:
        series: without any effect, with covariates.
        way: none, linear, boosted, or auto: for each channel the way with the least error on the validation windows.
        can_boost: whether the forecaster learns what the trees leave, so that their effect can be added to its
            forecast.
        after_round: called after each round of fitting trees, see `tree_rounds`.

    Raises:
        UserError: if a column cannot be encoded.
    """
    tried = [NONE, LINEAR, BOOSTED] if way == "auto" else list(dict.fromkeys([NONE, way]))
    if not series.table.covariates.known:
        tried = [name for name in tried if name != LINEAR]
    if not can_boost:
        tried = [name for name in tried if name != BOOSTED]
    training, validation = series.windows("train"), series.windows("val")
    line = _fit_line(training, validation)
    errors = {NONE: _channel_errors(line, validation)}
    explainer = boosted = None
    if LINEAR in tried:
        explainer = fit_explainer(series.table, scale(series.table, series.scaler), series.ends[:, 0])
        linear = series.with_known_ahead(KnownAhead(explainer, None))
        linear_validation = linear.windows("val")
        errors[LINEAR] = _channel_errors(_fit_line(linear.windows("train"), linear_validation), linear_validation)
    if BOOSTED in tried:
        boosted, errors[BOOSTED] = _fit_useful_columns(series, line, after_round)
    ways = _choose(errors, validation) if way == "auto" else [tried[-1]] * len(series.channels)
    known = KnownAhead(_keep_linear(explainer, ways), _keep_boosted(boosted, ways))
    warnings = [*_constant_columns(series), *(explainer.warnings() if explainer else ())]
    warnings = [f"{series.table.source}: {warning}" for warning in warnings]
    return known, Choice(series.channels, ways, errors, _rises(series, known, ways, line), warnings)


def _constant_columns(series: Series) -> list[str]:
    """Warn of columns from which nothing can be learned."""
    covariates = series.table.covariates
    names = [*covariates.known, *covariates.past, *covariates.notes]
    return [
        f"column {name!r} has a single value in all training rows: it has no effect"
        for name in names
        if len(pd.unique(training_rows(series.table, series.ends[:, 0], name))) == 1
    ]


def tree_rounds(series: Series) -> int:
    """Count the rounds of fitting trees at most."""
    own, shared = _channels_with_own_trees(series.windows("train"))
    return (len(own) + bool(len(shared))) * ROUNDS


def _fit_line(training: WindowDataset, validation: WindowDataset) -> torch.Tensor:
    """Fit a linear forecast, (pred_len, seq_len) float64; the random generators keep their states."""
    with torch.random.fork_rng(devices=[]):
        line = LinearResidual(training.seq_len, training.pred_len)
    line.fit(training.pairs, validation.pairs)
    return line.linear.weight.detach().double()


def _channel_errors(line: torch.Tensor, windows: WindowDataset) -> np.ndarray:
    """Compute the MSE of a linear forecast for each channel, (channels,); NaN for a channel without known targets."""
    numbers = evenly_spaced(len(windows), max(_FITTED_ROWS // windows.pred_len, 1))
    squares = [
        np.square(forecast_line(line, contexts.numpy()) - targets.double().numpy())
        for _, contexts, targets in windows.in_chunks(numbers)
    ]
    return _channel_means(np.concatenate(squares), windows.channel_of(numbers), len(windows.channels))


def _channels_with_own_trees(training: WindowDataset) -> tuple[np.ndarray, np.ndarray]:
    """Split the channels into those with trees of their own and those that share theirs."""
    counts = training.counts * training.pred_len
    is_own = np.minimum(counts, _FITTED_ROWS // len(counts)) >= _ROWS_OF_OWN_TREES
    return np.flatnonzero(is_own), np.flatnonzero(~is_own if counts[~is_own].any() else [])


def _fit_useful_columns(
    series: Series, line: torch.Tensor, after_round: Callable[[], None]
) -> tuple[BoostedEffect, np.ndarray]:
    """Fit the boosted effect, without columns that do not matter if it is better without; return it and its errors."""

    def fit(own: Series) -> tuple[BoostedEffect, np.ndarray]:
        training, validation = own.windows("train"), own.windows("val")
        effect = _fit_boosted(own, training, validation, line, after_round)
        return effect, _channel_errors(line, own.with_known_ahead(KnownAhead(None, effect)).windows("val"))

    counts, (effect, errors) = series.windows("val").counts, fit(series)
    rises = _rises(series, KnownAhead(None, effect), [BOOSTED] * len(counts), line)
    least = _USELESS * np.nansum(errors * counts)
    useless = {name for name, own in rises.items() if np.nansum(own * counts) < least}
    if not 0 < len(useless) < len(rises):
        return effect, errors
    covariates = series.table.covariates
    parts = {
        part: tuple(name for name in getattr(covariates, part) if name not in useless)
        for part in ("known", "past", "notes")
    }
    without, fewer_errors = fit(replace(series, table=replace(series.table, covariates=replace(covariates, **parts))))
    return (
        (without, fewer_errors) if np.nansum(fewer_errors * counts) < np.nansum(errors * counts) else (effect, errors)
    )


def _fit_boosted(
    series: Series,
    training: WindowDataset,
    validation: WindowDataset,
    line: torch.Tensor,
    after_round: Callable[[], None],
) -> BoostedEffect:
    """Fit trees to what a linear forecast leaves, for channels of their own and together for the others."""
    table, covariates, ends = series.table, series.table.covariates, series.ends[:, 0]
    known, past = (fit_encodings(table, ends, names) for names in (covariates.known, covariates.past))
    effect = BoostedEffect(
        channels=list(series.channels),
        tree_of=[-1] * len(series.channels),
        known=known,
        past=past,
        line=line,
        lags=table.seasons()[:2],
        step_in_days=table.step_in_days(),
        trees=[],
        notes=[NoteColumn.fit(training_rows(table, ends, name), covariates.states) for name in covariates.notes],
        note_effects=[],
        llm=covariates.states.llm if covariates.notes else "",
    )
    rows = effect.rows_of(covariates.rows, table.dates, covariates.states)
    own, shared = _channels_with_own_trees(training)
    for channels in [*own[:, None], *([shared] if len(shared) else [])]:
        share = len(channels) / len(series.channels) if len(own) else 1
        fitted = _gather(training, channels, line, int(_FITTED_ROWS * share))
        validated = _gather(validation, channels, line, int(_VALIDATION_ROWS * share))
        estimates = [None, None]
        if effect.notes:
            note_effect, estimate = fit_note_effect(rows.notes, fitted.horizon, fitted.residuals)
            effect.note_effects.append(note_effect)
            estimates = [estimate, note_effect.estimate(rows.notes, validated.horizon)]
        for channel in channels:
            effect.tree_of[channel] = len(effect.trees)
        examples = [
            part.examples(rows, effect.lags, own_estimate)
            for part, own_estimate in zip((fitted, validated), estimates, strict=True)
        ]
        effect.trees.append(fit_trees(*examples[0], examples[1], after_round))
    return effect


@dataclass(frozen=True)
class _Gathered:
    """Windows to fit trees to: contexts, linear forecasts and what they leave, first dates."""

    contexts: np.ndarray
    line: np.ndarray
    residuals: np.ndarray
    first: np.ndarray

    @property
    def horizon(self) -> np.ndarray:
        """The indices of the dates to forecast, (B, pred_len)."""
        return self.first[:, None] + self.contexts.shape[1] + np.arange(self.line.shape[1])

    def examples(
        self, rows: KnownRows, lags: Sequence[int], note_effect: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Build features and targets of the rows whose target is known."""
        features = row_features(self.contexts, self.line, rows, self.first, lags, note_effect)
        residuals = self.residuals.ravel()
        is_known = ~np.isnan(residuals)
        return features[is_known], residuals[is_known]


def _gather(windows: WindowDataset, channels: np.ndarray, line: torch.Tensor, at_most: int) -> _Gathered:
    """Gather evenly spaced windows of some channels, with at most so many rows to forecast."""
    numbers = np.flatnonzero(np.isin(windows.channel_of(np.arange(len(windows))), channels))
    numbers = numbers[evenly_spaced(len(numbers), max(at_most // windows.pred_len, 1))]
    pairs = [
        (contexts.double().numpy(), targets.double().numpy()) for _, contexts, targets in windows.in_chunks(numbers)
    ]
    contexts, targets = map(np.concatenate, zip(*pairs, strict=True))
    forecast = forecast_line(line, contexts)
    return _Gathered(contexts, forecast, targets - forecast, windows.first_dates(numbers))


def _choose(errors: dict[str, np.ndarray], validation: WindowDataset) -> list[str]:
    """Choose the way of each channel; `none` unless another is clearly better."""
    total = {name: np.nansum(own * validation.counts) for name, own in errors.items()}
    best_of_all = _best(total)
    return [
        best_of_all if count < _FEW_WINDOWS else _best({name: own[number] for name, own in errors.items()})
        for number, count in enumerate(validation.counts)
    ]


def _best(errors: dict[str, float]) -> str:
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < (1 - _NEEDED_GAIN) * errors[NONE] else NONE


def _keep_linear(explainer: Explainer | None, ways: list[str]) -> Explainer | None:
    """Set the coefficients of channels without a linear effect to 0."""
    if explainer is None or LINEAR not in ways:
        return None
    pairs = zip(explainer.coefficients, ways, strict=True)
    return replace(explainer, coefficients=[own if way == LINEAR else [0.0] * len(own) for own, way in pairs])


def _keep_boosted(boosted: BoostedEffect | None, ways: list[str]) -> BoostedEffect | None:
    """Drop the trees of channels without a boosted effect."""
    if boosted is None or BOOSTED not in ways:
        return None
    tree_of = [number if way == BOOSTED else -1 for number, way in zip(boosted.tree_of, ways, strict=True)]
    used = sorted(set(tree_of) - {-1})
    tree_of = [used.index(number) if number >= 0 else -1 for number in tree_of]
    note_effects = [boosted.note_effects[number] for number in used] if boosted.notes else []
    return replace(
        boosted, tree_of=tree_of, trees=[boosted.trees[number] for number in used], note_effects=note_effects
    )


def _rises(series: Series, known: KnownAhead, ways: list[str], line: torch.Tensor) -> dict[str, np.ndarray]:
    """Compute by how much the validation MSE of each channel rises if the values of a column are shuffled."""
    if not known.linear and not known.boosted:
        return {}
    covariates, with_effect = series.table.covariates, series.with_known_ahead(known)
    windows = with_effect.windows("val")
    numbers = evenly_spaced(len(windows), max(_IMPORTANCE_ROWS // windows.pred_len, 1))
    errors, effects = _errors_and_effects(with_effect, ways, line, numbers)
    in_windows = np.zeros(len(covariates.rows), bool)
    for first in windows.first_dates(numbers):
        in_windows[first : first + windows.length] = True
    places = np.flatnonzero(in_windows)
    shuffled_places = np.random.default_rng(0).permutation(places)
    rises = {}
    for name in (*covariates.known, *covariates.past, *covariates.notes):
        rows = covariates.rows.copy()
        rows.iloc[places, rows.columns.get_loc(name)] = covariates.rows[name].iloc[shuffled_places].array
        table = replace(series.table, covariates=replace(covariates, rows=rows))
        other = replace(series, table=table).with_known_ahead(known).windows("val")
        change = other.with_covariate_effect(numbers, np.zeros_like(effects)) - effects
        squares = np.square(errors + change) - np.square(errors)
        rises[name] = _channel_means(squares, windows.channel_of(numbers), len(windows.channels))
    return rises


def _errors_and_effects(
    series: Series, ways: list[str], line: torch.Tensor, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute errors of a linear forecast with the chosen effects on validation windows, and the effects themselves."""
    windows = series.windows("val")
    is_linear = np.array([way == LINEAR for way in ways])
    linear_line = _fit_line(series.windows("train"), windows) if is_linear.any() else line
    errors = []
    for chunk, contexts, targets in windows.in_chunks(numbers):
        lines = np.stack([forecast_line(one, contexts.numpy()) for one in (line, linear_line)])
        errors.append(lines[is_linear[windows.channel_of(chunk)].astype(int), np.arange(len(chunk))] - targets.numpy())
    return np.concatenate(errors), windows.with_covariate_effect(numbers, np.zeros((len(numbers), windows.pred_len)))


def _channel_means(values: np.ndarray, channel_of: np.ndarray, channels: int) -> np.ndarray:
    """Take the mean of each channel's known values, (windows, steps); NaN for a channel without any."""
    sums, counts = np.zeros((2, channels))
    np.add.at(sums, channel_of, np.nansum(values, axis=1))
    np.add.at(counts, channel_of, (~np.isnan(values)).sum(axis=1))
    with np.errstate(invalid="ignore"):
        return sums / counts
