"""How long prompts and answers are in a base's tokens, and the limits that follow. Nothing is downloaded for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from multilora.base_files import BaseFiles, Family, find_base
from multilora.errors import SpecError
from multilora.spec import BaseSpec
from orchestrator.prepare import CHARS_PER_TOKEN

MULTIPLE = 16
"""Lengths are rounded up to these many tokens."""
MOST_TOKENS = 32768
"""The largest train.max_length of a spec."""
MOST_MEASURED = 5000
"""Texts that are tokenised, evenly chosen."""


@dataclass(frozen=True)
class KnownBase:
    """What can be told of a base without a download."""

    spec: BaseSpec
    files: BaseFiles | None
    """None where the base is not on this machine."""
    tokenizer: Any = None

    @property
    def family(self) -> Family | None:
        """None where it is not known."""
        return self.files.family if self.files else None

    @property
    def max_positions(self) -> int | None:
        """Longest input; None where there is no limit, or it is not known."""
        return self.files.max_positions if self.files else None

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Tokens of a piece of text, without special ones; of a base that is not here its characters."""
        if self.tokenizer is None:
            return tuple(map(ord, text.casefold()))
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of whole prompts, special ones included; estimated from the characters where the base is not here."""
        if self.tokenizer is None:
            return [math.ceil(len(text) / CHARS_PER_TOKEN) + 2 for text in texts]
        return [len(ids) for ids in self.tokenizer(list(texts))["input_ids"]]


@dataclass(frozen=True)
class Lengths:
    """Percentiles of token counts."""

    median: int
    p90: int
    p99: int
    longest: int


def know_base(spec: BaseSpec) -> KnownBase:
    """Look for a base on this machine. Raises SpecError where a folder that is named holds none."""
    try:
        files = find_base(spec, is_offline=True)
    except SpecError:
        if spec.model.startswith("/"):
            raise
        return KnownBase(spec, None)
    transformers_logging.set_verbosity_error()  # it would warn of texts that are longer than the base takes
    return KnownBase(spec, files, AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False, local_files_only=True))


def lengths_of(base: KnownBase, texts: Sequence[str]) -> Lengths:
    """Measure texts, of which there is at least one; beyond MOST_MEASURED every n-th."""
    counts = base.num_tokens(texts[:: -(-len(texts) // MOST_MEASURED)])
    return Lengths(*(int(np.percentile(counts, share, method="higher")) for share in (50, 90, 99, 100)))


def rounded_limit(num_tokens: int, most: int | None) -> int:
    """A limit for what takes so many tokens: the next multiple of MULTIPLE, or the last one below `most`."""
    most = min(MOST_TOKENS, most or MOST_TOKENS)
    limit = -(-num_tokens // MULTIPLE) * MULTIPLE
    return min(limit, max(MULTIPLE, most // MULTIPLE * MULTIPLE))
