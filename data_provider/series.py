"""A CSV as one scaled array, with the borders of its splits."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd

from data_provider.covariates import Explainer, fit_explainer
from data_provider.gaps import fill
from data_provider.tables import Table, read_table, table_of
from data_provider.timefeatures import integer_features, scaled_features
from data_provider.windows import Spans, WindowDataset
from utils.errors import UserError
from utils.exact import mean_and_variance

SPLITS = ("train", "val", "test")

_MONTH_HOURS = 30 * 24

# Deviations from the mean beyond which the squares of an error would leave float32.
_LARGEST = 1e12

# Numbers beyond which a sum of squares would leave float64.
_HUGE = 1e150


@dataclass(frozen=True)
class Layout:
    """How a data set's rows are shared out.

    Without `val`, `train` and `test` are shares of the rows there are and validation has the rest; with it, all
    three are rows. `quarter_hours` adds the quarter of the hour to the integer time marks. `target_last` moves the
    target to the last channel, as Time-LLM does for every set but ETT.
    """

    train: float
    test: float
    val: int | None = None
    quarter_hours: bool = False
    target_last: bool = False

    def rows(self, rows_there: int) -> tuple[int, int, int]:
        """Return the numbers of training, validation and test rows."""
        if self.val is not None:
            return int(self.train), self.val, int(self.test)
        train, test = int(rows_there * self.train), int(rows_there * self.test)
        return train, rows_there - train - test, test


def _ett(rows_an_hour: int) -> Layout:
    month = _MONTH_HOURS * rows_an_hour
    return Layout(12 * month, 4 * month, val=4 * month, quarter_hours=rows_an_hour > 1)


_SHARES = Layout(0.7, 0.2, target_last=True)
LAYOUTS = {
    "ETTh1": _ett(1),
    "ETTh2": _ett(1),
    "ETTm1": _ett(4),
    "ETTm2": _ett(4),
    "custom": _SHARES,
    "ECL": _SHARES,
    "Traffic": _SHARES,
    "Weather": _SHARES,
}


@dataclass(frozen=True)
class Scaler:
    """How each channel was scaled: by the mean and the deviation of its training rows; constant ones by 1.

    Attributes:
        mean_, scale_: (channels,) float64, in the CSV's units.
    """

    mean_: np.ndarray
    scale_: np.ndarray


@dataclass(frozen=True)
class Series:
    """Scaled channels, one behind the other.

    Attributes:
        source: the CSV, as messages call it.
        values: (all rows,) float32, scaled with the training rows' mean and deviation, less what covariates explain;
            gaps are filled.
        targets: the same with NaN in the gaps; `values` itself if there are none.
        marks: (dates, marks) float32, the time marks.
        channels: the channels' names.
        spans: the rows of each channel.
        scaler: of each channel.
        ends: (channels, 3): the row of each channel behind its training, validation and test rows.
        is_long: whether it was a long CSV.
        notes: what the user should know of the data, a line each.
        explainer: of the covariates; None if there are none.
        explained: (all rows,) float32, scaled, what it explains; None likewise.
    """

    source: Path
    values: np.ndarray
    targets: np.ndarray
    marks: np.ndarray
    channels: tuple[str, ...]
    spans: Spans
    scaler: Scaler
    ends: np.ndarray
    is_long: bool
    notes: tuple[str, ...]
    explainer: Explainer | None = None
    explained: np.ndarray | None = None

    def of_channel(self, channel: int) -> np.ndarray:
        """Return the scaled values of a channel, (rows,)."""
        first = self.spans.first[channel]
        return self.values[first : first + self.spans.rows[channel]]

    def seasonal_errors(self, season: int) -> dict[str, float]:
        """Return how far, on average, each channel's training rows are from those `season` rows before, scaled.

        Of a channel that never changes by the season, or of fewer rows, there is none. Empty cells do not count.
        """
        errors = {}
        for first, end, name in zip(self.spans.first, self.ends[:, 0], self.channels, strict=True):
            training = self.targets[first : first + end].astype(np.float64)
            if self.explained is not None:
                training += self.explained[first : first + end]
            steps = np.abs(training[season:] - training[:-season])
            known = steps[~np.isnan(steps)]
            if len(known) and (error := float(known.mean())):
                errors[name] = error
        return errors

    def windows(self, split: str, seq_len: int, label_len: int, pred_len: int, percent: int) -> WindowDataset:
        """Return the windows of a split: of every channel, the first forecast is of the split's first row.

        Args:
            split: train, val or test.
            seq_len, label_len, pred_len: of the windows, in rows.
            percent: share of the training rows to use.

        Raises:
            UserError: if no channel has rows enough, or nothing is known of what is to be forecast.
        """
        number = SPLITS.index(split)
        end = self.ends[:, number]
        # The window reaches back into the split before.
        begin = self.ends[:, number - 1] - seq_len if number else np.zeros_like(end)
        if split == "train":
            end = (end - seq_len) * percent // 100 + seq_len
        if self.is_long:
            begin = np.maximum(begin, 0)
        elif begin[0] < 0:
            raise UserError(
                f"{self.source.name}: --seq_len {seq_len} reaches back before the first row:"
                f" {begin[0] + seq_len} rows stand before the {split} split"
            )
        needed, there = seq_len + pred_len, int((end - begin).max())
        if there < needed:
            whose = " of its longest series" if self.is_long else ""
            raise UserError(
                f"{self.source.name}: the {split} split{whose} is too short for --seq_len {seq_len} and --pred_len"
                f" {pred_len}: {needed} rows needed, {max(there, 0)} there"
            )
        part = self.spans.part(begin, end)
        self._check_targets(split, part, seq_len)
        return WindowDataset(
            self.values,
            self.targets,
            self.marks,
            part,
            self.channels,
            seq_len,
            label_len,
            pred_len,
            self.is_long,
            self.explained,
        )

    def _check_targets(self, split: str, part: Spans, seq_len: int) -> None:
        if self.targets is self.values:
            return
        ends = part.first + part.rows
        if all(
            np.isnan(self.targets[first + seq_len : end]).all() for first, end in zip(part.first, ends, strict=True)
        ):
            raise UserError(
                f"{self.source.name}: every cell of the {split} split is empty, there is nothing to score: fill it,"
                " or give a CSV that ends before it"
            )

    def windows_to_come(self, marks: np.ndarray, seq_len: int, label_len: int) -> WindowDataset:
        """Return the windows that end with each channel's last row, followed by rows that nobody knows.

        Args:
            marks: the time marks of the rows to come, (channels, pred_len, marks).
            seq_len: rows that a window shows.
            label_len: past rows repeated before what is to come.
        """
        count, pred_len, _ = marks.shape
        rows, dates = self.spans.last(seq_len)  # (channels, seq_len) each
        unknown = np.full((count, pred_len), np.nan, np.float32)
        values, targets = (np.hstack([part[rows], unknown]).ravel() for part in (self.values, self.targets))
        all_marks = np.concatenate([self.marks[dates], marks], axis=1).reshape(-1, marks.shape[2])
        first = np.arange(count) * (seq_len + pred_len)
        spans = Spans(first, np.full(count, seq_len + pred_len), first)
        return WindowDataset(
            values, targets, all_marks, spans, self.channels, seq_len, label_len, pred_len, self.is_long
        )


def load_series(args: argparse.Namespace) -> Series:
    """Return the run's CSV scaled, with its splits; a second call for the same returns the same object.

    Raises:
        UserError: names the file, column, row or flag that is wrong.
    """
    return _load_series(read_table(args), args.data, args.embed, args.freq, args.seq_len, args.pred_len)


@lru_cache(maxsize=1)
def _load_series(table: Table, data: str, embed: str, freq: str, seq_len: int, pred_len: int) -> Series:
    layout, spans = LAYOUTS[data], table.spans
    shares = np.array([layout.rows(rows) for rows in spans.rows.tolist()])  # (channels, 3)
    _check_rows(table, data, shares)
    # Fitted on all training rows, whatever --percent uses of them, as in Time-LLM.
    scaler = _fit_scaler(table, shares[:, 0])
    targets = _scale(table, scaler)
    explainer = _fit_explainer(table, targets, shares[:, 0]) if table.covariates else None
    explained = None
    notes = [*table.notes(seq_len), *_notes_on_channels(table, shares[:, 0])]
    if explainer:
        explained = explainer.explain(table.covariates.rows, table.date_rows(), table.channels)
        targets = targets - explained
        notes += [f"{table.source}: {warning}" for warning in explainer.warnings()]
    values = fill(targets, spans)
    has_gaps = values is not targets
    values = values.astype(np.float32)
    short = (shares[:, 0] < seq_len + pred_len).sum() if table.is_long else 0
    if short:
        notes.append(
            f"{table.source}: {short} of {len(spans.rows)} series are too short to train on (their training rows are"
            f" fewer than {seq_len + pred_len}, --seq_len and --pred_len): tested and forecast where they have the rows"
        )
    return Series(
        source=table.source,
        values=values,
        targets=targets.astype(np.float32) if has_gaps else values,
        marks=_marks(table, data, embed, freq),
        channels=table.channels,
        spans=spans,
        scaler=scaler,
        ends=shares.cumsum(axis=1),
        is_long=table.is_long,
        notes=tuple(notes),
        explainer=explainer,
        explained=None if explained is None else explained.astype(np.float32),
    )


def _fit_explainer(table: Table, scaled: np.ndarray, training_rows: np.ndarray) -> Explainer:
    spans = table.spans
    return fit_explainer(
        table.source,
        table.covariates.rows,
        [scaled[first : first + rows] for first, rows in zip(spans.first, training_rows, strict=True)],
        [slice(first, first + rows) for first, rows in zip(spans.dates, training_rows, strict=True)],
        table.channels,
    )


def _marks(table: Table, data: str, embed: str, freq: str) -> np.ndarray:
    if not table.is_long:
        return time_marks(table.dates, data, embed, freq)
    codes, dates = pd.factorize(table.dates)  # series share most of their dates
    return time_marks(dates, data, embed, freq)[codes]


def _check_rows(table: Table, data: str, shares: np.ndarray) -> None:
    """Refuse channels with fewer rows than their splits have, or none to train on."""
    needed = shares.sum(axis=1)
    if (short := needed > table.spans.rows).any():
        channel = int(short.argmax())
        whose = f", series {table.channels[channel]!r}," if table.is_long else ""
        raise UserError(
            f"{table.source}{whose} is too short for --data {data}: {needed[channel]} rows needed,"
            f" {table.spans.rows[channel]} there (--data custom splits any length 70/10/20)"
        )
    if not shares[:, 0].all():
        raise UserError(f"{table.source} has {table.spans.rows.min()} data rows: too few to train on")


@dataclass(frozen=True)
class LastWindow:
    """The last rows of each channel of a CSV, and when the next ones will be.

    Attributes:
        table: the CSV.
        values: (seq_len, channels), in the CSV's units; gaps are filled.
        dates: of those rows, a channel each.
        dates_to_come: of the pred_len rows to come, a channel each.
    """

    table: Table
    values: np.ndarray
    dates: tuple[pd.DatetimeIndex, ...]
    dates_to_come: tuple[pd.DatetimeIndex, ...]

    @property
    def channels(self) -> tuple[str, ...]:
        """Return the channels' names."""
        return self.table.channels

    @property
    def is_long(self) -> bool:
        """Return whether it was a long CSV."""
        return self.table.is_long

    def scaled(self, mean: np.ndarray, deviation: np.ndarray, explainer: dict | None) -> np.ndarray:
        """Return the rows as a model sees them, (seq_len, channels).

        Args:
            mean, deviation: to scale each channel by, (channels,).
            explainer: `Explainer.as_dict` of the covariates, None if there are none.
        """
        if not explainer:
            return (self.values - mean) / deviation
        table = self.table
        explained = Explainer.from_dict(explainer).explain(table.covariates.rows, table.date_rows(), table.channels)
        left = fill(_scaled(table, mean, deviation) - explained, table.spans)
        return left[table.spans.last(len(self.values))[0]].T

    def explained_to_come(self, explainer: dict | None) -> np.ndarray:
        """Return what the covariates explain of the scaled rows to come, (pred_len, channels)."""
        steps = len(self.dates_to_come[0])
        if not explainer:
            return np.zeros((steps, len(self.channels)))
        covariates = self.table.covariates
        rows = [slice(first, first + steps) for first in covariates.spans.first]
        explained = Explainer.from_dict(explainer).explain(covariates.to_come, rows, self.channels)
        return explained.reshape(-1, steps).T


