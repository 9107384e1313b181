"""Rows -> batches of like length -> forward passes, on all of a CPU's cores or on the calling thread alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multilora.base_files import Family
from multilora.base_model import FrozenBase
from multilora.lora import AdapterSlots
from multilora.scoring import PAD_MULTIPLE, ScoringRow, pooled, score_labels
from multilora.segments import length_batches
from serve.forward_threads import ForwardThreads

OVERHEAD_TOKENS = {"cpu": 32, "cuda": 8192}
"""What one forward pass costs beside its tokens, in tokens."""
MIN_SHARE_TOKENS = 64
"""Less is not worth a forward pass of its own."""


class Passes:
    """The forward passes of one base."""

    def __init__(self, base: FrozenBase, max_batch_tokens: int) -> None:
        self._base, self._max_batch_tokens = base, max_batch_tokens
        self.threads = ForwardThreads(base.device)

    def scores(self, slots: AdapterSlots, rows: Sequence[ScoringRow]) -> list[list[float]]:
        """Scores of every row's labels, on all threads."""
        batches = self._shares([num_tokens(self._base.family, row) for row in rows])
        found = self.threads.map(lambda batch: score_labels(self._base, slots, [rows[i] for i in batch]), batches)
        return _in_order(batches, found, len(rows))

    def scores_here(self, slots: AdapterSlots, rows: Sequence[ScoringRow]) -> list[list[float]]:
        """Scores of every row's labels, on this thread."""
        batches = self.batches([num_tokens(self._base.family, row) for row in rows])
        found = [score_labels(self._base, slots, [rows[i] for i in batch]) for batch in batches]
        return _in_order(batches, found, len(rows))

    def embed(self, slots: AdapterSlots, rows: Sequence[ScoringRow]) -> Tensor:
        """See `multilora.scoring.pooled`, on all threads: [B, H] in host memory."""
        vectors_BH = torch.empty(len(rows), self._base.files.hidden_size)
        batches = self._shares([len(row.token_ids) for row in rows])
        found = self.threads.map(lambda batch: pooled(self._base, slots, [rows[i] for i in batch]).cpu(), batches)
        for batch, own_BH in zip(batches, found, strict=True):
            vectors_BH[batch] = own_BH
        return vectors_BH

    def batches(self, lengths: Sequence[int], max_tokens: int | None = None) -> list[list[int]]:
        """Cut rows into batches of like length, the longest batch first."""
        device = self._base.device.type
        return length_batches(lengths, max_tokens or self._max_batch_tokens, OVERHEAD_TOKENS[device], PAD_MULTIPLE[device])

    def _shares(self, lengths: Sequence[int]) -> list[list[int]]:
        """Batches for passes side by side, the most work first."""
        share = max(MIN_SHARE_TOKENS, -(-sum(lengths) // self.threads.number))
        batches = self.batches(lengths, min(self._max_batch_tokens, share))
        return sorted(batches, key=lambda batch: -len(batch) * max(lengths[row] for row in batch))


def num_tokens(family: Family, row: ScoringRow) -> int:
    """What a row costs in a forward pass, its labels included."""
    # An encoder's label vectors cost nothing.
    return len(row.token_ids) + (0 if family == "encoder" else row.labels.tree.num_nodes)


def _in_order(batches: Sequence[Sequence[int]], found: Sequence[Sequence[Tensor]], num_rows: int) -> list[list[float]]:
    """Scores of batches of rows, by row."""
    scores: list[list[float]] = [[]] * num_rows
    for batch, batch_scores in zip(batches, found, strict=True):
        for index, row_scores in zip(batch, batch_scores, strict=True):
            scores[index] = row_scores.tolist()
    return scores
