"""A CSV as one scaled array, with the borders of its splits: its windows, and the facts that a checkpoint keeps."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.covariates import Explainer, fit_explainer
from data_provider.facts import DataFacts
from data_provider.fingerprints import hash_rows, keep_rows, share_kept
from data_provider.gaps import fill
from data_provider.horizon import LastWindow, last_window
from data_provider.layouts import LAYOUTS, SPLITS
from data_provider.reading import read_table
from data_provider.scaling import Scaler, fit_scaler, note_on_constants, scale
from data_provider.tables import Table
from data_provider.timefeatures import MarkOptions
from data_provider.windows import Spans, WindowDataset, WindowSizes
from utils.errors import UserError


@dataclass(frozen=True)
class Series:
    """Scaled channels, one after the other.

    Attributes:
        table: the CSV.
        sizes: rows of a window.
        percent: share of the training rows to train on.
        values: (all rows,) float32, scaled by the training rows' mean and deviation, without what the covariates
            explain; gaps are filled.
        targets: the same with NaN in the gaps; `values` itself if there are none.
        marks: (dates, marks) float32, the time marks.
        mark_options: how they are made.
        scaler: of each channel.
        ends: (channels, 3): the row of each channel after its training, validation and test rows.
        notes: what the user should know about the data, one line each.
        explainer: of the covariates; None if there are none.
        covariate_effect: (all rows,) float32, scaled, what the covariates explain; None if there are none.
    """

    table: Table
    sizes: WindowSizes
    percent: int
    values: np.ndarray
    targets: np.ndarray
    marks: np.ndarray
    mark_options: MarkOptions
    scaler: Scaler
    ends: np.ndarray
    notes: tuple[str, ...]
    explainer: Explainer | None = None
    covariate_effect: np.ndarray | None = None

    @property
    def source(self) -> Path:
        """The CSV, as messages call it."""
        return self.table.source

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels' names."""
        return self.table.channels

    @property
    def is_long(self) -> bool:
        """Whether it was a long CSV."""
        return self.table.is_long

    def facts(self) -> DataFacts:
        """Return the facts that a checkpoint keeps."""
        training, validation = self.ends[:, 0], self.ends[:, 1]
        _, trained = self._borders("train")
        return DataFacts(
            channels=list(self.channels),
            mean=self.scaler.mean_.tolist(),
            deviation=self.scaler.scale_.tolist(),
            is_long=self.is_long,
            explainer=self.explainer.as_dict() if self.explainer else None,
            training_hashes=hash_rows(self.table, np.zeros_like(training), training),
            validation_hashes=hash_rows(self.table, training, validation),
            trained_rows=keep_rows(self.table, np.clip(trained, 0, training)),
        )

    def share_trained_on(self, facts: DataFacts) -> float:
        """Return the share of the test rows that a run with these facts was trained on."""
        return share_kept(self.table, self.ends[:, 1], self.ends[:, 2], facts.trained_rows)

    def seasonal_errors(self, season: int) -> dict[str, float]:
        """Return the mean absolute error of the seasonal-naive forecast on each channel's training rows, scaled.

        A channel that never changes by the season, or has fewer rows, has none. Empty cells do not count.

        Args:
            season: in rows.
        """
        errors = {}
        for first, end, name in zip(self.table.spans.first, self.ends[:, 0], self.channels, strict=True):
            training = self.targets[first : first + end].astype(np.float64)
            if self.covariate_effect is not None:
                training += self.covariate_effect[first : first + end]
            steps = np.abs(training[season:] - training[:-season])
            known = steps[~np.isnan(steps)]
            if len(known) and (error := float(known.mean())):
                errors[name] = error
        return errors

    def windows(self, split: str) -> WindowDataset:
        """Return the windows of a split: the first forecasts its first row, or a later one if too few rows precede it.

        Args:
            split: train, val or test; or pred, the last window of each channel, whose rows to forecast are NaN.

        Raises:
            UserError: if no channel has enough rows, or no target is known.
        """
        if split == "pred":
            return self._last_windows()
        begin, end = self._borders(split)
        needed, there = self.sizes.seq_len + self.sizes.pred_len, int((end - begin).max())
        if there < needed:
            whose = " of its longest series" if self.is_long else ""
            raise UserError(
                f"{self.source.name}: the {split} split{whose} is too short for --seq_len {self.sizes.seq_len} and"
                f" --pred_len {self.sizes.pred_len}: {needed} rows needed, {max(there, 0)} there"
            )
        part = self.table.spans.part(begin, end)
        self._check_targets(split, part)
        return WindowDataset(
            self.values,
            self.targets,
            self.marks,
            part,
            self.channels,
            self.sizes,
            self.is_long,
            self.covariate_effect,
        )

    def last_window(self) -> LastWindow:
        """Return the last rows of the CSV, to forecast from.

        Raises:
            UserError: as in `horizon.last_window`.
        """
        return last_window(self.table, self.sizes.seq_len, self.sizes.pred_len)

    def _borders(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the first row of each channel that the windows of a split show, and the row after their last."""
        number, seq_len = SPLITS.index(split), self.sizes.seq_len
        end = self.ends[:, number]
        # The window reaches back into the split before.
        begin = self.ends[:, number - 1] - seq_len if number else np.zeros_like(end)
        if split == "train":
            end = (end - seq_len) * self.percent // 100 + seq_len
        if self.is_long:
            begin = np.maximum(begin, 0)
        elif begin[0] < 0:
            raise UserError(
                f"{self.source.name}: --seq_len {seq_len} reaches back before the first row:"
                f" {begin[0] + seq_len} rows stand before the {split} split"
            )
        return begin, end

    def _check_targets(self, split: str, part: Spans) -> None:
        if self.targets is self.values:
            return
        for first, rows in zip(part.first, part.rows, strict=True):
            if not np.isnan(self.targets[first + self.sizes.seq_len : first + rows]).all():
                return
        raise UserError(
            f"{self.source.name}: every cell of the {split} split is empty, there is nothing to score: fill it,"
            " or give a CSV that ends before it"
        )

    def _last_windows(self) -> WindowDataset:
        """Return the windows that end with each channel's last row, followed by rows that nobody knows."""
        future = self.last_window().future_dates
        count, length = len(future), self.sizes.seq_len + self.sizes.pred_len
        marks_of = {id(dates): self.mark_options.marks(dates) for dates in future}
        rows, dates = self.table.spans.last(self.sizes.seq_len)  # (channels, seq_len) each
        unknown = np.full((count, self.sizes.pred_len), np.nan, np.float32)
        values, targets = (np.hstack([part[rows], unknown]).ravel() for part in (self.values, self.targets))
        marks = np.concatenate([self.marks[dates], np.stack([marks_of[id(dates)] for dates in future])], axis=1)
        first = np.arange(count) * length
        spans = Spans(first, np.full(count, length), first)
        marks = marks.reshape(count * length, -1)
        return WindowDataset(values, targets, marks, spans, self.channels, self.sizes, self.is_long)


def load_series(args: argparse.Namespace) -> Series:
    """Read the run's CSV, scale it and split it.

    Raises:
        UserError: names the file, column, row or flag that is wrong.
    """
    return series_of(read_table(args), args)


def series_of(table: Table, args: argparse.Namespace) -> Series:
    """Scale and split the run's CSV.

    Raises:
        UserError: names the column or row that is wrong, or says that there are too few rows.
    """
    sizes, mark_options = WindowSizes.of(args), MarkOptions.of(args)
    rows = np.array([LAYOUTS[args.data].rows(rows) for rows in table.spans.rows.tolist()])  # (channels, 3)
    _check_rows(table, args.data, rows)
    training = rows[:, 0]
    # Fitted on all training rows, whatever --percent uses of them, as in Time-LLM.
    scaler = fit_scaler(table, training)
    targets = scale(table, scaler)
    notes = [*table.notes(sizes.seq_len), *note_on_constants(table, training)]
    explainer = effect = None
    if table.covariates:
        explainer = _fit_explainer(table, targets, training)
        effect = explainer.explain(table.covariates.rows, table.date_rows(), table.channels)
        targets = targets - effect
        notes += [f"{table.source}: {warning}" for warning in explainer.warnings()]
    values = fill(targets, table.spans)
    has_gaps = values is not targets
    values = values.astype(np.float32)
    notes += _note_on_short_series(table, training, sizes)
    return Series(
        table=table,
        sizes=sizes,
        percent=args.percent,
        values=values,
        targets=targets.astype(np.float32) if has_gaps else values,
        marks=_marks(table, mark_options),
        mark_options=mark_options,
        scaler=scaler,
        ends=rows.cumsum(axis=1),
        notes=tuple(notes),
        explainer=explainer,
        covariate_effect=None if effect is None else effect.astype(np.float32),
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


def _marks(table: Table, options: MarkOptions) -> np.ndarray:
    if not table.is_long:
        return options.marks(table.dates)
    codes, dates = pd.factorize(table.dates)  # series share most of their dates
    return options.marks(dates)[codes]


def _note_on_short_series(table: Table, training_rows: np.ndarray, sizes: WindowSizes) -> list[str]:
    needed = sizes.seq_len + sizes.pred_len
    short = (training_rows < needed).sum()
    if not table.is_long or not short:
        return []
    return [
        f"{table.source}: {short} of {len(training_rows)} series are too short to train on (their training rows are"
        f" fewer than {needed}, --seq_len and --pred_len): tested and forecast where they have the rows"
    ]


def _check_rows(table: Table, data: str, rows: np.ndarray) -> None:
    """Refuse channels with fewer rows than their splits have, or none to train on."""
    needed = rows.sum(axis=1)
    if (short := needed > table.spans.rows).any():
        channel = int(short.argmax())
        whose = f", series {table.channels[channel]!r}," if table.is_long else ""
        raise UserError(
            f"{table.source}{whose} is too short for --data {data}: {needed[channel]} rows needed,"
            f" {table.spans.rows[channel]} there (--data custom splits any length 70/10/20)"
        )
    if not rows[:, 0].all():
        raise UserError(f"{table.source} has {table.spans.rows.min()} data rows: too few to train on")
