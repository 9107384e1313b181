"""Metrics over gold and predicted labels. Plain Python; `gate.metric` names one of METRICS."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def accuracy(gold: Sequence[str], answers: Sequence[str]) -> float:
    """Share of examples answered right."""
    return sum(g == a for g, a in zip(gold, answers, strict=True)) / len(gold)


def macro_f1(gold: Sequence[str], answers: Sequence[str]) -> float:
    """Unweighted mean of the F1 of every label that occurs in gold or answers, as in scikit-learn."""
    pairs = list(zip(gold, answers, strict=True))
    scores = []
    for label in sorted(set(gold) | set(answers)):
        num_right = sum(g == a == label for g, a in pairs)
        num_seen = sum((g == label) + (a == label) for g, a in pairs)
        scores.append(2 * num_right / num_seen)
    return sum(scores) / len(scores)


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {"accuracy": accuracy, "macro_f1": macro_f1}
