"""The frozen base by itself: it scores labels, writes and reads texts without an adapter, in batches under a token budget.

Dims: B prompts, L labels, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from multilora.base_model import FrozenBase
from multilora.errors import AdapterError
from multilora.generate import answer_text, generate
from multilora.lora import AdapterSlots
from multilora.prompt import Prompt, PromptFormat, encode_prompt
from multilora.scoring import LabelSet, ScoringRow, encode_labels, pooled, score_labels
from multilora.spec import TaskSpec
from orchestrator.dataset import Example
from orchestrator.micro_batches import MicroBatches
from serve.forward_threads import ForwardThreads

NO_LABELS = LabelSet((), None, ())
"""Of prompts that are read or continued."""
T = TypeVar("T")


class BaseAlone:
    """Every method raises CapacityError where not even one prompt fits into the GPU's memory."""

    def __init__(self, base: FrozenBase) -> None:
        self.base = base
        # Slots of no module change nothing: the base can be given to whoever needs it next.
        self._slots = AdapterSlots(base.model, [], num_slots=1, max_rank=1)
        self._batches = MicroBatches(base.device, on_halved=lambda max_tokens: None)
        self._threads = ForwardThreads(base.device)

    @torch.no_grad()
    def label_set(self, prompt_format: PromptFormat) -> LabelSet:
        """A task's labels as the base sees them. Raises AdapterError for labels that it cannot tell apart or read."""
        return encode_labels(self.base, self._slots, prompt_format)

    def scores(self, prompts: Sequence[Prompt], labels: LabelSet) -> NDArray[np.float64]:
        """Score every label after every prompt [B, L]. Raises AdapterError for scores that are no numbers."""
        rows = self._rows(prompts, labels)
        num_nodes = labels.tree.num_nodes if labels.token_ids else 0

        def score(batch: list[int]) -> list[list[float]]:
            return [scores_L.tolist() for scores_L in score_labels(self.base, self._slots, [rows[i] for i in batch])]

        scores_BL = np.array(self._in_batches([len(row.token_ids) + num_nodes for row in rows], score))
        if not np.isfinite(scores_BL).all():
            raise AdapterError(f"base {self.base.spec.model} gives labels scores that are no numbers")
        return scores_BL

    def write(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Continue every prompt by its most likely tokens, `max_new_tokens` at most; without outer spaces."""
        rows = self._rows(prompts, NO_LABELS)

        def continued(batch: list[int]) -> list[str]:
            written = generate(self.base, self._slots, [rows[i] for i in batch], [max_new_tokens] * len(batch))
            return [answer_text(self.base, token_ids) for token_ids in written]

        return self._in_batches([len(row.token_ids) + max_new_tokens for row in rows], continued, side_by_side=False)

    def states(self, spec: TaskSpec, examples: Sequence[Example]) -> NDArray[np.float64]:
        """Mean of the last hidden states over each example's input, no instruction, unit length [B, H].

        See `multilora.scoring.pooled`. Inputs are cut at the task's max_length, as an encoder's prompts are.
        """
        own = PromptFormat.of(spec, "encoder")
        most = min(own.max_length_tokens, self.base.files.max_positions or own.max_length_tokens)
        inputs = replace(own, max_length_tokens=most)
        prompts = [encode_prompt(inputs, example.columns, self.base.tokenizer) for example in examples]
        rows = self._rows(prompts, NO_LABELS)

        def read(batch: list[int]) -> list[list[float]]:
            vectors: list[list[float]] = pooled(self.base, self._slots, [rows[i] for i in batch]).tolist()
            return vectors

        return np.array(self._in_batches([len(row.token_ids) for row in rows], read))

    def _rows(self, prompts: Sequence[Prompt], labels: LabelSet) -> list[ScoringRow]:
        # Some tokenizers make nothing of an empty text, which has no mean.
        return [ScoringRow(prompt.token_ids or (self.base.pad_id,), None, labels) for prompt in prompts]

    @torch.no_grad()
    def _in_batches(
        self, lengths: Sequence[int], work: Callable[[list[int]], Sequence[T]], *, side_by_side: bool = True
    ) -> list[T]:
        """Do the work on rows of these lengths in tokens, indices of a batch at a time; results in the order of the rows.

        Side by side as in the engine, so that what is measured here compares with what is measured there.
        """

        def attempt() -> list[T]:
            batches = self._batches.cut(lengths)[::-1]  # the longest first: no thread is left with them at the end
            found = self._threads.map(work, batches) if side_by_side else map(work, batches)
            done: dict[int, T] = {}
            for batch, results in zip(batches, found, strict=True):
                done.update(zip(batch, results, strict=True))
            return [done[row] for row in range(len(lengths))]

        return self._batches.within_memory(max(lengths), attempt)
