"""Facts about a run's data, stored in its checkpoint: scale, hashes of the splits, fingerprints of training rows."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Self

import numpy as np
import pandas as pd

from data_provider.tables import Table

# The facts that are compared, and their names in messages.
_COMPARED = {
    "channels": "channels",
    "is_long": "shape",
    "mean": "mean",
    "deviation": "deviation",
    "explainer": "explainer",
    "training_hashes": "training rows",
    "validation_hashes": "validation rows",
}

# The most fingerprints that a checkpoint stores.
_MAX_FINGERPRINTS = 4096

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class DataFacts:
    """The facts about a run's data that a checkpoint stores, as plain values.

    Attributes:
        mean, deviation: the scaler's, one number per channel.
        explainer: the fields of an `Explainer`; None without a linear effect of covariates.
        boosted: `BoostedEffect.as_dict`; None without a boosted effect of covariates.
        training_hashes, validation_hashes: one hash of these rows per channel.
        trained_rows: fingerprints of a sample of the training rows, see `sample_fingerprints`.
    """

    channels: list[str]
    mean: list[float]
    deviation: list[float]
    is_long: bool = False
    explainer: dict | None = None
    boosted: dict | None = None
    training_hashes: list[str] = field(default_factory=list)
    validation_hashes: list[str] = field(default_factory=list)
    trained_rows: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, contents: Mapping[str, object]) -> Self:
        """Take the facts from the contents of a checkpoint."""
        return cls(**{one.name: contents[one.name] for one in fields(cls)})

    def scale_of(self, channels: Sequence[str], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up the mean and the deviation of channels, (channels,) each.

        A channel unseen in training is scaled by its column of `values`, (rows, channels).
        """
        known = dict(zip(self.channels, zip(self.mean, self.deviation, strict=True), strict=True))
        columns = zip(channels, values.T, strict=True)
        scales = [known.get(name) or (column.mean(), column.std() or 1.0) for name, column in columns]
        return tuple(np.array(scales).T)

    def changed_fields(self, now: "DataFacts", may_be_subset: bool = False) -> list[str]:
        """List the facts that have changed, by their names in messages.

        With `may_be_subset`, a subset of the series of a long CSV counts as the same data.
        """
        compared = self.select_series(now.channels) if may_be_subset and self.is_long and now.is_long else self
        before, after = asdict(compared), asdict(now)
        # A checkpoint of an earlier version has no hashes of its rows.
        missing = [name for name in before if name.endswith("_hashes") and not before[name]]
        compared = {name: words for name, words in _COMPARED.items() if name not in missing}
        return [words for name, words in compared.items() if not _is_close(before[name], after[name])]

    def select_series(self, names: Sequence[str]) -> "DataFacts":
        """Select the facts about those of the named series of a long CSV that are known."""
        number_of = {name: number for number, name in enumerate(self.channels)}
        numbers = [number_of[name] for name in names if name in number_of]

        def chosen(facts: dict, *lists: str) -> dict:
            return {name: [facts[name][number] for number in numbers] for name in lists if facts[name]}

        explainer = self.explainer and self.explainer | chosen(self.explainer, "channels", "coefficients", "shares")
        own = chosen(asdict(self), "channels", "mean", "deviation", "training_hashes", "validation_hashes")
        return replace(self, **own, explainer=explainer)


def _is_close(before: object, now: object, abs_tol: float = 0.0) -> bool:
    """Compare nested lists and dictionaries; numbers may differ by the rounding of another machine."""
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-9, abs_tol=abs_tol)
    if isinstance(before, dict) and isinstance(now, dict):
        # A coefficient near 0 may be pure rounding error.
        return before.keys() == now.keys() and all(_is_close(before[name], now[name], 1e-9) for name in before)
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(_is_close(a, b, abs_tol) for a, b in zip(before, now, strict=True))
    return before == now


