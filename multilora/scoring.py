"""The one way a label is scored, in training, evaluation and serving, for the three families of base models.

encoder: 20 x cosine of the mean-pooled input (adapter on) and the label's wording encoded by the frozen base alone, so
a task can be scored before it is trained and label vectors are computed once. seq2seq and causal: log-likelihood of the
label's tokens, end-of-sequence included, after the prompt; the prompt and what labels share are run once. Softmax over a
task's scores gives its probabilities.

Dims: B rows, T prompt positions, H hidden, L labels of one task, N nodes and E edges of an answer tree, V vocabulary,
W positions of prompt and nodes together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's own abbreviation
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from multilora.answer_tree import AnswerTree, check_scorable, decoder_positions, laid_out
from multilora.base_model import FrozenBase
from multilora.errors import AdapterError
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, label_wordings
from multilora.segments import order_by_slot, segments_of

SCORER_VERSION = 1
"""Part of every fingerprint: raise it when scores change for the same weights."""
COSINE_SCALE = 20.0
"""Inverse temperature of cosine scores. Source: sentence-transformers MultipleNegativesRankingLoss."""
PAD_MULTIPLE = {"cpu": 1, "cuda": 8}
"""Rows are padded to a multiple of some positions: a GPU's products are fastest and its memory flat with few shapes."""
NODE_MULTIPLE = {"cpu": 1, "cuda": 4}
"""Most answers have one to three tokens and an end; eight positions for each would cost more than they save."""


@dataclass(frozen=True)
class LabelSet:
    """A task's labels as one base sees them."""

    names: tuple[str, ...]
    vectors_LH: Tensor | None
    """Unit vectors of the wordings (encoder)."""
    token_ids: tuple[tuple[int, ...], ...]
    """Answer tokens with end of sequence (seq2seq, causal)."""
    is_mean: bool = False
    """Score a label by the mean over its tokens instead of their sum."""

    @cached_property
    def tree(self) -> AnswerTree:
        """All answers as one tree."""
        return AnswerTree.of(self.token_ids, is_mean=self.is_mean)

    @cached_property
    def chains(self) -> tuple[AnswerTree, ...]:
        """Each answer alone, scored by the mean over its tokens: what training looks at in every step."""
        return tuple(AnswerTree.of([answer], is_mean=True) for answer in self.token_ids)


@dataclass(frozen=True)
class ScoringRow:
    """One tokenised prompt, the slot that answers it (None: the base alone) and the labels to choose from."""

    token_ids: tuple[int, ...]
    slot: int | None
    labels: LabelSet
    dropout_key: int | None = None
    """Set in training to turn the adapter's dropout on for this row."""


def encode_labels(base: FrozenBase, slots: AdapterSlots, prompt_format: PromptFormat) -> LabelSet:
    """Prepare a task's labels for `score_labels`. Raises AdapterError for labels that this base cannot tell apart or read."""
    names = tuple(label for label, _ in prompt_format.labels)
    if base.family == "encoder":
        token_ids = tuple(tuple(base.tokenizer(text)["input_ids"]) for text in label_wordings(prompt_format.labels))
    else:
        check_scorable(base.model)
        token_ids = tuple(_answer_ids(base, name) for name in names)
    if len(set(token_ids)) < len(names):
        raise AdapterError(f"two of the labels {', '.join(names)} are the same tokens to base {base.spec.model}; reword one")
    # A position that the base does not have would end the whole batch, and on a GPU the process.
    num_positions = max(map(len, token_ids), default=0) + (prompt_format.max_length_tokens if base.family == "causal" else 0)
    if base.files.max_positions and num_positions > base.files.max_positions:
        rule = f"the longest label needs {num_positions} tokens, base {base.spec.model} takes at most {base.files.max_positions}"
        raise AdapterError(f"{rule}; shorten the label" + (" or train.max_length" if base.family == "causal" else ""))
    if base.family == "encoder":
        with torch.no_grad():
            vectors_LH = pooled(base, slots, [ScoringRow(ids, None, LabelSet(names, None, ())) for ids in token_ids])
        return LabelSet(names, vectors_LH, ())
    return LabelSet(names, None, token_ids, is_mean=prompt_format.label_score == "mean")


def encode_answer(base: FrozenBase, text: str, max_tokens: int) -> LabelSet:
    """Make a free text a label set of its own, so that it is scored and trained as a label is.

    A text that is longer than `max_tokens` loses its end, the end token included.
    """
    return LabelSet((text,), None, (_answer_ids(base, text)[:max_tokens],))


