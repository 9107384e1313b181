"""A task's labels scored by plain transformers and PEFT, in padded batches and with gradients.

Scores and losses are those of multilora.scoring, by other code: what an untrained eye would write first. A prompt is read
once, and its labels, padded to one length, go on from its cache.

Dims: B texts, T prompt positions, H hidden, L labels, N tokens of the longest label, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's own abbreviation
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from multilora.base_model import FrozenBase
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, encode_prompt
from multilora.scoring import COSINE_SCALE, LabelSet, encode_labels, padded
from orchestrator.dataset import Example

BATCH_ROWS = 32
MAX_ANSWER_TOKENS = 2048
"""Label tokens of all rows of a batch together: each of them gets a row of logits over the vocabulary."""


@dataclass(frozen=True)
class LabelScorer:
    """Scores a task's labels with a base's model, whatever was trained in it or put around it."""

    base: FrozenBase
    model: Any
    """What reads prompts: the base's own model, or PEFT's around it."""
    prompt_format: PromptFormat
    labels: LabelSet
    """As the untouched base sees them."""

    @classmethod
    def of(cls, base: FrozenBase, prompt_format: PromptFormat) -> LabelScorer:
        """Take a base on which nothing was trained yet. Raises AdapterError for labels or models that cannot be scored."""
        labels = encode_labels(base, AdapterSlots(base.model, (), 0, 1), prompt_format)
        return cls(base, base.model, prompt_format, labels)

    @property
    def module(self) -> nn.Module:
        """What holds the trained parameters."""
        model: nn.Module = self.model
        return model

    @property
    def max_rows(self) -> int:
        """Most rows of a batch that is scored."""
        if self.base.family == "encoder":
            return BATCH_ROWS
        return max(1, min(BATCH_ROWS, MAX_ANSWER_TOKENS // self._answers().numel()))

    def rows(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """Tokenise prompts as our adapters' are."""
        return [encode_prompt(self.prompt_format, example.columns, self.base.tokenizer).token_ids for example in examples]

    def scores(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Score every label of every row [B, L], float32."""
        if self.base.family == "encoder":
            assert self.labels.vectors_LH is not None
            ids_BT, mask_BT = padded(self.base, rows)
            hidden_BTH = self.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state[:, -ids_BT.shape[1] :]
            return COSINE_SCALE * F.normalize(mean_pooled(hidden_BTH, mask_BT), dim=-1) @ self.labels.vectors_LH.T
        answers_LN = self._answers()
        logprobs_BL = self._answer_logprobs(rows, answers_LN)
        return logprobs_BL / (answers_LN >= 0).sum(-1) if self.labels.is_mean else logprobs_BL

    def losses(self, rows: Sequence[tuple[int, ...]], gold: Sequence[int]) -> Tensor:
        """Training loss of each row [B]: cross-entropy over the labels (encoder), or mean over the gold label's tokens."""
        if self.base.family == "encoder":
            return F.cross_entropy(self.scores(rows), torch.tensor(gold, device=self.base.device), reduction="none")
        answers = [self.labels.token_ids[label] for label in gold]
        targets_BN = self._targets(answers)
        num_tokens = targets_BN.shape[1]
        if self.base.family == "seq2seq":
            ids_BT, mask_BT = padded(self.base, rows)
            shifted_BN, _ = padded(self.base, [(self._start, *answer[:-1]) for answer in answers])
            logits = self.model(input_ids=ids_BT, attention_mask=mask_BT, decoder_input_ids=shifted_BN[:, :num_tokens]).logits
        else:
            texts = [(*row, *answer[:-1]) for row, answer in zip(rows, answers, strict=True)]
            logits, _ = self._read(texts, [len(row) - 1 for row in rows], num_tokens)
        losses_BN = F.cross_entropy(logits.float().mT, targets_BN, ignore_index=-100, reduction="none")
        return losses_BN.sum(-1) / (targets_BN >= 0).sum(-1)

    def _answer_logprobs(self, rows: Sequence[tuple[int, ...]], answers_LN: Tensor) -> Tensor:
        """Log-likelihood of each label after each prompt [B, L]."""
        ids_BT, mask_BT = padded(self.base, rows)
        num_rows, num_labels = len(rows), len(answers_LN)
        if self.base.family == "seq2seq":
            start_B1 = torch.full((num_rows, 1), self._start, device=self.base.device)
            read = self.model(input_ids=ids_BT, attention_mask=mask_BT, decoder_input_ids=start_B1, use_cache=True)
            first_BV, num_virtual = read.logits[:, 0], read.encoder_last_hidden_state.shape[1] - ids_BT.shape[1]
        else:
            logits_B1V, read = self._read(rows, [len(row) - 1 for row in rows], 1)
            first_BV, num_virtual = logits_B1V[:, 0], read.past_key_values.get_seq_length() - ids_BT.shape[1]
        # PEFT's virtual tokens are in the cache or the encoder's states by now.
        mask_BT = F.pad(mask_BT, (num_virtual, 0), value=1)
        logits = self._continued(read, mask_BT, answers_LN[:, :-1].clamp(min=0))  # padding is scored nowhere
        rest_targets = answers_LN[:, 1:].repeat(num_rows, 1)
        rest_losses = F.cross_entropy(logits.float().mT, rest_targets, ignore_index=-100, reduction="none")
        first_BL: Tensor = first_BV.float().log_softmax(-1)[:, answers_LN[:, 0]]
        return first_BL - rest_losses.sum(-1).view(num_rows, num_labels)

    def _continued(self, read: Any, mask_BT: Tensor, tokens_LN: Tensor) -> Tensor:
        """Logits [B x L, N, V] behind the tokens of every label, after prompts that were read into a cache."""
        num_rows, (num_labels, num_tokens) = len(mask_BT), tokens_LN.shape
        model: Any = self.base.model  # PEFT's own model would add its virtual tokens once more
        read.past_key_values.batch_repeat_interleave(num_labels)
        ids, mask = tokens_LN.repeat(num_rows, 1), mask_BT.repeat_interleave(num_labels, 0)
        given = {"attention_mask": mask, "past_key_values": read.past_key_values, "use_cache": True}
        if self.base.family == "seq2seq":
            states = BaseModelOutput(last_hidden_state=read.encoder_last_hidden_state.repeat_interleave(num_labels, 0))
            logits: Tensor = model(encoder_outputs=states, decoder_input_ids=ids, **given).logits
            return logits
        positions = mask.sum(1, keepdim=True) + torch.arange(num_tokens, device=self.base.device)
        given["attention_mask"] = F.pad(mask, (0, num_tokens), value=1)
        logits = model(input_ids=ids, position_ids=positions, **given).logits
        return logits

    def _read(self, texts: Sequence[tuple[int, ...]], starts: Sequence[int], num_logits: int) -> tuple[Tensor, Any]:
        """Run a causal model over texts: logits [B, num_logits, V] from each text's start on, and its whole output.

        Padding stands on the right, so that PEFT's virtual tokens are next to every text.
        """
        ids_BT, mask_BT = padded(self.base, texts)
        num_positions = ids_BT.shape[1]
        # A vocabulary's worth of logits at every position of a prompt would take more memory than the model.
        num_kept = num_positions - min(starts)
        read = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=True, logits_to_keep=num_kept)
        starts_B1 = torch.tensor(starts, device=self.base.device)[:, None] - min(starts)
        places_BN = (starts_B1 + torch.arange(num_logits, device=self.base.device)).clamp(max=num_kept - 1)
        return read.logits[torch.arange(len(texts), device=self.base.device)[:, None], places_BN], read

    @property
    def _start(self) -> int:
        return int(self.base.model.config.decoder_start_token_id)

    def _answers(self) -> Tensor:
        """Tokens of all labels [L, N]."""
        return self._targets(self.labels.token_ids)

    def _targets(self, answers: Sequence[tuple[int, ...]]) -> Tensor:
        """Tokens of some labels, padded with what cross-entropy ignores."""
        tensors = [torch.tensor(answer) for answer in answers]
        return pad_sequence(tensors, batch_first=True, padding_value=-100).to(self.base.device)


def mean_pooled(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the states of real tokens [B, H], float32."""
    weights_BT1 = mask_BT[..., None].float()
    return (hidden_BTH.float() * weights_BT1).sum(1) / weights_BT1.sum(1)


def sorted_batches(rows: Sequence[Sequence[int]], max_rows: int) -> list[list[int]]:
    """Indices of rows in batches, shortest first, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    return [order[start : start + max_rows] for start in range(0, len(order), max_rows)]


def with_adapter(model: Any, folder: Path, name: str = "default") -> Any:
    """Put an adapter on by PEFT under a name, its weights in the base's dtype as they are when served."""
    with warnings.catch_warnings():
        # PEFT only warns, and would answer as the base.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(model, str(folder), name, autocast_adapter_dtype=False).eval()
