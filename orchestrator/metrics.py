"""Metrics over gold answers and given ones. Plain Python; `gate.metric` names one of METRICS.

Answers are compared without regard to case and spaces: labels of a task differ in more than that, and of a free text it
is what exact match means. Punctuation and articles count, unlike in SQuAD's normalisation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence


def is_right(gold: str, answer: str) -> bool:
    """Whether an answer is the gold one."""
    return gold == answer or _normalised(gold) == _normalised(answer)


def accuracy(gold: Sequence[str], answers: Sequence[str]) -> float:
    """Share of examples answered right."""
    return sum(is_right(g, a) for g, a in zip(gold, answers, strict=True)) / len(gold)


def macro_f1(gold: Sequence[str], answers: Sequence[str]) -> float:
    """Unweighted mean of the F1 of every label that occurs in gold or answers, as in scikit-learn."""
    num_right = Counter(g for g, a in zip(gold, answers, strict=True) if g == a)
    num_seen = Counter(gold) + Counter(answers)
    return sum(2 * num_right[label] / num for label, num in sorted(num_seen.items())) / len(num_seen)


def token_f1(gold: Sequence[str], answers: Sequence[str]) -> float:
    """Mean F1 of the words that gold text and answer share. Source: SQuAD (arXiv 1606.05250) section 6.1."""
    return sum(text_f1(g, a) for g, a in zip(gold, answers, strict=True)) / len(gold)


def text_f1(gold: str, answer: str) -> float:
    """F1 of the words that one gold text and its answer share."""
    if gold == answer:
        return 1.0
    gold_words, words = _normalised(gold).split(), _normalised(answer).split()
    num_shared = sum((Counter(gold_words) & Counter(words)).values())
    return 2 * num_shared / (len(gold_words) + len(words))


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "token_f1": token_f1,
}
