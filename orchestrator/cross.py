"""Every adapter on every task: how often each is right with another task's prompt and labels, and what follows from it.

A cell is comparable with the others of its column only: same rows, same prompt, same labels, another adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.files import write_whole

BASE = "base"
"""The row of the base alone; no task may bear this name."""


@dataclass(frozen=True)
class CrossColumn:
    """One task asked of the base and of every adapter."""

    task: str
    num_examples: int
    num_right: Mapping[str, int | None]
    """By row: `base`, or an adapter's `task@version`; None where an adapter's scores are no numbers."""
    error: str = ""
    """Why the task's own adapter could not be bound, so that it has neither column nor row."""


@dataclass(frozen=True)
class CrossMatrix:
    """Right answers of every adapter of one base on every task's gate examples, X[a][t]."""

    base: str
    adapters: tuple[str, ...]
    """Rows: `task@version` of each task's own adapter, in the order of `tasks`."""
    tasks: tuple[str, ...]
    """Columns."""
    num_examples: Mapping[str, int]
    """Of each task; every adapter was asked the same ones."""
    num_right: Mapping[str, Mapping[str, int | None]]
    """By row (an adapter, or `base` for zero-shot), then by task; None where a cell is not comparable."""
    created: str
    """ISO time."""

    @classmethod
    def of(cls, base: str, versions: Mapping[str, int], columns: Sequence[CrossColumn], created: str) -> CrossMatrix:
        """Put columns together; those with an error are left out."""
        good = [column for column in columns if not column.error]
        adapters = {column.task: f"{column.task}@{versions[column.task]}" for column in good}
        return cls(
            base,
            tuple(adapters.values()),
            tuple(adapters),
            {column.task: column.num_examples for column in good},
            {row: {column.task: column.num_right[row] for column in good} for row in (BASE, *adapters.values())},
            created,
        )

    def own(self, task: str) -> str:
        """The row of a task's own adapter."""
        return self.adapters[self.tasks.index(task)]

    def accuracy(self, row: str, task: str) -> float | None:
        """X[row][task]: right answers over the task's examples."""
        num_right = self.num_right[row][task]
        return None if num_right is None else num_right / self.num_examples[task]

    def best_other(self, task: str) -> str | None:
        """The adapter of another task with the most right answers on this one, the first of equals; None without any."""
        others = [row for row in self.adapters if row != self.own(task) and self.num_right[row][task] is not None]
        return max(others, key=lambda row: self.num_right[row][task] or 0, default=None)

    def own_advantage(self, task: str) -> float | None:
        """What the best wrong adapter would lose: X[own][task] - X[best other][task], both over the task's examples."""
        other = self.best_other(task)
        return None if other is None else self._difference(self.own(task), other, task)

    def forward_transfer(self) -> tuple[float | None, int]:
        """Mean over ordered pairs (a, t) of an adapter and another's task of X[a][t] - X[base][t], and the number of pairs.

        Of n adapters there are n(n - 1) pairs, less those with a cell that is not comparable; each pair counts the same,
        however many examples its task has.
        """
        pairs = [(row, task) for row in self.adapters for task in self.tasks if row != self.own(task)]
        found = [difference for row, task in pairs if (difference := self._difference(row, BASE, task)) is not None]
        return (sum(found) / len(found) if found else None), len(found)

    def summary(self) -> dict[str, Any]:
        """What the cells come to, as plain values."""
        transfer, num_pairs = self.forward_transfer()
        return {
            "own_accuracy": {task: self.accuracy(self.own(task), task) for task in self.tasks},
            "zero_shot_accuracy": {task: self.accuracy(BASE, task) for task in self.tasks},
            "best_other": {task: self.best_other(task) for task in self.tasks},
            "own_advantage": {task: self.own_advantage(task) for task in self.tasks},
            "forward_transfer": transfer,
            "num_pairs": num_pairs,
        }

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CrossMatrix:
        """Undo `to_json`."""
        raw = json.loads(text)
        return cls(**{**raw, "adapters": tuple(raw["adapters"]), "tasks": tuple(raw["tasks"])})

    def _difference(self, row: str, other: str, task: str) -> float | None:
        first, second = self.accuracy(row, task), self.accuracy(other, task)
        return None if first is None or second is None else first - second


def store_matrices(file: Path, matrices: Sequence[CrossMatrix]) -> None:
    """Keep one matrix per base, atomically: these replace older ones of their bases, other bases' stay."""
    kept = {matrix.base: matrix for matrix in (*load_matrices(file), *matrices)}
    write_whole(file, f"[{','.join(matrix.to_json() for matrix in kept.values())}]\n".encode())


def load_matrices(file: Path) -> tuple[CrossMatrix, ...]:
    """Stored matrices; none where there is no file."""
    if not file.is_file():
        return ()
    return tuple(CrossMatrix.from_json(json.dumps(raw)) for raw in json.loads(file.read_text(encoding="utf-8")))
