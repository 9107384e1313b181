"""Statistics of two systems on the same examples. Pure functions of counts and of scores per example.

b counts the losses (only the reference is right), c the wins (only the candidate is), n all examples; differences are
candidate - reference. McNemar mid-p: Fagerland et al. 2013, doi:10.1186/1471-2288-13-91. Tango's score test for paired
proportions: Tango 1998, Statistics in Medicine 17:891. Holm 1979, Scandinavian Journal of Statistics 6:65.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc, ndtr, ndtri
from scipy.stats import binomtest

NUM_RESAMPLES = 10_000
MAX_DRAWN = 2**21
"""Counts drawn at once: 16 MiB."""
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From counts of examples (R resamples x K kinds of examples) to R values of a metric's difference."""


def mcnemar_midp(num_losses: int, num_wins: int) -> float:
    """One-sided mid-p that losses outnumber wins by chance: P(X > b) + P(X = b) / 2 for X ~ Bin(b + c, 1/2)."""
    total = num_losses + num_wins
    # The mean of P(X > b) and P(X >= b). scipy.special's functions take a thirtieth of scipy.stats' time.
    return float(bdtrc(num_losses, total, 0.5) + bdtrc(num_losses - 1, total, 0.5)) / 2 if total else 1.0


def tango_z(num_losses: float, num_wins: float, num_examples: int, difference: float) -> float:
    """Score statistic of H0: accuracy difference (candidate - reference) equals `difference`; closed form.

    Losses and wins may be means over several pairs of runs.
    """
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
    return float(ndtr(-tango_z(num_losses, num_wins, num_examples, -margin)))


def tango_interval(num_losses: float, num_wins: float, num_examples: int, level: float = 0.90) -> tuple[float, float]:
    """Two-sided score interval of the accuracy difference, by inverting Tango's test."""
    critical = float(ndtri(0.5 + level / 2))
    observed = (num_wins - num_losses) / num_examples

    def edge(outer: float, sign: int) -> float:
        inner = observed
        for _ in range(40):
            middle = (inner + outer) / 2
            inside = sign * tango_z(num_losses, num_wins, num_examples, middle) < critical
            inner, outer = (middle, outer) if inside else (inner, middle)
        return inner

    return edge(-1.0, 1), edge(1.0, -1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p values for their number, so that the chance of any false one below alpha is at most alpha."""
    adjusted: dict[str, float] = {}
    floor = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        floor = max(floor, min((len(p_values) - rank) * p_values[name], 1.0))
        adjusted[name] = floor
    return adjusted


def fewest_losses(alpha: float) -> int:
    """Losses without a win that are needed before mid-p can fall below `alpha`."""
    return next(count for count in range(1, 100) if mcnemar_midp(count, 0) < alpha)


def wilson(num_correct: int, num_examples: int) -> tuple[float, float]:
    """95 % Wilson interval of an accuracy."""
    found = binomtest(num_correct, num_examples).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Resampled:
    """What a paired bootstrap says of a metric's difference."""

    p_worse: float
    """One-sided p of H0: not worse."""
    p_margin: float
    """One-sided p of H0: worse by the margin or more."""
    interval: tuple[float, float]
    """90 % percentile interval of the difference."""
    variance: float
    """Of the difference, times the number of examples: what the share of flips is for an accuracy."""


def paired_bootstrap(counts: Sequence[int], statistic: Statistic, margin: float, prior: Sequence[float] = ()) -> Resampled:
    """Resample examples jointly for both systems, 10,000 times with a fixed seed.

    `counts` says how many examples there are of each kind; examples of one kind are alike for the statistic, so a resample
    is a draw of counts. Both tests shift the resampled differences to their null hypothesis (Efron and Tibshirani 1993,
    chapter 16). `prior` adds to what is drawn from, not to what was observed: without any loss among few examples, a
    resample would have none either, and thirty examples would prove everything.
    """
    num_examples, weights = sum(counts), np.add(counts, prior or 0.0)
    rng, rest, parts = np.random.default_rng(0), NUM_RESAMPLES, []
    while rest:
        size = min(rest, max(MAX_DRAWN // len(counts), 1))
        parts.append(statistic(rng.multinomial(num_examples, weights / weights.sum(), size=size).astype(float)))
        rest -= size
    observed, centre = statistic(np.array([counts, weights], dtype=float)).tolist()
    # Rounded, because equal differences must compare as equal whatever order their terms were added in.
    spread, observed = np.round(np.concatenate(parts) - centre, 12), round(observed, 12)
    # The observed sample counts as one resample, so that no p is zero.
    p_worse = (1 + int((spread <= observed).sum())) / (1 + NUM_RESAMPLES)
    p_margin = (1 + int((spread >= observed + margin).sum())) / (1 + NUM_RESAMPLES)
    low, high = observed + np.quantile(spread, [0.05, 0.95])
    return Resampled(p_worse, p_margin, (float(low), float(high)), float(num_examples * spread.var()))


def compare_f1(kinds: Mapping[tuple[str, str, str], int], margin: float) -> Resampled:
    """Bootstrap the difference of macro-F1 from counts of (gold, candidate's answer, reference's answer).

    The prior is one lost and one won example, spread over the labels as they are among the examples; Bonett and Price 2012
    (doi:10.3102/1076998611411915) add the same to an accuracy.
    """
    names = sorted({name for kind in kinds for name in kind})
    other = dict(zip(names, names[1:] + names[:1], strict=True))
    prior: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    for (gold, _, _), count in kinds.items():
        for answers in ((other[gold], gold), (gold, other[gold])):
            prior[gold, *answers] += count / sum(kinds.values())
    both = sorted({*kinds, *prior})
    return paired_bootstrap([kinds.get(kind, 0) for kind in both], f1_difference(both), margin, [prior[kind] for kind in both])


def compare_means(differences: Sequence[float], margin: float) -> Resampled:
    """Bootstrap the mean of differences per example, each from -1 to 1; the prior is one of either."""
    found = Counter(differences)
    both = sorted({*found, -1.0, 1.0})
    prior = [float(abs(value) == 1.0) for value in both]
    return paired_bootstrap([found[value] for value in both], mean_difference(both), margin, prior)


def f1_difference(kinds: Sequence[tuple[str, str, str]]) -> Statistic:
    """Difference of macro-F1 (candidate - reference) from counts of (gold, candidate's answer, reference's answer)."""
    labels = sorted({name for kind in kinds for name in kind})
    gold, candidate, reference = (
        np.array([[kind[side] == label for label in labels] for kind in kinds], dtype=float) for side in range(3)
    )
    # What each kind adds to a label's right answers and to its gold and given ones, for both systems.
    summed = np.hstack([2 * gold * candidate, gold + candidate, 2 * gold * reference, gold + reference])

    def difference(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        right, seen, right_before, seen_before = np.hsplit(counts @ summed, 4)
        # As in metrics.macro_f1, a label that occurs on neither side is not averaged.
        found: NDArray[np.float64] = mean_of(right, seen) - mean_of(right_before, seen_before)
        return found

    def mean_of(right: NDArray[np.float64], seen: NDArray[np.float64]) -> NDArray[np.float64]:
        mean: NDArray[np.float64] = (right / np.maximum(seen, 1.0)).sum(axis=1) / (seen > 0).sum(axis=1)
        return mean

    return difference


def mean_difference(differences: Sequence[float]) -> Statistic:
    """Mean of differences, one per kind of example."""
    column = np.array(differences)

    def mean(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        means: NDArray[np.float64] = counts @ column / counts.sum(axis=1)
        return means

    return mean
