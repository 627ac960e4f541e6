"""Calendar features of timestamps, either scaled (``--embed timeF``) or integers (``fixed``, ``learned``)."""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from utils.cli.options import FlagGroup
from utils.errors import UserError

# Each scaled feature: the calendar field, the smallest value of the field and the range to divide by.
_SCALED = {
    "second": (lambda t: t.second, 0, 59),
    "minute": (lambda t: t.minute, 0, 59),
    "hour": (lambda t: t.hour, 0, 23),
    "weekday": (lambda t: t.day_of_week, 0, 6),
    "day": (lambda t: t.day, 1, 30),
    "dayofyear": (lambda t: t.day_of_year, 1, 365),
    "week": (lambda t: t.isocalendar().week, 1, 52),
    "month": (lambda t: t.month, 1, 11),
}

# The spellings of each step (those of Time-LLM and pandas), and the features for that step.
_DAILY = ("weekday", "day", "dayofyear")
_FEATURES_OF_STEP = (
    (("s", "S"), ("second", "minute", "hour", *_DAILY)),
    (("t", "T", "min"), ("minute", "hour", *_DAILY)),
    (("h", "H"), ("hour", *_DAILY)),
    (("d", "D", "b", "B"), _DAILY),
    (("w", "W"), ("day", "week")),
    (("m", "M", "ME", "MS", "q", "Q", "QE", "QS"), ("month",)),
    (("y", "Y", "YE", "YS"), ()),
)


@dataclass(frozen=True)
class MarkOptions(FlagGroup):
    """The flags that the time marks depend on."""

    data: str
    embed: str
    freq: str

    def marks(self, dates: pd.DatetimeIndex) -> np.ndarray:
        """Compute the time marks of dates, (dates, marks) float32."""
        if self.embed == "timeF":
            return scaled_features(dates, self.freq)
        return integer_features(dates, quarter_hours=self.data.startswith("ETTm"))


def scaled_features(dates: pd.DatetimeIndex, freq: str) -> np.ndarray:
    """Compute calendar features between -0.5 and 0.5, (rows, features) float32, as GluonTS does.

    `freq` is the step of the series, such as ``h``, ``t`` or ``15min``; longer steps have fewer features.

    Raises:
        UserError: if the step is unknown.
    """
    columns = []
    for name in _feature_names(freq):
        field, smallest, width = _SCALED[name]
        columns.append((np.asarray(field(dates), dtype=np.float64) - smallest) / width - 0.5)
    return np.stack(columns, axis=1).astype(np.float32) if columns else np.zeros((len(dates), 0), np.float32)


def integer_features(dates: pd.DatetimeIndex, quarter_hours: bool) -> np.ndarray:
    """Compute month, day, weekday, hour and, if requested, the quarter of the hour, (rows, 4 or 5) float32."""
    columns = [dates.month, dates.day, dates.day_of_week, dates.hour]
    if quarter_hours:
        columns.append(dates.minute // 15)
    return np.stack(columns, axis=1).astype(np.float32)


def _feature_names(freq: str) -> tuple[str, ...]:
    step = re.fullmatch(r"\d*([A-Za-z]+)(-[A-Z]+)?", freq)
    for spellings, names in _FEATURES_OF_STEP:
        if step and step.group(1) in spellings:
            return names
    raise UserError(f"--freq {freq!r} is not a calendar step: give s, t, h, d, b, w or m, or a multiple such as 15min")
