"""What the report says of two systems on the same gate examples: results, flips, errors, labels, calibration. JSON-able."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control

from orchestrator.calibration import NUM_BINS, bins_of
from orchestrator.eval_report import EvalReport, Graded
from orchestrator.paired import mcnemar_midp, wilson
from orchestrator.report_words import cut

MAX_TEXT = 400
"""Characters of an input or answer that are shown; flips.jsonl has all of them."""
MAX_CONFUSIONS = 10
"""Kinds of mistakes listed per task."""
RIGHT, OTHER_LABEL, OTHER_TASK, OUTSIDE = "right", "another label", "another task's label", "outside every label set"
OTHER_TEXT, EMPTY = "another text", "empty"
Pair = tuple[Graded, Graded]
"""Candidate's and reference's answer to one example."""


def result(report: EvalReport, metric: str) -> dict[str, Any]:
    """How one system did."""
    num_correct = sum(report.correct)
    return {
        "system": report.system,
        "digest": report.digest,
        "value": report.value(metric),
        "token_f1": report.token_f1,
        "num_correct": num_correct,
        "accuracy": num_correct / len(report.answers),
        "accuracy_interval": list(wilson(num_correct, len(report.answers))),
        "num_truncated": sum(graded.is_truncated for graded in report.answers),
        "scorer_version": report.scorer_version,
        "fingerprint": dict(sorted(report.fingerprint.items())),
    }


def flips(candidate: EvalReport, reference: EvalReport) -> list[dict[str, Any]]:
    """List the examples that only one side gets right, whole: losses first, in each kind the surest candidate answer first.

    Scores are in label order. A lead is the given answer's score less that of the right answer, or, where the given answer
    is right, of the runner-up.
    """
    pairs = [pair for pair in zip(candidate.answers, reference.answers, strict=True) if _is_flip(pair)]
    pairs.sort(key=lambda pair: (pair[0].is_right, -(pair[0].probability or 0.0)))
    return [
        {
            "id": new.id,
            "kind": "win" if new.is_right else "loss",
            "text": new.text,
            "gold": new.gold,
            "reference_answer": old.answer,
            "reference_probability": old.probability,
            "reference_lead": _lead(old, reference.labels),
            "candidate_answer": new.answer,
            "candidate_probability": new.probability,
            "candidate_lead": _lead(new, candidate.labels),
            "reference_scores": list(old.scores),
            "candidate_scores": list(new.scores),
        }
        for new, old in pairs
    ]


def shown_flip(flip: Mapping[str, Any], most: int) -> dict[str, Any]:
    """A flip without its scores and with texts of at most so many characters."""
    texts = {name: cut(flip[name], most) for name in ("text", "gold", "reference_answer", "candidate_answer")}
    return {name: texts.get(name, value) for name, value in flip.items() if not name.endswith("_scores")}


def anatomy(candidate: EvalReport, reference: EvalReport, labels_elsewhere: Set[str]) -> list[dict[str, Any]]:
    """Count each side's answers by what kind of right or wrong they are; `labels_elsewhere` are the other tasks' labels."""
    kinds = (RIGHT, OTHER_LABEL, OTHER_TASK, OUTSIDE) if candidate.labels else (RIGHT, OTHER_TEXT, EMPTY)
    new, old = (
        Counter(_kind(graded, report.labels, labels_elsewhere) for graded in report.answers) for report in (candidate, reference)
    )
    return [{"kind": kind, "reference": old[kind], "candidate": new[kind]} for kind in kinds]


def confusions(candidate: EvalReport, reference: EvalReport) -> list[dict[str, Any]]:
    """The mistakes (right label -> given answer) whose number changed most; empty for free text."""
    if not candidate.labels:
        return []
    new, old = (
        Counter((graded.gold, graded.answer) for graded in report.answers if not graded.is_right)
        for report in (candidate, reference)
    )
    changed = [pair for pair in {**new, **old} if new[pair] != old[pair]]
    changed.sort(key=lambda pair: (-abs(new[pair] - old[pair]), old[pair] - new[pair], pair))
    return [
        {"gold": gold, "answer": cut(answer, MAX_TEXT), "reference": old[gold, answer], "candidate": new[gold, answer]}
        for gold, answer in changed[:MAX_CONFUSIONS]
    ]


def label_rows(candidate: EvalReport, reference: EvalReport) -> list[dict[str, Any]]:
    """Per label, worst first: its gate examples, how many each side gets right, what the candidate takes them for."""
    gold = Counter(graded.gold for graded in candidate.answers)
    pairs = Counter((new.gold, new.is_right, old.is_right) for new, old in zip(candidate.answers, reference.answers, strict=True))
    mistakes: dict[str, list[dict[str, Any]]] = {}
    wrong = Counter((graded.gold, graded.answer) for graded in candidate.answers if not graded.is_right)
    for (label, answer), count in wrong.most_common():
        mistakes.setdefault(label, []).append({"answer": cut(answer, MAX_TEXT), "count": count})
    rows = [_label_row(label, gold[label], pairs, mistakes.get(label, [])[:3]) for label in candidate.labels]
    return sorted(rows, key=lambda row: (row["num_correct"] - row["reference_num_correct"], row["recall"] or 0.0))


def label_tests(counts: Mapping[tuple[str, str], tuple[int, int]]) -> dict[tuple[str, str], tuple[float, float]]:
    """Test each (task, label) for lost recall, given its losses and wins: p, and p corrected by Benjamini and Hochberg.

    Corrected over all of them (1995, J. R. Stat. Soc. B 57:289): of the labels below q, at most a share q is there by chance.
    For looking closer; decides nothing.
    """
    known = {pair: mcnemar_midp(*pair) for pair in set(counts.values())}
    raw = [known[pair] for pair in counts.values()]
    corrected = [float(value) for value in false_discovery_control(raw)] if raw else []
    return dict(zip(counts, zip(raw, corrected, strict=True), strict=True))


def reliability(report: EvalReport) -> dict[str, Any] | None:
    """Confidence against accuracy, in the bins of the calibration error that are not empty; None for a system without scores."""
    confidences = report.confidences(report.temperature)
    if not len(confidences):
        return None
    numbers = bins_of(confidences)
    counts, sums, rights = (np.bincount(numbers, weights) for weights in (None, confidences, report.correct))
    bins = [
        {
            "low": int(number - 1) / NUM_BINS,
            "high": int(number) / NUM_BINS,
            "num_examples": int(counts[number]),
            "confidence": float(sums[number] / counts[number]),
            "accuracy": float(rights[number] / counts[number]),
        }
        for number in np.unique(numbers)
    ]
    return {"temperature": report.temperature, **report.calibration_errors, "bins": bins}


def _is_flip(pair: Pair) -> bool:
    return pair[0].is_right != pair[1].is_right


def _lead(graded: Graded, labels: Sequence[str]) -> float | None:
    if len(graded.scores) != len(labels) or len(labels) < 2 or graded.answer not in labels:
        return None
    given = labels.index(graded.answer)
    rest = [score for number, score in enumerate(graded.scores) if number != given]
    if graded.is_right:
        return graded.scores[given] - max(rest)
    return graded.scores[given] - graded.scores[labels.index(graded.gold)] if graded.gold in labels else None


def _kind(graded: Graded, labels: Sequence[str], labels_elsewhere: Set[str]) -> str:
    if graded.is_right:
        return RIGHT
    if not labels:
        return OTHER_TEXT if graded.answer.strip() else EMPTY
    if graded.answer in labels:
        return OTHER_LABEL
    return OTHER_TASK if graded.answer in labels_elsewhere else OUTSIDE


def _label_row(
    label: str, num_examples: int, pairs: Mapping[tuple[str, bool, bool], int], mistaken_for: list[dict[str, Any]]
) -> dict[str, Any]:
    both, won, lost = (pairs.get((label, *kind), 0) for kind in ((True, True), (True, False), (False, True)))
    return {
        "label": label,
        "num_examples": num_examples,
        "num_correct": both + won,
        "reference_num_correct": both + lost,
        "recall": (both + won) / num_examples if num_examples else None,
        "reference_recall": (both + lost) / num_examples if num_examples else None,
        "num_losses": lost,
        "num_wins": won,
        "p_worse": None,
        "p_corrected": None,
        "mistaken_for": mistaken_for,
    }