def hash_rows(table: Table, begin: np.ndarray, end: np.ndarray) -> list[str]:
    """Hash each channel's values and covariates in its rows `begin` to `end`, (channels,) each."""
    columns = [_as_bytes(values) for _, values in table.covariates.rows.items()] if table.covariates else []
    part = table.spans.part(begin, end)
    hashes = []
    for rows, dates in zip(part.slices(), part.date_slices(), strict=True):
        digest = hashlib.sha256(table.raw[rows].tobytes())
        for column in columns:
            digest.update(column[dates].tobytes())
        hashes.append(digest.hexdigest()[:16])
    return hashes


def _as_bytes(values: pd.Series) -> np.ndarray:
    """Convert a covariate to an array of fixed-size values, whose bytes can be hashed."""
    if pd.api.types.is_numeric_dtype(values):
        return values.to_numpy(np.float64)
    return np.array([hashlib.sha256(text.encode()).digest()[:8] for text in values.astype(str).fillna("")], "S8")


def sample_fingerprints(table: Table, rows: np.ndarray) -> list[int]:
    """Compute fingerprints of each channel's first `rows`, (channels,); of too many, the smallest: a random sample."""
    found, waiting, count = np.zeros(0, np.uint64), [], 0
    for own in _fingerprints(table, np.zeros_like(rows), rows):
        waiting.append(own)
        count += len(own)
        if count > 16 * _MAX_FINGERPRINTS:  # all of them may take much memory
            found, waiting, count = _smallest([found, *waiting]), [], 0
    return _smallest([found, *waiting]).view(np.int64).tolist()


def _smallest(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Select the fingerprints that a checkpoint stores."""
    found = np.concatenate(parts)
    return found if len(found) <= _MAX_FINGERPRINTS else np.partition(found, _MAX_FINGERPRINTS)[:_MAX_FINGERPRINTS]


def estimate_overlap(table: Table, begin: np.ndarray, end: np.ndarray, sampled: Sequence[int]) -> float:
    """Estimate the share of rows `begin` to `end`, (channels,) each, that other data contain.

    `sampled` are the fingerprints of the other data, from `sample_fingerprints`.
    """
    known = np.array(sampled, np.int64).view(np.uint64)
    # Of many rows, only the smallest fingerprints were sampled.
    largest = known.max() if len(known) >= _MAX_FINGERPRINTS else np.iinfo(np.uint64).max
    found = np.concatenate([own[own <= largest] for own in _fingerprints(table, begin, end)])
    return float(np.isin(found, known).mean()) if len(found) and len(known) else 0.0


def _fingerprints(table: Table, begin: np.ndarray, end: np.ndarray) -> Iterator[np.ndarray]:
    """Yield for each channel uint64 fingerprints of channel, date and value, except of empty and repeated values."""
    # Unrelated data share rows with empty and repeated values.
    dates, raw = table.dates.as_unit("us").asi8.view(np.uint64), table.raw
    part = table.spans.part(begin, end)
    mixed_dates, mixed = slice(0), dates[:0]
    for name, rows, own_dates in zip(table.channels, part.slices(), part.date_slices(), strict=True):
        if own_dates != mixed_dates:  # the channels of a wide CSV share their dates
            mixed_dates, mixed = own_dates, _mix(dates[own_dates])
        values = raw[rows]
        before = np.concatenate([raw[rows.start - 1 : rows.start] if rows.start else [np.nan], values[:-1]])
        taken = (values != before[: len(values)]) & ~np.isnan(values)
        salt = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], np.uint64)[0]
        yield _mix(mixed[taken] ^ _mix((values[taken] + 0.0).view(np.uint64) ^ salt))


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Hash uint64 numbers without collisions (the mixing steps of splitmix64)."""
    numbers = numbers + _INCREMENT
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MULTIPLIERS[0]
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MULTIPLIERS[1]
    return numbers ^ (numbers >> np.uint64(31))
