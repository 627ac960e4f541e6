"""Windows over single channels, gathered in whole batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import Dataset

from utils.cli.options import FlagGroup

Window = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# The effect of what is known in advance on horizons, (B, pred_len), from the contexts of windows, (B, seq_len), the
# numbers of their channels and the indices of their first dates, (B,) each.
WindowEffect = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

# More effects than these would take too much memory to be stored: they are computed anew each time.
_MAX_STORED_EFFECTS = 2**27

# The most windows that a linear forecast is fitted to; with gaps, the solver passes over them several times.
_FITTED_WINDOWS, _FITTED_WITH_GAPS = 200_000, 50_000

# The number of windows in a chunk, where all windows are read.
_CHUNK = 4096


@dataclass(frozen=True)
class WindowSizes(FlagGroup):
    """The rows of a window: the context, its last rows that seq_y repeats, and the horizon."""

    seq_len: int
    label_len: int
    pred_len: int


@dataclass(frozen=True)
class Spans:
    """The position of each channel in arrays that hold one channel after the other.

    Attributes:
        first: the index of each channel's first value, (channels,).
        rows: the number of values, (channels,).
        dates: the index of each channel's first date, (channels,); channels may share their dates.
    """

    first: np.ndarray
    rows: np.ndarray
    dates: np.ndarray

    @classmethod
    def of_table(cls, rows: int, channels: int) -> Self:
        """Build the spans of channels of equal length that share their dates."""
        return cls(np.arange(channels) * rows, np.full(channels, rows), np.zeros(channels, np.int64))

    @classmethod
    def of_series(cls, rows: np.ndarray) -> Self:
        """Build the spans of channels of these lengths, each with its own dates."""
        first = np.concatenate([[0], rows.cumsum()[:-1]])
        return cls(first, rows, first)

    def part(self, begin: np.ndarray | int, end: np.ndarray | int) -> Self:
        """Select rows `begin` to `end` of each channel; none where `end` is not after `begin`."""
        return Spans(self.first + begin, np.maximum(end - begin, np.zeros_like(self.rows)), self.dates + begin)

    def slices(self) -> list[slice]:
        """List the slice of each channel's values."""
        return [slice(first, first + rows) for first, rows in zip(self.first, self.rows, strict=True)]

    def date_slices(self) -> list[slice]:
        """List the slice of each channel's dates."""
        return [slice(first, first + rows) for first, rows in zip(self.dates, self.rows, strict=True)]

    def last(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Index the last values of each channel and their dates, (channels, count) each."""
        back = self.rows[:, None] + np.arange(-count, 0)
        return self.first[:, None] + back, self.dates[:, None] + back

    def channel_of(self, places: np.ndarray) -> np.ndarray:
        """Find the number of the channel to which each value belongs, by the value's index."""
        return np.searchsorted(self.first, places, side="right") - 1


class WindowDataset(Dataset):
    """Every window of every channel, channel-major as in Time-LLM.

    Item `i` is (seq_x, seq_y, seq_x_mark, seq_y_mark): (seq_len, 1), (label_len + pred_len, 1) and their time marks;
    seq_y begins with the last label_len rows of seq_x. An unknown target is NaN in seq_y.

    `counts`, (channels,), are the numbers of windows.

    Args:
        values: (all rows,) float32, the values in the contexts.
        targets: (all rows,) float32, the values to forecast, NaN where unknown; `values` itself if all are known.
        marks: (dates, marks) float32.
        spans: the rows of each channel to take windows from; a channel too short for a window has none.
        is_long: whether the channels are the series of a long CSV.
        covariate_effect: (all rows,) float32, the effect subtracted from `values` and `targets`.
        window_effect: a further effect, which is subtracted from the horizon of each window.
        mark_rows: (dates,), the row of `marks` for each date; None if `marks` has a row for each.
    """

    def __init__(
        self,
        values: np.ndarray,
        targets: np.ndarray,
        marks: np.ndarray,
        spans: Spans,
        channels: Sequence[str],
        sizes: WindowSizes,
        is_long: bool = False,
        covariate_effect: np.ndarray | None = None,
        window_effect: WindowEffect | None = None,
        mark_rows: np.ndarray | None = None,
    ):
        self.values = values
        # None stands for `values`; otherwise pickling would send the same array to a worker process twice.
        self.targets = None if targets is values else targets
        self.marks, self._mark_rows = marks, mark_rows
        self.channels = tuple(channels)
        self.seq_len, self.label_len, self.pred_len = sizes.seq_len, sizes.label_len, sizes.pred_len
        self.length = self.seq_len + self.pred_len
        self.is_long = is_long
        self._covariate_effect, self._window_effect = covariate_effect, window_effect
        self.counts = counts = np.maximum(spans.rows - self.length + 1, 0)
        self._ends = counts.cumsum()  # one more than the number of each channel's last window
        # The offsets from a window's number to its first row and to its first date.
        self._to_row, self._to_date = (begins - (self._ends - counts) for begins in (spans.first, spans.dates))
        is_stored = window_effect is not None and len(self) * self.pred_len <= _MAX_STORED_EFFECTS
        self._stored_effects = np.full((len(self), self.pred_len), np.nan, np.float32) if is_stored else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def has_gaps(self) -> bool:
        """Whether some targets are unknown."""
        return self.targets is not None

    @property
    def has_covariates(self) -> bool:
        """Whether the covariates' effect was subtracted from the rows."""
        return self._covariate_effect is not None

    def has_known_target(self, indices: Sequence[int]) -> bool:
        """Return whether any value in the horizon of these windows is known."""
        if not self.has_gaps:
            return len(indices) > 0
        rows, _ = self._places(indices)
        return not np.isnan(sliding_window_view(self.targets, self.length)[rows, self.seq_len :]).all()

    def __getitem__(self, index: int) -> Window:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return tuple(part[0].numpy() for part in self.__getitems__([index % len(self)]))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Gather the windows of a whole batch; each part is (batch, rows, columns).

        PyTorch's DataLoader calls this instead of `__getitem__`; the result needs no collation.
        """
        rows, dates = self._places(indices)
        # The views are not attributes: pickling a view for a worker process would copy every window.
        values = targets = torch.from_numpy(sliding_window_view(self.values, self.length)[rows, :, None])
        if self.has_gaps:
            targets = torch.from_numpy(sliding_window_view(self.targets, self.length)[rows, :, None])
        if self._window_effect is not None:
            targets = targets.clone()
            targets[:, self.seq_len :, 0] -= torch.from_numpy(self._effects_of(np.asarray(indices)))
        if self._mark_rows is None:
            mark_rows = dates[:, None] + np.arange(self.length)
        else:
            mark_rows = sliding_window_view(self._mark_rows, self.length)[dates]
        marks = torch.from_numpy(np.take(self.marks, mark_rows, axis=0))
        context, repeated = self.seq_len, self.seq_len - self.label_len
        return values[:, :context], targets[:, repeated:], marks[:, :context], marks[:, repeated:]

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield contexts (B, seq_len) and targets (B, pred_len) of evenly spaced windows, to fit a linear forecast."""
        numbers = evenly_spaced(len(self), _FITTED_WITH_GAPS if self.has_gaps else _FITTED_WINDOWS)
        return ((contexts, targets) for _, contexts, targets in self.in_chunks(numbers))

    def in_chunks(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """Yield windows in chunks: their numbers, contexts (B, seq_len) and targets (B, pred_len)."""
        for chunk in chunks(indices):
            context, following, *_ = self.__getitems__(chunk)
            yield chunk, context[..., 0], following[:, -self.pred_len :, 0]

    def with_covariate_effect(self, indices: Sequence[int], forecast: np.ndarray) -> np.ndarray:
        """Add the effect of what is known in advance to forecasts or targets of windows, (B, pred_len)."""
        if self._window_effect is not None:
            forecast = forecast + self._effects_of(np.asarray(indices))
        if not self.has_covariates:
            return forecast
        rows, _ = self._places(indices)
        return forecast + sliding_window_view(self._covariate_effect, self.length)[rows, self.seq_len :]

    def _effects_of(self, indices: np.ndarray) -> np.ndarray:
        """Compute the effect on the horizons of windows, (B, pred_len) float32; once for each if effects are stored."""
        stored = self._stored_effects
        missing = indices if stored is None else indices[np.isnan(stored[indices, 0])]
        computed = np.zeros((0, self.pred_len), np.float32)
        if len(missing):
            rows, dates = self._places(missing)
            contexts = sliding_window_view(self.values, self.seq_len)[rows]
            computed = self._window_effect(contexts, self.channel_of(missing), dates).astype(np.float32)
        if stored is None:
            return computed
        stored[missing] = computed
        return stored[indices]

    def whole_context(self, index: int) -> np.ndarray:
        """Add the covariates' effect to the context of a window, (seq_len,)."""
        (row,), _ = self._places([index])
        rows = slice(row, row + self.seq_len)
        return self.values[rows] + self._covariate_effect[rows] if self.has_covariates else self.values[rows]

    def _places(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Index the first rows and the first dates of windows."""
        indices = np.asarray(indices)
        channels = self.channel_of(indices)
        return indices + self._to_row[channels], indices + self._to_date[channels]

    def first_dates(self, indices: Sequence[int]) -> np.ndarray:
        """Index the first date of windows."""
        return self._places(indices)[1]

    def channel_of(self, indices: Sequence[int]) -> np.ndarray:
        """Find the number of each window's channel."""
        return self._ends.searchsorted(indices, side="right")


def evenly_spaced(count: int, at_most: int) -> np.ndarray:
    """Choose at most `at_most` of the numbers below `count`, evenly spaced, including the first and the last."""
    return np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64)


def chunks(numbers: Sequence[int]) -> list[np.ndarray]:
    """Split window numbers into chunks of a few thousand."""
    return np.array_split(np.asarray(numbers), -(-len(numbers) // _CHUNK) or 1)
