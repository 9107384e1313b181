"""What a learning curve says: how accuracy grows with labelled examples, where it flattens, what twice as many would buy.

Pure functions of numbers. Every seed's curve is also fitted by itself, so that the interval shows how far seeds differ;
another gate split could differ by more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import stdtrit

MIN_SIZES = 4
"""One more than the curve has parameters."""
WORTH = 0.01
"""A curve is flat where twice as many examples buy less accuracy than this."""
RATES = (0.1, 3.0)
"""Slower growth cannot be told from a straight line over few sizes, faster growth not from a step."""


@dataclass(frozen=True)
class PowerLaw:
    """accuracy = top - drop * (size / smallest) ^ -rate. Source of the form: Hestness et al. 2017, arXiv 1712.00409."""

    top: float
    """What endless examples would give."""
    drop: float
    """What the smallest size lacks of it; never negative, so a curve does not fall."""
    rate: float
    smallest: int

    def at(self, size: float) -> float:
        """Accuracy at a number of examples."""
        return self.top - self.drop * math.pow(size / self.smallest, -self.rate)

    def gain(self, size: float) -> float:
        """What twice as many examples add."""
        return self.at(2 * size) - self.at(size)

    @property
    def flat_from(self) -> int:
        """Number of examples from which on doubling them buys less than `WORTH`."""
        first = self.drop * (1 - math.pow(2, -self.rate)) / WORTH
        return math.ceil(self.smallest * math.pow(max(first, 1.0), 1 / self.rate))


@dataclass(frozen=True)
class LearningCurve:
    """What is said of a curve; nothing but `why_not` where it cannot be fitted."""

    law: PowerLaw | None = None
    """Fitted to all seeds together."""
    largest: int = 0
    """Most examples that were measured."""
    error: float = 0.0
    """Root mean square of what the law misses the measured accuracies by."""
    gain: float = 0.0
    """What twice the largest size would add: mean over seeds."""
    gain_interval: tuple[float, float] | None = None
    """95 % t interval over seeds; None with fewer than two."""
    num_seeds: int = 0
    """Seeds with enough sizes for a curve of their own."""
    flat_by_seed: tuple[int, ...] = ()
    """Where each seed's curve flattens."""
    why_not: str = ""

    @property
    def flat_from(self) -> int | None:
        """Where the curve flattens; None where that is beyond what was measured."""
        return self.law.flat_from if self.law and self.law.flat_from <= self.largest else None

    @property
    def sentence(self) -> str:
        """What to tell a person."""
        if self.law is None:
            return f"No learning curve: {self.why_not}."
        law, largest = self.law, self.largest
        text = f"From {law.smallest} to {largest} examples the fitted accuracy goes from {law.at(law.smallest):.3f} to "
        text += f"{law.at(largest):.3f} (points lie {self.error:.3f} off). "
        if self.flat_from is None:
            text += f"It has not flattened at {largest}"
        else:
            text += f"From {self.flat_from} on, twice as many buy less than {100 * WORTH:g} point"
        if len(self.flat_by_seed) > 1:
            text += f" (by seed: {', '.join(_place(size, largest) for size in self.flat_by_seed)})"
        text += f". Twice {largest} would buy {100 * self.gain:+.1f} points"
        if self.gain_interval is None:
            return text + "; how sure that is, takes more seeds to say."
        low, high = self.gain_interval
        return text + f", {100 * low:+.1f} to {100 * high:+.1f} over {self.num_seeds} seeds."


def fit_learning_curve(points: Iterable[tuple[int, int, float]]) -> LearningCurve:
    """Fit accuracies by number of examples; `points` are (examples, seed, accuracy)."""
    by_seed: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for size, seed, accuracy in points:
        by_seed[seed].append((size, accuracy))
    pooled = [point for own in by_seed.values() for point in own]
    num_sizes = len({size for size, _ in pooled})
    if num_sizes < MIN_SIZES:
        return LearningCurve(why_not=f"it needs {MIN_SIZES} sizes, and {num_sizes} were measured")
    law, largest = fit_power_law(pooled), max(size for size, _ in pooled)
    own_laws = [fit_power_law(own) for own in by_seed.values() if len({size for size, _ in own}) >= MIN_SIZES]
    gains = [own.gain(largest) for own in own_laws]
    return LearningCurve(
        law,
        largest,
        error=math.sqrt(sum((law.at(size) - accuracy) ** 2 for size, accuracy in pooled) / len(pooled)),
        gain=sum(gains) / len(gains) if gains else law.gain(largest),
        gain_interval=_t_interval(gains),
        num_seeds=len(gains),
        flat_by_seed=tuple(own.flat_from for own in own_laws),
    )


def fit_power_law(points: Sequence[tuple[int, float]]) -> PowerLaw:
    """Least squares within bounds, from three starts, because the rate has local minima; (examples, accuracy) in any order."""
    sizes, accuracies = np.array(points, dtype=float).T
    smallest = int(sizes.min())

    def misses(parameters: Sequence[float]) -> NDArray[np.float64]:
        top, drop, rate = parameters
        off: NDArray[np.float64] = top - drop * (sizes / smallest) ** -rate - accuracies
        return off

    starts = [(accuracies.max(), accuracies.max() - accuracies.min(), rate) for rate in (0.3, 1.0, 2.0)]
    bounds = ([0.0, 0.0, RATES[0]], [1.0, 1.0, RATES[1]])
    found = min((least_squares(misses, start, bounds=bounds) for start in starts), key=lambda result: result.cost)
    top, drop, rate = map(float, found.x)
    return PowerLaw(top, drop, rate, smallest)


def _t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    half = stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _place(size: int, largest: int) -> str:
    return str(size) if size <= largest else f"beyond {largest}"
