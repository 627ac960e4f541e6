"""Recognize rows: whether a split has changed, and whether test rows were trained on."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from data_provider.covariates import is_numeric
from data_provider.tables import Table

# The most fingerprints that a checkpoint keeps.
MOST_KEPT = 4096

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def hash_rows(table: Table, begin: np.ndarray, end: np.ndarray) -> list[str]:
    """Hash the values and covariates in rows `begin` to `end`, (channels,) each, of each channel."""
    columns = [] if table.covariates is None else [_as_bytes(values) for _, values in table.covariates.rows.items()]
    hashes = []
    for first, dates, start, stop in zip(table.spans.first, table.spans.dates, begin, end, strict=True):
        digest = hashlib.sha256(table.raw[first + start : first + stop].tobytes())
        for column in columns:
            digest.update(column[dates + start : dates + stop].tobytes())
        hashes.append(digest.hexdigest()[:16])
    return hashes


def _as_bytes(values: pd.Series) -> np.ndarray:
    """Convert a covariate to an array of fixed-size values, whose bytes can be hashed."""
    if is_numeric(values):
        return values.to_numpy(np.float64)
    return np.array([hashlib.sha256(text.encode()).digest()[:8] for text in values.astype(str)], "S8")


def keep_rows(table: Table, rows: np.ndarray) -> list[int]:
    """Sample fingerprints of the first `rows`, (channels,), of each channel: the smallest, which is a random choice."""
    found = _fingerprints(table, np.zeros_like(rows), rows)
    if len(found) > MOST_KEPT:
        found = np.partition(found, MOST_KEPT - 1)[:MOST_KEPT]
    return found.view(np.int64).tolist()


def share_kept(table: Table, begin: np.ndarray, end: np.ndarray, kept: Sequence[int]) -> float:
    """Estimate the share of rows `begin` to `end` of each channel that are among the rows given to `keep_rows`.

    Args:
        table: the CSV.
        begin, end: (channels,) each.
        kept: the fingerprints that `keep_rows` returned.
    """
    known = np.array(kept, np.int64).view(np.uint64)
    found = _fingerprints(table, begin, end)
    if len(known) >= MOST_KEPT:  # larger fingerprints were not kept
        found = found[found <= known.max()]
    return float(np.isin(found, known).mean()) if len(found) and len(known) else 0.0


def _fingerprints(table: Table, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Compute a uint64 fingerprint of channel, date and value for each row, except empty and repeated values."""
    # Unrelated data share rows with empty and repeated values.
    dates = _mix(table.dates.as_unit("us").asi8.view(np.uint64))
    changes = np.concatenate([[True], np.diff(table.raw) != 0]) & ~np.isnan(table.raw)
    found = []
    for name, first, date, start, stop in zip(
        table.channels, table.spans.first, table.spans.dates, begin, end, strict=True
    ):
        taken = changes[first + start : first + stop]
        values = (table.raw[first + start : first + stop][taken] + 0.0).view(np.uint64)
        salt = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], np.uint64)[0]
        found.append(_mix(dates[date + start : date + stop][taken] ^ _mix(values ^ salt)))
    return np.concatenate(found)


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Hash uint64 numbers without collisions (the mixing steps of splitmix64)."""
    numbers = numbers + _INCREMENT
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MULTIPLIERS[0]
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MULTIPLIERS[1]
    return numbers ^ (numbers >> np.uint64(31))
