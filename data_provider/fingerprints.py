"""Tell rows again: whether a split is what it was, and whether test rows were trained on."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from data_provider.tables import Table

# Fingerprints of rows that a checkpoint keeps at most, in all.
MOST_KEPT = 4096

_ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def hash_rows(table: Table, begin: np.ndarray, end: np.ndarray) -> list[str]:
    """Return a hash of rows `begin` to `end` of each channel, (channels,) each: of its values and covariates."""
    columns = [] if table.covariates is None else [_as_bytes(values) for _, values in table.covariates.rows.items()]
    hashes = []
    for first, dates, start, stop in zip(table.spans.first, table.spans.dates, begin, end, strict=True):
        digest = hashlib.sha256(table.raw[first + start : first + stop].tobytes())
        for column in columns:
            digest.update(column[dates + start : dates + stop].tobytes())
        hashes.append(digest.hexdigest()[:16])
    return hashes


def _as_bytes(values: pd.Series) -> np.ndarray:
    """Return a covariate as something whose bytes tell its values."""
    if pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return values.to_numpy(np.float64)
    return np.array([hashlib.sha256(text.encode()).digest()[:8] for text in values.astype(str)], "S8")


def keep_rows(table: Table, rows: np.ndarray) -> tuple[list[int], int]:
    """Return fingerprints of some of the first `rows` of each channel, and of how many dates those of one are kept."""
    one_in = 1 << max(int(np.ceil(np.log2(max(rows.sum() / MOST_KEPT, 1)))), 0)
    kept = _fingerprints(table, np.zeros_like(rows), rows, one_in)
    return kept[:MOST_KEPT].view(np.int64).tolist(), one_in


def share_kept(table: Table, begin: np.ndarray, end: np.ndarray, kept: Sequence[int], one_in: int) -> float:
    """Return which share of rows `begin` to `end` of each channel was among those that `keep_rows` was shown.

    Args:
        table: of the rows.
        begin, end: (channels,) each.
        kept, one_in: what `keep_rows` returned.
    """
    found = _fingerprints(table, begin, end, one_in).view(np.int64)
    return float(np.isin(found, np.array(kept, np.int64)).mean()) if len(found) and len(kept) else 0.0


def _fingerprints(table: Table, begin: np.ndarray, end: np.ndarray, one_in: int) -> np.ndarray:
    """Return fingerprints of rows, of their channel, date and value, uint64.

    A date is taken or not by itself, so that two tables take the same ones. Of a value that is the one above it, or
    that is not known, there is none: other data have such rows, too.
    """
    dates = _mixed(table.dates.as_unit("us").asi8.view(np.uint64))
    changes = np.concatenate([[True], np.diff(table.raw) != 0]) & ~np.isnan(table.raw)
    found = []
    for name, first, date, start, stop in zip(
        table.channels, table.spans.first, table.spans.dates, begin, end, strict=True
    ):
        own = dates[date + start : date + stop]
        taken = (own % np.uint64(one_in) == 0) & changes[first + start : first + stop]
        values = (table.raw[first + start : first + stop][taken] + 0.0).view(np.uint64)
        salt = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], np.uint64)[0]
        found.append(_mixed(own[taken] ^ _mixed(values ^ salt)))
    return np.concatenate(found)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return numbers that look random and differ if these do (the mixing steps of splitmix64)."""
    numbers = numbers + _ODD
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MIX[0]
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MIX[1]
    return numbers ^ (numbers >> np.uint64(31))
