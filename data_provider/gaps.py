"""Forward-fill empty cells, and describe them to the user."""

from collections.abc import Sequence

import numpy as np

from data_provider.windows import Spans
from utils.errors import listed


def fill(values: np.ndarray, spans: Spans) -> np.ndarray:
    """Forward-fill the gaps of each channel; a gap at a channel's start takes the channel's first value.

    So a context never holds a later value, except in a channel that begins with a gap.

    Args:
        values: (all rows,), NaN where a cell is empty; every channel has a number. Without gaps, they are returned.
        spans: the rows of each channel.
    """
    empty = np.isnan(values)
    if not empty.any():
        return values
    known = np.flatnonzero(~empty)
    source = np.where(empty, 0, np.arange(len(values)))
    # A channel's first row takes the channel's first number, not the last number of the channel before.
    source[spans.first] = known[np.searchsorted(known, spans.first)]
    return values[np.maximum.accumulate(source)]


def note_on_gaps(values: np.ndarray, spans: Spans, channels: Sequence[str], seq_len: int) -> str:
    """Describe the empty cells in one line: their number, the longest gaps, the channels with too many.

    Without gaps, the line is empty. `values` and `spans` are as in `fill`.
    """
    empty = np.isnan(values)
    if not empty.any():
        return ""
    begins, lengths = _gaps(empty, spans)
    channel_of = spans.channel_of(begins)
    longest = np.zeros(len(channels), np.int64)
    np.maximum.at(longest, channel_of, lengths)
    cells = np.bincount(channel_of, lengths, minlength=len(channels)).astype(np.int64)
    parts = [
        f"{cells.sum()} of {len(values)} cells are empty",
        "longest gap in rows: " + listed([f"{channels[n]} {longest[n]}" for n in np.argsort(-longest) if longest[n]]),
    ]
    if leading := int(lengths[np.isin(begins, spans.first)].sum()):
        parts.append(f"{leading} at the very beginning take the first value")
    for is_bad, words in (
        (cells > spans.rows / 2, "more than half empty"),
        (longest > seq_len, f"a gap longer than --seq_len {seq_len}"),
    ):
        if is_bad.any():
            parts.append(f"{words}: {listed([channels[n] for n in np.flatnonzero(is_bad)])}")
    return "; ".join(parts)


def _gaps(empty: np.ndarray, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
    """Find the first row and the length of each gap; no gap crosses from one channel into the next."""
    before = np.concatenate([[False], empty[:-1]])
    before[spans.first] = False
    after = np.concatenate([empty[1:], [False]])
    after[spans.first + spans.rows - 1] = False
    begins, ends = np.flatnonzero(empty & ~before), np.flatnonzero(empty & ~after)
    return begins, ends - begins + 1
