"""The regression gate: judges all candidates of a release together, each against its champion on the same gate examples.

A "no" is a value here, never an exception. Three verdicts per task, four outcomes per release; the rules and their
simulated operating characteristics: docs/gate.md, measured again by benchmarks/gate_power.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from multilora.spec import GateSpec
from orchestrator.eval_report import EvalReport
from orchestrator.metrics import text_f1
from orchestrator.paired import (
    f1_difference,
    holm,
    mcnemar_midp,
    mean_difference,
    paired_bootstrap,
    tango_interval,
    tango_p,
)
from orchestrator.power import ALPHA_MARGIN, detectable_drop, examples_needed

ALPHA_TASKS, ALPHA_POOLED = 0.03, 0.02
"""For "some task is worse" (Holm), and for "all tasks together are worse"; together they block a harmless release in 5 %."""
ALPHA_HARD = 0.01
"""A hard drop is believed at this p, or at ALPHA_POOLED over the number of changed tasks where that is less."""
MIN_CLASS_EXAMPLES = 10
"""Gate examples that a label needs before losing all of them is a collapse."""
MAX_EMPTY_RISE = 0.01
"""How much the share of empty answers of a free-text task may rise."""


class VerdictKind(StrEnum):
    """What the gate says about a candidate."""

    REGRESSED = "REGRESSED"
    NON_INFERIOR = "NON_INFERIOR"
    INCONCLUSIVE = "INCONCLUSIVE"


class Outcome(StrEnum):
    """What a whole submission came to, worst first; the worst task decides."""

    ERROR = "ERROR"
    BLOCK = "BLOCK"
    HOLD = "HOLD"
    CLEAR = "CLEAR"


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
class Verdict:
    """The gate's answer for one task, with its reasons in words and the numbers behind them."""

    kind: VerdictKind
    is_promoted: bool
    reasons: tuple[str, ...]
    difference: float
    """Of the spec's metric, candidate - reference."""
    num_losses: int
    """b: examples that only the reference gets right."""
    num_wins: int
    """c: examples that only the candidate gets right."""
    p_worse: float
    """One-sided p that the candidate is worse: McNemar mid-p, or bootstrap for a metric that is no accuracy."""
    p_holm: float | None
    """The same corrected over the release's changed tasks; None for a task that is not among them."""
    p_margin: float
    """One-sided p against "worse by the margin or more" (Tango, or bootstrap); small means proven not worse."""
    interval: tuple[float, float]
    """90 % interval of the metric's difference."""
    detectable_drop: float
    """Smallest true drop of accuracy that these examples find with 80 % power, at the observed rate of flips."""
    examples_needed: int | None = None
    """Of an inconclusive task: gate examples that would settle it."""


@dataclass(frozen=True)
class Release:
    """The gate's answer for everything that was judged together."""

    outcome: Outcome
    verdicts: Mapping[str, Verdict]
    errors: Mapping[str, str]
    """Why a comparison is not valid, by task; such a task never passes."""
    family: tuple[str, ...]
    """Tasks that changed, flipped at least one answer, and are corrected for together."""
    pooled_losses: int
    pooled_wins: int
    pooled_p: float
    """Mid-p over the family's flips together; finds small drops everywhere that no single task can show."""

    @property
    def is_pooled_drop(self) -> bool:
        """Whether the family as a whole got worse."""
        return len(self.family) > 1 and self.pooled_p < ALPHA_POOLED


@dataclass(frozen=True)
class _Measured:
    """The numbers of one task before any correction."""

    evidence: Evidence
    num_losses: int
    num_wins: int
    p_worse: float
    p_margin: float
    interval: tuple[float, float]

    @property
    def num_examples(self) -> int:
        return len(self.evidence.candidate.answers)

    @property
    def num_flips(self) -> int:
        return self.num_losses + self.num_wins

    @property
    def is_in_family(self) -> bool:
        return self.evidence.is_changed and not self.evidence.is_first_version and self.num_flips > 0


