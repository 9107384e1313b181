"""Batches of few fixed shapes, each a pure function of a seed and its number, so that a resumed run goes on with the next one.

Dims: B rows, P pairs of a row and another of its options, T input positions, U target positions, N sentences, H hidden.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bases.corpus import corrupt_spans, target_length, text_length
from bases.mixture import Drawn, Mixture
from multilora.errors import DataError
from multilora.prompt import encode_prompt

PAD, EOS, IGNORED = 0, 1, -100
SPAN_INPUT_TOKENS = 128
INPUT_LENGTHS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Fine steps: with 32 and 64 as the shortest, 44 % of the sentences' positions only filled up."""
TARGET_LENGTHS = (4, 8, 32, 64)
LEAST_EXAMPLES_IN_CHUNK = 1024
"""At least so many, and half the tokens of a batch: sorted by length, most batches are then full."""
SPAN_BATCHES_IN_CHUNK = 16
MAX_SENTENCE_TOKENS = 64
MAX_OTHERS = 6
"""Wrong options of an example that its answer is held against."""
PAIRS_MULTIPLE = 32
Encoded = tuple[Sequence[int], Sequence[int], Sequence[Sequence[int]]]
"""Prompt, answer, and wrong options."""


@dataclass(frozen=True)
class Others:
    """Wrong options of a batch's rows. Pairs that fill up belong to row B and have no target that counts."""

    targets_PU: Tensor
    row_P: Tensor
    place_P: Tensor
    """Which of its row's wrong options it is, from 1."""


@dataclass(frozen=True)
class Batch:
    """Padded rows; targets that do not count are -100."""

    ids_BT: Tensor
    targets_BU: Tensor
    kind: str
    num_tokens: int
    """Input and target tokens that are no padding."""
    vectors_RH: Tensor | None = None
    """What the encoder's mean state should point to, for the first R rows: all that are no padding."""
    others: Others | None = None


