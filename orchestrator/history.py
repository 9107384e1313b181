"""The history matrix R[promotion event][task]: what answered after every event, how well, and how well that is known.

An event is a submission that judged something, a forced promotion or a roll-back. Each is one file, written whole. A value
that was not measured is never a zero: its cell says so.
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from orchestrator.files import write_whole


class CellState(StrEnum):
    """How the value of a cell is known."""

    MEASURED = "measured"
    """Evaluated in this event."""
    CANARY = "canary-verified"
    """Same fingerprint as when it was measured, and its canaries still score the same."""
    CARRIED = "carried"
    """Not looked at in this event."""
    MISSING = "missing"
    """Nothing answers, or it was never measured."""
    NOT_COMPARABLE = "not comparable"
    """Measured on other gate examples, by another metric or scorer than the newest cell of the task."""


@dataclass(frozen=True)
class Cell:
    """What answered for a task after an event. All shares are fractions 0..1."""

    state: CellState
    version: str | None
    """`task@version`; None where nothing answers."""
    metric: str = "accuracy"
    value: float | None = None
    """The spec's metric on the gate split."""
    zero_shot: float | None = None
    """The same of the base alone."""
    num_right: int = 0
    num_examples: int = 0
    gate_fingerprint: str = ""
    scorer_version: int = 0
    fingerprint: str = ""
    """Digest of the serving fingerprint."""

    @property
    def yardstick(self) -> tuple[str, str, int]:
        """What two cells must share for their values to be compared."""
        return self.gate_fingerprint, self.metric, self.scorer_version


@dataclass(frozen=True)
class PromotionEvent:
    """One row of the matrix."""

    id: str
    """Time, sorts by age; also the name of the report's folder."""
    kind: Literal["submit", "promote", "rollback"]
    created: str
    """ISO time."""
    who: str
    outcome: str
    """CLEAR, HOLD, BLOCK or ERROR of a submission; FORCED for what a person decided."""
    reason: str
    cells: Mapping[str, Cell]
    """By task, of every task that has a champion or was judged."""
    consulted: Mapping[str, str] = field(default_factory=dict)
    """Gate fingerprint by task whose candidate was judged on it in this event."""
    flip_rates: Mapping[str, float] = field(default_factory=dict)
    """Share of gate answers that flipped between champion and candidate, by task."""


EVENT = TypeAdapter(PromotionEvent)


@dataclass(frozen=True)
class Metric:
    """One summary number with its denominator written out."""

    name: str
    value: float | None
    """None where there is nothing to average."""
    meaning: str


def current_user() -> str:
    """Who decides; in a container the user id may have no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def append_event(folder: Path, event: PromotionEvent) -> None:
    """Write an event, whole or not at all."""
    write_whole(folder / f"{event.id}.json", EVENT.dump_json(event))


def read_events(folder: Path) -> list[PromotionEvent]:
    """All events, oldest first."""
    return [EVENT.validate_python(json.loads(file.read_bytes())) for file in sorted(folder.glob("*.json"))]


def next_cells(
    before: Mapping[str, Cell], measured: Mapping[str, Cell], verified: Set[str], champions: Mapping[str, str]
) -> dict[str, Cell]:
    """Cells after an event: `champions` are `task@version` by task; what was neither measured nor verified is carried."""
    cells = dict(measured)
    for task in sorted({*before, *champions} - set(measured)):
        old, version = before.get(task), champions.get(task)
        if version is None or old is None or old.value is None or old.version != version:
            cells[task] = Cell(CellState.MISSING, version)
        else:
            cells[task] = replace(old, state=CellState.CANARY if task in verified else CellState.CARRIED)
    return dict(sorted(cells.items()))


def comparable(events: Sequence[PromotionEvent]) -> list[dict[str, Cell]]:
    """The matrix, one row per event, with what cannot be compared with a task's newest value marked as such."""
    newest: dict[str, Cell] = {}
    rows = []
    for event in reversed(events):
        row = {}
        for task, cell in event.cells.items():
            if cell.value is not None and newest.setdefault(task, cell).yardstick != cell.yardstick:
                cell = replace(cell, state=CellState.NOT_COMPARABLE)
            row[task] = cell
        rows.append(row)
    return rows[::-1]


def values_of(rows: Sequence[Mapping[str, Cell]], task: str) -> list[float]:
    """A task's comparable values, oldest first, one per measurement."""
    cells = [row[task] for row in rows if task in row]
    return [cell.value for cell in cells if cell.state is CellState.MEASURED and cell.value is not None]


def summary(rows: Sequence[Mapping[str, Cell]]) -> list[Metric]:
    """Average accuracy, learning accuracy, backward transfer and forgetting over the tasks that answer now.

    With R[e][j] the value of task j after event e, over comparable cells alone: GEM (arXiv 1706.08840) defines backward
    transfer, Chaudhry et al. 2018 (arXiv 1801.10112) forgetting. Both average over the tasks with at least two measurements.
    """
    now = {task: cell.value for task, cell in (rows[-1] if rows else {}).items() if cell.value is not None}
    first, pairs = [], []
    for task, value in now.items():
        measured = [row[task] for row in rows if task in row and row[task].state is CellState.MEASURED]
        values = [cell.value for cell in measured if cell.value is not None] or [value]
        first.append(values[0])
        # After a roll-back it is not the newest measurement that answers.
        earlier = values[:-1] if not measured or measured[-1].version == rows[-1][task].version else values
        if earlier:
            pairs.append((earlier, value))
    num, num_again = len(now), len(pairs)
    backward = [value - earlier[0] for earlier, value in pairs]
    forgotten = [max(earlier) - value for earlier, value in pairs]
    return [
        Metric("average accuracy", _mean(list(now.values())), f"value now, mean over {num} tasks"),
        Metric("learning accuracy", _mean(first), f"first value, mean over {num} tasks"),
        Metric("backward transfer", _mean(backward), f"value now - first value, mean over {num_again} tasks measured again"),
        Metric("forgetting", _mean(forgotten), f"best earlier value - value now, mean over {num_again} tasks measured again"),
    ]


def best_ever(rows: Sequence[Mapping[str, Cell]], task: str) -> float | None:
    """A task's best comparable value; None where it was never measured."""
    return max(values_of(rows, task), default=None)


def num_consults(events: Sequence[PromotionEvent], gate_fingerprint: str) -> int:
    """How often candidates were judged on a gate split: a split that chose among many flatters the chosen one."""
    return sum(list(event.consulted.values()).count(gate_fingerprint) for event in events)


def flip_rate(events: Sequence[PromotionEvent], task: str) -> float | None:
    """Share of answers that flipped when the task was last retrained."""
    return next((event.flip_rates[task] for event in reversed(events) if task in event.flip_rates), None)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
