"""Texts that one engine writes together, a token a step, each by its own adapter or by the base alone. Knows no queue.

A writer holds no slot: before every step the engine says where its adapters sit now, so what else the engine does in
between cannot change a text. While a writer has rows, its adapters are the last to be evicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from multilora.base_model import FrozenBase
from multilora.errors import AdapterError
from multilora.generate import Token, Writing, answer_text, end_ids
from multilora.lora import AdapterSlots
from multilora.prompt import Prompt


@dataclass(frozen=True)
class TextWork:
    """A text that is asked for."""

    key: str | None
    """Of the adapter that writes it; None only where the caller asked for the base by its own name."""
    prompt: Prompt
    max_new_tokens: int
    num_alternatives: int = 0
    """Alternatives that every token is returned with."""


@dataclass(frozen=True)
class Text:
    """A text that came to its end."""

    text: str
    tokens: tuple[Token, ...]
    is_cut_off: bool
    """True where it reached its token limit before its end."""


@dataclass
class Progress:
    """What one step brought, by row."""

    tokens: dict[int, Token] = field(default_factory=dict)
    texts: dict[int, Text] = field(default_factory=dict)
    """Of the rows that are done."""
    errors: dict[int, Exception] = field(default_factory=dict)
    """Of the rows that cannot go on; the others can."""


class Writer:
    """Rows of at most as many adapters as there are slots."""

    def __init__(self, base: FrozenBase, works: Sequence[TextWork]) -> None:
        self.works = tuple(works)
        self._base, self._ends = base, end_ids(base)
        prompts = [work.prompt.token_ids for work in works]
        num_alternatives = max(work.num_alternatives for work in works)
        self._writing = Writing(base, prompts, [work.max_new_tokens for work in works], num_alternatives)
        self._tokens: list[list[Token]] = [[] for _ in works]

    @property
    def keys(self) -> list[str]:
        """Adapters of the rows that are not done."""
        keys = [self.works[row].key for row in self.alive]
        return list(dict.fromkeys(key for key in keys if key is not None))

    @property
    def alive(self) -> Sequence[int]:
        """Rows that are not done."""
        return self._writing.alive

    @property
    def has_begun(self) -> bool:
        """Whether a token was written."""
        return any(self._tokens)

    def drop(self, rows: Collection[int]) -> None:
        """Let rows leave before they are done."""
        self._writing.drop(rows)

    def step(self, slots: AdapterSlots, slot_of: Callable[[str], int]) -> Progress:
        """Write the next token of every row. What `slot_of` raises for an adapter is the end of its rows alone."""
        progress = Progress()
        placed: dict[str, int] = {}
        for key in self.keys:
            try:
                placed[key] = slot_of(key)
            except Exception as error:  # noqa: BLE001  whatever is wrong with one adapter, the others go on
                progress.errors |= {row: error for row in self.alive if self.works[row].key == key}
        self.drop(progress.errors)
        if self.alive:
            alive = set(self.alive)
            # An adapter that has no slot is a KeyError here: None would be the base.
            row_slots = [
                None if work.key is None or row not in alive else placed[work.key] for row, work in enumerate(self.works)
            ]
            self._gather(self._writing.step(slots, row_slots), progress)
        return progress

    def _gather(self, tokens: Mapping[int, Token], progress: Progress) -> None:
        for row, token in tokens.items():
            if math.isnan(token.logprob):
                name = self.works[row].key or "the base"
                progress.errors[row] = AdapterError(f"{name} gives its tokens scores that are no numbers")
                continue
            progress.tokens[row] = token
            self._tokens[row].append(token)
            if row not in self.alive:
                ids = [token.id for token in self._tokens[row]]
                text, is_cut_off = answer_text(self._base, ids), ids[-1] not in self._ends
                progress.texts[row] = Text(text, tuple(self._tokens[row]), is_cut_off)
        self.drop(progress.errors)
