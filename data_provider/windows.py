"""Windows over series, one channel each, gathered a batch at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import Dataset

Window = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Spans:
    """Where the rows of each channel stand, where all channels lie one behind the other.

    Attributes:
        first: of its values, (channels,).
        rows: how many, (channels,).
        dates: the first of its dates, (channels,); channels may share them.
    """

    first: np.ndarray
    rows: np.ndarray
    dates: np.ndarray

    @classmethod
    def of_table(cls, rows: int, channels: int) -> Self:
        """Return those of channels of equal length that share their dates."""
        return cls(np.arange(channels) * rows, np.full(channels, rows), np.zeros(channels, np.int64))

    def part(self, begin: np.ndarray, end: np.ndarray) -> Self:
        """Return those of rows `begin` to `end` of each channel; of none, where they are in the wrong order."""
        return Spans(self.first + begin, np.maximum(end - begin, 0), self.dates + begin)

    def last(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where the last values of each channel stand, and their dates: (channels, count) each."""
        back = self.rows[:, None] + np.arange(-count, 0)
        return self.first[:, None] + back, self.dates[:, None] + back


class WindowDataset(Dataset):
    """Every window of every channel, channel-major as in Time-LLM.

    Item `i` is (seq_x, seq_y, seq_x_mark, seq_y_mark): (seq_len, 1), (label_len + pred_len, 1) and their time marks;
    seq_y begins with the last label_len rows of seq_x. Where a target is not known, seq_y is NaN.

    Args:
        values: (all rows,) float32, what windows show.
        targets: (all rows,) float32, what is forecast, NaN where it is not known; `values` itself if all is known.
        marks: (dates, marks) float32.
        spans: the rows of each channel to take windows from; a channel too short for one has none.
        channels: the channels' names.
        seq_len, label_len, pred_len: rows of the context, repeated of it, and to forecast.
        is_long: whether the channels are the series of a long CSV.
        explained: (all rows,) float32, what covariates explain and is in no window; None if there are none.
    """

    def __init__(
        self,
        values: np.ndarray,
        targets: np.ndarray,
        marks: np.ndarray,
        spans: Spans,
        channels: Sequence[str],
        seq_len: int,
        label_len: int,
        pred_len: int,
        is_long: bool = False,
        explained: np.ndarray | None = None,
    ):
        self.values = values
        # None stands for `values`: a worker process would be sent the same numbers twice.
        self.targets = None if targets is values else targets
        self.marks = marks
        self.channels = tuple(channels)
        self.seq_len = seq_len
        self.label_len = label_len
        self.pred_len = pred_len
        self.length = seq_len + pred_len
        self.is_long = is_long
        self._explained = explained
        counts = np.maximum(spans.rows - self.length + 1, 0)
        self._ends = counts.cumsum()  # the number behind each channel's windows
        # What to add to a window's number for its first row, and its first date.
        self._to_row, self._to_date = (begins - (self._ends - counts) for begins in (spans.first, spans.dates))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def has_gaps(self) -> bool:
        """Return whether some targets may be unknown."""
        return self.targets is not None

    def knows_a_target(self, indices: Sequence[int]) -> bool:
        """Return whether anything is known of what is to be forecast in these windows."""
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

    def explained_of(self, indices: Sequence[int]) -> np.ndarray | None:
        """Return what covariates explain of windows, (B, seq_len + pred_len); None if there are no covariates."""
        if self._explained is None:
            return None
        rows, _ = self._places(indices)
        return sliding_window_view(self._explained, self.length)[rows]

    def _places(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return where the rows and the dates of windows begin."""
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
