"""Forecast what comes after the last row of a CSV."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import nn

from layers.StandardNorm import Normalize
from utils.errors import UserError
from utils.exact import FARTHEST
from utils.runs.files import write_text
from utils.runs.intervals import Calibration
from utils.runs.pictures import DrawnForecast, draw_forecasts
from utils.runs.watchers import SERIES_FILE

# A picture of more channels could not be read; of the series of a long CSV, these many stand for all.
MOST_CHANNELS = 12
SERIES_SHOWN = 6

# Deviations from the mean of the training rows that no such series comes to by itself.
FAR = 1000


class Context(Protocol):
    """What a forecast is made from: the last rows of each channel, (seq_len, channels), in the CSV's units.

    `dates` are those of the rows, `dates_to_come` those of the rows to forecast, a channel each.
    """

    def scaled(self, mean: np.ndarray, deviation: np.ndarray, explainer: dict | None) -> np.ndarray:
        """Return the rows as a model sees them: scaled, less what the covariates explain; (seq_len, channels)."""

    def explained_to_come(self, explainer: dict | None) -> np.ndarray:
        """Return what the covariates explain of the scaled rows to forecast, (pred_len, channels)."""

    values: np.ndarray
    channels: tuple[str, ...]
    dates: tuple[pd.DatetimeIndex, ...]
    dates_to_come: tuple[pd.DatetimeIndex, ...]
    is_long: bool


@dataclass(frozen=True)
class Forecast:
    """A forecast in the CSV's units.

    Attributes:
        context: what it was made from.
        values: (pred_len, channels).
        half_widths: of the intervals, (pred_len, channels) each, by level in per cent, the lowest first.
        warnings: what the user should know of it, a line each.
    """

    context: Context
    values: np.ndarray
    half_widths: dict[int, np.ndarray]
    warnings: tuple[str, ...] = ()

    def as_frame(self) -> pd.DataFrame:
        """Return it in the shape of the CSV: a row a date, a column a channel followed by its bounds, the lowest first.

        Or, as of a long CSV, a row a series and date: `unique_id`, `ds`, `y` and its bounds.
        """
        names, dates = self.context.channels, self.context.dates_to_come
        if not self.context.is_long:
            columns = {"date": dates[0]}
            for number, name in enumerate(names):
                half_widths = {level: half[:, number] for level, half in self.half_widths.items()}
                columns |= _with_bounds(name, self.values[:, number], half_widths)
            return pd.DataFrame(columns)
        half_widths = {level: half.T.ravel() for level, half in self.half_widths.items()}
        columns = {"unique_id": np.repeat(names, len(self.values)), "ds": dates[0].append(list(dates[1:]))}
        return pd.DataFrame({**columns, **_with_bounds("y", self.values.T.ravel(), half_widths)})


def check_columns(channels: Sequence[str], is_long: bool, levels: Sequence[int]) -> None:
    """Refuse channels that have the names of other channels' bounds: one column would take the other's place.

    Raises:
        UserError: names the channel.
    """
    if is_long:  # there, every bound is of the column `y`
        return
    nothing = np.zeros(0)
    for name in channels:
        bounds = _with_bounds(name, nothing, dict.fromkeys(levels, nothing)).keys() - {name}
        if taken := sorted(bounds & set(channels)):
            raise UserError(
                f"the channel {taken[0]!r} has the name of a bound of {name!r} with --level: give it another name"
            )


def _with_bounds(name: str, values: np.ndarray, half_widths: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a column and those of its bounds."""
    lower = {f"{name}-lo-{level}": values - half for level, half in reversed(half_widths.items())}
    return {name: values, **lower, **{f"{name}-hi-{level}": values + half for level, half in half_widths.items()}}


@torch.inference_mode()
def forecast_beyond(
    model: nn.Module,
    context: Context,
    contents: dict,
    batch_size: int,
    calibration: Calibration | None = None,
    levels: Sequence[int] = (),
) -> Forecast:
    """Forecast what follows the last window of each channel.

    The channels are scaled as they were in training, so that the rows before the window do not matter; a series that
    training has not seen, as its window says.

    Args:
        model: with the checkpoint's weights; left in evaluation mode.
        context: the windows.
        contents: of the checkpoint, for its channels and scaler.
        batch_size: channels at one time.
        calibration: of the intervals; None if no levels are asked for.
        levels: of the intervals, in per cent, the lowest first.

    Raises:
        UserError: if a value of a window is no reading, or the forecast is not finite.
    """
    mean, deviation = _scale_of(context, contents)
    explainer = contents["explainer"]
    scaled = context.scaled(mean, deviation, explainer)
    warnings = _check_window(context, scaled, mean, deviation)
    scaled = scaled.astype(np.float32)
    windows = torch.from_numpy(scaled.T.copy())[..., None]  # (channels, seq_len, 1)
    model.eval()
    parts = [model(batch).float().cpu() for batch in windows.split(batch_size)]
    left = torch.cat(parts)[..., 0].T.double().numpy()
    values = (left + context.explained_to_come(explainer)) * deviation + mean
    if not np.isfinite(values).all():
        channel = context.channels[int(np.isfinite(values).all(axis=0).argmin())]
        raise UserError(
            f"the forecast of {channel!r} is not finite: look at its last rows, or give --llm_dtype float32 or bfloat16"
        )
    shown = Normalize()(windows[..., 0])[1].deviation[:, 0].numpy()
    numbers = np.arange(len(shown))
    half_widths = {level: calibration.half_widths(level, numbers, shown).T * deviation for level in levels}
    return Forecast(context, values, half_widths, warnings)


