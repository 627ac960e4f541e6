"""The effect of what is known in advance, to look at: over the values of a column, and for each note."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from data_provider.covariates import Column, training_rows
from data_provider.forecast_features import KnownRows
from data_provider.known_ahead import KnownAhead
from data_provider.notes import is_empty
from data_provider.series import Series
from data_provider.windows import WindowDataset, evenly_spaced

# The columns and the channels that are shown at most.
_COLUMNS, _CHANNELS = 4, 4

# Values of a column, windows of a channel, and rows that trees forecast for a column at most.
_VALUES, _WINDOWS, _ROWS = 20, 200, 400_000

# Outside of these quantiles, few values would take most of the axis.
_QUANTILES = (0.01, 0.99)

# Rows to forecast that the effects of notes are measured on, and channels that they are measured for at most.
_NOTE_ROWS, _NOTE_CHANNELS = 40_000, 100


@dataclass(frozen=True, eq=False)
class ColumnEffect:
    """The mean effect of a column on forecasts, over its values.

    Attributes:
        is_past: whether the column is known up to the origin only, so that the values are those at the origin.
        values: increasing numbers, or texts.
        curves: for each channel, the effect in the channel's units minus its mean over the values, (values,).
    """

    name: str
    is_past: bool
    values: np.ndarray | list[str]
    curves: dict[str, np.ndarray]


def column_effects(series: Series, rises: Mapping[str, np.ndarray]) -> list[ColumnEffect]:
    """Compute the effects of the most important columns on the first channels that have an effect.

    This is partial dependence: all rows to forecast of validation windows get the same value, everything before them
    stays as it was, and the effects are averaged. Of a past column, the value at the origin changes.

    Args:
        series: with the effect of what is known in advance.
        rises: by how much the error of each channel rises if the values of a column are shuffled, (channels,) each.

    Returns:
        the effects, of the most important column first; none if no channel has an effect.
    """
    linear, boosted = series.known_ahead.linear, series.known_ahead.boosted
    columns = {column.name: column for column in linear.columns} if linear else {}
    if boosted:
        columns |= {column.name: column for column in (*boosted.known, *boosted.past)}
    windows = series.without_window_effect().windows("val")
    channels = np.flatnonzero(_has_effect(series.known_ahead, series.channels) & (windows.counts > 0))[:_CHANNELS]
    if not len(channels):
        return []
    names = sorted((name for name in columns if name in rises), key=lambda name: -np.nansum(rises[name]))
    return [_effect_of(series, windows, columns[name], channels) for name in names[:_COLUMNS]]


def _has_effect(known: KnownAhead, channels: Sequence[str]) -> np.ndarray:
    """Return for each channel whether what is known in advance changes its forecast."""
    result = np.zeros(len(channels), bool)
    if known.linear:
        result |= np.any(known.linear.coefficients, axis=1)
    if known.boosted:
        result |= np.array(known.boosted.tree_of) >= 0
    return result


def _effect_of(series: Series, windows: WindowDataset, column: Column, channels: np.ndarray) -> ColumnEffect:
    """Compute the effect of one column on channels."""
    known = series.known_ahead
    values = _values_to_show(column, training_rows(series.table, series.ends[:, 1], column.name))
    encoded = column.encode(pd.Series(values))
    is_past = column.name in series.table.covariates.past
    curves = np.zeros((len(channels), len(values)))
    if known.linear and not is_past:
        features = _features_of(known.linear.columns, column.name)
        curves += np.array(known.linear.coefficients)[channels, features] @ encoded.T
    if known.boosted:
        at_most = min(_WINDOWS, max(_ROWS // (len(channels) * len(values) * windows.pred_len), 1))
        for place, channel in enumerate(channels):
            if known.boosted.tree_of[channel] >= 0:
                first, count = windows.counts[:channel].sum(), windows.counts[channel]
                numbers = first + evenly_spaced(count, at_most)
                curves[place] += _boosted_curve(series, windows, column.name, encoded, numbers)
    curves -= curves.mean(axis=1, keepdims=True)
    curves *= series.scaler.scale_[channels, None]
    names = [series.channels[channel] for channel in channels]
    return ColumnEffect(column.name, is_past, values, dict(zip(names, curves, strict=True)))


def _values_to_show(column: Column, values: pd.Series) -> np.ndarray | list[str]:
    """Choose values of a column: all texts, or numbers at evenly spaced quantiles."""
    if column.texts is not None:
        return column.texts
    numbers = np.sort(values.to_numpy(np.float64, na_value=np.nan))
    numbers = numbers[~np.isnan(numbers)]
    distinct, levels = np.unique(numbers), np.linspace(*_QUANTILES, _VALUES)
    if len(distinct) <= _VALUES:
        return distinct
    chosen = np.unique(np.quantile(numbers, levels, method="nearest"))
    # Where most values are the same, as the rain of dry hours, the others are what matters.
    return chosen if len(chosen) > _VALUES / 2 else np.unique(np.quantile(distinct, levels, method="nearest"))


def _features_of(columns: Sequence[Column], name: str) -> slice:
    """Find the features of a column among those of several columns."""
    names, counts = [column.name for column in columns], [len(column.features) for column in columns]
    number = names.index(name)
    return slice(sum(counts[:number]), sum(counts[: number + 1]))


def _boosted_curve(
    series: Series, windows: WindowDataset, name: str, encoded: np.ndarray, numbers: np.ndarray
) -> np.ndarray:
    """Compute the mean effect of the trees on windows of a channel for each encoded value of a column, (values,)."""
    effect, rows = series.window_effect.effect, series.window_effect.rows
    origin, length, count = windows.seq_len - 1, windows.length, len(numbers)
    # Each window has rows of its own, since those of windows that overlap change together otherwise.
    places = windows.first_dates(numbers)[:, None] + np.arange(length)
    known, past, calendar, notes = (part[places] for part in (rows.known, rows.past, rows.calendar, rows.notes))
    if name in series.table.covariates.past:
        changed = past[:, origin, _features_of(effect.past, name)]
    else:
        changed = known[:, origin + 1 :, _features_of(effect.known, name)]
    contexts = windows.__getitems__(numbers)[0][..., 0].numpy()
    channels = [series.channels[channel] for channel in windows.channel_of(numbers)]
    first, means = np.arange(count) * length, []
    for value in encoded:
        changed[:] = value  # a view
        own = KnownRows(*(part.reshape(count * length, -1) for part in (known, past, calendar, notes)))
        means.append(effect.effect(contexts, channels, own, first).mean())
    return np.array(means)


def note_effects(series: Series) -> pd.DataFrame:
    """Compute the mean effect of each note on the forecasts of the rows that have it, most effective first.

    The effect is the difference to the forecast without any note of that column in the horizon, on training and
    validation windows; rare notes are preferred, since there is a limit of rows.

    Args:
        series: with the effect of what is known in advance, and with notes.

    Returns:
        text; rows, the number of rows of the CSV that have it; and the effect on each channel in its units, NaN for a
        text without a measured row, 0 for a channel without an effect. Of many channels, 100 are taken.
    """
    covariates = series.table.covariates
    texts, rows = _count_texts(covariates.rows, covariates.future, covariates.notes)
    boosted = series.known_ahead.boosted
    codes = [_codes(covariates.rows[column.name], texts) for column in (boosted.notes if boosted else ())]
    is_boosted = np.array(boosted.tree_of) >= 0 if boosted else np.zeros(len(series.channels), bool)
    channels = np.sort(np.argsort(~is_boosted, kind="stable")[:_NOTE_CHANNELS])
    means = np.zeros((len(texts), len(series.channels)))
    if is_boosted.any() and codes:
        is_measured = is_boosted & np.isin(np.arange(len(is_boosted)), channels)
        means[:, is_measured] = _mean_effects(series, codes, len(texts), is_measured)[:, is_measured]
    means = means[:, channels]
    sizes = np.nan_to_num(np.abs(means), nan=-1.0).max(axis=1, initial=-1.0)  # scaled, so that channels are comparable
    frame = pd.DataFrame(means * series.scaler.scale_[channels], columns=[series.channels[own] for own in channels])
    # A channel may have the same name.
    frame.insert(0, "rows", rows, allow_duplicates=True)
    frame.insert(0, "text", texts, allow_duplicates=True)
    return frame.iloc[np.lexsort((-rows, -sizes))].reset_index(drop=True)


def _count_texts(rows: pd.DataFrame, future: pd.DataFrame, names: Sequence[str]) -> tuple[pd.Index, np.ndarray]:
    """List the distinct notes, and count the rows that have each."""
    cells = pd.concat([frame[name] for frame in (rows, future) for name in names])
    counts = cells[~is_empty(cells)].astype(str).value_counts()
    return counts.index, counts.to_numpy()


def _codes(values: pd.Series, texts: pd.Index) -> np.ndarray:
    """Index the text of each cell, (rows,); -1 for an empty cell."""
    return np.where(is_empty(values), -1, texts.get_indexer(values.astype(str)))


def _mean_effects(series: Series, codes: Sequence[np.ndarray], texts: int, is_measured: np.ndarray) -> np.ndarray:
    """Compute the mean effect of each text on scaled channels, (texts, channels); NaN where no row has the text."""
    effect, rows = series.window_effect.effect, series.window_effect.rows
    sums, counts = np.zeros((2, texts, len(series.channels)))
    for split in ("train", "val"):
        windows = series.without_window_effect().windows(split)
        numbers = _windows_with_notes(windows, codes, is_measured)
        if not len(numbers):
            continue
        contexts, first = windows.__getitems__(numbers)[0][..., 0].numpy(), windows.first_dates(numbers)
        channel_of = windows.channel_of(numbers)
        names = [series.channels[channel] for channel in channel_of]
        horizon = first[:, None] + windows.seq_len + np.arange(windows.pred_len)
        with_notes = effect.effect(contexts, names, rows, first)
        for places, own_codes in zip(effect.places_of_notes(), codes, strict=True):
            notes = rows.notes.copy()
            notes[:, places] = np.nan
            change = with_notes - effect.effect(contexts, names, replace(rows, notes=notes), first)
            found = own_codes[horizon]
            cells = found[found >= 0], np.broadcast_to(channel_of[:, None], found.shape)[found >= 0]
            np.add.at(sums, cells, change[found >= 0])
            np.add.at(counts, cells, 1)
    with np.errstate(invalid="ignore"):
        return sums / counts


def _windows_with_notes(windows: WindowDataset, codes: Sequence[np.ndarray], is_measured: np.ndarray) -> np.ndarray:
    """Choose windows with notes in their horizons; if there are too many, those with the rarest notes."""
    numbers = np.flatnonzero(is_measured[windows.channel_of(np.arange(len(windows)))])
    at_most = max(_NOTE_ROWS // 2 // windows.pred_len, 1)  # of either split
    # So that every row is in the horizon of a window, or of as many as there is room for.
    numbers = numbers[:: max(min(len(numbers) // at_most, windows.pred_len), 1)]
    # The sum over the rows of a horizon, each weighed by how rare its note is.
    rarity = sum(np.where(own >= 0, 1 / np.bincount(own[own >= 0], minlength=own.max() + 1)[own], 0) for own in codes)
    total = np.concatenate([[0], np.cumsum(rarity)])
    begin = windows.first_dates(numbers) + windows.seq_len
    weights = total[begin + windows.pred_len] - total[begin]
    chosen = np.argsort(-weights, kind="stable")[:at_most]
    return np.sort(numbers[chosen[weights[chosen] > 0]])
