"""Forecast what comes after the last row of a CSV."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from data_provider.series import continue_dates, read_table
from utils.cli.options import csv_path
from utils.errors import UserError
from utils.runs.files import write_text
from utils.runs.pictures import draw_forecast


@dataclass(frozen=True)
class Forecast:
    """A forecast in the CSV's units.

    Attributes:
        dates: of the forecast rows, at the step of the data.
        values: (pred_len, channels).
        channels: the channels' names.
    """

    dates: pd.DatetimeIndex
    values: np.ndarray
    channels: tuple[str, ...]


@torch.inference_mode()
def forecast_beyond(args: argparse.Namespace, model: nn.Module, contents: dict) -> Forecast:
    """Forecast the `pred_len` rows after the CSV's last.

    The channels are scaled as they were in training, so that the rows before the window do not matter.

    Args:
        args: the parsed flags.
        model: with the checkpoint's weights; left in evaluation mode.
        contents: of the checkpoint, for its channels and scaler.

    Raises:
        UserError: if the CSV has other channels or too few rows.
    """
    table, path = read_table(args), csv_path(args)
    if list(table.channels) != contents["channels"]:
        raise UserError(
            f"{path} has the channels {list(table.channels)}, the checkpoint was trained on {contents['channels']}"
        )
    if len(table.raw) < args.seq_len:
        raise UserError(f"{path} has {len(table.raw)} rows: a forecast needs --seq_len {args.seq_len}")
    mean, deviation = np.array(contents["mean"]), np.array(contents["deviation"])
    scaled = ((table.raw[-args.seq_len :] - mean) / deviation).astype(np.float32)
    windows = torch.from_numpy(scaled.T.copy())[..., None]  # (channels, seq_len, 1)
    model.eval()
    parts = [model(batch).float().cpu() for batch in windows.split(args.eval_batch_size or args.batch_size)]
    values = torch.cat(parts)[..., 0].T.double().numpy() * deviation + mean
    return Forecast(continue_dates(table.dates, args.pred_len, path), values, table.channels)


def written_out(dates: pd.DatetimeIndex) -> list[str]:
    """Return dates as text, all with as many digits of a second as any needs, and with their offset from UTC if any."""
    precisions = (("s", "seconds"), ("ms", "milliseconds"), ("us", "microseconds"), ("ns", "nanoseconds"))
    digits = next(name for unit, name in precisions if unit == "ns" or (dates == dates.floor(unit)).all())
    return [date.isoformat(sep=" ", timespec=digits) for date in dates]


def write_forecast(folder: Path, args: argparse.Namespace, forecast: Forecast) -> None:
    """Write forecast.csv, a row a date and a column a channel, and forecast.png."""
    frame = pd.DataFrame(forecast.values, columns=list(forecast.channels))
    frame.insert(0, "date", written_out(forecast.dates))
    write_text(folder / "forecast.csv", frame.to_csv(index=False, lineterminator="\n"))
    table = read_table(args)
    draw_forecast(
        folder / "forecast.png",
        table.dates[-args.seq_len :],
        table.raw[-args.seq_len :],
        forecast.dates,
        forecast.values,
        table.channels,
    )