def judge(evidences: Sequence[Evidence]) -> Release:
    """Judge a release. Pure: the same evidence gives the same answer."""
    errors = {e.task: problem for e in evidences if (problem := incomparable(e.candidate, e.reference))}
    measured = {e.task: _measure(e) for e in evidences if e.task not in errors}
    family = {task: m for task, m in measured.items() if m.is_in_family}
    p_holm = holm({task: m.p_worse for task, m in family.items()})
    losses, wins = sum(m.num_losses for m in family.values()), sum(m.num_wins for m in family.values())
    verdicts = {task: _verdict(m, p_holm.get(task), len(family)) for task, m in measured.items()}
    release = Release(Outcome.CLEAR, verdicts, errors, tuple(family), losses, wins, mcnemar_midp(losses, wins))
    if release.is_pooled_drop:
        verdicts |= {task: _held_back(verdicts[task], release) for task, m in family.items() if m.num_losses > m.num_wins}
    verdicts = {task: _by_policy(verdict, measured[task].evidence.gate) for task, verdict in verdicts.items()}
    return replace(release, outcome=_outcome(release, verdicts, measured), verdicts=verdicts)


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


def _measure(evidence: Evidence) -> _Measured:
    candidate, reference, gate = evidence.candidate, evidence.reference, evidence.gate
    pairs = Counter(zip(candidate.correct, reference.correct, strict=True))
    num_losses, num_wins = pairs[False, True], pairs[True, False]
    if gate.metric == "accuracy":
        num_examples = len(candidate.answers)
        return _Measured(
            evidence,
            num_losses,
            num_wins,
            mcnemar_midp(num_losses, num_wins),
            tango_p(num_losses, num_wins, num_examples, gate.margin),
            tango_interval(num_losses, num_wins, num_examples),
        )
    both = list(zip(candidate.answers, reference.answers, strict=True))
    if gate.metric == "macro_f1":
        kinds = Counter((new.gold, new.answer, old.answer) for new, old in both)
        found = paired_bootstrap(list(kinds.values()), f1_difference(list(kinds)), gate.margin)
    else:
        differences = [text_f1(new.gold, new.answer) - text_f1(old.gold, old.answer) for new, old in both]
        found = paired_bootstrap([1] * len(both), mean_difference(differences), gate.margin)
    return _Measured(evidence, num_losses, num_wins, found.p_worse, found.p_margin, found.interval)


def _verdict(measured: _Measured, p_holm: float | None, num_family: int) -> Verdict:
    evidence = measured.evidence
    kind, reasons = _decide(measured, p_holm, num_family)
    metric = evidence.gate.metric
    difference = evidence.candidate.value(metric) - evidence.reference.value(metric)
    flip_rate = max(measured.num_flips, 1) / measured.num_examples
    verdict = Verdict(
        kind=kind,
        is_promoted=kind is VerdictKind.NON_INFERIOR,
        reasons=tuple(reasons),
        difference=difference,
        num_losses=measured.num_losses,
        num_wins=measured.num_wins,
        p_worse=measured.p_worse,
        p_holm=p_holm,
        p_margin=measured.p_margin,
        interval=measured.interval,
        detectable_drop=detectable_drop(flip_rate, measured.num_examples, ALPHA_TASKS / max(num_family, 1)),
    )
    if kind is not VerdictKind.INCONCLUSIVE:
        return verdict
    needed = max(examples_needed(flip_rate, evidence.gate.margin, ALPHA_MARGIN), measured.num_examples + 1)
    reason = f"{_flips(measured)}: too few examples to tell; about {needed} would settle a margin of {evidence.gate.margin:.3f}"
    return replace(verdict, reasons=(reason,), is_promoted=difference >= 0, examples_needed=needed)


