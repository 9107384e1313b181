"""Free-text answers: greedy decoding of a mixed batch, step by step, through the layer that also trains and scores.

The most likely token is taken at every step, as `model.generate(do_sample=False)` does; what else a base's
generation_config asks for (repetition penalties, sampling) is left out. Keys and values are cached by transformers.

Dims: B rows that are not done, T positions, V vocabulary, K alternatives.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multilora.base_model import FrozenBase
from multilora.lora import AdapterSlots
from multilora.scoring import ScoringRow, padded
from multilora.segments import Segment, order_by_slot, segments_of

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNSETTLED = re.compile(r"[\s\ufffd]+$")
"""Half a character reads as U+FFFD; spaces at the end are no part of an answer unless something follows."""


@dataclass(frozen=True)
class Token:
    """A token that was written."""

    id: int
    logprob: float
    """Natural logarithm of its probability; no number where the adapter's tensors have gone bad."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The most likely tokens at its place with theirs, best first, as many as were asked for."""


def generate(
    base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow], max_new_tokens: Sequence[int]
) -> list[tuple[int, ...]]:
    """Write an answer of at most `max_new_tokens` tokens, a limit for each row, after every row's prompt.

    Returns the new tokens in the order of `rows`; the end token is among them where the answer came to its end.
    """
    answers: list[list[int]] = [[] for _ in rows]
    writing = Writing(base, [row.token_ids for row in rows], max_new_tokens)
    row_slots = [row.slot for row in rows]
    while writing.alive:
        for row, token in writing.step(slots, row_slots).items():
            answers[row].append(token.id)
    return [tuple(answer) for answer in answers]


class Writing:
    """Rows that are written together, one token a step. A row that is done leaves: long answers cost short ones nothing."""

    def __init__(
        self, base: FrozenBase, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], num_alternatives: int = 0
    ) -> None:
        """Only take the prompts' tokens: the first step reads them. Every token gets `num_alternatives` alternatives."""
        self.alive = list(range(len(prompts)))
        """Rows that are not done."""
        self._prompts, self._num_left = prompts, list(max_new_tokens)
        self._base, self._num_alternatives, self._ends = base, num_alternatives, end_ids(base)
        self._batch: _Batch | None = None

    @torch.no_grad()
    def step(self, slots: AdapterSlots, row_slots: Sequence[int | None]) -> dict[int, Token]:
        """Write the next token of every row: row -> token; those that are done leave `alive`.

        `row_slots` says where each row's adapter sits now; rows that shared a slot must share it still.
        """
        if self._batch is None:
            order = order_by_slot([row_slots[row] for row in self.alive], slots.ranks)
            self.alive = [self.alive[position] for position in order]
        segments = segments_of([row_slots[row] for row in self.alive])
        if self._batch is None:
            self._batch = _Batch(self._base, slots, [self._prompts[row] for row in self.alive], segments)
        logits_BV = self._batch.step(slots, segments).float()
        best_B = logits_BV.argmax(-1)
        logits_BK, ids_BK = logits_BV.topk(self._num_alternatives)
        total_B1 = logits_BV.logsumexp(-1, keepdim=True)
        logprobs_B = (logits_BV.gather(1, best_B[:, None]) - total_B1)[:, 0].tolist()
        alternatives = [
            tuple(zip(ids, logprobs, strict=True))
            for ids, logprobs in zip(ids_BK.tolist(), (logits_BK - total_B1).tolist(), strict=True)
        ]
        self._batch.append(best_B)
        chosen = map(Token, best_B.tolist(), logprobs_B, alternatives)
        tokens = dict(zip(self.alive, chosen, strict=True))
        for row in self.alive:
            self._num_left[row] -= 1
        self.drop([row for row, token in tokens.items() if token.id in self._ends or not self._num_left[row]])
        return tokens

    def drop(self, rows: Collection[int]) -> None:
        """Let rows leave."""
        kept = [position for position, row in enumerate(self.alive) if row not in rows]
        if len(kept) < len(self.alive):
            self.alive = [self.alive[position] for position in kept]
            if self._batch is not None:
                self._batch.keep(kept)