def last_window(args: argparse.Namespace) -> LastWindow:
    """Return the window that the forecast beyond the CSV is made from.

    Raises:
        UserError: if the CSV is wrong, has fewer rows than a window or dates without a step.
    """
    return _last_window(read_table(args), args)


def last_window_of(frame: pd.DataFrame, args: argparse.Namespace) -> LastWindow:
    """Return the same of a DataFrame like the CSV.

    Raises:
        UserError: as in `last_window`.
    """
    return _last_window(table_of(frame, "the DataFrame", args), args)


def _last_window(table: Table, args: argparse.Namespace) -> LastWindow:
    spans, seq_len = table.spans, args.seq_len
    if spans.rows.min() < seq_len:
        raise UserError(f"{table.source} has {spans.rows.min()} rows: a forecast needs --seq_len {seq_len}")
    dates = [table.dates_of(channel) for channel in range(len(table.channels))]
    return LastWindow(
        table=table,
        values=table.filled[spans.last(seq_len)[0]].T,
        dates=tuple(own[-seq_len:] for own in dates),
        dates_to_come=tuple(_dates_to_come(table, dates, args.pred_len)),
    )


def _dates_to_come(table: Table, dates: Sequence[pd.DatetimeIndex], count: int) -> Iterator[pd.DatetimeIndex]:
    """Yield the dates of the next rows of each channel: those that the covariates have, or at the step of the data."""
    if table.covariates:
        spans, there = table.covariates.spans, table.covariates.to_come.index
        if (spans.rows < count).any():
            fewest = int(spans.rows.argmin())
            whose = f" of series {table.channels[fewest]!r}" if table.is_long else ""
            raise UserError(
                f"{table.source}: a forecast of --pred_len {count} rows with --covariates needs {count} rows behind the"
                f" last known one{whose}, with the covariates filled and the rest empty: there are {spans.rows[fewest]}"
            )
        for own, first in zip(dates, spans.first, strict=True):
            coming = there[first : first + count]
            if not coming.is_monotonic_increasing or coming[0] < own[-1]:
                raise UserError(f"{table.source}: the rows behind {own[-1]} are not in order: sort them by date")
            yield coming
        return
    step = step_of(table.dates_of_longest(), table.source)
    known = {}  # what follows a date: most series end with the same
    for own in dates:
        if own[-1] not in known:
            known[own[-1]] = continue_dates(own[-1], step, count)
        yield known[own[-1]]