def _check_window(context: Context, scaled: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> tuple[str, ...]:
    """Refuse values that training would refuse, too; return a warning of those that it has seen nothing like.

    Args:
        context: the windows.
        scaled: their values as the model sees them, (seq_len, channels).
        mean, deviation: that they were scaled by, (channels,) each.
    """
    farthest = np.abs(scaled).argmax(axis=0)
    warnings = []
    for channel, row in enumerate(farthest):
        distance = abs(scaled[row, channel])
        if distance <= FAR:
            continue
        where = f"{context.channels[channel]!r}, {context.dates[channel][row]}: {context.values[row, channel]:g} is"
        if distance > FARTHEST:
            raise UserError(
                f"{where} too far from the training rows' mean {mean[channel]:g} and deviation {deviation[channel]:g}"
                " to be a reading: correct it or leave it empty"
            )
        warnings.append(
            f"{where} {distance:.2g} deviations from the training rows' mean {mean[channel]:g}: a forecast from there"
            " may mean nothing"
        )
    return (*warnings[:8], *([f"and so are values of {len(warnings) - 8} more channels"] if len(warnings) > 8 else []))


def _scale_of(context: Context, contents: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation that each channel is to be scaled by."""
    known = dict(zip(contents["channels"], zip(contents["mean"], contents["deviation"], strict=True), strict=True))
    unseen = [
        (column.mean(), column.std() or 1.0) if name not in known else known[name]
        for name, column in zip(context.channels, context.values.T, strict=True)
    ]
    mean, deviation = np.array(unseen).T
    return mean, deviation


def written_out(dates: pd.DatetimeIndex) -> list[str]:
    """Return dates as text, all with as many digits of a second as any needs, and with their offset from UTC if any."""
    precisions = (("s", "seconds"), ("ms", "milliseconds"), ("us", "microseconds"), ("ns", "nanoseconds"))
    digits = next(name for unit, name in precisions if unit == "ns" or (dates == dates.floor(unit)).all())
    return [date.isoformat(sep=" ", timespec=digits) for date in dates]


def write_forecast(folder: Path, forecast: Forecast) -> None:
    """Write forecast.csv and forecast.png, the forecast behind its window."""
    frame = forecast.as_frame()
    dates = "ds" if forecast.context.is_long else "date"
    frame[dates] = written_out(pd.DatetimeIndex(frame[dates]))
    write_text(folder / "forecast.csv", frame.to_csv(index=False, lineterminator="\n"))
    _draw(folder, forecast)


def _draw(folder: Path, forecast: Forecast) -> None:
    context = forecast.context
    count, steps = len(context.channels), len(forecast.values)
    if context.is_long:
        numbers = _series_to_show(folder / SERIES_FILE, context.channels)
        title = f"{steps} steps after the end of each series ({len(numbers)} of {count}, by test error)"
    else:
        numbers = list(range(min(count, MOST_CHANNELS)))
        left_out = f" (the first {len(numbers)} of {count} channels)" if len(numbers) < count else ""
        title = f"{steps} steps after {context.dates[0][-1]}{left_out}"
    drawn = [
        DrawnForecast(
            context.channels[number],
            context.dates[number],
            context.values[:, number],
            context.dates_to_come[number],
            forecast.values[:, number],
            {level: half[:, number] for level, half in forecast.half_widths.items()},
        )
        for number in numbers
    ]
    draw_forecasts(folder / "forecast.png", title, drawn, share_dates=not context.is_long)


def _series_to_show(scores: Path, names: Sequence[str]) -> list[int]:
    """Return the numbers of the best, the worst and some series between, as a test has scored them; else of some."""
    number_of = {name: number for number, name in enumerate(names)}
    order = list(number_of.values())
    if scores.is_file():
        tested = pd.read_csv(scores, dtype={"unique_id": str}, keep_default_na=False).sort_values("mse", kind="stable")
        order = [number_of[name] for name in tested["unique_id"] if name in number_of] or order
    places = np.linspace(0, len(order) - 1, min(len(order), SERIES_SHOWN)).round().astype(int)
    return [order[place] for place in places]
