"""The regression gate: judges all candidates of a release together, each against its champion on the same gate examples.

A "no" is a value here, never an exception. Three verdicts per task, four outcomes per release; the rules and their
simulated operating characteristics: docs/gate.md, measured again by benchmarks/gate_power.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from enum import StrEnum

from multilora.spec import GateSpec
from orchestrator.comparison import Comparison, Evidence, compare, incomparable
from orchestrator.paired import holm, mcnemar_midp
from orchestrator.power import ALPHA_MARGIN, detectable_drop, examples_needed

ALPHA_TASKS, ALPHA_POOLED = 0.03, 0.02
"""For "some task is worse" (Holm), and for "all tasks together are worse"; together they block a harmless release in 5 %."""
ALPHA_HARD = 0.01
"""A hard drop is believed at this p, or at ALPHA_POOLED over the number of changed tasks where that is less."""


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
    pooled: tuple[str, ...]
    """Tasks of the family whose flips are added up; those under an advisory gate are not."""
    pooled_losses: int
    pooled_wins: int
    pooled_p: float
    """Mid-p over these flips together; finds small drops everywhere that no single task can show."""

    @property
    def is_pooled_drop(self) -> bool:
        """Whether the pooled tasks as a whole got worse."""
        return len(self.pooled) > 1 and self.pooled_p < ALPHA_POOLED


def judge(evidences: Sequence[Evidence]) -> Release:
    """Judge a release. Pure: the same evidence gives the same answer."""
    errors = {e.task: problem for e in evidences if (problem := incomparable(e.candidate, e.reference))}
    return decide({e.task: compare(e) for e in evidences if e.task not in errors}, errors)


def decide(comparisons: Mapping[str, Comparison], errors: Mapping[str, str]) -> Release:
    """Decide on tasks that were compared, given why others could not be."""
    family = {task: found for task, found in comparisons.items() if found.is_in_family}
    p_holm = holm({task: found.p_worse for task, found in family.items()})
    verdicts = {task: _verdict(found, p_holm.get(task), len(family)) for task, found in comparisons.items()}
    pool = {task: found for task, found in family.items() if found.is_counted}
    losses, wins = sum(found.num_losses for found in pool.values()), sum(found.num_wins for found in pool.values())
    release = Release(Outcome.CLEAR, verdicts, errors, tuple(family), tuple(pool), losses, wins, mcnemar_midp(losses, wins))
    if release.is_pooled_drop:
        verdicts |= {task: _held_back(verdicts[task], release) for task, found in pool.items() if found.drop > 0}
    verdicts = {task: _by_policy(verdict, comparisons[task].gate) for task, verdict in verdicts.items()}
    kinds = {verdicts[task].kind for task, found in comparisons.items() if found.is_counted}
    return replace(release, outcome=_outcome(release, kinds), verdicts=verdicts)


def _verdict(found: Comparison, p_holm: float | None, num_family: int) -> Verdict:
    kind, reasons = _decide(found, p_holm, max(num_family, 1))
    alpha = ALPHA_TASKS / max(num_family, 1)
    difference = found.value - found.before
    needed = _examples_needed(found, alpha) if kind is VerdictKind.INCONCLUSIVE else None
    if needed:
        reasons = [f"{found.flips}: too few examples to tell; about {needed} would settle a margin of {found.gate.margin:.3f}"]
    return Verdict(
        kind=kind,
        is_promoted=kind is VerdictKind.NON_INFERIOR or (kind is VerdictKind.INCONCLUSIVE and difference >= 0),
        reasons=tuple(reasons),
        difference=difference,
        num_losses=found.num_losses,
        num_wins=found.num_wins,
        p_worse=found.p_worse,
        p_holm=p_holm,
        p_margin=found.p_margin,
        interval=found.interval,
        detectable_drop=detectable_drop(found.flip_rate, found.num_examples, alpha),
        examples_needed=needed,
    )


def _decide(found: Comparison, p_holm: float | None, num_family: int) -> tuple[VerdictKind, list[str]]:
    if found.faults:
        return VerdictKind.REGRESSED, list(found.faults)
    if found.is_first_version:
        is_better = found.value > found.before
        words = "beats" if is_better else "does not beat"
        reason = f"first version: {found.value:.3f} {words} the zero-shot base's {found.before:.3f}"
        return VerdictKind.NON_INFERIOR if is_better else VerdictKind.REGRESSED, [reason]
    if found.is_same:
        return VerdictKind.NON_INFERIOR, ["the same answers as the champion"]
    if found.drop >= found.gate.hard_drop:
        p_drop = mcnemar_midp(found.num_losses, found.num_wins)
        if p_drop < min(ALPHA_HARD, ALPHA_POOLED / num_family):
            return VerdictKind.REGRESSED, [f"a hard drop of {100 * found.drop:.1f} points ({found.flips}, p = {p_drop:.3g})"]
    is_worse = p_holm is not None and p_holm < ALPHA_TASKS
    if found.p_margin < ALPHA_MARGIN:
        note = " (a real drop, but within the margin)" if is_worse else ""
        reason = f"not worse by {found.gate.margin:.3f} or more ({found.flips}, p = {found.p_margin:.3g}){note}"
        return VerdictKind.NON_INFERIOR, [reason]
    if is_worse:
        over = f", corrected over {num_family} changed tasks" if num_family > 1 else ""
        return VerdictKind.REGRESSED, [f"worse than the champion ({found.flips}, p = {p_holm:.3g}{over})"]
    return VerdictKind.INCONCLUSIVE, []


def _examples_needed(found: Comparison, alpha: float) -> int:
    """Were the candidate as good as the champion; where there are as many already, at the drop seen, by either test."""
    margin, drop = found.gate.margin, found.before - found.value
    needed = examples_needed(found.flip_rate, margin, ALPHA_MARGIN)
    if needed <= found.num_examples:
        distances = ((margin - drop, ALPHA_MARGIN), (drop, alpha))
        needed = min(examples_needed(found.flip_rate, distance, level) for distance, level in distances if distance > 0)
    return max(needed, found.num_examples + 1)


def _held_back(verdict: Verdict, release: Release) -> Verdict:
    reason = (
        f"all changed tasks together got worse ({release.pooled_losses} lost, {release.pooled_wins} won, "
        f"p = {release.pooled_p:.3g}), and this one lost more than it won"
    )
    return replace(verdict, is_promoted=False, reasons=(*verdict.reasons, reason))


def _by_policy(verdict: Verdict, gate: GateSpec) -> Verdict:
    """Let the spec's policy decide where the statistics leave room, and say so."""
    if gate.policy == "advisory" and not verdict.is_promoted:
        reason = "promoted all the same: gate.policy is advisory"
        return replace(verdict, is_promoted=True, reasons=(*verdict.reasons, reason))
    if verdict.kind is not VerdictKind.INCONCLUSIVE:
        return verdict
    if gate.policy == "strict":
        return replace(verdict, is_promoted=False, reasons=(*verdict.reasons, "not promoted: gate.policy is strict"))
    if verdict.difference >= 0 and not verdict.is_promoted:
        return verdict  # held back, which is said already
    reason = "promoted: not below the champion" if verdict.is_promoted else "not promoted: below the champion"
    return replace(verdict, reasons=(*verdict.reasons, reason))


def _outcome(release: Release, kinds: Set[VerdictKind]) -> Outcome:
    """The worst of what counts."""
    if release.errors:
        return Outcome.ERROR
    if release.is_pooled_drop or VerdictKind.REGRESSED in kinds:
        return Outcome.BLOCK
    return Outcome.HOLD if VerdictKind.INCONCLUSIVE in kinds else Outcome.CLEAR
