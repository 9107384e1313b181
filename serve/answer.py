"""What a request gets: a label with scores and probabilities, or a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from multilora.errors import AdapterError
from multilora.generate import Token
from multilora.prompt import Prompt
from multilora.scoring import LabelSet
from serve.writer import Text


@dataclass(frozen=True)
class Answer:
    """The answer to one request; scores and probabilities in label order, none for a free text."""

    label: str
    """One of `labels`; of a free-text task the text."""
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    is_truncated: bool
    is_cut_off: bool = False
    """True where a free text reached the task's token limit before its end."""
    temperature: float = 1.0
    """The adapter's; the base alone has 1."""
    tokens: tuple[Token, ...] = ()
    """Of a free text."""

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Calibrated probabilities; none of a free text."""
        return softmax(self.scores, self.temperature)


def softmax(scores: Sequence[float], temperature: float) -> tuple[float, ...]:
    """Turn label scores into probabilities."""
    top = max(scores, default=0.0)
    weights = [math.exp((score - top) / temperature) for score in scores]
    return tuple(weight / sum(weights) for weight in weights)


def answer_of(name: str, labels: LabelSet, scores: Sequence[float], prompt: Prompt, temperature: float) -> Answer:
    """The best label, the first of equals. Raises AdapterError where a score is no number."""
    if not all(map(math.isfinite, scores)):
        raise AdapterError(f"{name} gives its labels scores that are no numbers")
    # index() takes the first of equal scores, so ties go to the label that the spec lists first.
    label = labels.names[scores.index(max(scores))]
    return Answer(label, labels.names, tuple(scores), prompt.is_truncated, temperature=temperature)


def written(text: Text, prompt: Prompt) -> Answer:
    """The answer that a text is."""
    return Answer(text.text, (), (), prompt.is_truncated, text.is_cut_off, tokens=text.tokens)
