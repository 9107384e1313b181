"""Classification heads: a linear layer over a base's pooled states, as most people fine-tune a classifier.

The head reads the text alone, without an instruction: its labels are numbers to it.

Dims: B texts, T positions, H hidden, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's own abbreviation
from torch import Tensor, nn

from multilora.base_model import FrozenBase
from multilora.prompt import PromptFormat, encode_prompt
from multilora.scoring import padded
from multilora.spec import TaskSpec
from orchestrator.dataset import Example
from orchestrator.plain_scoring import BATCH_ROWS, mean_pooled, sorted_batches


class HeadClassifier(nn.Module):
    """A base's body and a linear layer over its mean state; over the last token's where the base reads from left to right.

    Of a seq2seq base the body is its encoder.
    """

    def __init__(self, base: FrozenBase, num_labels: int) -> None:
        super().__init__()
        model: Any = base.model
        self.body = model.get_encoder() if base.family == "seq2seq" else model.base_model
        self.score = nn.Linear(base.files.hidden_size, num_labels, device=base.device)  # PEFT finds it by this name
        self._is_causal = base.family == "causal"

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Score every label [B, L]."""
        scores_BL: Tensor = self.score(self.pooled(ids_BT, mask_BT))
        return scores_BL

    def pooled(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """One state for each text [B, H], float32; padding stands on the right."""
        hidden_BTH: Tensor = self.body(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        if self._is_causal:
            return hidden_BTH[torch.arange(len(ids_BT), device=ids_BT.device), mask_BT.sum(1) - 1].float()
        return mean_pooled(hidden_BTH, mask_BT)


@dataclass(frozen=True)
class HeadLearner:
    """A head that trains together with what below it takes gradients."""

    base: FrozenBase
    module: HeadClassifier
    prompt_format: PromptFormat
    max_rows: int = BATCH_ROWS

    @classmethod
    def of(cls, base: FrozenBase, spec: TaskSpec) -> HeadLearner:
        """Put a fresh head on a base."""
        return cls(base, HeadClassifier(base, len(spec.labels or ())), PromptFormat.of(spec, "encoder"))

    def rows(self, examples: Sequence[Example]) -> list[Any]:
        """Tokenise the input columns, without instruction and labels."""
        return [encode_prompt(self.prompt_format, example.columns, self.base.tokenizer).token_ids for example in examples]

    def scores(self, rows: Sequence[Any]) -> Tensor:
        """Score every label of every row [B, L]."""
        scores_BL: Tensor = self.module(*padded(self.base, rows))
        return scores_BL

    def losses(self, rows: Sequence[Any], gold: Sequence[int]) -> Tensor:
        """Cross-entropy of each row [B]."""
        return F.cross_entropy(self.scores(rows), torch.tensor(gold, device=self.base.device), reduction="none")


@dataclass(frozen=True)
class FrozenHeadLearner(HeadLearner):
    """A head over a base that does not change, so that every text is read once: its rows are states [H]."""

    def rows(self, examples: Sequence[Example]) -> list[Any]:
        """Read every text."""
        token_rows = super().rows(examples)
        states_BH = torch.empty(len(token_rows), self.base.files.hidden_size, device=self.base.device)
        with torch.no_grad():
            for batch in sorted_batches(token_rows, BATCH_ROWS):
                states_BH[batch] = self.module.pooled(*padded(self.base, [token_rows[i] for i in batch]))
        return list(states_BH)

    def scores(self, rows: Sequence[Any]) -> Tensor:
        """Score every label of every row [B, L]."""
        scores_BL: Tensor = self.module.score(torch.stack(list(rows)))
        return scores_BL
