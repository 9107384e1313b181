"""One task's way through a submission."""

from __future__ import annotations

from dataclasses import dataclass, field

from multilora.registry import AdapterVersion, RunRecord
from orchestrator.eval_report import EvalReport
from orchestrator.judge import Verdict
from orchestrator.prepare import PreparedTask
from orchestrator.state import Action, Status


@dataclass
class TaskWork:
    """One task's way through a submission."""

    prepared: PreparedTask
    run: RunRecord | None
    status: Status
    action: Action
    champion: AdapterVersion | None
    version: AdapterVersion | None = None
    reports: dict[str, EvalReport] = field(default_factory=dict)
    """By system name: task@version, zero-shot, majority, tf-idf."""
    verdict: Verdict | None = None
    reference: EvalReport | None = None
    error: str = ""

    @property
    def task(self) -> str:
        """Task name."""
        return self.prepared.spec.name
