"""Notes: free text that is known in advance, as the hidden states of an LLM that read its sentences."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
import torch

# The most principal components of sentences, and of the notes that they form.
_SENTENCE_COMPONENTS, COMPONENTS = 128, 96

# A sentence that training did not see is a mixture of the most similar ones that it saw: so words that are new to a
# run, whose states may lie anywhere, have an effect that it has learned. The temperature is that of cosines.
_NEIGHBORS, _TEMPERATURE = 5, 0.05
_SAME = 0.999

# The most sentences of training that are kept, and similarities that are computed at a time.
_KEPT_SENTENCES, _CHUNK = 10_000, 2**24

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\s*\n\s*")


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences; a text that is not empty has at least one."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]


@dataclass(frozen=True, eq=False)
class NoteStates:
    """What an LLM read.

    Attributes:
        states: a vector for each sentence, (d_llm,) float32.
        sentences: the sentences of each text that were read.
        llm: a fingerprint of the LLM, see `utils.llm.notes`.
    """

    states: Mapping[str, np.ndarray]
    sentences: Mapping[str, Sequence[str]]
    llm: str

    def of(self, sentences: Sequence[str]) -> np.ndarray:
        """Stack the states of sentences, (sentences, d_llm) float64."""
        return np.stack([self.states[sentence] for sentence in sentences]).astype(np.float64)


def is_empty(values: pd.Series) -> np.ndarray:
    """Return for each cell whether it says nothing."""
    return values.isna().to_numpy() | (values.astype(str).str.strip() == "").to_numpy()


@dataclass(frozen=True, eq=False)
class NoteColumn:
    """The encoding of a column of notes: the mean of a note's sentences, by principal components.

    Attributes:
        has_empty: whether training rows have no note; if so, the first component tells that there is one.
        sentence_mean, sentence_projection: of the states to the components of sentences, (d_llm,) and
            (d_llm, sentence components).
        seen: the components of training's sentences, (sentences, sentence components) float32.
        mean, projection: of the means of a note's sentences to components of unit variance, (sentence components,) and
            (sentence components, components).
    """

    name: str
    has_empty: bool
    sentence_mean: np.ndarray
    sentence_projection: np.ndarray
    seen: np.ndarray
    mean: np.ndarray
    projection: np.ndarray

    @property
    def width(self) -> int:
        """The number of components."""
        return self.has_empty + self.projection.shape[1]

    @classmethod
    def fit(cls, values: pd.Series, states: NoteStates) -> Self:
        """Fit the components to a column's training rows."""
        empty = is_empty(values)
        texts = values[~empty].astype(str).unique()
        sentences = sorted({sentence for text in texts for sentence in states.sentences[text]})
        rows = states.of(sentences)
        mean, scale, _, directions = _principal_components(rows, _SENTENCE_COMPONENTS)
        projection = directions.T / scale[:, None]
        kept = np.linspace(0, len(rows) - 1, min(len(rows), _KEPT_SENTENCES)).astype(int)
        seen = ((rows[kept] - mean) @ projection).astype(np.float32)
        unfitted = np.zeros(len(directions)), np.eye(len(directions))
        column = cls(str(values.name), bool(empty.any()), mean, projection, seen, *unfitted)
        notes = column._means_of_sentences(texts, states)
        mean, scale, singular, directions = _principal_components(notes, COMPONENTS)
        unit = directions.T / singular * np.sqrt(len(notes)) / scale[:, None]
        return cls(**{**vars(column), "mean": mean, "projection": unit})

    def encode(self, values: pd.Series, states: NoteStates) -> np.ndarray:
        """Encode notes, (rows, components); NaN for an empty cell."""
        codes, texts = pd.factorize(values.astype(str).where(~is_empty(values)))
        encoded = np.full((len(texts) + 1, self.width), np.nan)  # the last row is that of empty cells
        if len(texts):
            encoded[:-1, : self.has_empty] = 1
            notes = self._means_of_sentences(texts, states)
            encoded[:-1, self.has_empty :] = (notes - self.mean) @ self.projection
        return encoded[codes]

    def _means_of_sentences(self, texts: Sequence[str], states: NoteStates) -> np.ndarray:
        """Compute the mean components of each text's sentences, (texts, sentence components)."""
        parts = [states.sentences[text] for text in texts]
        codes, sentences = pd.factorize(np.array([one for part in parts for one in part], object))
        components = self._mix((states.of(sentences) - self.sentence_mean) @ self.sentence_projection)
        counts = np.array([len(part) for part in parts])
        return np.add.reduceat(components[codes], np.cumsum(counts) - counts, axis=0) / counts[:, None]

    def _mix(self, components: np.ndarray) -> np.ndarray:
        """Replace the components of sentences that training did not see by those of similar sentences."""
        seen, result, count = _unit(self.seen), components.copy(), min(_NEIGHBORS, len(self.seen))
        for own in np.array_split(np.arange(len(components)), len(components) * len(seen) // _CHUNK + 1):
            cosines = _unit(components[own]).astype(np.float32) @ seen.T
            nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
            cosines = np.take_along_axis(cosines, nearest, axis=1)
            largest = cosines.max(axis=1, keepdims=True)
            weights = np.exp((cosines - largest) / _TEMPERATURE)
            mixtures = np.einsum("bk,bkc->bc", weights / weights.sum(axis=1, keepdims=True), self.seen[nearest])
            is_new = largest[:, 0] < _SAME
            result[own[is_new]] = mixtures[is_new]
        return result

    def as_dict(self) -> dict:
        """Convert to plain values and tensors, as a checkpoint stores them."""
        return {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_dict(cls, kept: Mapping) -> Self:
        """Restore a column from `as_dict`."""
        return cls(
            **{name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in kept.items()}
        )


def _principal_components(rows: np.ndarray, at_most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find the principal components of standardized rows.

    Returns:
        mean and scale of the columns; singular values, and directions, (components, columns).
    """
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1)
    _, singular, directions = np.linalg.svd((rows - mean) / scale, full_matrices=False)
    kept = min(at_most, int((singular > 1e-6 * singular.max(initial=1e-12)).sum()))
    return mean, scale, singular[:kept], directions[:kept]


def _unit(rows: np.ndarray) -> np.ndarray:
    """Scale rows to length 1; a row of zeros stays."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
