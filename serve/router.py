"""What the `model` of a request names: a task, or `task@version`. Plain values, no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence

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


def is_in_share(task: str, items: Sequence[str | Mapping[str, str]], share: float) -> bool:
    """Whether a request belongs to the share that a task's challenger answers.

    Decided by a hash: the same inputs always go to the same version, and those of a smaller share are in every larger one.
    """
    texts = [[item] if isinstance(item, str) else [item[name] for name in sorted(item)] for item in items]
    digest = hashlib.sha256(json.dumps([task, texts]).encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def unknown_task(model: str, tasks: Collection[str]) -> UnknownTaskError:
    """The error that lists the tasks that there are."""
    shown = sorted(tasks)[:NUM_SHOWN]
    more = f" and {len(tasks) - len(shown)} more: GET /v1/models" if len(tasks) > len(shown) else ""
    error = UnknownTaskError(f"there is no task {model!r}; tasks are {', '.join(shown) or 'none yet'}{more}")
    error.model, error.tasks = model, tasks
    return error
