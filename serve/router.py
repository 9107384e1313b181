"""What the `model` of a request names: a task, or `task@version`. Plain values, no torch."""

from __future__ import annotations

import re
from collections.abc import Collection

from multilora.errors import UnknownTaskError

PINNED = re.compile(r"([a-z0-9-]{1,63})@([1-9][0-9]{0,8})", re.ASCII)
NUM_SHOWN = 50


def pinned(model: str) -> tuple[str, int] | None:
    """Task and version of `task@version`; None for any other name."""
    match = PINNED.fullmatch(model)
    return (match[1], int(match[2])) if match else None


def task_of(model: str) -> str:
    """The task that a key must open for this model."""
    pin = pinned(model)
    return pin[0] if pin else model


def unknown_task(model: str, tasks: Collection[str]) -> UnknownTaskError:
    """The error that lists the tasks that there are."""
    shown = sorted(tasks)[:NUM_SHOWN]
    more = f" and {len(tasks) - len(shown)} more: GET /v1/models" if len(tasks) > len(shown) else ""
    error = UnknownTaskError(f"there is no task {model!r}; tasks are {', '.join(shown) or 'none yet'}{more}")
    error.model, error.tasks = model, tasks
    return error