def step_of(dates: pd.DatetimeIndex, source: Path) -> pd.offsets.BaseOffset | pd.Timedelta:
    """Return the step from date to date: a calendar's, such as a month, or the most frequent.

    Raises:
        UserError: if the dates have no step.
    """
    recent = dates[-1000:]
    # A calendar's steps, such as months, are not all of one length.
    with pd.option_context("future.infer_freq_returns_offset", True):
        offset = pd.infer_freq(recent) if len(recent) > 2 else None
    if offset is not None:
        return offset
    steps = pd.Series(recent).diff().dropna()
    step = steps[steps > pd.Timedelta(0)].mode()
    if step.empty:
        raise UserError(f"{source}: the dates have no step to go on with")
    return step[0]


def continue_dates(last: pd.Timestamp, step: pd.offsets.BaseOffset | pd.Timedelta, count: int) -> pd.DatetimeIndex:
    """Return so many dates after the last one."""
    if isinstance(step, pd.Timedelta):
        return pd.DatetimeIndex([last + step * number for number in range(1, count + 1)])
    dates = pd.date_range(last, periods=count + 1, freq=step)
    return dates[dates > last][:count]


def time_marks(dates: pd.DatetimeIndex, data: str, embed: str, freq: str) -> np.ndarray:
    """Return the time marks of dates, (dates, marks) float32, as the flags of the same names ask for them."""
    if embed == "timeF":
        return scaled_features(dates, freq)
    return integer_features(dates, LAYOUTS[data].quarter_hours)


