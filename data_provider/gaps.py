"""Empty cells: what windows see in their place, and what the user is told of them."""

from collections.abc import Sequence

import numpy as np

from data_provider.windows import Spans
from utils.errors import listed


def fill(values: np.ndarray, spans: Spans) -> np.ndarray:
    """Return values with each gap filled by the last one before it in its channel; those at the beginning by the first.

    So a window never sees a later value, but for a channel that begins with a gap.

    Args:
        values: (all rows,), NaN where a cell is empty; every channel has a number.
        spans: the rows of each channel.

    Returns:
        (all rows,): `values` itself if there are no gaps.
    """
    empty = np.isnan(values)
    if not empty.any():
        return values
    known = np.flatnonzero(~empty)
    source = np.where(empty, 0, np.arange(len(values)))
    # A channel's first row takes its first number, wherever that is: nothing before it is the channel's.
    source[spans.first] = known[np.searchsorted(known, spans.first)]
    return values[np.maximum.accumulate(source)]


def note_on_gaps(values: np.ndarray, spans: Spans, channels: Sequence[str], seq_len: int) -> str:
    """Return a line on the empty cells: how many, the longest gap of each channel, what is likely too much.

    Args:
        values, spans: as in `fill`.
        channels: the channels' names.
        seq_len: rows of a window.

    Returns:
        The line; empty if no cell is.
    """
    empty = np.isnan(values)
    if not empty.any():
        return ""
    begins, lengths = _gaps(empty, spans)
    channel_of = np.searchsorted(spans.first, begins, side="right") - 1
    longest = np.zeros(len(channels), np.int64)
    np.maximum.at(longest, channel_of, lengths)
    cells = np.bincount(channel_of, lengths, minlength=len(channels)).astype(np.int64)
    parts = [
        f"{cells.sum()} of {len(values)} cells are empty",
        "longest gap in rows: " + listed([f"{channels[n]} {longest[n]}" for n in np.argsort(-longest) if longest[n]]),
    ]
    if leading := int(lengths[np.isin(begins, spans.first)].sum()):
        parts.append(f"{leading} at the very beginning take the first value")
    for which, words in (
        (cells > spans.rows / 2, "more than half empty"),
        (longest > seq_len, f"a gap longer than --seq_len {seq_len}"),
    ):
        if which.any():
            parts.append(f"{words}: {listed([channels[n] for n in np.flatnonzero(which)])}")
    return "; ".join(parts)


def _gaps(empty: np.ndarray, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
    """Return where each gap begins and how long it is; none reaches from one channel into the next."""
    before = np.concatenate([[False], empty[:-1]])
    before[spans.first] = False
    after = np.concatenate([empty[1:], [False]])
    after[spans.first + spans.rows - 1] = False
    begins, ends = np.flatnonzero(empty & ~before), np.flatnonzero(empty & ~after)
    return begins, ends - begins + 1
