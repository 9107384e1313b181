"""Demonstrations: labelled examples that a prompt shows. Which ones, in which order, and how they are written. No torch.

A prompt with demonstrations is another instruction for the same task, so what renders, cuts and tokenises prompts does
not know of them:

    Read a message. How soon must somebody act on it?      the head, with the labels, once
    - high: someone must act now
    - low: no hurry

    Message: the cellar is full of water                   a demonstration: the shown part, the cue and the answer
    Answer: high

    Message: {text}                                        the text that is asked
    Answer:

Dims: B texts, T training examples.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from multilora.prompt import Prompt, PromptFormat, Tokenizer, encode_prompt
from multilora.spec import template_fields
from orchestrator.dataset import Example

REASON_CUE = "Let's think step by step."
"""Source: Kojima et al. 2022, Large Language Models are Zero-Shot Reasoners, arXiv 2205.11916."""
ANSWER_CUE = "Answer:"
"""Where the instruction says nothing after the input, for an answer right behind a text would read as a part of it."""
_LABEL_LIST = re.compile(r"^(?:[^{}\n]*:[ \t]*\n)?[ \t]*\{labels\}[ \t]*(?:\n|\Z)", re.MULTILINE)
"""A line that is the labels, with a line like `Options:` above it."""
_LABELS_INSIDE = re.compile(r"(?<!\{)\{labels\}(?!\})")


# Which ones: indices into the train split, in the order in which the prompt shows them.


def random_examples(train: Sequence[Example], num: int, seed: int) -> list[int]:
    """Draw `num` at random; of one seed fewer are the beginning of more."""
    return _shuffled(train, seed)[:num]


def balanced_examples(train: Sequence[Example], num: int, seed: int) -> list[int]:
    """Draw `num` whose labels are as evenly spread as they can be; which label comes twice, and the order, go by the seed."""
    groups = list(examples_of_labels(train, seed).values())
    rng = random.Random(f"balanced {seed}")
    rng.shuffle(groups)
    rounds = itertools.zip_longest(*groups)
    chosen = [index for one_of_each in rounds for index in one_of_each if index is not None][:num]
    rng.shuffle(chosen)
    return chosen


CHOICES: Mapping[str, Callable[[Sequence[Example], int, int], list[int]]] = {
    "random": random_examples,
    "balanced": balanced_examples,
}
"""Ways to choose that do not look at the text that is asked."""


def nearest_examples(likeness_BT: NDArray[np.floating], num: int) -> list[list[int]]:
    """The `num` most alike examples of every text, the most alike last: right before the text itself."""
    order_BT = np.argsort(-likeness_BT, axis=1, kind="stable")[:, :num]
    nearest: list[list[int]] = order_BT[:, ::-1].tolist()
    return nearest


def examples_of_labels(train: Sequence[Example], seed: int) -> dict[str, list[int]]:
    """Shuffle the examples of every label that has any."""
    found: dict[str, list[int]] = {label: [] for label in sorted({example.label for example in train})}
    for index in _shuffled(train, seed):
        found[train[index].label].append(index)
    return found


def _shuffled(train: Sequence[Example], seed: int) -> list[int]:
    return random.Random(f"demonstrations {seed}").sample(range(len(train)), len(train))


# How they are written


@dataclass(frozen=True)
class PromptParts:
    """An instruction taken apart; each part is a template as the instruction is."""

    head: str
    """What is asked, with the labels; may be empty."""
    shown: str
    """From the first line with an input column to the last."""
    cue: str
    """What stands between the input and the answer."""

    @classmethod
    def of(cls, instruction: str) -> PromptParts:
        """Take an instruction apart. Labels that it lists beside or after the input move into the head."""
        lines = instruction.split("\n")
        first = next(number for number, line in enumerate(lines) if _shows_input(line))
        head, rest = lines[:first], "\n".join(lines[first:])
        if "labels" in template_fields(rest):
            found = _LABEL_LIST.search(rest)
            if not any("labels" in template_fields(line) for line in head):
                head.append(found[0].rstrip("\n") if found else "{labels}")
            rest = _LABELS_INSIDE.sub("the labels above", _LABEL_LIST.sub("", rest))
        lines = rest.split("\n")
        end = max(number for number, line in enumerate(lines) if _shows_input(line)) + 1
        return cls("\n".join(head), "\n".join(lines[:end]), "\n".join(lines[end:]).strip() or ANSWER_CUE)

    def with_demonstrations(self, demonstrations: Sequence[Example]) -> str:
        """An instruction that shows these examples before the input."""
        asked = f"{self.shown}\n{self.cue}"
        written = [_literal(f"{asked.format_map(example.columns)} {example.label}") for example in demonstrations]
        return "\n\n".join(filter(None, [self.head, *written, asked]))

    def asking_for_reason(self) -> str:
        """An instruction that is answered by a reason."""
        return "\n".join(filter(None, [self.head, self.shown, REASON_CUE]))

    def with_reason(self, reason: str) -> str:
        """An instruction with the input and the reason that was written about it, still to be answered."""
        return "\n".join([self.asking_for_reason() + (" " + _literal(reason) if reason else ""), self.cue])


@dataclass(frozen=True)
class Asked:
    """The prompt of one text, and what made it."""

    prompt_format: PromptFormat
    prompt: Prompt
    num_shown: int = 0
    """Demonstrations in it."""


def ask(prompt_format: PromptFormat, columns: Mapping[str, str], tokenizer: Tokenizer) -> Asked:
    """Ask without demonstrations. Raises DataError where not even an empty input fits."""
    return Asked(prompt_format, encode_prompt(prompt_format, columns, tokenizer))


def ask_with(
    demonstrations: Sequence[Example],
    parts: PromptParts,
    prompt_format: PromptFormat,
    columns: Mapping[str, str],
    tokenizer: Tokenizer,
) -> Asked:
    """Show as many demonstrations as fit into `max_length_tokens`; those that stand farthest from the input go first.

    The input is cut only where it does not fit without any. Raises DataError where not even an empty input fits.
    """
    for first in range(len(demonstrations)):
        showing = replace(prompt_format, instruction=parts.with_demonstrations(demonstrations[first:]))
        token_ids = tokenizer(showing.render(columns))["input_ids"]
        if len(token_ids) <= showing.max_length_tokens:
            return Asked(showing, Prompt(tuple(token_ids), is_truncated=False), len(demonstrations) - first)
    return ask(replace(prompt_format, instruction=parts.with_demonstrations(())), columns, tokenizer)


def _shows_input(line: str) -> bool:
    return bool(set(template_fields(line)) - {"labels"})


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
