"""A CSV as one scaled array, with the borders of its splits."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd

from data_provider.covariates import Explainer, fit_explainer
from data_provider.fingerprints import hash_rows, keep_rows, share_kept
from data_provider.gaps import fill
from data_provider.reading import read_table
from data_provider.tables import Table
from data_provider.timefeatures import integer_features, scaled_features
from data_provider.windows import Spans, WindowDataset
from utils.errors import UserError
from utils.exact import FARTHEST, mean_and_variance
from utils.runs.checkpoint import DataFacts

SPLITS = ("train", "val", "test")

_MONTH_HOURS = 30 * 24

# Numbers beyond which a sum of squares would leave float64.
_HUGE = 1e150


@dataclass(frozen=True)
class Layout:
    """How a data set's rows are shared out.

    Without `val`, `train` and `test` are shares of the rows there are and validation has the rest; with it, all
    three are rows. `quarter_hours` adds the quarter of the hour to the integer time marks.
    """

    train: float
    test: float
    val: int | None = None
    quarter_hours: bool = False

    def rows(self, rows_there: int) -> tuple[int, int, int]:
        """Return the numbers of training, validation and test rows."""
        if self.val is not None:
            return int(self.train), self.val, int(self.test)
        train, test = int(rows_there * self.train), int(rows_there * self.test)
        return train, rows_there - train - test, test


def _ett(rows_an_hour: int) -> Layout:
    month = _MONTH_HOURS * rows_an_hour
    return Layout(12 * month, 4 * month, val=4 * month, quarter_hours=rows_an_hour > 1)


_SHARES = Layout(0.7, 0.2)
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
        table: what the CSV holds.
        values: (all rows,) float32, scaled with the training rows' mean and deviation, less what covariates explain;
            gaps are filled.
        targets: the same with NaN in the gaps; `values` itself if there are none.
        marks: (dates, marks) float32, the time marks.
        scaler: of each channel.
        ends: (channels, 3): the row of each channel behind its training, validation and test rows.
        notes: what the user should know of the data, a line each.
        explainer: of the covariates; None if there are none.
        explained: (all rows,) float32, scaled, what it explains; None likewise.
    """

    table: Table
    values: np.ndarray
    targets: np.ndarray
    marks: np.ndarray
    scaler: Scaler
    ends: np.ndarray
    notes: tuple[str, ...]
    explainer: Explainer | None = None
    explained: np.ndarray | None = None

    @property
    def source(self) -> Path:
        """The CSV, as messages call it."""
        return self.table.source

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels' names."""
        return self.table.channels

    @property
    def spans(self) -> Spans:
        """The rows of each channel."""
        return self.table.spans

    @property
    def is_long(self) -> bool:
        """Whether it was a long CSV."""
        return self.table.is_long

    def facts(self, percent: int) -> DataFacts:
        """Return what a checkpoint keeps of it; `percent` is the share of the training rows that are trained on."""
        training, validation = self.ends[:, 0], self.ends[:, 1]
        trained_rows, one_in = keep_rows(self.table, training * percent // 100)
        return DataFacts(
            channels=list(self.channels),
            mean=self.scaler.mean_.tolist(),
            deviation=self.scaler.scale_.tolist(),
            is_long=self.is_long,
            explainer=self.explainer.as_dict() if self.explainer else None,
            training_hashes=hash_rows(self.table, np.zeros_like(training), training),
            validation_hashes=hash_rows(self.table, training, validation),
            trained_rows=trained_rows,
            one_in=one_in,
        )

    def share_trained_on(self, trained_rows: Sequence[int], one_in: int) -> float:
        """Return which share of the test rows a run has trained on, by what its `facts` say."""
        return share_kept(self.table, self.ends[:, 1], self.ends[:, 2], trained_rows, one_in)

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
        """Return the windows of a split: the first forecast is of its first row, or later if too few stand before it.

        Args:
            split: train, val or test.
            seq_len, label_len, pred_len: of the windows, in rows.
            percent: share of the training rows to use.

        Raises:
            UserError: if no channel has rows enough, or nothing is known of what is to be forecast.
        """
        begin, end = self._borders(split, seq_len, percent)
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

    def _borders(self, split: str, seq_len: int, percent: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which rows of each channel the windows of a split are taken from: the first, and the one behind."""
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
        return begin, end

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
    """Read the run's CSV and return it scaled, with its splits.

    Raises:
        UserError: names the file, column, row or flag that is wrong.
    """
    return series_of(read_table(args), args)


def series_of(table: Table, args: argparse.Namespace) -> Series:
    """Return what the run's CSV holds scaled, with its splits.

    Raises:
        UserError: names the column or row that is wrong, or says that there are too few rows.
    """
    layout, spans, data, seq_len = LAYOUTS[args.data], table.spans, args.data, args.seq_len
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
    short = (shares[:, 0] < seq_len + args.pred_len).sum() if table.is_long else 0
    if short:
        notes.append(
            f"{table.source}: {short} of {len(spans.rows)} series are too short to train on (their training rows are"
            f" fewer than {seq_len + args.pred_len}, --seq_len and --pred_len): tested and forecast where they have"
            " the rows"
        )
    return Series(
        table=table,
        values=values,
        targets=targets.astype(np.float32) if has_gaps else values,
        marks=_marks(table, data, args.embed, args.freq),
        scaler=scaler,
        ends=shares.cumsum(axis=1),
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
        if not len(known) and table.is_long:  # it is not trained on, but may be forecast
            known = table.raw[table.rows_of(channel)]
            known = known[~np.isnan(known)]
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
    scaled = table.scaled(scaler.mean_, scaler.scale_)
    if (too_large := np.flatnonzero(np.abs(scaled) > FARTHEST)).size:
        channel = np.searchsorted(table.spans.first, too_large[0], side="right") - 1
        _refuse(
            table,
            too_large[0],
            f"is too far from the training rows' mean {scaler.mean_[channel]:g} and deviation"
            f" {scaler.scale_[channel]:g} to be a reading",
        )
    return scaled


def _refuse(table: Table, place: int, words: str) -> NoReturn:
    """Say what is wrong with a value."""
    channel = int(np.searchsorted(table.spans.first, place, side="right")) - 1
    row = place - table.spans.first[channel] + 1
    where = f"row {row} of series" if table.is_long else f"data row {row}, column"
    raise UserError(f"{table.source} {where} {table.channels[channel]!r}: {table.raw[place]:g} {words}")
