"""From the `model` of a request to the adapter key that answers it. Plain values, no torch."""

from __future__ import annotations

from collections.abc import Mapping

from multilora.errors import AdapterError, UnknownTaskError


def route(model: str, keys: Mapping[str, str], broken: Mapping[str, str]) -> str:
    """Find the adapter key (`task@version`) of a task.

    Raises UnknownTaskError with the list of tasks; AdapterError where the task's only champion could not be bound.
    """
    if model in keys:
        return keys[model]
    for key, reason in broken.items():
        if key.partition("@")[0] == model:
            raise AdapterError(f"task {model} cannot answer now: {reason}")
    raise UnknownTaskError(f"there is no task {model!r}; tasks are {', '.join(sorted(keys)) or 'none yet'}")
