"""Forecast the rows after the last row of a CSV."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data_provider.facts import DataFacts
from data_provider.horizon import LastWindow
from layers.StandardNorm import Normalize
from models.forecaster import Forecaster
from utils.errors import UserError, first_line
from utils.exact import FARTHEST
from utils.runs.intervals import Calibration
from utils.runs.metrics import SERIES_FILE
from utils.runs.pictures import draw_forecast
from utils.system.files import write_text

# The most channels, and series of a long CSV, that a plot shows legibly.
MOST_CHANNELS, MOST_SERIES = 12, 6

_DIGITS = 7

# A value this many standard deviations from the mean of the training rows is hardly a true reading.
FAR = 1000


@dataclass(frozen=True)
class Forecast:
    """A forecast in the CSV's units.

    Attributes:
        window: the context.
        values: (pred_len, channels).
        half_widths: half the width of the intervals, (pred_len, channels) each, by ascending level in percent.
        warnings: one line each, for the user.
    """

    window: LastWindow
    values: np.ndarray
    half_widths: dict[int, np.ndarray]
    warnings: tuple[str, ...] = ()

    def as_frame(self) -> pd.DataFrame:
        """Lay the forecast out like the CSV, wide or long, with the bounds of each column after it, in 7 digits."""
        names, dates = self.window.channels, self.window.future_dates
        if not self.window.is_long:
            columns = {"date": dates[0]}
            for number, name in enumerate(names):
                half_widths = {level: half[:, number] for level, half in self.half_widths.items()}
                columns |= _with_bounds(name, self.values[:, number], half_widths)
            return pd.DataFrame(columns)
        half_widths = {level: half.T.ravel() for level, half in self.half_widths.items()}
        columns = {"unique_id": np.repeat(names, len(self.values)), "ds": dates[0].append(list(dates[1:]))}
        return pd.DataFrame({**columns, **_with_bounds("y", self.values.T.ravel(), half_widths)})


def check_columns(channels: Sequence[str], is_long: bool, levels: Sequence[int]) -> None:
    """Raise UserError for a channel with the name of another channel's bound: one column would overwrite the other."""
    for name in () if is_long else channels:  # a long forecast has bounds of the column `y` only
        bounds = _with_bounds(name, 0, dict.fromkeys(levels, 0)).keys() - {name}
        if taken := sorted(bounds & set(channels)):
            raise UserError(
                f"the channel {taken[0]!r} has the name of a bound of {name!r} with --level: rename the channel"
            )


