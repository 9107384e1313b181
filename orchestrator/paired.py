"""Statistics of two systems on the same examples. Pure functions of counts and of scores per example.

b counts the losses (only the reference is right), c the wins (only the candidate is), n all examples; differences are
candidate - reference. McNemar mid-p: Fagerland et al. 2013, doi:10.1186/1471-2288-13-91. Tango's score test for paired
proportions: Tango 1998, Statistics in Medicine 17:891. Holm 1979, Scandinavian Journal of Statistics 6:65.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm

NUM_RESAMPLES = 10_000
Z_POWER = float(norm.ppf(0.8))
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From counts of examples (R resamples x K kinds of examples) to R values of a metric's difference."""


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


def examples_needed(flip_rate: float, margin: float, alpha: float) -> int:
    """Examples that prove an unchanged task not worse, with 80 % power: (z_alpha + z_power)^2 x flip rate / margin^2."""
    return math.ceil((float(norm.ppf(1 - alpha)) + Z_POWER) ** 2 * flip_rate / margin**2)


def detectable_drop(flip_rate: float, num_examples: int, alpha: float) -> float:
    """Smallest true drop of accuracy that is found with 80 % power, where `flip_rate` of the answers flip without any.

    A drop d adds d to the flips, so d solves d = (z_alpha + z_power) x sqrt((flip rate + d) / n).
    """
    half = (float(norm.ppf(1 - alpha)) + Z_POWER) ** 2 / num_examples / 2
    return min(half + math.sqrt(half**2 + 2 * half * flip_rate), 1.0)


def fewest_losses(alpha: float) -> int:
    """Losses without a win that are needed before mid-p can fall below `alpha`."""
    return next(count for count in range(1, 100) if mcnemar_midp(count, 0) < alpha)


def wilson(num_correct: int, num_examples: int) -> tuple[float, float]:
    """95 % Wilson interval of an accuracy."""
    share, z = num_correct / num_examples, float(norm.ppf(0.975))
    scale = 1 + z**2 / num_examples
    middle = (share + z**2 / num_examples / 2) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num_examples + (z / num_examples / 2) ** 2)
    return max(middle - half, 0.0), min(middle + half, 1.0)


@dataclass(frozen=True)
class Resampled:
    """What a paired bootstrap says of a metric's difference."""

    p_worse: float
    """One-sided p of H0: not worse."""
    p_margin: float
    """One-sided p of H0: worse by the margin or more."""
    interval: tuple[float, float]
    """90 % percentile interval of the difference."""


def paired_bootstrap(counts: Sequence[int], statistic: Statistic, margin: float) -> Resampled:
    """Resample examples jointly for both systems, 10,000 times with a fixed seed.

    `counts` says how many examples there are of each kind; examples of one kind are alike for the statistic, so a resample
    is a draw of counts. Both tests shift the resampled differences to their null hypothesis (Efron and Tibshirani 1993,
    chapter 16).
    """
    num_examples = sum(counts)
    drawn = np.random.default_rng(0).multinomial(num_examples, np.divide(counts, num_examples), size=NUM_RESAMPLES)
    observed = float(statistic(np.array([counts], dtype=float))[0])
    differences = statistic(drawn.astype(float))
    spread = differences - observed
    # The observed sample counts as one resample, so that no p is zero.
    p_worse = (1 + int((spread <= observed).sum())) / (1 + NUM_RESAMPLES)
    p_margin = (1 + int((spread >= observed + margin).sum())) / (1 + NUM_RESAMPLES)
    low, high = np.quantile(differences, [0.05, 0.95])
    return Resampled(p_worse, p_margin, (float(low), float(high)))


def f1_difference(kinds: Sequence[tuple[str, str, str]]) -> Statistic:
    """Difference of macro-F1 (candidate - reference) from counts of (gold, candidate's answer, reference's answer)."""
    labels = sorted({name for kind in kinds for name in kind})
    gold, candidate, reference = (np.array([[kind[side] == label for label in labels] for kind in kinds]) for side in range(3))

    def macro_f1(counts: NDArray[np.float64], answers: NDArray[np.bool_]) -> NDArray[np.float64]:
        num_right = counts @ (gold & answers)
        num_seen = counts @ (gold.astype(float) + answers)
        scores = np.divide(2 * num_right, num_seen, out=np.zeros_like(num_seen), where=num_seen > 0)
        # As in metrics.macro_f1, a label that occurs on neither side is not averaged.
        mean: NDArray[np.float64] = scores.sum(axis=1) / (num_seen > 0).sum(axis=1)
        return mean

    return lambda counts: macro_f1(counts, candidate) - macro_f1(counts, reference)


def mean_difference(differences: Sequence[float]) -> Statistic:
    """Mean of differences per example, each example a kind of its own."""
    column = np.array(differences)

    def mean(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        means: NDArray[np.float64] = counts @ column / counts.sum(axis=1)
        return means

    return mean
