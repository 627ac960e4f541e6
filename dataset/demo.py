"""Synthetic data in the format of the ETT files, for --demo and tests."""

import os
from pathlib import Path

import numpy as np
import pandas as pd

from utils.system.files import write_text

CHANNELS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
ROWS = 2 * 365 * 24


def demo_frame(rows: int = ROWS, step: str = "h", seed: int = 0) -> pd.DataFrame:
    """Generate seven channels with daily, weekly and yearly cycles, a trend and noise.

    The six loads have the same cycles with different amplitudes; the oil temperature OT is a smoothed sum of them.

    Args:
        rows: number of rows.
        step: the interval between timestamps, a pandas frequency string.
        seed: the random seed.
    """
    dates = pd.date_range("2020-01-01", periods=rows, freq=step)
    random = np.random.default_rng(seed)
    hours = (dates - dates[0]).total_seconds().to_numpy() / 3600
    day, week, year = (np.sin(2 * np.pi * hours / period) for period in (24, 24 * 7, 24 * 365))
    evening = np.maximum(np.sin(2 * np.pi * (hours - 9) / 24), 0) ** 2
    strengths = random.uniform(0.5, 2.0, size=(4, 6))
    loads = np.stack([day, week, year, evening], axis=1) @ strengths
    loads += hours[:, None] * random.normal(0, 2e-5, size=6) + random.normal(0, 0.25, size=(rows, 6))
    total = pd.Series(loads.sum(axis=1)).ewm(halflife=6).mean().to_numpy()
    oil = 20 + total + random.normal(0, 0.2, size=rows)
    frame = pd.DataFrame(np.column_stack([loads, oil]).round(4), columns=list(CHANNELS))
    frame.insert(0, "date", dates.strftime("%Y-%m-%d %H:%M:%S"))
    return frame


def write_demo_csv(path: str | os.PathLike, rows: int = ROWS, step: str = "h", seed: int = 0) -> Path:
    """Write `demo_frame` to a CSV, unless the file exists, and return its path."""
    path = Path(path)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, demo_frame(rows, step, seed).to_csv(index=False, lineterminator="\n"))
    return path
