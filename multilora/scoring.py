"""The one way a label is scored, in training, evaluation and serving, for the three families of base models.

encoder: 20 x cosine of the mean-pooled input (adapter on) and the label's wording encoded by the frozen base alone, so
a task can be scored before it is trained and label vectors are computed once. seq2seq and causal: log-likelihood of the
label's tokens, end-of-sequence included, after the prompt. Softmax over a task's scores gives its probabilities.

Dims: B rows, T positions, H hidden, L labels of one task, N prompt-answer pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's own abbreviation
from torch import Tensor

from multilora.base_model import FrozenBase
from multilora.errors import AdapterError
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, label_wordings
from multilora.segments import order_by_slot, segments_of

SCORER_VERSION = 1
"""Part of every fingerprint: raise it when scores change for the same weights."""
COSINE_SCALE = 20.0
"""Inverse temperature of cosine scores. Source: sentence-transformers MultipleNegativesRankingLoss."""
PAD_MULTIPLE = 8


@dataclass(frozen=True)
class LabelSet:
    """A task's labels as one base sees them."""

    names: tuple[str, ...]
    vectors_LH: Tensor | None
    """Unit vectors of the wordings (encoder)."""
    token_ids: tuple[tuple[int, ...], ...]
    """Answer tokens with end of sequence (seq2seq, causal)."""


@dataclass(frozen=True)
class ScoringRow:
    """One tokenised prompt, the slot that answers it (None: the base alone) and the labels to choose from."""

    token_ids: tuple[int, ...]
    slot: int | None
    labels: LabelSet
    dropout_key: int | None = None
    """Set in training to turn the adapter's dropout on for this row."""


def encode_labels(base: FrozenBase, slots: AdapterSlots, prompt_format: PromptFormat) -> LabelSet:
    """Prepare a task's labels for `score_labels`. Raises AdapterError where two labels become the same to this base."""
    names = tuple(label for label, _ in prompt_format.labels)
    space = " " if base.family == "causal" else ""
    if base.family == "encoder":
        token_ids = tuple(tuple(base.tokenizer(text)["input_ids"]) for text in label_wordings(prompt_format.labels))
    else:
        token_ids = tuple(_answer_ids(base.tokenizer, space + name) for name in names)
    if len(set(token_ids)) < len(names):
        raise AdapterError(f"two of the labels {', '.join(names)} are the same tokens to base {base.spec.model}; reword one")
    if base.family == "encoder":
        with torch.no_grad():
            vectors_LH = _pooled(base, slots, [ScoringRow(ids, None, LabelSet(names, None, ())) for ids in token_ids])
        return LabelSet(names, vectors_LH, ())
    return LabelSet(names, None, token_ids)


def encode_answer(base: FrozenBase, text: str, max_tokens: int) -> LabelSet:
    """Make a free text a label set of its own, so that it is scored and trained as a label is.

    A text that is longer than `max_tokens` loses its end, the end token included.
    """
    space = " " if base.family == "causal" else ""
    return LabelSet((text,), None, (_answer_ids(base.tokenizer, space + text)[:max_tokens],))


def score_labels(base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow]) -> list[Tensor]:
    """Score every label of every row in one mixed batch; float32 [L] per row, in the order of `rows`.

    Gradients flow to the adapters unless the caller turned them off.
    """
    order = order_by_slot([row.slot for row in rows])
    ordered = [rows[index] for index in order]
    if base.family == "encoder":
        pooled_BH = _pooled(base, slots, ordered)
        scores = [COSINE_SCALE * (row.labels.vectors_LH @ pooled_H) for row, pooled_H in zip(ordered, pooled_BH, strict=True)]
    else:
        pairs = [(index, answer) for index, row in enumerate(ordered) for answer in row.labels.token_ids]
        logprobs_N = _answer_logprobs(base, slots, ordered, pairs)
        scores = list(torch.split(logprobs_N, [len(row.labels.names) for row in ordered]))
    restored: list[Tensor] = [scores[0]] * len(rows)
    for position, index in enumerate(order):
        restored[index] = scores[position]
    return restored


def answer_losses(base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow], gold: Sequence[int]) -> Tensor:
    """Training loss of each row [B]: cross-entropy over the labels (encoder), or mean over the gold answer's tokens."""
    if base.family == "encoder":
        scores = score_labels(base, slots, rows)
        return torch.stack([-F.log_softmax(s, dim=-1)[label] for s, label in zip(scores, gold, strict=True)])
    order = order_by_slot([row.slot for row in rows])
    ordered = [rows[index] for index in order]
    pairs = [(position, rows[index].labels.token_ids[gold[index]]) for position, index in enumerate(order)]
    logprobs_N = _answer_logprobs(base, slots, ordered, pairs)
    losses_N = -logprobs_N / torch.tensor([len(answer) for _, answer in pairs], device=logprobs_N.device)
    inverse = torch.empty(len(order), dtype=torch.long)
    inverse[torch.tensor(order)] = torch.arange(len(order))
    return losses_N[inverse.to(losses_N.device)]