def _decide(measured: _Measured, p_holm: float | None, num_family: int) -> tuple[VerdictKind, list[str]]:
    evidence = measured.evidence
    gate, candidate, reference = evidence.gate, evidence.candidate, evidence.reference
    value, before = candidate.value(gate.metric), reference.value(gate.metric)
    if value < gate.min:
        return VerdictKind.REGRESSED, [f"{value:.3f} is below gate.min {gate.min:.3f}"]
    if broken := _broken_rules(evidence):
        return VerdictKind.REGRESSED, broken
    if evidence.is_first_version:
        kind = VerdictKind.NON_INFERIOR if value > before else VerdictKind.REGRESSED
        return kind, [
            f"first version: {value:.3f} {'beats' if value > before else 'does not beat'} the zero-shot base's {before:.3f}"
        ]
    if [graded.answer for graded in candidate.answers] == [graded.answer for graded in reference.answers]:
        return VerdictKind.NON_INFERIOR, ["the same answers as the champion"]
    flips = _flips(measured)
    drop = (measured.num_losses - measured.num_wins) / measured.num_examples
    if drop >= gate.hard_drop and mcnemar_midp(measured.num_losses, measured.num_wins) < min(
        ALPHA_HARD, ALPHA_POOLED / max(num_family, 1)
    ):
        return VerdictKind.REGRESSED, [f"a hard drop of {100 * drop:.1f} points ({flips}, p = {measured.p_worse:.3g})"]
    is_proven = measured.p_margin < ALPHA_MARGIN or (measured.num_flips == 0 and gate.metric == "accuracy")
    is_worse = p_holm is not None and p_holm < ALPHA_TASKS
    if is_worse and not is_proven:
        over = f", corrected over {num_family} changed tasks" if num_family > 1 else ""
        return VerdictKind.REGRESSED, [f"worse than the champion ({flips}, p = {p_holm:.3g}{over})"]
    if is_proven:
        note = " (a real drop, but within the margin)" if is_worse else ""
        return VerdictKind.NON_INFERIOR, [f"not worse by {gate.margin:.3f} or more ({flips}, p = {measured.p_margin:.3g}){note}"]
    return VerdictKind.INCONCLUSIVE, []


def _broken_rules(evidence: Evidence) -> list[str]:
    """Name what no statistic excuses: answers outside the label set or empty, a label of which nothing is right any more."""
    candidate, reference = evidence.candidate, evidence.reference
    if not candidate.labels:
        empty, before = (sum(not graded.answer.strip() for graded in side.answers) for side in (candidate, reference))
        is_up = empty - before > MAX_EMPTY_RISE * len(candidate.answers)
        return [f"{empty} answers are empty ({before} were)"] if is_up else []
    found = []
    if outside := sum(graded.answer not in candidate.labels for graded in candidate.answers):
        found.append(f"{outside} answers are outside the label set")
    gold = Counter(graded.gold for graded in candidate.answers)
    right, right_before = (Counter(g.gold for g in side.answers if g.is_right) for side in (candidate, reference))
    for label, count in gold.items():
        if count >= MIN_CLASS_EXAMPLES and right_before[label] and not right[label]:
            found.append(f"none of the {count} `{label}` examples is right any more ({right_before[label]} were)")
    return found


def _held_back(verdict: Verdict, release: Release) -> Verdict:
    reason = (
        f"all changed tasks together got worse ({release.pooled_losses} lost, {release.pooled_wins} won, "
        f"p = {release.pooled_p:.3g}), and this one lost more than it won"
    )
    return replace(verdict, is_promoted=False, reasons=(*verdict.reasons, reason))


def _by_policy(verdict: Verdict, gate: GateSpec) -> Verdict:
    """Let the spec's policy decide where the statistics leave room."""
    is_promoted, reason = verdict.is_promoted, ""
    if gate.policy == "advisory" and not is_promoted:
        is_promoted, reason = True, "promoted all the same: gate.policy is advisory"
    elif verdict.kind is VerdictKind.INCONCLUSIVE:
        is_promoted = is_promoted and gate.policy != "strict"
        reason = "promoted: not below the champion" if is_promoted else "not promoted: below the champion"
        if gate.policy == "strict":
            reason = "not promoted: gate.policy is strict"
    return replace(verdict, is_promoted=is_promoted, reasons=(*verdict.reasons, reason) if reason else verdict.reasons)


def _outcome(release: Release, verdicts: Mapping[str, Verdict], measured: Mapping[str, _Measured]) -> Outcome:
    """The worst of what counts; a task under an advisory gate does not."""
    counted = {task: v.kind for task, v in verdicts.items() if measured[task].evidence.gate.policy != "advisory"}
    if release.errors:
        return Outcome.ERROR
    is_drop = release.is_pooled_drop and any(task in counted for task in release.family)
    if is_drop or VerdictKind.REGRESSED in counted.values():
        return Outcome.BLOCK
    return Outcome.HOLD if VerdictKind.INCONCLUSIVE in counted.values() else Outcome.CLEAR


def _flips(measured: _Measured) -> str:
    return f"{measured.num_losses} lost, {measured.num_wins} won of {measured.num_examples}"
