"""Windows over a series, one channel each, gathered a batch at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import Dataset

Window = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class WindowDataset(Dataset):
    """Every window of every channel between two rows, channel-major as in Time-LLM.

    Item `i` is window `i % windows_per_channel` of channel `i // windows_per_channel`, as
    (seq_x, seq_y, seq_x_mark, seq_y_mark): (seq_len, 1), (label_len + pred_len, 1) and their time marks;
    seq_y begins with the last label_len rows of seq_x.

    Args:
        values: (rows, channels) float32.
        marks: (rows, marks) float32.
        channels: the channels' names.
        seq_len, label_len, pred_len: rows of the context, repeated of it, and to forecast; rows >= seq_len + pred_len.
    """

    def __init__(
        self,
        values: np.ndarray,
        marks: np.ndarray,
        channels: Sequence[str],
        seq_len: int,
        label_len: int,
        pred_len: int,
    ):
        self.values = values
        self.marks = marks
        self.channels = tuple(channels)
        self.seq_len = seq_len
        self.label_len = label_len
        self.length = seq_len + pred_len
        self.windows_per_channel = len(values) - self.length + 1

    def __len__(self) -> int:
        return self.windows_per_channel * len(self.channels)

    def __getitem__(self, index: int) -> Window:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return tuple(part[0].numpy() for part in self.__getitems__([index % len(self)]))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the windows of a whole batch; each part is (batch, rows, columns).

        torch's DataLoader calls this instead of `__getitem__`; no collation is needed after it.
        """
        channels, starts = np.divmod(np.asarray(indices), self.windows_per_channel)
        # Views are made here and not kept: they cost microseconds, and a kept view would be written out
        # in full when the dataset is sent to a worker process.
        values = torch.from_numpy(sliding_window_view(self.values, self.length, axis=0)[starts, channels, :, None])
        marks = torch.from_numpy(sliding_window_view(self.marks, self.length, axis=0)[starts]).transpose(1, 2)
        context, repeated = self.seq_len, self.seq_len - self.label_len
        return values[:, :context], values[:, repeated:], marks[:, :context], marks[:, repeated:]

    def channel_of(self, indices: Sequence[int]) -> np.ndarray:
        """Return the channel number of each window."""
        return np.asarray(indices) // self.windows_per_channel


def evenly_spaced(windows: int, at_most: int) -> np.ndarray:
    """Return at most `at_most` window numbers out of `windows`, evenly spaced, first and last included."""
    if windows <= at_most:
        return np.arange(windows)
    return np.linspace(0, windows - 1, at_most).round().astype(np.int64)
