"""Pseudo-labels: which phrases fit a sentence, by the cosine similarity of a sentence encoder.

A small base reads too little text to learn which option a text is about; an encoder that knows labels any number of sentences.
Its similarities become one more kind of example of the mixture (`mixture.draw_match`). Nothing of the judging tasks is read.

Dims: N sentences, P phrases, H hidden, T input positions.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  the field's own abbreviation
from torch import Tensor

from multilora.base_model import FrozenBase, load_base
from multilora.spec import BaseSpec

TEACHER = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS_AT_ONCE = 64
MAX_TOKENS = 64
SENTENCES_AT_ONCE = 2000
MAX_PHRASES = 4500
"""Of each kind: labels, words, and phrases of several words."""
MAX_WORDS = 4
CLAUSE_END = re.compile(r"\w+:|[^a-z ]+")
"""Also what says who is speaking."""
NUM_FITTING, NUM_NEAR = 3, 8
NEAR_RANKS = range(40, 400)
LEAST_SIMILARITY, FIT_MARGIN, NEAR_MARGIN = 0.25, 0.04, 0.1
"""A phrase fits at this cosine at least, this close to the best; a near one that is wrong is this far from all that fit."""


@dataclass(frozen=True)
class Match:
    """A sentence, the numbers of the phrases that fit it best, and of some that are close but fit worse."""

    text: str
    fitting: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True)
class Matches:
    """All labelled sentences and the phrases that they refer to."""

    phrases: Sequence[str] = ()
    rows: Sequence[Match] = ()

    def write(self, file: Path) -> None:
        """Write one JSON document, whole or not there."""
        partial = file.with_suffix(".partial")
        with lzma.open(partial, "wt", encoding="utf-8") as stream:
            json.dump(asdict(self), stream)
        os.replace(partial, file)

    @classmethod
    def read(cls, file: Path) -> Matches:
        """Read what `write` wrote; nothing where there is no such file."""
        if not file.exists():
            return cls()
        with lzma.open(file, "rt", encoding="utf-8") as stream:
            found = json.load(stream)
        rows = [Match(row["text"], tuple(row["fitting"]), tuple(row["near"])) for row in found["rows"]]
        return cls(found["phrases"], rows)


def label_sentences(
    sentences: Sequence[str], phrases: Sequence[str], seed: int, show: Callable[[float, str], None]
) -> tuple[Matches, Tensor]:
    """Label each sentence that some phrase fits, and return the vectors [N, H] of those beside them.

    A phrase that is similar to everything is marked down by as much.
    """
    base = load_base(BaseSpec(model=TEACHER))
    phrases_PH = embed(base, phrases)
    rng = random.Random(seed)
    mean_P: Tensor | None = None
    rows: list[Match] = []
    vectors: list[Tensor] = []
    for start in range(0, len(sentences), SENTENCES_AT_ONCE):
        texts = sentences[start : start + SENTENCES_AT_ONCE]
        vectors_NH = embed(base, texts)
        similarity_NP = vectors_NH @ phrases_PH.T
        mean_P = similarity_NP.mean(0) if mean_P is None else mean_P
        best = (similarity_NP - mean_P).topk(min(NEAR_RANKS.stop, len(phrases)), dim=1)
        found = zip(texts, vectors_NH, best.values, best.indices, similarity_NP, strict=True)
        for text, vector_H, values_R, places_R, similarity_P in found:
            ranked = [(value, place) for value, place in zip(values_R.tolist(), places_R.tolist(), strict=True)
                      if not is_said(phrases[place], text)]  # fmt: skip
            if ranked and float(similarity_P[ranked[0][1]]) >= LEAST_SIMILARITY:
                rows.append(_match(text, ranked, rng))
                vectors.append(vector_H)
        show((start + len(texts)) / len(sentences), f"{len(rows)} of {start + len(texts)} sentences labelled")
    return Matches(phrases, rows), torch.stack(vectors)


def is_said(phrase: str, text: str) -> bool:
    """Whether a word of the phrase stands in the text, perhaps with another ending: to find it would be no more than to copy."""
    lowered = text.lower()
    return any(word[:5].rstrip("sy") in lowered for word in phrase.lower().split() if len(word) > 3)


def _match(text: str, ranked: Sequence[tuple[float, int]], rng: random.Random) -> Match:
    best = ranked[0][0]
    fitting = [(value, place) for value, place in ranked[:NUM_FITTING] if value >= best - FIT_MARGIN]
    near = [place for value, place in ranked[NEAR_RANKS.start :] if value < fitting[-1][0] - NEAR_MARGIN]
    return Match(text, tuple(place for _, place in fitting), tuple(rng.sample(near, min(NUM_NEAR, len(near)))))


@torch.no_grad()
def embed(base: FrozenBase, texts: Sequence[str]) -> Tensor:
    """Return unit vectors [N, H]: mean states of the encoder, as its authors use it."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: list[Tensor] = []
    for start in range(0, len(order), TEXTS_AT_ONCE):
        batch = [texts[index] for index in order[start : start + TEXTS_AT_ONCE]]
        encoded = base.tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(base.device)
        states_NTH = base.model(**encoded).last_hidden_state
        mask_NT1 = encoded["attention_mask"][..., None]
        found.append((states_NTH * mask_NT1).sum(1) / mask_NT1.sum(1))
    vectors_NH = torch.empty_like(torch.cat(found))
    vectors_NH[torch.tensor(order)] = torch.cat(found)
    return F.normalize(vectors_NH, dim=-1)


def choose_sentences(texts: Mapping[str, Sequence[str]], split: Callable[[str], list[str]], number: int, seed: int) -> list[str]:
    """Choose so many sentences, from each file of the corpus as many where it has them."""
    rng = random.Random(seed)
    per_file = {name: [part for line in lines[: number // 4] for part in split(line)] for name, lines in texts.items()}
    for found in per_file.values():
        rng.shuffle(found)
    chosen: list[str] = []
    for index, name in enumerate(sorted(per_file, key=lambda name: len(per_file[name]))):
        chosen += per_file[name][: (number - len(chosen)) // (len(per_file) - index)]
    rng.shuffle(chosen)
    return chosen


def choose_phrases(options: Counter[str], words: Sequence[str], sentences: Sequence[str]) -> list[str]:
    """Take the commonest labels of the instruction tasks, frequent words, and the commonest phrases of the sentences.

    Without the last nearly all that fits a sentence is one word (92 %), and people's labels are often several.
    """
    labels = [label for label, _ in options.most_common() if len(label) > 2 and len(label.split()) <= MAX_WORDS]
    return list(dict.fromkeys([*labels[:MAX_PHRASES], *words[:MAX_PHRASES], *_common_phrases(sentences, words)]))


def _common_phrases(sentences: Sequence[str], words: Sequence[str]) -> list[str]:
    """Find what is often said in two to four words of which the first and the last are among these."""
    outer = set(words)
    counts: Counter[str] = Counter()
    for sentence in sentences:
        for clause in CLAUSE_END.split(sentence.lower()):
            said = clause.split()
            starts = [place for place, word in enumerate(said) if word in outer]
            counts.update(" ".join(said[start : end + 1]) for start in starts for end in starts if 0 < end - start < MAX_WORDS)
    return [phrase for phrase, _ in counts.most_common(MAX_PHRASES)]