def end_ids(base: FrozenBase) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, with which training ends it, and those of the base's generation_config."""
    configured = base.model.generation_config.eos_token_id
    also = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return frozenset({int(base.tokenizer.eos_token_id), *also})


def answer_text(base: FrozenBase, token_ids: Sequence[int]) -> str:
    """Read generated tokens as text, without special tokens and outer spaces."""
    return str(base.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()


class Reader:
    """Reads a text while it is written, in pieces that never split a character; together they are `answer_text` of it all."""

    def __init__(self, base: FrozenBase) -> None:
        self._base = base
        self._special = frozenset(base.tokenizer.all_special_ids)
        self._ids: list[int] = []
        self._text = ""

    def read(self, token_id: int, *, is_last: bool) -> str:
        """The text that a token settles; empty where it takes another token to say what it is."""
        if token_id not in self._special:
            self._ids.append(token_id)
        settled = answer_text(self._base, self._ids[: len(self._ids) if is_last else self._num_settled()])
        if not is_last:
            settled = _UNSETTLED.sub("", settled)
        piece = settled[len(self._text) :]
        self._text += piece
        return piece

    def spell(self, token_id: int) -> str:
        """What a token would add after those that were read; its name where that is nothing that can be shown."""
        before, after = (self._decode([*self._ids, *more]) for more in ((), (token_id,)))
        added = after[len(before) :] if after.startswith(before) else ""
        return added if added.strip("\ufffd") else str(self._base.tokenizer.convert_ids_to_tokens(token_id))

    def _num_settled(self) -> int:
        """A run of byte tokens reads as characters or as none: what follows decides."""
        num = len(self._ids)
        while num and _BYTE.fullmatch(self._base.tokenizer.convert_ids_to_tokens(self._ids[num - 1])):
            num -= 1
        return num

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._base.tokenizer.decode(list(token_ids), skip_special_tokens=True))


class _Batch:
    """Rows that decode together, equal slots side by side: the model's inputs of the next step, and the cache of those before."""

    def __init__(
        self, base: FrozenBase, slots: AdapterSlots, prompts: Sequence[Sequence[int]], segments: Sequence[Segment]
    ) -> None:
        self._model: Any = base.model
        self._cache: Any = None
        self._encoded_BTH: Tensor | None = None
        # Without an encoder the answer goes on where the prompt ends, so all prompts must end at the same position.
        self._ids_BT, self._mask_BT = padded(base, prompts, is_left=base.family == "causal")
        if base.family == "seq2seq":
            with slots.using(segments):
                encoder = self._model.get_encoder()
                self._encoded_BTH = encoder(input_ids=self._ids_BT, attention_mask=self._mask_BT).last_hidden_state
            start = int(self._model.config.decoder_start_token_id)
            self._ids_BT = torch.full((len(prompts), 1), start, device=base.device)

    def step(self, slots: AdapterSlots, segments: Sequence[Segment]) -> Tensor:
        """Logits [B, V] of every row's next token."""
        inputs = {"past_key_values": self._cache, "use_cache": True, "attention_mask": self._mask_BT}
        with slots.using(segments):
            if self._encoded_BTH is not None:
                output = self._model(encoder_outputs=(self._encoded_BTH,), decoder_input_ids=self._ids_BT, **inputs)
            else:
                positions_BT = (self._mask_BT.cumsum(1) - 1).clamp(min=0)[:, -self._ids_BT.shape[1] :]
                output = self._model(input_ids=self._ids_BT, position_ids=positions_BT, logits_to_keep=1, **inputs)
        self._cache = output.past_key_values
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def append(self, chosen_B: Tensor) -> None:
        """Go on from these tokens."""
        self._ids_BT = chosen_B[:, None]
        if self._encoded_BTH is None:
            self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(self._ids_BT)], dim=1)

    def keep(self, positions: Sequence[int]) -> None:
        """Let go of all other rows."""
        chosen = torch.tensor(positions, dtype=torch.long, device=self._ids_BT.device)
        self._ids_BT, self._mask_BT = self._ids_BT[chosen], self._mask_BT[chosen]
        if self._encoded_BTH is not None:
            self._encoded_BTH = self._encoded_BTH[chosen]
        self._cache.batch_select_indices(chosen)
