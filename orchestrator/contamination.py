"""Examples that are there twice, exactly or nearly, in training and in a gate split or in one file: they make a gate flatter.

Nearly the same is a cosine similarity of character 5-grams of at least 0.9: a changed word in a sentence, not a changed topic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.neighbors import NearestNeighbors

NEAR = 0.9


@dataclass(frozen=True)
class Overlap:
    """Training texts of one task that another's gate split, or its own, has too."""

    train_task: str
    gate_task: str
    num_exact: int
    """Equal but for case and spaces."""
    num_near: int
    """Not equal, and nearly the same."""
    sample: str
    """One of the training texts."""

    @property
    def sentence(self) -> str:
        """The finding in words."""
        whose = "its own gate split" if self.gate_task == self.train_task else f"the gate split of {self.gate_task}"
        counts = [f"{self.num_exact} equal" if self.num_exact else "", f"{self.num_near} nearly equal" if self.num_near else ""]
        return f"training examples are in {whose}, too ({' and '.join(filter(None, counts))}), such as {self.sample[:80]!r}"


def find_overlaps(train: Mapping[str, Sequence[str]], gate: Mapping[str, Sequence[str]]) -> list[Overlap]:
    """Compare the training texts of every task with the gate texts of every task, its own included."""
    gates = {task: (set(map(_normalised, texts)), _vectors(texts).T.tocsc()) for task, texts in gate.items() if texts}
    found = []
    for train_task, texts in train.items():
        vectors = _vectors(texts) if texts else None
        for gate_task, (known, gate_vectors) in gates.items():
            if vectors is None:
                continue
            exact = np.array([_normalised(text) in known for text in texts])
            near = _nearest(vectors, gate_vectors) >= NEAR
            if near.any() or exact.any():
                sample = texts[int(np.argmax(exact)) if exact.any() else int(np.argmax(near))]
                found.append(Overlap(train_task, gate_task, int(exact.sum()), int((near & ~exact).sum()), sample))
    return found


def near_texts(texts: Sequence[str]) -> dict[int, int]:
    """Texts that are equal to or nearly the same as another: position -> that of the nearest one.

    Time grows with the square of their number.
    """
    if len(texts) < 2:
        return {}
    distances, nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(_vectors(texts)).kneighbors()
    return {index: int(nearest[index, 0]) for index in np.flatnonzero(distances[:, 0] <= 1 - NEAR).tolist()}


def _vectors(texts: Sequence[str]) -> csr_matrix:
    """Counts of character 5-grams, of length one."""
    vectorizer = HashingVectorizer(
        analyzer="char_wb", ngram_range=(5, 5), n_features=2**20, alternate_sign=False, dtype=np.float32
    )
    return vectorizer.transform(texts)


def _nearest(vectors: csr_matrix, others: csr_matrix) -> np.ndarray:
    """Largest similarity of each row; the vectors have length one."""
    return np.asarray((vectors @ others).max(axis=1).todense()).ravel()


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())
