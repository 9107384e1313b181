"""A release: what a submission evaluated is judged together, acted on, and leaves its evidence in report, history and MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime

from multilora.fingerprint import changed_parts, digest_of
from multilora.registry import AdapterVersion, Registry
from multilora.spec import GateSpec
from orchestrator.comparison import Evidence
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import Controller
from orchestrator.cross import load_matrices
from orchestrator.eval_report import EvalReport, load_reports
from orchestrator.evaluation import Checked
from orchestrator.history import (
    Cell,
    CellState,
    PromotionEvent,
    append_event,
    best_ever,
    comparable,
    current_user,
    next_cells,
    num_consults,
    read_events,
)
from orchestrator.judge import Release, judge
from orchestrator.live import live_rows
from orchestrator.report import State, TaskOutcome, build_report
from orchestrator.report_page import write_report
from orchestrator.submissions import SubmitResult, TaskResult
from orchestrator.work import TaskWork


def judge_release(controller: Controller, works: Sequence[TaskWork], checked: Checked) -> Release:
    """Judge candidates and changed champions together, keep the verdicts, then act on them.

    Killed while it acts, the next call acts on the same verdicts, though the tasks that are done are no longer judged with the
    others.
    """
    evidences = [controller.evidence_of(work) for work in works]
    rechecks = [Evidence(task, gate_of(version), after, before) for task, (version, before, after) in checked.rechecked.items()]
    release = judge([*evidences, *rechecks])
    valid = [work for work in works if work.task not in release.errors]
    stored = {work.task: verdict for work in valid if (verdict := controller.stored_verdict(work))}
    if len(stored) == len(valid):
        release = replace(release, verdicts={**release.verdicts, **stored})
    else:
        for work in valid:
            controller.store_verdict(work, release.verdicts[work.task])
    for work in works:
        if work.task in release.errors:
            work.error = release.errors[work.task]
        else:
            controller.conclude(work, release.verdicts[work.task])
    return release


def gate_of(version: AdapterVersion) -> GateSpec:
    """The gate that a version was last judged by."""
    return GateSpec.model_validate_json(version.tags.get("gate", "{}"))


class ReleaseRecord:
    """Leaves the evidence of a release."""

    def __init__(self, config: OrchestratorConfig, registry: Registry, contamination: Mapping[str, tuple[str, ...]]) -> None:
        """`contamination`: sentences by task, see contamination.py."""
        self._config, self._registry, self._contamination = config, registry, contamination
        self._created = datetime.now(UTC)

    def write(
        self, controller: Controller, works: Sequence[TaskWork], checked: Checked, release: Release, facts: Mapping[str, str]
    ) -> SubmitResult:
        """Write event and report, and log the report; the result says where it is."""
        events = read_events(self._config.history_dir)
        news = {*checked.rechecked, *checked.failed}  # also of a task that was submitted and had nothing to train
        found = [controller.outcome_of(work) for work in works if work.task not in news]
        found += _others(checked, release, {work.task for work in works})
        event = self._event(events, works, found, checked)
        events = [*events, event]
        rows = comparable(events)
        outcomes = [
            replace(
                outcome,
                num_consults=num_consults(events, outcome.candidate_report.gate_fingerprint) if outcome.candidate_report else 0,
                best_ever=best_ever(rows, outcome.task),
                contamination=self._contamination.get(outcome.task, ()),
            )
            for outcome in found
        ]
        matrices = [{**asdict(matrix), **matrix.summary()} for matrix in load_matrices(self._config.cross_file)]
        live = live_rows(self._config.live_dir, is_newest_only=True)
        report = build_report(outcomes, self._created, facts, release, events, matrices, live)
        event = replace(event, outcome=report["outcome"], reason=report["sentence"])
        report["history"]["events"][-1] |= {"outcome": event.outcome, "reason": event.reason}
        folder = self._config.reports_dir / event.id
        page = write_report(report, folder)
        append_event(self._config.history_dir, event)
        tags = {"outcome": report["outcome"], "sentence": report["sentence"]}
        self._registry.log_report(event.id, folder, report_metrics(release), tags)
        return SubmitResult(results_of(outcomes), (), report["outcome"], page)

    def _event(
        self, events: Sequence[PromotionEvent], works: Sequence[TaskWork], outcomes: Sequence[TaskOutcome], checked: Checked
    ) -> PromotionEvent:
        judged = [work for work in works if work.verdict and work.version]
        measured = {}
        for outcome in outcomes:
            answers = [report for report in (outcome.candidate_report, outcome.reference_report) if report]
            now = next((report for report in answers if report.system == outcome.champion), None)
            if outcome.verdict and now:
                measured[outcome.task] = cell_of(now, outcome.metric, CellState.MEASURED, _zero_shot(outcome))
        champions = self._registry.champions()
        known = events[-1].cells if events else {}
        unknown = {t: v for t, v in champions.items() if t not in known or known[t].version != v.key or known[t].value is None}
        measured |= {task: Cell(CellState.MISSING, version.key) for task, (version, _) in checked.failed.items()}
        before = {**known, **stored_cells(self._config, unknown)}
        keys = {task: version.key for task, version in champions.items()}
        return PromotionEvent(
            id=self._created.strftime("%Y%m%dT%H%M%S.%f"),
            kind="submit",
            created=self._created.isoformat(timespec="seconds"),
            who=current_user(),
            outcome="",
            reason="",
            cells=next_cells(before, measured, set(checked.verified), keys),
            consulted={work.task: work.prepared.dataset.gate_fingerprint for work in judged},
            flip_rates={
                work.task: (work.verdict.num_losses + work.verdict.num_wins) / len(work.prepared.dataset.gate)
                for work in judged
                if work.verdict and work.reference and work.reference.system != "zero-shot"
            },
        )


def stored_cells(config: OrchestratorConfig, champions: Mapping[str, AdapterVersion]) -> dict[str, Cell]:
    """Cells of what answers now, from stored answers: for champions whose submission was killed before it wrote its event."""
    cells = {}
    for task, version in champions.items():
        reports = load_reports(config.answers_file(version.tags.get("run_key", "")))
        if found := reports.get(version.key):
            metric = gate_of(version).metric
            zero_shot = reports["zero-shot"].value(metric) if "zero-shot" in reports else None
            cells[task] = cell_of(found, metric, CellState.CARRIED, zero_shot)
    return cells


def cell_of(report: EvalReport, metric: str, state: CellState, zero_shot: float | None) -> Cell:
    """One cell from every answer of a system."""
    return Cell(
        state=state,
        version=report.system,
        metric=metric,
        value=report.value(metric),
        zero_shot=zero_shot,
        num_right=sum(report.correct),
        num_examples=len(report.answers),
        gate_fingerprint=report.gate_fingerprint,
        scorer_version=report.scorer_version,
        fingerprint=digest_of(report.fingerprint),
    )


def report_metrics(release: Release) -> dict[str, float]:
    """What MLflow shows of a release, by task."""
    metrics: dict[str, float] = {}
    for task, verdict in release.verdicts.items():
        low, high = verdict.interval
        rates = {"delta": verdict.difference, "ci_low": low, "ci_high": high, "p_worse": verdict.p_worse}
        rates |= {"num_losses": verdict.num_losses, "num_wins": verdict.num_wins}
        if verdict.p_holm is not None:
            rates["p_holm"] = verdict.p_holm
        metrics |= {f"reg/{task}/{name}": float(value) for name, value in rates.items()}
    return {**metrics, "reg/pooled_p": release.pooled_p}


def results_of(outcomes: Sequence[TaskOutcome]) -> tuple[TaskResult, ...]:
    """What scripts are told of every task."""
    return tuple(TaskResult(outcome.task, outcome.state, outcome.champion, outcome.error) for outcome in outcomes)


def _zero_shot(outcome: TaskOutcome) -> float | None:
    return next((report.value(outcome.metric) for report in outcome.baselines if report.system == "zero-shot"), None)


def _others(checked: Checked, release: Release, submitted: set[str]) -> list[TaskOutcome]:
    """Champions that were not on trial: verified by canaries, judged again because their fingerprint changed, or failed."""
    found = []
    for task, version in checked.verified.items():
        if task not in submitted:
            found.append(_other(version, "verified"))
    for version, error in checked.failed.values():
        found.append(replace(_other(version, "failed"), champion=None, candidate=version.key, error=error))
    for task, (version, before, after) in checked.rechecked.items():
        found.append(
            replace(
                _other(version, "rechecked"),
                candidate=version.key,
                reference=version.key,
                verdict=release.verdicts.get(task),
                candidate_report=after,
                reference_report=before,
                changed=changed_parts(before.fingerprint, after.fingerprint),
                error=release.errors.get(task, ""),
            )
        )
    return sorted(found, key=lambda outcome: outcome.task)


def _other(version: AdapterVersion, state: State) -> TaskOutcome:
    gate = gate_of(version)
    return TaskOutcome(version.task, "", state, gate.metric, gate.min, gate.margin, version.key, policy=gate.policy)
