"""Windows over series, one channel each, gathered a batch at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import Dataset

from utils.cli.options import FlagGroup

Window = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Windows that are read at a time where all are looked through.
_CHUNK = 4096


@dataclass(frozen=True)
class WindowSizes(FlagGroup):
    """Rows of a window: its context, the end of the context repeated before the target, the rows to forecast."""

    seq_len: int
    label_len: int
    pred_len: int


@dataclass(frozen=True)
class Spans:
    """Where the rows of each channel are, in arrays that hold one channel after the other.

    Attributes:
        first: index of the channel's first value, (channels,).
        rows: number of its values, (channels,).
        dates: index of its first date, (channels,); channels may share their dates.
    """

    first: np.ndarray
    rows: np.ndarray
    dates: np.ndarray

    @classmethod
    def of_table(cls, rows: int, channels: int) -> Self:
        """Return the spans of channels of equal length that share their dates."""
        return cls(np.arange(channels) * rows, np.full(channels, rows), np.zeros(channels, np.int64))

    def part(self, begin: np.ndarray, end: np.ndarray) -> Self:
        """Return the spans of rows `begin` to `end` of each channel; empty where they are in the wrong order."""
        return Spans(self.first + begin, np.maximum(end - begin, 0), self.dates + begin)

    def last(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the last values of each channel and of their dates, (channels, count) each."""
        back = self.rows[:, None] + np.arange(-count, 0)
        return self.first[:, None] + back, self.dates[:, None] + back


class WindowDataset(Dataset):
    """Every window of every channel, channel-major as in Time-LLM.

    Item `i` is (seq_x, seq_y, seq_x_mark, seq_y_mark): (seq_len, 1), (label_len + pred_len, 1) and their time marks;
    seq_y begins with the last label_len rows of seq_x. An unknown target is NaN in seq_y.

    Args:
        values: (all rows,) float32, the values that windows show.
        targets: (all rows,) float32, the values to forecast, NaN where unknown; `values` itself if all are known.
        marks: (dates, marks) float32.
        spans: the rows of each channel to take windows from; a channel too short for a window has none.
        channels: the channels' names.
        sizes: rows of a window.
        is_long: whether the channels are the series of a long CSV.
        covariate_effect: (all rows,) float32, what the covariates explain, which is not in `values`; None without
            covariates.
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
    ):
        self.values = values
        # None stands for `values`: a worker process would be sent the same numbers twice.
        self.targets = None if targets is values else targets
        self.marks = marks
        self.channels = tuple(channels)
        self.seq_len, self.label_len, self.pred_len = sizes.seq_len, sizes.label_len, sizes.pred_len
        self.length = self.seq_len + self.pred_len
        self.is_long = is_long
        self._covariate_effect = covariate_effect
        counts = np.maximum(spans.rows - self.length + 1, 0)
        self._ends = counts.cumsum()  # the number after each channel's last window
        # What to add to a window's number for its first row, and its first date.
        self._to_row, self._to_date = (begins - (self._ends - counts) for begins in (spans.first, spans.dates))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def has_gaps(self) -> bool:
        """Whether some targets may be unknown."""
        return self.targets is not None

    @property
    def has_covariates(self) -> bool:
        """Whether covariates explain a part of the series that is not in the windows."""
        return self._covariate_effect is not None

    def knows_a_target(self, indices: Sequence[int]) -> bool:
        """Return whether any target of these windows is known."""
        if self.targets is None:
            return len(indices) > 0
        rows, _ = self._places(indices)
        return not np.isnan(sliding_window_view(self.targets, self.length)[rows, self.seq_len :]).all()

    def __getitem__(self, index: int) -> Window:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return tuple(part[0].numpy() for part in self.__getitems__([index % len(self)]))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the windows of a whole batch; each part is (batch, rows, columns).

        torch's DataLoader calls this instead of `__getitem__`; no collation is needed after it.
        """
        rows, dates = self._places(indices)
        # Views are made here and not kept: they cost microseconds, and a kept view would be written out
        # in full when the dataset is sent to a worker process.
        values = torch.from_numpy(sliding_window_view(self.values, self.length)[rows, :, None])
        targets = values
        if self.targets is not None:
            targets = torch.from_numpy(sliding_window_view(self.targets, self.length)[rows, :, None])
        marks = torch.from_numpy(sliding_window_view(self.marks, self.length, axis=0)[dates]).transpose(1, 2)
        context, repeated = self.seq_len, self.seq_len - self.label_len
        return values[:, :context], targets[:, repeated:], marks[:, :context], marks[:, repeated:]

    def in_chunks(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """Yield windows a few thousand at a time: their indices, contexts (B, seq_len) and targets (B, pred_len)."""
        for some in chunks(indices):
            context, following, *_ = self.__getitems__(some)
            yield some, context[..., 0], following[:, -self.pred_len :, 0]

    def with_covariate_effect(self, indices: Sequence[int], forecast: np.ndarray) -> np.ndarray:
        """Return forecasts or targets of windows, (B, pred_len), with what the covariates explain added."""
        if self._covariate_effect is None:
            return forecast
        rows, _ = self._places(indices)
        return forecast + sliding_window_view(self._covariate_effect, self.length)[rows, self.seq_len :]

    def whole_context(self, index: int) -> np.ndarray:
        """Return the context of a window with what the covariates explain, (seq_len,)."""
        (row,), _ = self._places([index])
        context = self.values[row : row + self.seq_len]
        if self._covariate_effect is None:
            return context
        return context + self._covariate_effect[row : row + self.seq_len]

    def _places(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the first row and the first date of windows."""
        indices = np.asarray(indices)
        channels = self.channel_of(indices)
        return indices + self._to_row[channels], indices + self._to_date[channels]

    def channel_of(self, indices: Sequence[int]) -> np.ndarray:
        """Return the channel number of each window."""
        return self._ends.searchsorted(indices, side="right")


def evenly_spaced(windows: int, at_most: int) -> np.ndarray:
    """Return at most `at_most` window numbers out of `windows`, evenly spaced, first and last included."""
    if windows <= at_most:
        return np.arange(windows)
    return np.linspace(0, windows - 1, at_most).round().astype(np.int64)


def chunks(numbers: Sequence[int]) -> list[np.ndarray]:
    """Return window numbers in parts that are read at a time."""
    return np.array_split(np.asarray(numbers), -(-len(numbers) // _CHUNK) or 1)
