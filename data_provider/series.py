"""Scale and split a table; build the windows of its splits and the facts that a checkpoint stores."""

import argparse
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from data_provider.facts import DataFacts, estimate_overlap, hash_rows, sample_fingerprints
from data_provider.horizon import LastWindow, last_window
from data_provider.known_ahead import KnownAhead, TableEffect
from data_provider.scaling import Scaler, fit_scaler, note_on_constants, scale
from data_provider.tables import Table, fill
from data_provider.timefeatures import MarkOptions
from data_provider.windows import Spans, WindowDataset, WindowSizes
from utils.errors import UserError

SPLITS = ("train", "val", "test")

_MONTH = 30 * 24

# The numbers of training, validation and test rows, where they are fixed; other data are split 70/10/20.
LAYOUTS = {
    **dict.fromkeys(("ETTh1", "ETTh2"), (12 * _MONTH, 4 * _MONTH, 4 * _MONTH)),
    **dict.fromkeys(("ETTm1", "ETTm2"), (48 * _MONTH, 16 * _MONTH, 16 * _MONTH)),
}


@dataclass(frozen=True)
class Series:
    """The scaled channels of a table, one after the other, and their splits.

    Attributes:
        percent: the percentage of the training rows to train on.
        values: (all rows,) float32, scaled by the training rows' mean and deviation, without the covariates' effect,
            with filled gaps.
        targets: `values` with NaN in the gaps; `values` itself if there are no gaps.
        marks: (distinct dates, marks) float32, the time marks.
        mark_rows: (dates,) int32, the row of `marks` for each date; None if no date occurs twice.
        ends: (channels, 3): the row of each channel after its training, validation and test rows.
        notes: what the user should know about the data, one line each.
        known_ahead: the effect of the covariates; None without covariates, or before `with_known_ahead`.
        covariate_effect: (all rows,) float32, the linear effect subtracted from `values`; None without one.
        window_effect: the boosted effect, which is subtracted from the horizons; None without one.
    """

    table: Table
    sizes: WindowSizes
    percent: int
    values: np.ndarray
    targets: np.ndarray
    marks: np.ndarray
    mark_rows: np.ndarray | None
    mark_options: MarkOptions
    scaler: Scaler
    ends: np.ndarray
    notes: tuple[str, ...]
    known_ahead: KnownAhead | None = None
    covariate_effect: np.ndarray | None = None
    window_effect: TableEffect | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels' names."""
        return self.table.channels

    def facts(self) -> DataFacts:
        """Collect the facts that a checkpoint stores."""
        training, validation, _ = self.ends.T
        _, trained = self._borders("train")
        return DataFacts(
            channels=list(self.channels),
            mean=self.scaler.mean_.tolist(),
            deviation=self.scaler.scale_.tolist(),
            is_long=self.table.is_long,
            explainer=asdict(self.known_ahead.linear) if self.known_ahead and self.known_ahead.linear else None,
            boosted=self.known_ahead.boosted.as_dict() if self.known_ahead and self.known_ahead.boosted else None,
            training_hashes=hash_rows(self.table, np.zeros_like(training), training),
            validation_hashes=hash_rows(self.table, training, validation),
            trained_rows=sample_fingerprints(self.table, np.clip(trained, 0, training)),
        )

    def share_trained_on(self, facts: DataFacts) -> float:
        """Estimate the share of the test rows that a run with these facts was trained on."""
        return estimate_overlap(self.table, self.ends[:, 1], self.ends[:, 2], facts.trained_rows)

    def seasonal_errors(self, season: int) -> dict[str, float]:
        """Compute the mean absolute error of the seasonal naive on each channel's training rows, in scaled units.

        `season` is in rows. Channels with an error of 0, or with no known pair of values a season apart, are left out.
        """
        errors = {}
        for rows, name in zip(self.table.spans.part(0, self.ends[:, 0]).slices(), self.channels, strict=True):
            training = self.targets[rows].astype(np.float64)
            if self.covariate_effect is not None:
                training += self.covariate_effect[rows]
            steps = np.abs(training[season:] - training[:-season])
            known = steps[~np.isnan(steps)]
            if len(known) and (error := float(known.mean())):
                errors[name] = error
        return errors

    def windows(self, split: str) -> WindowDataset:
        """Build the dataset of a split; its horizons start at the split's first row, or at row seq_len if later.

        Args:
            split: train, val or test; or pred, the last window of each channel, whose rows to forecast are NaN.

        Raises:
            UserError: if no channel has enough rows, or no target is known.
        """
        if split == "pred":
            return self._last_windows()
        begin, end = self._borders(split)
        needed, rows = self.sizes.seq_len + self.sizes.pred_len, int((end - begin).max())
        if rows < needed:
            whose = " of its longest series" if self.table.is_long else ""
            raise UserError(
                f"{self.table.source.name}: the {split} split{whose} is too short for --seq_len {self.sizes.seq_len}"
                f" and --pred_len {self.sizes.pred_len}: {needed} rows needed, {max(rows, 0)} available"
            )
        part = self.table.spans.part(begin, end)
        self._check_targets(split, part)
        return WindowDataset(
            *(self.values, self.targets, self.marks, part, self.channels, self.sizes, self.table.is_long),
            covariate_effect=self.covariate_effect,
            window_effect=self.window_effect,
            mark_rows=self.mark_rows,
        )

    def with_known_ahead(self, known: KnownAhead) -> "Series":
        """Subtract the effect of what is known in advance."""
        table, covariates = self.table, self.table.covariates
        effect = window_effect = None
        targets = scale(table, self.scaler)
        if known.linear:
            effect = known.linear.explain(covariates.rows, table.spans.date_slices(), table.channels)
            targets = targets - effect
            effect = effect.astype(np.float32)
        if known.boosted:
            window_effect = TableEffect.of(known.boosted, table)
        values, targets = _fill(targets, table)
        return replace(
            self,
            values=values,
            targets=targets,
            known_ahead=known,
            covariate_effect=effect,
            window_effect=window_effect,
        )

    def without_window_effect(self) -> "Series":
        """Leave the horizons as they are, for forecasts of which the trees know nothing."""
        return replace(self, window_effect=None)

    def last_window(self) -> LastWindow:
        """Take the last rows of the CSV, to forecast from, see `horizon.last_window`."""
        return last_window(self.table, self.sizes.seq_len, self.sizes.pred_len)

    def _borders(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Find each channel's first row in the windows of a split, and the row after its last one."""
        number, seq_len = SPLITS.index(split), self.sizes.seq_len
        end = self.ends[:, number]
        # The first context is the end of the split before.
        begin = self.ends[:, number - 1] - seq_len if number else np.zeros_like(end)
        if split == "train":
            end = (end - seq_len) * self.percent // 100 + seq_len
        if self.table.is_long:
            begin = np.maximum(begin, 0)
        elif begin[0] < 0:
            rows = begin[0] + seq_len
            raise UserError(
                f"{self.table.source.name}: --seq_len {seq_len} exceeds the {rows} rows before the {split} split"
            )
        return begin, end

    def _check_targets(self, split: str, part: Spans) -> None:
        """Refuse a split without a known value to forecast."""
        horizons = part.part(self.sizes.seq_len, part.rows).slices()
        if self.targets is not self.values and all(np.isnan(self.targets[rows]).all() for rows in horizons):
            raise UserError(
                f"{self.table.source.name}: every cell of the {split} split is empty, so there is nothing to score:"
                " fill cells, or give a CSV that ends before them"
            )

    def _last_windows(self) -> WindowDataset:
        """Build the dataset of the last context of each channel; the horizon is NaN."""
        future = self.last_window().future_dates
        count, length = len(future), self.sizes.seq_len + self.sizes.pred_len
        rows, dates = self.table.spans.last(self.sizes.seq_len)
        unknown = np.full((count, self.sizes.pred_len), np.nan, np.float32)
        values, targets = (np.hstack([part[rows], unknown]).ravel() for part in (self.values, self.targets))
        places = dates if self.mark_rows is None else self.mark_rows[dates]
        future_marks = np.stack([self.mark_options.marks(own) for own in future])
        marks = np.concatenate([self.marks[places], future_marks], axis=1).reshape(count * length, -1)
        spans = Spans.of_series(np.full(count, length))
        return WindowDataset(values, targets, marks, spans, self.channels, self.sizes, self.table.is_long)


def series_of(table: Table, args: argparse.Namespace) -> Series:
    """Scale a table and split it, without an effect of its covariates.

    Raises:
        UserError: if a value is invalid or rows are missing.
    """
    sizes, mark_options = WindowSizes.of(args), MarkOptions.of(args)
    rows = np.array([_split(args.data, rows) for rows in table.spans.rows.tolist()])  # (channels, 3)
    _check_rows(table, args.data, rows)
    training = rows[:, 0]
    # Fitted to all training rows, whatever --percent is, as in Time-LLM.
    scaler = fit_scaler(table, training)
    values, targets = _fill(scale(table, scaler), table)
    notes = [*table.notes(sizes.seq_len), *note_on_constants(table, training)]
    mark_rows, dates = pd.factorize(table.dates)  # series share most of their dates
    notes += _note_on_short_series(table, training, sizes)
    return Series(
        table=table,
        sizes=sizes,
        percent=args.percent,
        values=values,
        targets=targets,
        marks=mark_options.marks(dates),
        mark_rows=None if len(dates) == len(mark_rows) else mark_rows.astype(np.int32),
        mark_options=mark_options,
        scaler=scaler,
        ends=rows.cumsum(axis=1),
        notes=tuple(notes),
    )


def _fill(scaled: np.ndarray, table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Return scaled values with filled gaps, and with NaN in them; the same array twice if there are none."""
    filled = fill(scaled, table.spans)
    values = filled.astype(np.float32)
    return values, values if filled is scaled else scaled.astype(np.float32)


def _split(data: str, rows: int) -> tuple[int, int, int]:
    """Count the training, validation and test rows."""
    if data in LAYOUTS:
        return LAYOUTS[data]
    train, test = int(rows * 0.7), int(rows * 0.2)
    return train, rows - train - test, test


def _note_on_short_series(table: Table, training_rows: np.ndarray, sizes: WindowSizes) -> list[str]:
    needed = sizes.seq_len + sizes.pred_len
    short = (training_rows < needed).sum()
    note = (
        f"{table.source}: {short} of {len(training_rows)} series are too short to train on (fewer than {needed}"
        " training rows, --seq_len plus --pred_len): they are tested and forecast if they have enough rows"
    )
    return [note] if table.is_long and short else []


def _check_rows(table: Table, data: str, rows: np.ndarray) -> None:
    """Refuse channels with fewer rows than their splits need, or without training rows."""
    needed = rows.sum(axis=1)
    if (short := needed > table.spans.rows).any():
        channel = int(short.argmax())
        whose = f", series {table.channels[channel]!r}," if table.is_long else ""
        raise UserError(
            f"{table.source}{whose} is too short for --data {data}: {needed[channel]} rows needed,"
            f" {table.spans.rows[channel]} available (--data custom splits any length 70/10/20)"
        )
    if not rows[:, 0].all():
        raise UserError(f"{table.source} has {table.spans.rows.min()} data rows: too few to train on")
