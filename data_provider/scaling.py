"""Scale each channel by the mean and deviation of its training rows."""

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from data_provider.tables import Table
from utils.errors import UserError, listed
from utils.exact import FARTHEST, HUGE, mean_and_variance


@dataclass(frozen=True)
class Scaler:
    """The mean and the deviation of each channel's training rows; the deviation of a constant channel is 1.

    Attributes:
        mean_, scale_: (channels,) float64, in the CSV's units.
    """

    mean_: np.ndarray
    scale_: np.ndarray


def fit_scaler(table: Table, training_rows: np.ndarray) -> Scaler:
    """Fit a scaler to the known training rows of each channel; its numbers are the same on every machine.

    Args:
        table: of all rows.
        training_rows: the number of the first rows of each channel that are training rows, (channels,).

    Raises:
        UserError: if a channel has no number there, or one too large.
    """
    found = np.zeros((len(table.channels), 2))
    for channel, (first, rows) in enumerate(zip(table.spans.first, training_rows, strict=True)):
        training = table.raw[first : first + rows]
        known = training[~np.isnan(training)]
        if not len(known) and table.is_long:  # it is not trained on, but may be forecast
            known = table.raw[table.rows_of(channel)]
            known = known[~np.isnan(known)]
        if not len(known):
            raise UserError(
                f"{table.source}, {table.channels[channel]!r} holds no number in its training rows: drop it, or give"
                " more rows"
            )
        if (huge := np.flatnonzero(np.abs(training) > HUGE)).size:
            _refuse(table, first + huge[0], "is too large to be a reading")
        mean, variance = mean_and_variance(known)
        # As scikit-learn's StandardScaler distinguishes a constant from the rounding of its mean.
        rounding = np.finfo(np.float64).eps * len(known)
        is_constant = variance <= rounding * variance + (rounding * mean) ** 2
        found[channel] = mean, 1 if is_constant else np.sqrt(variance)
    return Scaler(*found.T.copy())


def scale(table: Table, scaler: Scaler) -> np.ndarray:
    """Return the values of a table scaled, (all rows,) float64.

    Raises:
        UserError: names a value that is too far from the training rows.
    """
    scaled = table.scaled(scaler.mean_, scaler.scale_)
    if (too_large := np.flatnonzero(np.abs(scaled) > FARTHEST)).size:
        channel = table.channel_at(too_large[0])
        _refuse(
            table,
            too_large[0],
            f"is too far from the training rows' mean {scaler.mean_[channel]:g} and deviation"
            f" {scaler.scale_[channel]:g} to be a reading",
        )
    return scaled


def note_on_constants(table: Table, training_rows: np.ndarray) -> list[str]:
    """Return a line that names the channels that are constant in their training rows, if there are any."""
    constant = [
        name
        for name, first, rows in zip(table.channels, table.spans.first, training_rows, strict=True)
        if np.ptp(table.filled[first : first + rows]) == 0
    ]
    if not constant:
        return []
    return [f"{table.source}: constant in the training rows, so not scaled: {listed(constant)}"]


def _refuse(table: Table, place: int, problem: str) -> NoReturn:
    channel = table.channel_at(place)
    row = place - table.spans.first[channel] + 1
    where = f"row {row} of series" if table.is_long else f"data row {row}, column"
    raise UserError(f"{table.source} {where} {table.channels[channel]!r}: {table.raw[place]:g} {problem}")
