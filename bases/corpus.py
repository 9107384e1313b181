"""Plain text for a T5: which lines are read, the tokenizer, and span corruption. Knows no model."""

from __future__ import annotations

import lzma
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

Ids = NDArray[np.int64]

SHARES = {"literature_gutenberg": 0.25, "medquad": 0.3, "dialogue_sgd": 0.6, "us_presidents": 0.5}
"""Part of a file's lines that is read, where it is not all of them: old novels are 61 % of the corpus, medquad is formulaic."""
SPECIAL = ("<pad>", "</s>", "<unk>")
NUM_SENTINELS = 100
VOCAB_SIZE = 10240
"""Sentinels included. With 8k pieces the teacher's cosine to itself is .82, with 10k .85, with 16k .89, at 5 MB more."""
TOKENIZER_CHARACTERS = 8_000_000
NOISE_DENSITY, MEAN_SPAN_TOKENS = 0.15, 3


def read_texts(data: Path, part: float, seed: int) -> dict[str, list[str]]:
    """Read the corpus, file name -> shuffled lines: of each file its share, and of that `part`."""
    rng = random.Random(seed)
    texts = {}
    for file in sorted((data / "corpus").glob("*.txt.xz")):
        name = file.name.removesuffix(".txt.xz")
        share = SHARES.get(name, 1.0) * part
        with lzma.open(file, "rt", encoding="utf-8") as stream:
            texts[name] = [line.strip() for line in stream if rng.random() < share]
        rng.shuffle(texts[name])
    return texts


def mixed_lines(texts: Mapping[str, Sequence[str]], seed: int) -> list[str]:
    """Put the lines of all files into one random order."""
    lines = [line for file_lines in texts.values() for line in file_lines]
    random.Random(seed).shuffle(lines)
    return lines


def build_tokenizer(teacher: Any, texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a Unigram tokenizer of the teacher's commonest pieces: <pad> </s> <unk>, pieces, <extra_id_99> ... <extra_id_0>.

    `teacher` is a lower-casing WordPiece tokenizer. That nearly every word is the same piece as the teacher's is worth more
    than pieces fitted to the text: with those a text had a sixth more tokens, and the teacher itself, given their vectors, had
    a cosine of .57 to its own sentence vectors; given these, .85. Its single characters are kept, so that most words have pieces.
    """
    pieces = teacher.get_vocab()
    counts: Counter[str] = Counter()
    for text in _up_to(texts, TOKENIZER_CHARACTERS):
        counts.update(teacher.tokenize(text))
    characters = [piece for piece in pieces if len(piece.removeprefix("##")) == 1 and piece.isascii()]
    common = [piece for piece, _ in counts.most_common() if piece not in teacher.all_special_tokens]
    kept = list(dict.fromkeys([*characters, *common, *pieces]))[: vocab_size - len(SPECIAL) - NUM_SENTINELS]
    rows = [(piece, 0.0) for piece in SPECIAL]
    rows += [(_unigram_name(piece), log((counts[piece] + 0.5) / counts.total())) for piece in kept]
    made = Tokenizer(models.Unigram(rows, unk_id=SPECIAL.index("<unk>")))
    made.normalizer = normalizers.BertNormalizer()
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), metaspace])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))])
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(NUM_SENTINELS))]
    tokenizer.add_special_tokens({"additional_special_tokens": sentinels})
    return tokenizer


def teacher_piece(piece: str, teacher: Any) -> str:
    """Return the teacher's name of one of our pieces."""
    special = {"<pad>": teacher.pad_token, "</s>": teacher.sep_token, "<unk>": teacher.unk_token}
    if piece.startswith("<extra_id_"):
        return str(teacher.mask_token)
    return str(special.get(piece) or (piece[1:] if piece.startswith("▁") else f"##{piece}"))


def sentinel_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of <extra_id_0>; the following sentinels count down from it."""
    return int(tokenizer.convert_tokens_to_ids("<extra_id_0>"))


def encode_lines(tokenizer: PreTrainedTokenizerFast, lines: Sequence[str]) -> NDArray[np.uint16]:
    """Tokenise all lines into one array, each ended by </s>."""
    backend, parts = tokenizer.backend_tokenizer, []
    for start in range(0, len(lines), 2000):
        for encoding in backend.encode_batch_fast(lines[start : start + 2000]):
            parts.append(np.array(encoding.ids, dtype=np.uint16))
    return np.concatenate(parts)


def save_array(array: NDArray[Any], file: Path) -> None:
    """Write an array so that the file is whole or not there."""
    partial = file.with_suffix(".partial.npy")
    np.save(partial, array)
    os.replace(partial, file)


def text_length(input_length: int) -> int:
    """Return how many tokens of text become exactly `input_length` tokens of corrupted input, </s> included."""
    length = input_length
    while True:
        num_noise, num_spans = _noise(length + 1)
        if length + 1 - num_noise + num_spans + 1 > input_length:
            return length
        length += 1


def target_length(num_text_tokens: int) -> int:
    """Return the length of the target that belongs to so many tokens of text, </s> included."""
    num_noise, num_spans = _noise(num_text_tokens)
    return num_noise + num_spans + 1


def corrupt_spans(ids: Ids, first_sentinel: int, eos: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """Hide spans: the input shows a sentinel for each, the target each sentinel and what it hides. Source: T5, section 3.1.4."""
    num_noise, num_spans = _noise(len(ids))
    kept, hidden = _parts(len(ids) - num_noise, num_spans, rng), _parts(num_noise, num_spans, rng)
    source: list[Ids] = []
    target: list[Ids] = []
    start = 0
    for number, (num_kept, num_hidden) in enumerate(zip(kept, hidden, strict=True)):
        sentinel = np.array([first_sentinel - number])
        middle, end = start + num_kept, start + num_kept + num_hidden
        source += [ids[start:middle], sentinel]
        target += [sentinel, ids[middle:end]]
        start = end
    return np.concatenate([*source, [eos]]), np.concatenate([*target, [eos]])


def _up_to(texts: Sequence[str], num_characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        num_characters -= len(text)
        if num_characters < 0:
            return


def _unigram_name(piece: str) -> str:
    return piece.removeprefix("##") if piece.startswith("##") else f"▁{piece}"


def _noise(length: int) -> tuple[int, int]:
    num_noise = max(1, round(length * NOISE_DENSITY))
    return num_noise, max(1, round(num_noise / MEAN_SPAN_TOKENS))


def _parts(total: int, num_parts: int, rng: np.random.Generator) -> Ids:
    """Cut `total` into so many lengths of at least one, every cut as likely."""
    cuts = np.sort(rng.choice(total - 1, num_parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