def _notes_on_channels(table: Table, training_rows: np.ndarray) -> list[str]:
    """Return which channels never change in the rows that they are scaled by."""
    constant = [
        name
        for name, first, rows in zip(table.channels, table.spans.first, training_rows, strict=True)
        if np.ptp(table.filled[first : first + rows]) == 0
    ]
    more = f" and {len(constant) - 8} more" if len(constant) > 8 else ""
    names = ", ".join(constant[:8]) + more
    return [f"{table.source}: constant in the training rows, so not scaled: {names}"] if constant else []


def _fit_scaler(table: Table, training_rows: np.ndarray) -> Scaler:
    """Return the scaler of each channel's known training rows; its numbers come out alike on every machine."""
    found = np.zeros((len(table.channels), 2))
    for channel, (first, rows) in enumerate(zip(table.spans.first, training_rows, strict=True)):
        training = table.raw[first : first + rows]
        known = training[~np.isnan(training)]
        if not len(known):
            raise UserError(
                f"{table.source}, {table.channels[channel]!r} holds no number in its training rows: drop it, or give"
                " more rows"
            )
        if (huge := np.flatnonzero(np.abs(training) > _HUGE)).size:
            _refuse(table, first + huge[0], "is too large to be a reading")
        mean, variance = mean_and_variance(known)
        # As scikit-learn's StandardScaler tells a constant from the rounding of its mean.
        rounding = np.finfo(np.float64).eps * len(known)
        is_constant = variance <= rounding * variance + (rounding * mean) ** 2
        found[channel] = mean, 1 if is_constant else np.sqrt(variance)
    return Scaler(*found.T.copy())


def _scale(table: Table, scaler: Scaler) -> np.ndarray:
    """Return what the CSV holds, scaled, float64."""
    scaled = _scaled(table, scaler.mean_, scaler.scale_)
    if (too_large := np.flatnonzero(np.abs(scaled) > _LARGEST)).size:
        channel = np.searchsorted(table.spans.first, too_large[0], side="right") - 1
        _refuse(
            table,
            too_large[0],
            f"is too far from the training rows' mean {scaler.mean_[channel]:g} and deviation"
            f" {scaler.scale_[channel]:g} to be a reading",
        )
    return scaled


def _scaled(table: Table, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    return (table.raw - np.repeat(mean, table.spans.rows)) / np.repeat(deviation, table.spans.rows)


def _refuse(table: Table, place: int, words: str) -> NoReturn:
    """Say what is wrong with a value."""
    channel = int(np.searchsorted(table.spans.first, place, side="right")) - 1
    row = place - table.spans.first[channel] + 1
    where = f"row {row} of series" if table.is_long else f"data row {row}, column"
    raise UserError(f"{table.source} {where} {table.channels[channel]!r}: {table.raw[place]:g} {words}")
