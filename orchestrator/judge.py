"""The regression gate: paired statistics of candidate against champion on the same gate examples. Pure functions.

A "no" is a value here (a Verdict), never an exception. Formulas: McNemar mid-p (Fagerland et al. 2013,
doi:10.1186/1471-2288-13-91) and Tango's score test for paired proportions (Tango 1998, Statistics in Medicine 17:891).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from scipy.stats import binom, binomtest, norm

ALPHA = 0.05


class VerdictKind(StrEnum):
    """What the gate says about a candidate."""

    REGRESSED = "REGRESSED"
    NON_INFERIOR = "NON_INFERIOR"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class GateInput:
    """One task's evidence. Correctness lists run over the same gate examples in the same order."""

    candidate_correct: Sequence[bool]
    reference_correct: Sequence[bool]
    """The champion's; for a first version the zero-shot base's."""
    candidate_value: float
    """The spec's metric on the gate split."""
    reference_value: float
    minimum: float
    margin: float
    is_first_version: bool


@dataclass(frozen=True)
class Verdict:
    """The gate's answer for one task, with its reasons in words and the numbers behind them."""

    kind: VerdictKind
    is_promoted: bool
    reasons: tuple[str, ...]
    difference: float
    """candidate_value - reference_value."""
    num_losses: int
    """b: examples that only the reference gets right."""
    num_wins: int
    """c: examples that only the candidate gets right."""
    p_worse: float
    """One-sided McNemar mid-p that the candidate is worse."""
    p_margin: float
    """One-sided p of Tango's test against "worse by the margin or more"; small means proven not worse."""
    interval: tuple[float, float]
    """90 % score interval of the accuracy difference."""


def judge(evidence: GateInput) -> Verdict:
    """Judge a candidate. Raises ValueError when the two sides were not measured on the same number of examples."""
    pairs = list(zip(evidence.candidate_correct, evidence.reference_correct, strict=True))
    num_losses = sum(reference and not candidate for candidate, reference in pairs)
    num_wins = sum(candidate and not reference for candidate, reference in pairs)
    num_examples = len(pairs)
    p_worse = mcnemar_midp(num_losses, num_wins)
    p_margin = tango_p(num_losses, num_wins, num_examples, evidence.margin)
    kind, reasons = _decide(evidence, num_losses, num_wins, p_worse, p_margin)
    difference = evidence.candidate_value - evidence.reference_value
    is_promoted = kind is VerdictKind.NON_INFERIOR or (kind is VerdictKind.INCONCLUSIVE and difference >= 0)
    if kind is VerdictKind.INCONCLUSIVE:
        reasons.append("promoted: not below the champion" if is_promoted else "not promoted: below the champion")
    return Verdict(
        kind=kind,
        is_promoted=is_promoted,
        reasons=tuple(reasons),
        difference=difference,
        num_losses=num_losses,
        num_wins=num_wins,
        p_worse=p_worse,
        p_margin=p_margin,
        interval=tango_interval(num_losses, num_wins, num_examples),
    )


def _decide(
    evidence: GateInput, num_losses: int, num_wins: int, p_worse: float, p_margin: float
) -> tuple[VerdictKind, list[str]]:
    value, reference = evidence.candidate_value, evidence.reference_value
    if value < evidence.minimum:
        return VerdictKind.REGRESSED, [f"{value:.3f} is below gate.min {evidence.minimum:.3f}"]
    if evidence.is_first_version:
        if value > reference:
            return VerdictKind.NON_INFERIOR, [f"first version: {value:.3f} beats the zero-shot base's {reference:.3f}"]
        return VerdictKind.REGRESSED, [f"first version: {value:.3f} does not beat the zero-shot base's {reference:.3f}"]
    flips = f"{num_losses} lost, {num_wins} won of {len(evidence.candidate_correct)}"
    if num_losses == num_wins == 0:
        return VerdictKind.NON_INFERIOR, ["right and wrong on the same examples as the champion"]
    is_proven = p_margin < ALPHA
    if p_worse < ALPHA and not is_proven:
        return VerdictKind.REGRESSED, [f"worse than the champion ({flips}, p = {p_worse:.3g})"]
    if is_proven:
        note = " (a real drop, but within the margin)" if p_worse < ALPHA else ""
        return VerdictKind.NON_INFERIOR, [f"not worse by {evidence.margin:.3f} or more ({flips}, p = {p_margin:.3g}){note}"]
    needed = examples_needed(num_losses + num_wins, len(evidence.candidate_correct), evidence.margin)
    return VerdictKind.INCONCLUSIVE, [
        f"{flips}: too few examples to tell; about {needed} would settle a margin of {evidence.margin:.3f}"
    ]


def mcnemar_midp(num_losses: int, num_wins: int) -> float:
    """One-sided mid-p that losses outnumber wins by chance: P(X > b) + P(X = b) / 2 for X ~ Bin(b + c, 1/2)."""
    total = num_losses + num_wins
    if total == 0:
        return 1.0
    return float(binom.sf(num_losses, total, 0.5) + 0.5 * binom.pmf(num_losses, total, 0.5))


def tango_z(num_losses: int, num_wins: int, num_examples: int, difference: float) -> float:
    """Score statistic of H0: accuracy difference (candidate - reference) equals `difference`; closed form."""
    b, c, n, d = num_losses, num_wins, num_examples, difference
    linear = -c - b + (2 * n - c + b) * d
    constant = -b * d * (1 - d)
    q = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
    variance = n * (2 * q + d * (1 - d))
    distance = c - b - n * d
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def tango_p(num_losses: int, num_wins: int, num_examples: int, margin: float) -> float:
    """One-sided p of H0: the candidate is worse by `margin` or more."""
    return float(norm.sf(tango_z(num_losses, num_wins, num_examples, -margin)))


def tango_interval(num_losses: int, num_wins: int, num_examples: int, level: float = 0.90) -> tuple[float, float]:
    """Two-sided score interval of the accuracy difference, by inverting Tango's test."""
    critical = float(norm.ppf(0.5 + level / 2))
    observed = (num_wins - num_losses) / num_examples

    def edge(outer: float, sign: int) -> float:
        inner = observed
        for _ in range(60):
            middle = (inner + outer) / 2
            inside = sign * tango_z(num_losses, num_wins, num_examples, middle) < critical
            inner, outer = (middle, outer) if inside else (inner, middle)
        return inner

    return edge(-1.0, 1), edge(1.0, -1)


def examples_needed(num_flips: int, num_examples: int, margin: float, power: float = 0.8) -> int:
    """Gate examples that prove an unchanged task not worse: (z_alpha + z_power)^2 x flip rate / margin^2."""
    flip_rate = max(num_flips, 1) / num_examples
    return math.ceil((float(norm.ppf(1 - ALPHA)) + float(norm.ppf(power))) ** 2 * flip_rate / margin**2)


def wilson(num_correct: int, num_examples: int) -> tuple[float, float]:
    """95 % Wilson interval of an accuracy."""
    found = binomtest(num_correct, num_examples).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