def _pooled(base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow]) -> Tensor:
    """Mean-pool the last hidden states over real tokens and scale to unit length [B, H], float32."""
    ids_BT, mask_BT = _padded(base, [row.token_ids for row in rows])
    with _routed(slots, rows):
        hidden_BTH = base.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
    weights_BT1 = mask_BT[..., None].float()
    return F.normalize((hidden_BTH * weights_BT1).sum(1) / weights_BT1.sum(1), dim=-1)


def _answer_logprobs(
    base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow], pairs: Sequence[tuple[int, tuple[int, ...]]]
) -> Tensor:
    """Sum the log-probabilities of each answer after its prompt [N]; `pairs` are (row index, answer), rows sorted by slot."""
    logits_of = _seq2seq_logits if base.family == "seq2seq" else _causal_logits
    logits_NTV, targets_NT = logits_of(base, slots, rows, pairs)
    nll_NT = F.cross_entropy(logits_NTV.float().mT, targets_NT, ignore_index=-100, reduction="none")
    return -nll_NT.sum(1)


def _seq2seq_logits(
    base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow], pairs: Sequence[tuple[int, tuple[int, ...]]]
) -> tuple[Tensor, Tensor]:
    """Encode each prompt once, then decode every answer against it."""
    model: Any = base.model
    ids_BT, mask_BT = _padded(base, [row.token_ids for row in rows])
    with _routed(slots, rows):
        encoded_BTH = model.get_encoder()(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
    row_of_pair = torch.tensor([index for index, _ in pairs], device=base.device)
    start = int(model.config.decoder_start_token_id)
    inputs_NT, _ = _padded(base, [(start, *answer[:-1]) for _, answer in pairs])
    targets_NT, is_real_NT = _padded(base, [answer for _, answer in pairs])
    with _routed(slots, [rows[index] for index, _ in pairs]):
        logits_NTV = model(
            encoder_outputs=(encoded_BTH[row_of_pair],),
            attention_mask=mask_BT[row_of_pair],
            decoder_input_ids=inputs_NT,
            use_cache=False,
        ).logits
    return logits_NTV, targets_NT.masked_fill(is_real_NT == 0, -100)


def _causal_logits(
    base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow], pairs: Sequence[tuple[int, tuple[int, ...]]]
) -> tuple[Tensor, Tensor]:
    """Run prompt + answer as one right-padded row each; logits at t predict the token at t + 1."""
    ids_NT, mask_NT = _padded(base, [rows[index].token_ids + answer for index, answer in pairs])
    with _routed(slots, [rows[index] for index, _ in pairs]):
        logits_NTV = base.model(input_ids=ids_NT, attention_mask=mask_NT, use_cache=False).logits
    targets_NT = torch.full_like(ids_NT, -100)
    for pair, (index, answer) in enumerate(pairs):
        start = len(rows[index].token_ids)
        targets_NT[pair, start : start + len(answer)] = ids_NT[pair, start : start + len(answer)]
    return logits_NTV[:, :-1], targets_NT[:, 1:]


def _routed(slots: AdapterSlots, rows: Sequence[ScoringRow]) -> AbstractContextManager[None]:
    """Route a forward pass over `rows` to their slots, with dropout where the rows carry keys."""
    keys = [row.dropout_key for row in rows]
    is_training = all(key is not None for key in keys)
    return slots.using(segments_of([row.slot for row in rows]), [key or 0 for key in keys] if is_training else None)


def _padded(base: FrozenBase, token_rows: Iterable[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-pad to a multiple of 8 positions (few distinct shapes keep memory flat); ids and mask [B, T]."""
    token_lists = [list(row) for row in token_rows]
    width = -(-max(map(len, token_lists)) // PAD_MULTIPLE) * PAD_MULTIPLE
    ids_BT = torch.full((len(token_lists), width), base.pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(token_lists), width), dtype=torch.long)
    for index, ids in enumerate(token_lists):
        ids_BT[index, : len(ids)] = torch.tensor(ids)
        mask_BT[index, : len(ids)] = 1
    return ids_BT.to(base.device), mask_BT.to(base.device)


def _answer_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return (*ids, int(tokenizer.eos_token_id))