def _with_bounds(name: str, values: np.ndarray, half_widths: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Build a column and the columns of its bounds, from the lowest bound to the highest."""
    lower = {f"{name}-lo-{level}": values - half for level, half in reversed(half_widths.items())}
    upper = {f"{name}-hi-{level}": values + half for level, half in half_widths.items()}
    return {column: _round(numbers) for column, numbers in ({name: values} | lower | upper).items()}


def _round(values: np.ndarray) -> np.ndarray:
    """Round to the digits that a forecast in float32 has."""
    return np.array([float(f"{value:.{_DIGITS}g}") for value in np.atleast_1d(values)])


@torch.inference_mode()
def forecast_window(
    model: Forecaster,
    window: LastWindow,
    facts: DataFacts,
    batch_size: int,
    calibration: Calibration | None = None,
    levels: Sequence[int] = (),
) -> Forecast:
    """Forecast the rows after the last window of each channel, with intervals of the levels in ascending order.

    Channels are scaled by the facts about the training data, so that rows before the window do not matter; a series
    that training has not seen is scaled by its window. The batch size is in channels; the model is left in evaluation
    mode.

    Raises:
        UserError: if a value is too far off to be a reading, or the forecast is not finite.
    """
    scaled, effect = window.scaled(facts), window.covariate_effect(facts)
    warnings = _check_window(window, scaled, effect, facts)
    contexts = torch.from_numpy(scaled.astype(np.float32).T.copy())[..., None]  # (channels, seq_len, 1)
    model.eval()
    parts = [model(batch).float().cpu() for batch in contexts.split(batch_size)]
    values = window.restore(torch.cat(parts)[..., 0].T.double().numpy() + effect, facts)
    if not np.isfinite(values).all():
        channel = window.channels[int(np.isfinite(values).all(axis=0).argmin())]
        raise UserError(
            f"the forecast of {channel!r} is not finite: look at its last rows, or give --llm_dtype float32 or bfloat16"
        )
    spread = Normalize()(contexts[..., 0])[1].deviation[:, 0].numpy()
    numbers = np.arange(len(spread))
    _, deviation = facts.scale_of(window.channels, window.values)
    half_widths = {level: calibration.half_widths(level, numbers, spread).T * deviation for level in levels}
    return Forecast(window, values, half_widths, warnings)


def _check_window(window: LastWindow, scaled: np.ndarray, effect: np.ndarray, facts: DataFacts) -> tuple[str, ...]:
    """Refuse values that training would refuse; return warnings of values that are far from all training rows."""
    mean, deviation = facts.scale_of(window.channels, window.values)
    warnings = []
    for channel, name in enumerate(window.channels):
        values, distances = window.values[:, channel], np.abs(scaled[:, channel])
        is_known = name in facts.channels
        row, distance = (distances.argmax(), distances.max()) if is_known else _farthest_from_others(values)
        is_explained = is_known and abs(values[row] - mean[channel]) <= FAR * deviation[channel]
        subject = "what its covariates explain" if is_explained else f"{values[row]:g}"
        subject = f"{name!r}, {window.dates[channel][row]}: {subject} is"
        warnings += _judge(distance, subject, f"the {'training' if is_known else 'other'} rows' mean {mean[channel]:g}")
    effect = np.abs(effect)
    for channel, name in enumerate(window.channels):
        row = effect[:, channel].argmax()
        subject = f"{name!r}, {window.future_dates[channel][row]}: what its covariates explain is"
        warnings += _judge(effect[row, channel], subject, "the mean")
    if len(warnings) > 8:
        warnings[8:] = [f"{len(warnings) - 8} more values are as far from the mean"]
    return tuple(warnings)


def _judge(distance: float, subject: str, mean: str) -> list[str]:
    """Refuse a distance from the mean, in standard deviations, or return a warning of it if it is far."""
    if not distance <= FARTHEST:  # NaN, too
        raise UserError(f"{subject} too far from {mean} to be a reading: correct it or leave it empty")
    if distance <= FAR:
        return []
    return [f"{subject} {distance:.2g} deviations from {mean}: a forecast from such a value may be meaningless"]


def _farthest_from_others(values: np.ndarray) -> tuple[int, float]:
    """Find the most extreme value, and its distance from the others in their deviations, which it cannot inflate."""
    row = np.abs(values - np.median(values)).argmax()
    others = np.delete(values, row)
    if not len(others):
        return row, 0.0
    spread = others.std() or max(abs(others.mean()), 1.0)  # constant so far
    return row, abs(values[row] - others.mean()) / spread


def write_forecast(folder: Path, forecast: Forecast) -> None:
    """Write forecast.csv, and forecast.png with the forecast after its context."""
    frame = forecast.as_frame()
    dates = "ds" if forecast.window.is_long else "date"
    frame[dates] = forecast.window.table.date_style.write(pd.DatetimeIndex(frame[dates]))
    write_text(folder / "forecast.csv", frame.to_csv(index=False, lineterminator="\n"))
    window, (steps, count) = forecast.window, forecast.values.shape
    if window.is_long:
        shown = _series_to_show(folder / SERIES_FILE, window.channels)
        title = f"{steps} steps after the end of each series ({len(shown)} of {count} series, by test error)"
    else:
        shown = range(min(count, MOST_CHANNELS))
        selection = f" (the first {len(shown)} of {count} channels)" if len(shown) < count else ""
        title = f"{steps} steps after {window.dates[0][-1]}{selection}"
    draw_forecast(folder / "forecast.png", title, window, forecast.values, forecast.half_widths, shown)


def _series_to_show(scores: Path, names: Sequence[str]) -> list[int]:
    """Choose series evenly from the best to the worst test MSE; evenly by position if none was tested."""
    order = range(len(names))
    if scores.is_file():
        try:
            tested = pd.read_csv(scores, dtype={"unique_id": str, "mse": float}, keep_default_na=False)
            tested = tested.sort_values("mse", kind="stable")["unique_id"]
        except Exception as problem:  # pandas can raise anything for a damaged file
            raise UserError(f"{scores} is damaged ({first_line(problem)}): test again to write it anew") from problem
        number_of = {name: number for number, name in enumerate(names)}
        order = [number_of[name] for name in tested if name in number_of] or order
    places = np.linspace(0, len(order) - 1, min(len(order), MOST_SERIES)).round().astype(int)
    return [order[place] for place in places]
