"""Find training material that shares text with the test rows of the tasks that judge the base."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NUM_WORDS = 13
"""Length of a shared word sequence that counts. Source: GPT-3's contamination study."""
MIN_WHOLE_WORDS = 5
"""A test text shorter than the sequence counts where it is a whole training text, unless it is as short as a greeting."""


@dataclass(frozen=True)
class JudgingTexts:
    """The test texts, as hashes of word sequences and of whole texts."""

    sequences: frozenset[int]
    wholes: frozenset[int]
    num_texts: int

    @classmethod
    def read(cls, data: Path) -> JudgingTexts:
        """Read tasks/*/*test.jsonl; without them nothing overlaps, and num_texts says so."""
        sequences: set[int] = set()
        wholes: set[int] = set()
        num_texts = 0
        for file in sorted((data / "tasks").glob("*/*test.jsonl")):
            with file.open(encoding="utf-8") as stream:  # str.splitlines would cut at other line ends inside a text too
                tests = [_words(json.loads(line)["text"]) for line in stream]
            sequences.update(sequence for words in tests for sequence in _sequences(words))
            wholes.update(hash(tuple(words)) for words in tests if len(words) >= MIN_WHOLE_WORDS)
            num_texts += len(tests)
        return cls(frozenset(sequences), frozenset(wholes), num_texts)

    def has_none_of(self, text: str) -> bool:
        """Whether a training text shares nothing with them."""
        if not self.num_texts:
            return True
        words = _words(text)
        return hash(tuple(words)) not in self.wholes and self.sequences.isdisjoint(_sequences(words))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _sequences(words: list[str]) -> Iterable[int]:
    return (hash(tuple(words[start : start + NUM_WORDS])) for start in range(len(words) - NUM_WORDS + 1))
