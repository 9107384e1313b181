"""Comparisons on disk: `workspace/compare/TASK/KEY/` has the order, and a file of rows per part that grows row by row.

Files are replaced whole, so a command that is killed leaves everything up to its last row, and the next one goes on with the
parts that are missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import filelock
from pydantic import TypeAdapter, ValidationError

from multilora.errors import CapacityError, DataError, RequestError
from orchestrator.compare_result import PARTS, CompareOrder, MethodComparison
from orchestrator.files import write_whole
from orchestrator.methods import MethodRow, Part

T = TypeVar("T")


@dataclass(frozen=True)
class PartRows:
    """What is known of one part."""

    rows: tuple[MethodRow, ...] = ()
    is_finished: bool = False
    error: str = ""
    """What it raised after its last row."""


_ORDER, _ROWS = TypeAdapter(CompareOrder), TypeAdapter(PartRows)


class CompareStore:
    """The folder of one comparison."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def opened(self, order: CompareOrder) -> Iterator[None]:
        """Write to it alone: one comparison of a task at a time. Raises CapacityError where another process does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            held = filelock.FileLock(self.folder.parent / ".lock").acquire(timeout=0)
        except filelock.Timeout as error:
            raise CapacityError(f"another command compares {order.task} in this workspace; wait for its end") from error
        with held:
            write_whole(self._order_file, _ORDER.dump_json(order, indent=1))
            yield

    def part(self, part: Part) -> PartRows:
        """What is known of a part; nothing where it has not begun. Raises DataError for a file that somebody changed."""
        return _read(self._rows_file(part), _ROWS) if self._rows_file(part).is_file() else PartRows()

    def put(self, part: Part, known: PartRows) -> None:
        """Replace what is known of a part."""
        write_whole(self._rows_file(part), _ROWS.dump_json(known))

    def load(self) -> MethodComparison:
        """Everything that is known; what a part raised becomes its last row. Raises DataError."""
        known = {part: self.part(part) for part in PARTS}
        rows: list[MethodRow] = []
        for part, found in known.items():
            rows += found.rows
            if found.error:
                rows.append(MethodRow(part, "the rest of this part", skipped=found.error))
        return MethodComparison(
            order=_read(self._order_file, _ORDER),
            rows=tuple(rows),
            finished=tuple(part for part, found in known.items() if found.is_finished),
            failed={part: found.error for part, found in known.items() if found.error},
        )

    @property
    def _order_file(self) -> Path:
        return self.folder / "order.json"

    def _rows_file(self, part: Part) -> Path:
        return self.folder / "rows" / f"{part}.json"


def newest(compare_dir: Path, task: str) -> CompareStore:
    """The comparison of a task that was worked on last. Raises RequestError where there is none."""
    found = sorted((compare_dir / task).glob("*/order.json"), key=lambda file: file.stat().st_mtime_ns)
    if not found:
        known = sorted({file.parents[1].name for file in compare_dir.glob("*/*/order.json")})
        there = f"; there are comparisons of {', '.join(known)}" if known else ""
        raise RequestError(
            f"nothing was compared for {task} in {compare_dir.parent} yet{there}; run: orchestrator compare TASK.yaml"
        )
    return CompareStore(found[-1].parent)


def check_row(row: MethodRow, part: Part, num_gate: int) -> None:
    """Refuse a row that would break every later look at the comparison. Raises DataError."""
    if row.part != part:
        raise DataError(f"{row.method} says that it belongs to {row.part}")
    if not row.skipped and len(row.answers) != num_gate:
        raise DataError(f"{row.method} has {len(row.answers)} answers to {num_gate} gate examples")
    if not (math.isfinite(row.train_s) and math.isfinite(row.ms_per_text)):
        raise DataError(f"{row.method} has a time that is no number: {row.train_s} s, {row.ms_per_text} ms a text")


def _read(file: Path, kind: TypeAdapter[T]) -> T:
    try:
        return kind.validate_json(file.read_bytes())
    except ValidationError as error:
        raise DataError(f"{file} cannot be read: {error.errors()[0]['msg']}; delete its folder and compare again") from error
