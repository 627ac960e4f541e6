"""Forecast what comes after the last row of a CSV."""

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
from utils.errors import UserError
from utils.exact import FARTHEST
from utils.runs.intervals import Calibration
from utils.runs.metrics import SERIES_FILE
from utils.runs.pictures import DrawnForecast, draw_forecasts
from utils.system.files import write_text

# A picture of more channels could not be read; of the series of a long CSV, these many stand for all.
MOST_CHANNELS = 12
SERIES_SHOWN = 6

# Deviations from the mean of the training rows that no such series comes to by itself.
FAR = 1000


@dataclass(frozen=True)
class Forecast:
    """A forecast in the CSV's units.

    Attributes:
        window: what it was made from.
        values: (pred_len, channels).
        half_widths: of the intervals, (pred_len, channels) each, by level in per cent, the lowest first.
        warnings: what the user should know of it, a line each.
    """

    window: LastWindow
    values: np.ndarray
    half_widths: dict[int, np.ndarray]
    warnings: tuple[str, ...] = ()

    def as_frame(self) -> pd.DataFrame:
        """Return it in the shape of the CSV: a row a date, a column a channel followed by its bounds, the lowest first.

        Or, as of a long CSV, a row a series and date: `unique_id`, `ds`, `y` and its bounds.
        """
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
def forecast_window(
    model: Forecaster,
    window: LastWindow,
    facts: DataFacts,
    batch_size: int,
    calibration: Calibration | None = None,
    levels: Sequence[int] = (),
) -> Forecast:
    """Forecast what follows the last window of each channel.

    The channels are scaled as they were in training, so that the rows before the window do not matter; a series that
    was not there in training is scaled by its window.

    Args:
        model: with the checkpoint's weights; left in evaluation mode.
        window: the last rows.
        facts: of the checkpoint's data.
        batch_size: channels at a time.
        calibration: of the intervals; None without levels.
        levels: of the intervals, in per cent, in ascending order.

    Raises:
        UserError: if a value of a window is no reading, or the forecast is not finite.
    """
    scaled = window.scaled(facts)
    mean, deviation = facts.scale_of(window.channels, window.values)
    warnings = _check_window(window, scaled, mean, deviation)
    contexts = torch.from_numpy(scaled.astype(np.float32).T.copy())[..., None]  # (channels, seq_len, 1)
    model.eval()
    parts = [model(batch).float().cpu() for batch in contexts.split(batch_size)]
    values = window.restore(torch.cat(parts)[..., 0].T.double().numpy(), facts)
    if not np.isfinite(values).all():
        channel = window.channels[int(np.isfinite(values).all(axis=0).argmin())]
        raise UserError(
            f"the forecast of {channel!r} is not finite: look at its last rows, or give --llm_dtype float32 or bfloat16"
        )
    shown = Normalize()(contexts[..., 0])[1].deviation[:, 0].numpy()
    numbers = np.arange(len(shown))
    half_widths = {level: calibration.half_widths(level, numbers, shown).T * deviation for level in levels}
    return Forecast(window, values, half_widths, warnings)


def _check_window(window: LastWindow, scaled: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> tuple[str, ...]:
    """Refuse values that training would refuse, too; return a warning of those that it has seen nothing like.

    Args:
        window: the last rows.
        scaled: their values as the model sees them, (seq_len, channels).
        mean, deviation: that they were scaled by, (channels,) each.
    """
    farthest = np.abs(scaled).argmax(axis=0)
    warnings = []
    for channel, row in enumerate(farthest):
        distance = abs(scaled[row, channel])
        if distance <= FAR:
            continue
        where = f"{window.channels[channel]!r}, {window.dates[channel][row]}: {window.values[row, channel]:g} is"
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


def written_out(dates: pd.DatetimeIndex) -> list[str]:
    """Return dates as text, all with as many digits of a second as any needs, and with their offset from UTC if any."""
    precisions = (("s", "seconds"), ("ms", "milliseconds"), ("us", "microseconds"), ("ns", "nanoseconds"))
    digits = next(name for unit, name in precisions if unit == "ns" or (dates == dates.floor(unit)).all())
    return [date.isoformat(sep=" ", timespec=digits) for date in dates]


def write_forecast(folder: Path, forecast: Forecast) -> None:
    """Write forecast.csv and forecast.png, the forecast behind its window."""
    frame = forecast.as_frame()
    dates = "ds" if forecast.window.is_long else "date"
    frame[dates] = written_out(pd.DatetimeIndex(frame[dates]))
    write_text(folder / "forecast.csv", frame.to_csv(index=False, lineterminator="\n"))
    _draw(folder, forecast)


def _draw(folder: Path, forecast: Forecast) -> None:
    window = forecast.window
    count, steps = len(window.channels), len(forecast.values)
    if window.is_long:
        numbers = _series_to_show(folder / SERIES_FILE, window.channels)
        title = f"{steps} steps after the end of each series ({len(numbers)} of {count}, by test error)"
    else:
        numbers = list(range(min(count, MOST_CHANNELS)))
        left_out = f" (the first {len(numbers)} of {count} channels)" if len(numbers) < count else ""
        title = f"{steps} steps after {window.dates[0][-1]}{left_out}"
    drawn = [
        DrawnForecast(
            window.channels[number],
            window.dates[number],
            window.values[:, number],
            window.future_dates[number],
            forecast.values[:, number],
            {level: half[:, number] for level, half in forecast.half_widths.items()},
        )
        for number in numbers
    ]
    draw_forecasts(folder / "forecast.png", title, drawn, share_dates=not window.is_long)


def _series_to_show(scores: Path, names: Sequence[str]) -> list[int]:
    """Return the numbers of the best, the worst and some series between, as a test has scored them; else of some."""
    number_of = {name: number for number, name in enumerate(names)}
    order = list(number_of.values())
    if scores.is_file():
        tested = pd.read_csv(scores, dtype={"unique_id": str}, keep_default_na=False).sort_values("mse", kind="stable")
        order = [number_of[name] for name in tested["unique_id"] if name in number_of] or order
    places = np.linspace(0, len(order) - 1, min(len(order), SERIES_SHOWN)).round().astype(int)
    return [order[place] for place in places]