def score_labels(base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow]) -> list[Tensor]:
    """Score every label of every row in one mixed batch; float32 [L] per row, in the order of `rows`.

    Gradients flow to the adapters unless the caller turned them off.
    """
    order = order_by_slot([row.slot for row in rows], slots.ranks)
    ordered = [rows[index] for index in order]
    if base.family == "encoder":
        pooled_BH = pooled(base, slots, ordered)
        scores = [COSINE_SCALE * (row.labels.vectors_LH @ pooled_H) for row, pooled_H in zip(ordered, pooled_BH, strict=True)]
    else:
        scores = list(_tree_scores(base, slots, ordered, [row.labels.tree for row in ordered]))
    restored: list[Tensor] = [scores[0]] * len(rows)
    for position, index in enumerate(order):
        restored[index] = scores[position]
    return restored


def answer_losses(base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow], gold: Sequence[int]) -> Tensor:
    """Training loss of each row [B]: cross-entropy over the labels (encoder), or mean over the gold answer's tokens."""
    if base.family == "encoder":
        scores = score_labels(base, slots, rows)
        return torch.stack([-F.log_softmax(s, dim=-1)[label] for s, label in zip(scores, gold, strict=True)])
    order = order_by_slot([row.slot for row in rows], slots.ranks)
    ordered = [rows[index] for index in order]
    chains = [rows[index].labels.chains[gold[index]] for index in order]
    losses_B = -torch.cat(_tree_scores(base, slots, ordered, chains))
    inverse = torch.empty(len(order), dtype=torch.long)
    inverse[torch.tensor(order)] = torch.arange(len(order))
    return losses_B[inverse.to(losses_B.device)]


def pooled(base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow]) -> Tensor:
    """Mean-pool the last hidden states over real tokens and scale to unit length [B, H], float32; rows sorted by slot.

    Of a seq2seq base these are its encoder's states, of a causal one those before its head.
    """
    model: Any = base.model
    reader = model.get_encoder() if base.family == "seq2seq" else model.base_model
    ids_BT, mask_BT = padded(base, [row.token_ids for row in rows])
    if slots.reader is not None and not torch.is_grad_enabled():
        hidden_BTH = slots.reader(ids_BT, mask_BT, [row.slot for row in rows]).float()
    else:
        with _routed(slots, rows):
            hidden_BTH = reader(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
    weights_BT1 = mask_BT[..., None].float()
    return F.normalize((hidden_BTH * weights_BT1).sum(1) / weights_BT1.sum(1), dim=-1)


def _tree_scores(
    base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow], trees: Sequence[AnswerTree]
) -> tuple[Tensor, ...]:
    """Score the answers of each row's tree after its prompt, float32 [L] per row; rows sorted by slot."""
    logits_of = _seq2seq_logits if base.family == "seq2seq" else _causal_logits
    logits_BNV = logits_of(base, slots, rows, trees).float()
    # Padding is an edge and a label of weight zero; one copy of each to the device, however many rows.
    nodes_BE, tokens_BE = (
        pad_sequence(edges, batch_first=True).to(base.device)
        for edges in ([tree.edge_nodes_E for tree in trees], [tree.edge_tokens_E for tree in trees])
    )
    num_labels = [len(tree.paths_LE) for tree in trees]
    paths_BLE = torch.zeros(len(trees), max(num_labels), nodes_BE.shape[1])
    for row, tree in enumerate(trees):
        paths_BLE[row, : tree.paths_LE.shape[0], : tree.paths_LE.shape[1]] = tree.paths_LE
    rows_B1 = torch.arange(len(trees), device=base.device)[:, None]
    logprobs_BE = logits_BNV[rows_B1, nodes_BE, tokens_BE] - logits_BNV.logsumexp(-1)[rows_B1, nodes_BE]
    scores_BL = torch.bmm(paths_BLE.to(base.device), logprobs_BE[..., None])[..., 0]
    return tuple(scores_L[:num] for scores_L, num in zip(scores_BL, num_labels, strict=True))


def _seq2seq_logits(base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow], trees: Sequence[AnswerTree]) -> Tensor:
    """Encode each prompt once and decode its tree against it: logits [B, N, V] of what follows each node."""
    model: Any = base.model
    ids_BT, mask_BT = padded(base, [row.token_ids for row in rows])
    start = int(model.config.decoder_start_token_id)
    nodes_BN, _ = padded(base, [(start, *tree.token_ids) for tree in trees], NODE_MULTIPLE)
    reads_B1NN: Tensor | None = None
    positions: AbstractContextManager[None] = nullcontext()
    if not all(tree.is_chain for tree in trees):  # chains, as in training, are ordinary texts
        reads_BNN, depths_BN = laid_out(trees, nodes_BN.shape[1])
        reads_B1NN = _additive(reads_BNN, base)
        positions = decoder_positions(model, depths_BN.to(base.device))
    with _routed(slots, rows), positions:
        logits_BNV: Tensor = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            decoder_input_ids=nodes_BN,
            decoder_attention_mask=reads_B1NN,
            use_cache=False,
        ).logits
    return logits_BNV


