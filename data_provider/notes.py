"""Notes: free text that is known in advance, as the hidden states of an LLM that read its sentences."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
import torch

# The most principal components of notes, and the most coordinates in which sentences are compared.
COMPONENTS, _COORDINATES = 96, 128

# A sentence that training did not see is replaced by a mixture of the most similar ones that it saw, since effects are
# learned only near those. The temperature is that of a softmax of cosines.
_NEIGHBORS, _TEMPERATURE = 5, 0.05

# Sentences with at least this cosine are the same.
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
    """The encoding of a column of notes: principal components of the mean state of a note's sentences.

    Attributes:
        has_empty: whether training rows have no note; if so, the first component tells that there is one.
        mean, projection: of states to components, which have unit variance over the notes, (d_llm,) and
            (d_llm, components).
        center, axes: of states to coordinates in which sentences are compared, (d_llm,) and (d_llm, coordinates).
        seen, seen_components: the coordinates and the components of training's sentences, (sentences, coordinates)
            and (sentences, components), float32.
    """

    name: str
    has_empty: bool
    mean: np.ndarray
    projection: np.ndarray
    center: np.ndarray
    axes: np.ndarray
    seen: np.ndarray
    seen_components: np.ndarray

    @property
    def width(self) -> int:
        """The number of components."""
        return self.has_empty + self.projection.shape[1]

    @classmethod
    def fit(cls, values: pd.Series, states: NoteStates) -> Self:
        """Fit the components to a column's training rows."""
        empty = is_empty(values)
        parts = [states.sentences[text] for text in values[~empty].astype(str).unique()]
        codes, sentences = pd.factorize(np.array([one for part in parts for one in part], object), sort=True)
        rows = states.of(sentences)
        notes = _means(rows[codes], parts)
        mean, scale, singular, directions = _principal_components(notes, COMPONENTS)
        projection = directions.T / singular * np.sqrt(len(notes)) / scale[:, None]
        center, scale, _, directions = _principal_components(rows, _COORDINATES)
        axes = directions.T / scale[:, None]
        kept = rows[np.linspace(0, len(rows) - 1, min(len(rows), _KEPT_SENTENCES)).astype(int)]
        seen, components = (kept - center) @ axes, (kept - mean) @ projection
        described = str(values.name), bool(empty.any()), mean, projection, center, axes
        return cls(*described, seen.astype(np.float32), components.astype(np.float32))

    def encode(self, values: pd.Series, states: NoteStates) -> np.ndarray:
        """Encode notes, (rows, components); NaN for an empty cell."""
        codes, texts = pd.factorize(values.astype(str).where(~is_empty(values)))
        encoded = np.full((len(texts) + 1, self.width), np.nan)  # the last row is that of empty cells
        if len(texts):
            parts = [states.sentences[text] for text in texts]
            sentence_of, sentences = pd.factorize(np.array([one for part in parts for one in part], object))
            encoded[:-1, : self.has_empty] = 1
            encoded[:-1, self.has_empty :] = _means(self._encode_sentences(states.of(sentences))[sentence_of], parts)
        return encoded[codes]

    def _encode_sentences(self, states: np.ndarray) -> np.ndarray:
        """Compute the components of sentences; for one that training did not see, mix those of similar ones."""
        result, coordinates = (states - self.mean) @ self.projection, _unit((states - self.center) @ self.axes)
        seen, count = _unit(self.seen), min(_NEIGHBORS, len(self.seen))
        for own in np.array_split(np.arange(len(states)), len(states) * len(seen) // _CHUNK + 1):
            cosines = coordinates[own].astype(np.float32) @ seen.T
            nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
            cosines = np.take_along_axis(cosines, nearest, axis=1)
            largest = cosines.max(axis=1, keepdims=True)
            weights = np.exp((cosines - largest) / _TEMPERATURE)
            weights /= weights.sum(axis=1, keepdims=True)
            mixtures = np.einsum("bk,bkc->bc", weights, self.seen_components[nearest])
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


def _means(rows: np.ndarray, parts: Sequence[Sequence[str]]) -> np.ndarray:
    """Average the rows of each text's sentences, (texts, columns); the rows are those of all parts, in order."""
    counts = np.array([len(part) for part in parts])
    return np.add.reduceat(rows, np.cumsum(counts) - counts, axis=0) / counts[:, None]


def _unit(rows: np.ndarray) -> np.ndarray:
    """Scale rows to length 1; a row of zeros stays."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
