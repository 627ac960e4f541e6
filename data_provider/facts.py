"""The facts about its data that a checkpoint keeps, and their comparison with other data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Self

import numpy as np

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

# A checkpoint of an earlier version has no hashes of its rows.
_MAY_BE_MISSING = ("training_hashes", "validation_hashes")


@dataclass(frozen=True)
class DataFacts:
    """The facts about a run's data that a checkpoint keeps, as plain values.

    Attributes:
        channels: the channels' names.
        mean, deviation: the scaler's, one number per channel.
        is_long: whether the channels are the series of a long CSV.
        explainer: the effect of the covariates, see `Explainer.as_dict`; None without covariates.
        training_hashes, validation_hashes: one hash of these rows per channel.
        trained_rows: fingerprints of a sample of the training rows, see `data_provider.fingerprints`.
    """

    channels: list[str]
    mean: list[float]
    deviation: list[float]
    is_long: bool = False
    explainer: dict | None = None
    training_hashes: list[str] = field(default_factory=list)
    validation_hashes: list[str] = field(default_factory=list)
    trained_rows: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, contents: Mapping[str, object]) -> Self:
        """Take the facts from the contents of a checkpoint."""
        return cls(**{one.name: contents[one.name] for one in fields(cls)})

    def scale_of(self, channels: Sequence[str], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up the mean and the deviation to scale channels by, (channels,) each.

        Args:
            channels: the channels' names.
            values: a window of each channel, (rows, channels), to which channels unseen in training are scaled.
        """
        known = dict(zip(self.channels, zip(self.mean, self.deviation, strict=True), strict=True))
        scales = [
            known[name] if name in known else (column.mean(), column.std() or 1.0)
            for name, column in zip(channels, values.T, strict=True)
        ]
        mean, deviation = np.array(scales).T
        return mean, deviation

    def changed_fields(self, now: "DataFacts", may_be_subset: bool = False) -> list[str]:
        """List the facts that differ from the present ones, by their names in messages.

        Args:
            now: the present facts.
            may_be_subset: whether a subset of the series of a long CSV counts as the same data.
        """
        compared = self.of_series(now.channels) if may_be_subset and self.is_long and now.is_long else self
        before, after = asdict(compared), asdict(now)
        return [
            words
            for name, words in _COMPARED.items()
            if not (name in _MAY_BE_MISSING and not before[name]) and not _same(before[name], after[name])
        ]

    def of_series(self, names: Sequence[str]) -> "DataFacts":
        """Select the known facts about some series of a long CSV."""
        number_of = {name: number for number, name in enumerate(self.channels)}
        numbers = [number_of[name] for name in names if name in number_of]

        def chosen(facts: dict, *lists: str) -> dict:
            return {name: [facts[name][number] for number in numbers] for name in lists if facts[name]}

        explainer = self.explainer
        if explainer:
            explainer = {**explainer, **chosen(explainer, "channels", "coefficients", "shares")}
        own = chosen(asdict(self), "channels", "mean", "deviation", "training_hashes", "validation_hashes")
        return replace(self, **own, explainer=explainer)


def _same(before: object, now: object, abs_tol: float = 0.0) -> bool:
    """Compare nested lists and dictionaries; numbers may differ by the rounding of another machine."""
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-9, abs_tol=abs_tol)
    if isinstance(before, dict) and isinstance(now, dict):
        # A coefficient near 0 may be pure rounding error.
        return before.keys() == now.keys() and all(_same(before[name], now[name], 1e-9) for name in before)
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(_same(a, b, abs_tol) for a, b in zip(before, now, strict=True))
    return before == now
