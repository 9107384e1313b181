"""One task's way through a submission."""

from __future__ import annotations

from dataclasses import dataclass, field

from multilora.registry import AdapterVersion, RunRecord
from orchestrator.eval_report import EvalReport
from orchestrator.judge import Verdict
from orchestrator.prepare import PreparedTask
from orchestrator.search import Found
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
    found: Found | None = None
    """What its search found."""
    candidate_runs: dict[str, str] = field(default_factory=dict)
    """Run key -> MLflow run of the candidates that were begun."""

    @property
    def task(self) -> str:
        """Task name."""
        return self.prepared.spec.name
