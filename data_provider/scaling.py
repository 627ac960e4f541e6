"""Scale each channel by the mean and the standard deviation of its training rows."""

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from data_provider.tables import Table
from utils.errors import UserError, listed
from utils.exact import FARTHEST, HUGE, mean_and_variance


@dataclass(frozen=True)
class Scaler:
    """The mean and the standard deviation (1 if constant) of each channel's training rows, (channels,) float64 each."""

    mean_: np.ndarray
    scale_: np.ndarray


def fit_scaler(table: Table, training_rows: np.ndarray) -> Scaler:
    """Fit a scaler to the known training values of each channel; the result is identical on every machine.

    `training_rows`, (channels,), is the number of training rows at the start of each channel.

    Raises:
        UserError: if the training rows of a channel hold no number, or a number that is too large.
    """
    found = np.zeros((len(table.channels), 2))
    for channel, rows in enumerate(table.spans.part(0, training_rows).slices()):
        training = table.raw[rows]
        known = training[~np.isnan(training)]
        if not len(known) and table.is_long:  # the series is not trained on, but can be forecast
            series = table.raw[table.rows_of(channel)]
            known = series[~np.isnan(series)]
        if not len(known):
            raise UserError(
                f"{table.source}, {table.channels[channel]!r} holds no number in its training rows: drop it, or give"
                " more rows"
            )
        if (huge := np.flatnonzero(np.abs(training) > HUGE)).size:
            _refuse(table, rows.start + huge[0], "is too large to be a reading")
        mean, variance = mean_and_variance(known)
        # Rounding may give a constant channel a small variance; scikit-learn's StandardScaler has the same test.
        rounding = np.finfo(np.float64).eps * len(known)
        is_constant = variance <= rounding * variance + (rounding * mean) ** 2
        found[channel] = mean, 1 if is_constant else np.sqrt(variance)
    return Scaler(*found.T.copy())


def scale(table: Table, scaler: Scaler) -> np.ndarray:
    """Scale the values of a table, (all rows,); raise a UserError if one is too far from the training rows' mean."""
    scaled = table.scaled(scaler.mean_, scaler.scale_)
    if max(np.fmax.reduce(scaled, initial=0), -np.fmin.reduce(scaled, initial=0)) > FARTHEST:
        too_large = np.flatnonzero(np.abs(scaled) > FARTHEST)
        channel = table.spans.channel_of(too_large[0])
        mean, deviation = scaler.mean_[channel], scaler.scale_[channel]
        problem = f"is too far from the training rows' mean {mean:g} and deviation {deviation:g} to be a reading"
        _refuse(table, too_large[0], problem)
    return scaled


def note_on_constants(table: Table, training_rows: np.ndarray) -> list[str]:
    """List the channels that are constant in their training rows, in at most one line."""
    slices = table.spans.part(0, training_rows).slices()
    constant = [name for name, rows in zip(table.channels, slices, strict=True) if np.ptp(table.filled[rows]) == 0]
    return [f"{table.source}: constant in the training rows, so not scaled: {listed(constant)}"] if constant else []


def _refuse(table: Table, place: int, problem: str) -> NoReturn:
    channel = table.spans.channel_of(place)
    row = place - table.spans.first[channel] + 1
    where = f"row {row} of series" if table.is_long else f"data row {row}, column"
    raise UserError(f"{table.source} {where} {table.channels[channel]!r}: {table.raw[place]:g} {problem}")
