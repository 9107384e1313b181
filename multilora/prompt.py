"""Instruction + input -> text -> token ids, the same way for training, evaluation and serving. Knows no torch.

A prompt that is too long loses the end of its longest input column; the instruction, the labels and the answer are never cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from multilora.errors import DataError, RequestError
from multilora.spec import TaskSpec, template_fields


class Tokenizer(Protocol):
    """The part of a Hugging Face fast tokenizer that is used here."""

    def __call__(self, text: str, **options: Any) -> Any: ...


@dataclass(frozen=True)
class PromptFormat:
    """Everything that turns a request into a prompt; stored in the task card, so serving needs no spec."""

    family: str
    instruction: str
    text_column: str
    labels: tuple[tuple[str, str], ...]
    """(label, meaning) pairs; the meaning may be empty."""
    max_length_tokens: int
    label_score: str = "sum"
    """sum or mean of a label's token log-likelihoods (generative bases)."""

    @classmethod
    def of(cls, spec: TaskSpec, family: str) -> PromptFormat:
        """Take the prompt's parts out of a spec."""
        labels = tuple((label, meaning or "") for label, meaning in (spec.labels or {}).items())
        return cls(family, spec.instruction, spec.data.text, labels, spec.train.max_length, spec.label_score)

    @classmethod
    def all_of(cls, spec: TaskSpec, family: str) -> tuple[PromptFormat, ...]:
        """One for each wording that training mixes; the first is that of `of`."""
        first = cls.of(spec, family)
        return tuple(replace(first, instruction=wording) for wording in spec.wordings)

    @property
    def columns(self) -> tuple[str, ...]:
        """Input columns in the order in which the instruction shows them."""
        return tuple(name for name in template_fields(self.instruction) if name != "labels")

    def columns_of(self, item: str | Mapping[str, str]) -> dict[str, str]:
        """Read a request item: a string fills the text column, a mapping names every column.

        Raises RequestError when columns are missing or unknown.
        """
        given = {self.text_column: item} if isinstance(item, str) else dict(item)
        if set(given) != set(self.columns):
            expected = ", ".join(self.columns)
            raise RequestError(f"input must give the columns {expected}; it gives {', '.join(sorted(given)) or 'none'}")
        return given

    def takes(self, item: str | Mapping[str, str]) -> bool:
        """Whether a request item has the columns."""
        return {self.text_column} == set(self.columns) if isinstance(item, str) else set(item) == set(self.columns)

    def render(self, columns: Mapping[str, str]) -> str:
        """Write the prompt text. An encoder reads the input columns alone; its labels are encoded separately."""
        if self.family == "encoder":
            return "\n".join(columns[name] for name in self.columns)
        options = "\n".join(f"- {wording}" for wording in label_wordings(self.labels))
        return self.instruction.format_map({**columns, "labels": options})


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt."""

    token_ids: tuple[int, ...]
    is_truncated: bool


def label_wordings(labels: Sequence[tuple[str, str]]) -> list[str]:
    """Word each label as `label: meaning`, or as the bare label where no meaning is given."""
    return [f"{label}: {meaning}" if meaning else label for label, meaning in labels]


def encode_prompt(prompt_format: PromptFormat, columns: Mapping[str, str], tokenizer: Tokenizer) -> Prompt:
    """Tokenise the prompt, cutting the end of the longest input column until it fits max_length_tokens.

    Raises DataError when the prompt does not fit even with empty inputs.
    """
    limit = prompt_format.max_length_tokens
    columns = dict(columns)
    token_ids = tokenizer(prompt_format.render(columns))["input_ids"]
    is_truncated = len(token_ids) > limit
    while len(token_ids) > limit:
        spans = {
            name: tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            for name, text in columns.items()
        }
        longest = max(spans, key=lambda name: len(spans[name]))
        if not spans[longest]:
            raise DataError(
                f"the instruction and labels alone take {len(token_ids)} tokens, more than train.max_length {limit}: "
                "raise max_length or shorten them"
            )
        # Tokens at the cut may merge differently with what follows, so the loop measures again instead of trusting the count.
        num_shown = max(1, prompt_format.instruction.count(f"{{{longest}}}"))
        num_kept = max(0, len(spans[longest]) - max(1, (len(token_ids) - limit) // num_shown))
        # Byte-level tokenizers give a lone space an empty span at its end: cutting there would cut nothing, for ever.
        columns[longest] = columns[longest][: min(spans[longest][num_kept][0], len(columns[longest]) - 1)]
        token_ids = tokenizer(prompt_format.render(columns))["input_ids"]
    return Prompt(tuple(token_ids), is_truncated)
