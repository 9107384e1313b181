"""Comparisons whose numbers are made up by hand: which gate examples a method answers rightly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.compare_result import CompareOrder, MethodComparison
from orchestrator.methods import MethodRow, Part

NUM_GATE = 200
LABELS = ("yes", "no")
GOLD = tuple(LABELS[number % 2] for number in range(NUM_GATE))


def order(task: str = "mood", gold: Sequence[str] = GOLD, seeds: Sequence[int] = (0, 1, 2)) -> CompareOrder:
    """What is compared."""
    labels = tuple(dict.fromkeys(gold))
    return CompareOrder(
        task, "k" * 16, "tiny base", labels, tuple(gold), 400, tuple(seeds), (25, 50, 100), "2026-11-27T10:00:00+00:00"
    )


def row(part: Part, method: str, right: Iterable[int], num_train: int = 0, gold: Sequence[str] = GOLD, **fields) -> MethodRow:
    """A run that answers the examples `right` rightly and the others with another label."""
    known, labels = set(right), list(dict.fromkeys(gold))
    answers = tuple(label if number in known else labels[labels.index(label) - 1] for number, label in enumerate(gold))
    return MethodRow(part, method, answers, num_train, **fields)


def comparison(*rows: MethodRow, gold: Sequence[str] = GOLD, failed: dict[Part, str] | None = None) -> MethodComparison:
    """A comparison whose parts are finished, but for those that failed."""
    parts = dict.fromkeys(one.part for one in rows)
    return MethodComparison(order(gold=gold), rows, tuple(part for part in parts if part not in (failed or {})), failed or {})


def curve(*num_right: int, sizes: Sequence[int] = (100, 200, 400), seed: int = 0) -> list[MethodRow]:
    """A learning curve: the first so many examples are right at each size."""
    return [
        row(
            "curve",
            "adapter",
            range(count),
            size,
            seed=seed,
            train_s=size / 10,
            ms_per_text=3.4,
            num_trained=9000,
            disk_bytes=1_300_000,
        )
        for count, size in zip(num_right, sizes, strict=True)
    ]
