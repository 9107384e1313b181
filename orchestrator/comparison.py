"""What two systems' answers to the same gate examples come to: flips, p values, broken rules. Pure; decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

from multilora.spec import GateSpec
from orchestrator.eval_report import EvalReport
from orchestrator.metrics import text_f1
from orchestrator.paired import compare_f1, compare_means, mcnemar_midp, tango_interval, tango_p

MIN_CLASS_EXAMPLES = 10
"""Gate examples that a label needs before losing all of them is a collapse."""
MAX_EMPTY_RISE = 0.01
"""How much the share of empty answers of a free-text task may rise."""
MAX_SAME_FLIPS = 0.01
"""Share of answers (one at least) in which a system may differ from itself, in other batches and by other kernels."""


@dataclass(frozen=True)
class Evidence:
    """What is known of one task: the answers of two systems to the same gate examples."""

    task: str
    gate: GateSpec
    candidate: EvalReport
    reference: EvalReport
    """The champion's answers; for a first version the zero-shot base's."""
    is_first_version: bool = False
    is_changed: bool = True
    """Whether the fingerprints differ; only tasks that changed are in the family that Holm corrects over."""


@dataclass(frozen=True)
class Comparison:
    """What two systems' answers to a task's examples come to; the release is decided from these numbers alone."""

    gate: GateSpec
    num_examples: int
    num_losses: int
    num_wins: int
    value: float
    """The candidate's."""
    before: float
    """The reference's."""
    p_worse: float
    p_margin: float
    interval: tuple[float, float]
    flip_rate: float
    """Share of flips, one at least; of a metric that is no accuracy what takes its place, see Resampled.variance."""
    is_same: bool
    """Whether all answers are the same."""
    faults: tuple[str, ...] = ()
    """Broken rules that no statistic excuses."""
    is_first_version: bool = False
    is_changed: bool = True

    @property
    def drop(self) -> float:
        """How much accuracy was lost."""
        return (self.num_losses - self.num_wins) / self.num_examples

    @property
    def is_in_family(self) -> bool:
        """Whether the task is one of those that are corrected for: it changed, and so did what its metric counts."""
        is_moved = self.num_losses + self.num_wins > 0 or (self.gate.metric != "accuracy" and not self.is_same)
        return self.is_changed and not self.is_first_version and is_moved

    @property
    def is_counted(self) -> bool:
        """Whether the release's outcome depends on the task."""
        return self.gate.policy != "advisory"

    @property
    def flips(self) -> str:
        """In words."""
        return f"{self.num_losses} lost, {self.num_wins} won of {self.num_examples}"


def incomparable(candidate: EvalReport, reference: EvalReport) -> str:
    """Say why two eval reports cannot be compared; empty where they can."""
    if candidate.gate_fingerprint != reference.gate_fingerprint or (
        [graded.id for graded in candidate.answers] != [graded.id for graded in reference.answers]
    ):
        return "the compared systems were not measured on the same gate examples, so nothing can be said"
    if not candidate.answers:
        return "there are no gate examples, so nothing can be said"
    if candidate.scorer_version != reference.scorer_version:
        return (
            f"the answers come from scorer versions {reference.scorer_version} and {candidate.scorer_version}, "
            "which must not be compared: evaluate both again"
        )
    return ""


def compare(evidence: Evidence) -> Comparison:
    """Reduce the answers to the numbers that decide."""
    candidate, reference, gate = evidence.candidate, evidence.reference, evidence.gate
    both = list(zip(candidate.answers, reference.answers, strict=True))
    right, right_before = candidate.correct, reference.correct
    pairs = Counter(zip(right, right_before, strict=True))
    found = compare_counts(gate, len(both), pairs[False, True], pairs[True, False], pairs[True, True])
    if gate.metric != "accuracy":
        if gate.metric == "macro_f1":
            value, before = candidate.value(gate.metric), reference.value(gate.metric)
            resampled = compare_f1(Counter((new.gold, new.answer, old.answer) for new, old in both), gate.margin)
        else:
            scores = [(text_f1(new.gold, new.answer), text_f1(old.gold, old.answer)) for new, old in both]
            value, before = (sum(side) / len(both) for side in zip(*scores, strict=True))
            resampled = compare_means([new - old for new, old in scores], gate.margin)
        found = replace(
            found,
            value=value,
            before=before,
            p_worse=resampled.p_worse,
            p_margin=resampled.p_margin,
            interval=resampled.interval,
            flip_rate=max(resampled.variance, 1 / len(both)),
        )
    num_other = sum(new.answer != old.answer for new, old in both)
    faults = _broken_rules(candidate, reference, right, right_before)
    if found.value < gate.min:
        faults.insert(0, f"{found.value:.3f} is below gate.min {gate.min:.3f}")
    if not evidence.is_changed and num_other > max(1, MAX_SAME_FLIPS * len(both)):
        faults.append(f"nothing that decides the answers changed, yet {num_other} of {len(both)} differ")
    return replace(
        found,
        is_same=num_other == 0,
        faults=tuple(faults),
        is_first_version=evidence.is_first_version,
        is_changed=evidence.is_changed,
    )


def compare_counts(gate: GateSpec, num_examples: int, num_losses: int, num_wins: int, num_both_right: int) -> Comparison:
    """Compare two accuracies from counts; where none flips, all answers are taken for the same."""
    return Comparison(
        gate=gate,
        num_examples=num_examples,
        num_losses=num_losses,
        num_wins=num_wins,
        value=(num_both_right + num_wins) / num_examples,
        before=(num_both_right + num_losses) / num_examples,
        p_worse=mcnemar_midp(num_losses, num_wins),
        p_margin=tango_p(num_losses, num_wins, num_examples, gate.margin),
        interval=tango_interval(num_losses, num_wins, num_examples),
        flip_rate=max(num_losses + num_wins, 1) / num_examples,
        is_same=num_losses + num_wins == 0,
    )


def _broken_rules(candidate: EvalReport, reference: EvalReport, right: Sequence[bool], right_before: Sequence[bool]) -> list[str]:
    """Name what no statistic excuses: answers outside the label set or empty, a label of which nothing is right any more."""
    if not candidate.labels:
        empty, before = (sum(not graded.answer.strip() for graded in side.answers) for side in (candidate, reference))
        is_up = empty - before > MAX_EMPTY_RISE * len(candidate.answers)
        return [f"{empty} answers are empty ({before} were)"] if is_up else []
    found, labels = [], frozenset(candidate.labels)
    if outside := sum(graded.answer not in labels for graded in candidate.answers):
        found.append(f"{outside} answers are outside the label set")
    gold = [graded.gold for graded in candidate.answers]
    now, before_by_label = (Counter(compress(gold, side)) for side in (right, right_before))
    for label, count in Counter(gold).items():
        if count >= MIN_CLASS_EXAMPLES and before_by_label[label] and not now[label]:
            found.append(f"none of the {count} `{label}` examples is right any more ({before_by_label[label]} were)")
    return found