def _causal_logits(base: FrozenBase, slots: AdapterSlots, rows: Sequence[ScoringRow], trees: Sequence[AnswerTree]) -> Tensor:
    """Run prompt and tree as one row, the prompt's last token as the root: logits [B, N, V] of what follows each node."""
    model: Any = base.model
    # Padding stands on the left, so that the nodes of all rows are at the same positions.
    prompt_BT, is_prompt_BT = padded(base, [row.token_ids for row in rows], is_left=True)
    nodes_BN, _ = padded(base, [(base.pad_id, *tree.token_ids) for tree in trees], NODE_MULTIPLE)
    reads_BNN, depths_BN = (part.to(base.device) for part in laid_out(trees, nodes_BN.shape[1]))
    num_prompt_B1, num_nodes = is_prompt_BT.sum(1, keepdim=True), nodes_BN.shape[1]
    before_BT = torch.arange(prompt_BT.shape[1], device=base.device) - prompt_BT.shape[1] + num_prompt_B1
    mask = torch.cat([is_prompt_BT, torch.ones_like(nodes_BN[:, 1:])], dim=1)
    if not all(tree.is_chain for tree in trees):  # chains, as in training, are ordinary texts
        mask = _additive(_tree_reads(is_prompt_BT.bool(), reads_BNN), base)
    with _routed(slots, rows):
        logits_BNV: Tensor = model(
            input_ids=torch.cat([prompt_BT, nodes_BN[:, 1:]], dim=1),
            attention_mask=mask,
            position_ids=torch.cat([before_BT[:, :-1], num_prompt_B1 - 1 + depths_BN], dim=1).clamp(min=0),
            logits_to_keep=num_nodes,
            use_cache=False,
        ).logits
    return logits_BNV


def _tree_reads(is_prompt_BT: Tensor, reads_BNN: Tensor) -> Tensor:
    """Who reads whom in prompt and nodes together [B, W, W]: the prompt what is before it, the nodes all of it and their own."""
    num_before, num_nodes = is_prompt_BT.shape[1] - 1, reads_BNN.shape[1]
    width = num_before + num_nodes
    # What is padding reads itself, for a row of a softmax must not be empty.
    reads_BWW = torch.eye(width, dtype=torch.bool, device=reads_BNN.device).repeat(len(reads_BNN), 1, 1)
    is_before_WT = torch.ones(width, num_before + 1, dtype=torch.bool, device=reads_BNN.device).tril()
    reads_BWW[:, :, : num_before + 1] |= is_prompt_BT[:, None] & is_before_WT
    reads_BWW[:, num_before:, num_before:] = reads_BNN
    return reads_BWW


def _additive(reads_BTT: Tensor, base: FrozenBase) -> Tensor:
    """A mask [B, 1, T, T] that attention adds to its scores."""
    dtype = base.model.dtype
    mask_BTT = torch.zeros(reads_BTT.shape, dtype=dtype, device=base.device)
    return mask_BTT.masked_fill(~reads_BTT.to(base.device), torch.finfo(dtype).min)[:, None]


def _routed(slots: AdapterSlots, rows: Sequence[ScoringRow]) -> AbstractContextManager[None]:
    """Route a forward pass over `rows` to their slots, with dropout where the rows carry keys."""
    keys = [row.dropout_key for row in rows]
    is_training = all(key is not None for key in keys)
    return slots.using(segments_of([row.slot for row in rows]), [key or 0 for key in keys] if is_training else None)


def padded(
    base: FrozenBase, token_rows: Iterable[Sequence[int]], multiple_on: Mapping[str, int] = PAD_MULTIPLE, *, is_left: bool = False
) -> tuple[Tensor, Tensor]:
    """Pad to a multiple of some positions, by kind of device; ids and mask [B, T]."""
    token_lists = [list(row) for row in token_rows]
    multiple = multiple_on[base.device.type]
    width = -(-max(map(len, token_lists)) // multiple) * multiple
    width = min(width, base.files.max_positions or width)
    ids_BT = torch.full((len(token_lists), width), base.pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(token_lists), width), dtype=torch.long)
    for index, ids in enumerate(token_lists):
        real = slice(width - len(ids), None) if is_left else slice(len(ids))
        ids_BT[index, real] = torch.tensor(ids)
        mask_BT[index, real] = 1
    return ids_BT.to(base.device), mask_BT.to(base.device)


def _answer_ids(base: FrozenBase, name: str) -> tuple[int, ...]:
    """Tokenise an answer as the base's own training did: seq2seq with its special tokens (BART begins with <s>)."""
    is_causal = base.family == "causal"
    ids = tuple(base.tokenizer(" " + name if is_causal else name, add_special_tokens=not is_causal)["input_ids"])
    end = int(base.tokenizer.eos_token_id)
    return ids if ids[-1:] == (end,) else (*ids, end)
