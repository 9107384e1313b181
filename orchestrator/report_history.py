"""What the report says over time and across adapters: the history matrix, trends, summary, every adapter on every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.history import Cell, CellState, PromotionEvent, best_ever, comparable, summary, values_of

MAX_EVENTS = 24
"""Events shown as columns, the newest ones."""
MAX_TREND = 60
"""Measurements of a task in its trend, the newest ones."""


def history(events: Sequence[PromotionEvent]) -> dict[str, Any]:
    """The history matrix of the newest events, and what derives from all of them."""
    rows = comparable(events)
    tasks = sorted({task for row in rows for task in row})
    shown = list(events)[-MAX_EVENTS:]
    return {
        "events": [
            {"id": e.id, "created": e.created, "kind": e.kind, "who": e.who, "outcome": e.outcome, "reason": e.reason}
            for e in shown
        ],
        "num_events_hidden": len(events) - len(shown),
        "tasks": [_history_row(rows, task) for task in tasks],
        "summary": [{"name": metric.name, "value": metric.value, "meaning": metric.meaning} for metric in summary(rows)],
    }


def _history_row(rows: Sequence[Mapping[str, Cell]], task: str) -> dict[str, Any]:
    cells: list[dict[str, Any] | None] = []
    best: float | None = None
    for row in rows:
        cell = row.get(task)
        cells.append(_cell(cell, best) if cell else None)
        if cell and cell.state is CellState.MEASURED and cell.value is not None:
            best = cell.value if best is None else max(best, cell.value)
    values = values_of(rows, task)
    metric = next((row[task].metric for row in reversed(rows) if task in row and row[task].value is not None), "")
    return {
        "task": task,
        "metric": metric,
        "cells": cells[-MAX_EVENTS:],
        "values": values[-MAX_TREND:],
        "num_measured": len(values),
        "first": values[0] if values else None,
        "best_ever": best_ever(rows, task),
        "newest": values[-1] if values else None,
    }


def _cell(cell: Cell, best: float | None) -> dict[str, Any]:
    """`change` is against the best comparable value of earlier events."""
    is_measured = cell.state is CellState.MEASURED and cell.value is not None and best is not None
    return {
        "state": str(cell.state),
        "version": cell.version,
        "value": cell.value,
        "change": cell.value - best if is_measured and cell.value is not None and best is not None else None,
    }


def cross(matrix: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of a matrix of every adapter on every task's gate examples; `change` is against the base alone."""
    num_right, num_examples = matrix["num_right"], matrix["num_examples"]
    base = num_right.get("base", {})

    def cell(adapter: str, task: str) -> dict[str, Any] | None:
        count, total = num_right.get(adapter, {}).get(task), num_examples.get(task)
        if count is None or not total:
            return None
        before = base.get(task)
        return {"num_right": count, "value": count / total, "change": None if before is None else (count - before) / total}

    tasks = list(matrix["tasks"])
    return {
        "base": matrix["base"],
        "created": matrix["created"],
        "forward_transfer": matrix.get("forward_transfer"),
        "num_pairs": matrix.get("num_pairs", 0),
        "tasks": tasks,
        "num_examples": {task: num_examples.get(task) for task in tasks},
        "rows": [
            {"adapter": adapter, "task": adapter.partition("@")[0], "cells": [cell(adapter, task) for task in tasks]}
            for adapter in ["base", *(name for name in matrix["adapters"] if name != "base")]
        ],
    }
