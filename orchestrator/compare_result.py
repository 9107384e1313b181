"""What a comparison found: its rows, a summary per method, and paired differences to the task's own adapter. Pure, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, get_args

from orchestrator.methods import AS_IN_FILE, MethodRow, Part, Summary, summarise
from orchestrator.paired import tango_interval

PARTS: tuple[Part, ...] = get_args(Part)
WITH_ADAPTERS: tuple[Part, ...] = ("curve", "variants")
"""Parts that train the task's own adapter; the first of them that ran has the one that all others are held against."""
LEVEL = 0.95


@dataclass(frozen=True)
class CompareOrder:
    """What is compared: everything but the rows."""

    task: str
    key: str
    """Hash of everything that decides the answers, but for the parts."""
    base: str
    labels: tuple[str, ...]
    gold: tuple[str, ...]
    """Gold labels in gate order."""
    num_train: int
    seeds: tuple[int, ...]
    sizes: tuple[int, ...]
    created: str
    """ISO time of the command that ran last."""
    commit: str = ""


@dataclass(frozen=True)
class Difference:
    """Accuracy of one method less that of another on the same gate examples."""

    value: float
    low: float
    high: float
    flip_rate: float
    """Share of examples that one run of either method answers rightly and the other's wrongly."""

    @property
    def is_shown(self) -> bool:
        """Whether zero is outside the interval; else nobody is called better."""
        return self.low > 0 or self.high < 0


def difference(rows: Sequence[MethodRow], others: Sequence[MethodRow], gold: Sequence[str], level: float = LEVEL) -> Difference:
    """Compare the runs of two methods with Tango's interval for paired proportions (paired.py).

    Losses and wins are means over all pairs of a run of the one and a run of the other, so the value is the difference of the
    mean accuracies, and the interval is as wide as for one such pair: what other gate examples could have shown.
    """
    both = list(zip(_right(rows, gold), _right(others, gold), strict=True))
    losses, wins = sum((1 - p) * q for p, q in both), sum(p * (1 - q) for p, q in both)
    low, high = tango_interval(losses, wins, len(gold), level)
    return Difference((wins - losses) / len(gold), low, high, (wins + losses) / len(gold))


def _right(rows: Sequence[MethodRow], gold: Sequence[str]) -> list[float]:
    """Share of the runs that answer each example rightly."""
    return [sum(row.answers[i] == label for row in rows) / len(rows) for i, label in enumerate(gold)]


@dataclass(frozen=True)
class MethodComparison:
    """A stored comparison, whole or as far as it came."""

    order: CompareOrder
    rows: tuple[MethodRow, ...]
    """By part in the order of `Part`; of a part that failed the last row says why."""
    finished: tuple[Part, ...]
    failed: Mapping[Part, str]
    """Part -> what it raised."""

    @property
    def cut_off(self) -> tuple[Part, ...]:
        """Parts with rows that have not come to their end."""
        return tuple(part for part in dict.fromkeys(row.part for row in self.rows) if part not in (*self.finished, *self.failed))

    @cached_property
    def summaries(self) -> tuple[Summary, ...]:
        """Every method in the order in which it came; none is left out."""
        return tuple(summarise(self.rows, self.order.gold))

    def ran(self, *parts: Part) -> list[Summary]:
        """Methods of these parts that have answers."""
        return [summary for summary in self.summaries if summary.part in parts and summary.num_seeds]

    def runs(self, summary: Summary) -> list[MethodRow]:
        """The rows with answers behind a summary."""
        wanted = _identity(summary)
        return [row for row in self.rows if not row.skipped and (row.part, row.method, row.num_train) == wanted]

    @cached_property
    def own(self) -> Summary | None:
        """The adapter that the others are held against: of the curve with all examples, else the variant as in the task file.

        It is named before anybody looks at an accuracy, so that it is not the luckiest of many.
        """
        for part in WITH_ADAPTERS:
            if ran := self.ran(part):
                first = next((one for one in ran if one.note == AS_IN_FILE), ran[0])
                return max((one for one in ran if one.method == first.method), key=lambda one: one.num_train)
        return None

    def best(self, *parts: Part) -> Summary | None:
        """The most accurate method of these parts; of equals the one with fewer examples, then the faster one."""
        return max(self.ran(*parts), key=lambda one: (one.accuracy, -one.num_train, -one.ms_per_text), default=None)

    def difference(self, summary: Summary, other: Summary, level: float = LEVEL) -> Difference:
        """Paired difference of two methods that ran."""
        return difference(self.runs(summary), self.runs(other), self.order.gold, level)

    def to_own(self, summary: Summary) -> Difference | None:
        """How much better than the task's own adapter; None of that one itself, and where one of them has no answers."""
        if self.own is None or not summary.num_seeds or _identity(summary) == _identity(self.own):
            return None
        return self.difference(summary, self.own)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: all numbers, without the answers."""
        methods = [
            {**asdict(summary), "is_own": summary is self.own, "to_own": asdict(found) if found else None}
            for summary, found in ((summary, self.to_own(summary)) for summary in self.summaries)
        ]
        gold = self.order.gold
        runs = [
            {**asdict(row), "answers": len(row.answers), "accuracy": None if row.skipped else row.accuracy(gold)}
            for row in self.rows
        ]
        order = {name: value for name, value in asdict(self.order).items() if name != "gold"}
        state = {"finished": self.finished, "failed": dict(self.failed), "cut_off": self.cut_off}
        return {**order, "num_gate": len(gold), **state, "methods": methods, "runs": runs}


def _identity(summary: Summary) -> tuple[Part, str, int]:
    return summary.part, summary.method, summary.num_train
