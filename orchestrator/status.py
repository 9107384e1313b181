"""Where every task stands in the registry. Reads only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from multilora.registry import CHAMPION, Registry
from orchestrator.config import OrchestratorConfig
from orchestrator.search_record import found_in

COMPARED = "COMPARED"
"""Status of a run that is a comparison (compare.py) and no training."""


@dataclass(frozen=True)
class TaskStatus:
    """Where a task stands in the registry."""

    task: str
    champion: int | None
    num_versions: int
    status: str
    reason: str
    search: str = ""
    """What the search of the last run found."""


def status(config: OrchestratorConfig | None = None, tasks: Iterable[str] = ()) -> list[TaskStatus]:
    """Where every task (or the named ones) stands."""
    config = config or OrchestratorConfig.from_environment()
    registry = Registry(config.registry_uri, config.artifact_root)
    rows = []
    for task in sorted(set(tasks) or registry.tasks()):
        runs = [run for run in registry.runs(task) if run.status != COMPARED]
        champion = registry.by_alias(task, CHAMPION)
        latest = runs[0] if runs else None
        found = found_in(latest.tags) if latest else None
        rows.append(
            TaskStatus(
                task,
                champion.version if champion else None,
                len(registry.versions(task)),
                latest.status if latest else "NEW",
                latest.tags.get("end_reason", "") if latest else "",
                found.sentence if found else "",
            )
        )
    return rows
