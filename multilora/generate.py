"""Free-text answers: greedy decoding of a mixed batch through the layer that also trains and scores.

The most likely token is taken at every step, as `model.generate(do_sample=False)` does; what else a base's
generation_config asks for (repetition penalties, sampling) is left out. Keys and values are cached by transformers.

Dims: B rows that are not done, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multilora.base_model import FrozenBase
from multilora.lora import AdapterSlots
from multilora.scoring import ScoringRow, padded
from multilora.segments import order_by_slot, segments_of


@torch.no_grad()
def generate(
    base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow], max_new_tokens: Sequence[int]
) -> list[tuple[int, ...]]:
    """Write an answer of at most `max_new_tokens` tokens, a limit for each row, after every row's prompt.

    Returns the new tokens in the order of `rows`; the end token is among them where the answer came to its end. A row that
    is done leaves the batch, so long answers do not cost short ones anything.
    """
    if not rows:
        return []
    answers: list[list[int]] = [[] for _ in rows]
    alive = order_by_slot([row.slot for row in rows], slots.ranks)
    batch = _Batch(base, slots, [rows[index] for index in alive])
    ends = end_ids(base)
    while alive:
        tokens = batch.step()
        kept = []
        for position, (index, token) in enumerate(zip(alive, tokens, strict=True)):
            answers[index].append(token)
            if token not in ends and len(answers[index]) < max_new_tokens[index]:
                kept.append(position)
        if len(kept) < len(alive):
            alive = [alive[position] for position in kept]
            batch.keep(kept)
    return [tuple(answer) for answer in answers]


def end_ids(base: FrozenBase) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, with which training ends it, and those of the base's generation_config."""
    configured = base.model.generation_config.eos_token_id
    also = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return frozenset({int(base.tokenizer.eos_token_id), *also})


def answer_text(base: FrozenBase, token_ids: Sequence[int]) -> str:
    """Read generated tokens as text, without special tokens and outer spaces."""
    return str(base.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()


class _Batch:
    """Rows that decode together, sorted by slot: the model's inputs of the next step, and the cache of the steps before."""

    def __init__(self, base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow]) -> None:
        self._model: Any = base.model
        self._slots = slots
        self._row_slots = [row.slot for row in rows]
        self._cache: Any = None
        self._encoded_BTH: Tensor | None = None
        # Without an encoder the answer goes on where the prompt ends, so all prompts must end at the same position.
        self._ids_BT, self._mask_BT = padded(base, [row.token_ids for row in rows], is_left=base.family == "causal")
        if base.family == "seq2seq":
            with slots.using(segments_of(self._row_slots)):
                encoder = self._model.get_encoder()
                self._encoded_BTH = encoder(input_ids=self._ids_BT, attention_mask=self._mask_BT).last_hidden_state
            start = int(self._model.config.decoder_start_token_id)
            self._ids_BT = torch.full((len(rows), 1), start, device=base.device)

    def step(self) -> list[int]:
        """Choose the next token of every row."""
        inputs = {"past_key_values": self._cache, "use_cache": True, "attention_mask": self._mask_BT}
        with self._slots.using(segments_of(self._row_slots)):
            if self._encoded_BTH is not None:
                output = self._model(encoder_outputs=(self._encoded_BTH,), decoder_input_ids=self._ids_BT, **inputs)
            else:
                positions_BT = (self._mask_BT.cumsum(1) - 1).clamp(min=0)[:, -self._ids_BT.shape[1] :]
                output = self._model(input_ids=self._ids_BT, position_ids=positions_BT, logits_to_keep=1, **inputs)
        self._cache = output.past_key_values
        chosen_B = output.logits[:, -1].argmax(-1)
        self._ids_BT = chosen_B[:, None]
        if self._encoded_BTH is None:
            self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(self._ids_BT)], dim=1)
        return list(map(int, chosen_B.tolist()))

    def keep(self, positions: Sequence[int]) -> None:
        """Let go of all other rows."""
        chosen = torch.tensor(positions, dtype=torch.long, device=self._ids_BT.device)
        self._row_slots = [self._row_slots[position] for position in positions]
        self._ids_BT, self._mask_BT = self._ids_BT[chosen], self._mask_BT[chosen]
        if self._encoded_BTH is not None:
            self._encoded_BTH = self._encoded_BTH[chosen]
        self._cache.batch_select_indices(chosen)