class SpanChunks(Dataset[list[Batch]]):
    """Chunk number -> batches of span corruption at random places of the corpus."""

    def __init__(self, tokens: NDArray[np.uint16], first_sentinel: int, batch_tokens: int, seed: int) -> None:
        self.tokens, self.first_sentinel, self.seed = tokens, first_sentinel, seed
        self.num_rows = max(1, batch_tokens // SPAN_INPUT_TOKENS)

    def __getitem__(self, number: int) -> list[Batch]:
        rng = np.random.default_rng((self.seed, 0, number))
        length = text_length(SPAN_INPUT_TOKENS)
        batches = []
        for _ in range(SPAN_BATCHES_IN_CHUNK):
            starts = rng.integers(0, len(self.tokens) - length, self.num_rows)
            rows = [
                corrupt_spans(self.tokens[start : start + length].astype(np.int64), self.first_sentinel, EOS, rng)
                for start in starts
            ]
            width = -target_length(length) // 32 * -32
            batches.append(padded("spans", rows, self.num_rows, SPAN_INPUT_TOKENS, width))
        return batches


class InstructionChunks(Dataset[list[Batch]]):
    """Chunk number -> batches of worded examples, sorted into few shapes."""

    def __init__(self, mixture: Mixture, tokenizer: Any, batch_tokens: int, seed: int) -> None:
        self.mixture, self.tokenizer, self.batch_tokens, self.seed = mixture, tokenizer, batch_tokens, seed

    def __getitem__(self, number: int) -> list[Batch]:
        rng = random.Random(f"{self.seed} instructions {number}")
        num_examples = max(LEAST_EXAMPLES_IN_CHUNK, self.batch_tokens // 2)
        encoded = [row for _ in range(num_examples) if (row := encode(self.mixture.draw(rng), self.tokenizer, rng))]
        batches = []
        by_width: dict[int, list[Encoded]] = {width: [] for width in TARGET_LENGTHS}
        for row in encoded:
            by_width[_at_least(max(map(len, (row[1], *row[2]))), TARGET_LENGTHS)].append(row)
        for width, rows in by_width.items():
            rows.sort(key=lambda row: len(row[0]), reverse=True)
            while rows:
                length = _at_least(len(rows[0][0]), INPUT_LENGTHS)
                num_rows = max(1, self.batch_tokens // length)
                batch = padded("instructions", [row[:2] for row in rows[:num_rows]], num_rows, length, width)
                batches.append(replace(batch, others=_others([row[2] for row in rows[:num_rows]], num_rows, width)))
                rows = rows[num_rows:]
        rng.shuffle(batches)
        return batches


class SentenceChunks(Dataset[list[Batch]]):
    """Chunk number -> batches of sentences with the vectors that a sentence encoder gives them."""

    def __init__(
        self, sentences: Sequence[str], vectors_NH: NDArray[np.float16], tokenizer: Any, batch_tokens: int, seed: int
    ) -> None:
        self.sentences, self.vectors_NH, self.tokenizer = sentences, vectors_NH, tokenizer
        self.batch_tokens, self.seed = batch_tokens, seed

    def __getitem__(self, number: int) -> list[Batch]:
        rng = np.random.default_rng((self.seed, 2, number))
        chosen = rng.integers(0, len(self.sentences), max(LEAST_EXAMPLES_IN_CHUNK, self.batch_tokens // 2))
        encoded = self.tokenizer([self.sentences[index] for index in chosen], truncation=True, max_length=MAX_SENTENCE_TOKENS)
        rows = sorted(zip(encoded["input_ids"], chosen, strict=True), key=lambda row: len(row[0]), reverse=True)
        batches = []
        while rows:
            length = _at_least(len(rows[0][0]), INPUT_LENGTHS)
            num_rows = self.batch_tokens // length
            batch = padded("sentences", [(ids, ()) for ids, _ in rows[:num_rows]], num_rows, length, 1)
            vectors_RH = torch.from_numpy(self.vectors_NH[[index for _, index in rows[:num_rows]]])
            batches.append(replace(batch, vectors_RH=vectors_RH))
            rows = rows[num_rows:]
        return [batches[index] for index in rng.permutation(len(batches))]


def encode(drawn: Drawn, tokenizer: Any, rng: random.Random) -> Encoded | None:
    """Tokenise an example as training and serving do; None where its labels are too long, together or one."""
    try:
        prompt = encode_prompt(drawn.prompt_format(INPUT_LENGTHS[-1]), {"text": drawn.text}, tokenizer)
    except DataError:
        return None
    others = rng.sample(drawn.wrong, min(len(drawn.wrong), MAX_OTHERS))
    answers_ids = tokenizer([drawn.answer, *others])["input_ids"]
    return (prompt.token_ids, answers_ids[0], answers_ids[1:]) if max(map(len, answers_ids)) <= TARGET_LENGTHS[-1] else None


def _others(options: Sequence[Sequence[Sequence[int]]], num_rows: int, width: int) -> Others:
    """Write the wrong options of some rows."""
    pairs = [(row, place, ids) for row, every in enumerate(options) for place, ids in enumerate(every, 1)]
    num_pairs = max(1, -(-len(pairs) // PAIRS_MULTIPLE)) * PAIRS_MULTIPLE
    targets_PU = padded("", [((), ids) for _, _, ids in pairs], num_pairs, 1, width).targets_BU
    filling = [(num_rows, 1)] * (num_pairs - len(pairs))
    row_P, place_P = torch.tensor([pair[:2] for pair in pairs] + filling).unbind(1)
    return Others(targets_PU, row_P, place_P)


def padded(kind: str, rows: Sequence[tuple[Any, Any]], num_rows: int, length: int, width: int) -> Batch:
    """Write rows into one shape; missing rows hold an end token that no target belongs to."""
    ids_BT = np.full((num_rows, length), PAD, dtype=np.int32)
    targets_BU = np.full((num_rows, width), IGNORED, dtype=np.int32)
    ids_BT[len(rows) :, 0] = EOS
    for index, (source, target) in enumerate(rows):
        ids_BT[index, : len(source)] = source
        targets_BU[index, : len(target)] = target
    num_tokens = sum(len(source) + len(target) for source, target in rows)
    return Batch(torch.from_numpy(ids_BT), torch.from_numpy(targets_BU), kind, num_tokens)


def stream(chunks: Dataset[list[Batch]], position: tuple[int, int], num_loaders: int) -> Iterator[tuple[Batch, tuple[int, int]]]:
    """Give batches from (chunk, batch in chunk) on, each with the position that follows it; loaders start at once."""
    numbers = range(position[0], position[0] + 10_000_000)
    loader = DataLoader(chunks, batch_size=None, sampler=numbers, num_workers=num_loaders, collate_fn=_as_it_is)
    return _batches(zip(numbers, iter(loader), strict=False), position[1])


def _batches(chunks: Iterable[tuple[int, list[Batch]]], start: int) -> Iterator[tuple[Batch, tuple[int, int]]]:
    for number, batches in chunks:
        for index in range(start, len(batches)):
            is_last = index + 1 == len(batches)
            yield batches[index], (number + 1, 0) if is_last else (number, index + 1)
        start = 0


def _as_it_is(batches: list[Batch]) -> list[Batch]:
    return batches


def _at_least(length: int, allowed: Sequence[int]) -> int:
    return next(choice for choice in allowed if choice >= length)
