"""Forecast what comes after the last row of a CSV."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from layers.StandardNorm import Normalize
from utils.runs.files import write_text
from utils.runs.intervals import Calibration
from utils.runs.pictures import draw_forecast


@dataclass(frozen=True)
class Forecast:
    """A forecast in the CSV's units.

    Attributes:
        dates: of the forecast rows, at the step of the data.
        values: (pred_len, channels).
        channels: the channels' names.
        half_widths: of the intervals, (pred_len, channels) each, by level in per cent, the lowest first.
    """

    dates: pd.DatetimeIndex
    values: np.ndarray
    channels: tuple[str, ...]
    half_widths: dict[int, np.ndarray]

    def as_frame(self) -> pd.DataFrame:
        """Return a row a date, indexed by it, and a column a channel, followed by its bounds, the lowest first."""
        columns = {}
        for number, name in enumerate(self.channels):
            columns[name] = self.values[:, number]
            for level, half in reversed(self.half_widths.items()):
                columns[f"{name}-lo-{level}"] = self.values[:, number] - half[:, number]
            for level, half in self.half_widths.items():
                columns[f"{name}-hi-{level}"] = self.values[:, number] + half[:, number]
        return pd.DataFrame(columns, index=self.dates.rename("date"))


@torch.inference_mode()
def forecast_beyond(
    model: nn.Module,
    context: np.ndarray,
    dates: pd.DatetimeIndex,
    contents: dict,
    batch_size: int,
    calibration: Calibration | None = None,
    levels: Sequence[int] = (),
) -> Forecast:
    """Forecast what follows the last window of a series.

    The channels are scaled as they were in training, so that the rows before the window do not matter.

    Args:
        model: with the checkpoint's weights; left in evaluation mode.
        context: the window, (seq_len, channels), in the CSV's units.
        dates: of the rows to come, (pred_len,).
        contents: of the checkpoint, for its channels and scaler.
        batch_size: channels at one time.
        calibration: of the intervals; None if no levels are asked for.
        levels: of the intervals, in per cent, the lowest first.
    """
    mean, deviation = np.array(contents["mean"]), np.array(contents["deviation"])
    scaled = ((context - mean) / deviation).astype(np.float32)
    windows = torch.from_numpy(scaled.T.copy())[..., None]  # (channels, seq_len, 1)
    model.eval()
    parts = [model(batch).float().cpu() for batch in windows.split(batch_size)]
    values = torch.cat(parts)[..., 0].T.double().numpy() * deviation + mean
    shown = Normalize()(windows[..., 0])[1].deviation[:, 0].numpy()
    numbers = np.arange(len(shown))
    half_widths = {level: calibration.half_widths(level, numbers, shown).T * deviation for level in levels}
    return Forecast(dates, values, tuple(contents["channels"]), half_widths)


def written_out(dates: pd.DatetimeIndex) -> list[str]:
    """Return dates as text, all with as many digits of a second as any needs, and with their offset from UTC if any."""
    precisions = (("s", "seconds"), ("ms", "milliseconds"), ("us", "microseconds"), ("ns", "nanoseconds"))
    digits = next(name for unit, name in precisions if unit == "ns" or (dates == dates.floor(unit)).all())
    return [date.isoformat(sep=" ", timespec=digits) for date in dates]


def write_forecast(folder: Path, forecast: Forecast, context_dates: pd.DatetimeIndex, context: np.ndarray) -> None:
    """Write forecast.csv, a row a date and a column a channel, and forecast.png, the forecast behind its window."""
    frame = forecast.as_frame()
    frame.index = pd.Index(written_out(forecast.dates), name="date")
    write_text(folder / "forecast.csv", frame.to_csv(lineterminator="\n"))
    draw_forecast(
        folder / "forecast.png",
        context_dates,
        context,
        forecast.dates,
        forecast.values,
        forecast.channels,
        forecast.half_widths,
    )
