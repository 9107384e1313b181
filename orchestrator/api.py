"""The Python API that the command line is a thin layer over: load, plan, submit, status, latest_report, query.

    from orchestrator.api import load, query, submit
    result = submit(load(["tasks/client-talk.yaml"]))
    print(result.outcome, result.report_file)
    # after `orchestrator serve`:
    print(query("client-talk", "I have been thinking about cutting down.")["results"][0]["label"])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import filelock

from multilora.errors import CapacityError, MultiLoraError, Problem
from multilora.registry import Registry
from multilora.spec import GateSpec, TaskSpec
from multilora.spec_files import load_task_specs
from orchestrator.cluster import cluster_size, local_size, probe_nodes, ray_session
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import TAG_VERDICT, Controller
from orchestrator.judge import VerdictKind
from orchestrator.pace import Pace
from orchestrator.plan import ClusterSize, Plan, TaskNeed, plan_groups
from orchestrator.prepare import PreparedTask, git_sha, prepare
from orchestrator.report import Outcome, TaskOutcome, build_report
from orchestrator.report_page import latest_report, write_report
from orchestrator.services import query
from orchestrator.state import Action, Status
from orchestrator.status import TaskStatus, status
from orchestrator.work import TaskWork, Update

load = load_task_specs
"""Load task specs; see `multilora.spec_files.load_task_specs`."""


@dataclass(frozen=True)
class PlannedSubmission:
    """What a submission would do."""

    plan: Plan
    prepared: tuple[PreparedTask, ...]
    unchanged: tuple[str, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class SubmitResult:
    """What a submission did."""

    tasks: tuple[TaskOutcome, ...]
    problems: tuple[Problem, ...]
    outcome: Outcome
    report: dict[str, Any] | None
    """The report's object; None when nothing was judged."""
    report_file: Path | None


def plan(specs: Sequence[TaskSpec], config: OrchestratorConfig | None = None, *, force: bool = False) -> PlannedSubmission:
    """Show what `submit` would train, on this machine or the configured cluster, without training."""
    config = config or OrchestratorConfig.from_environment()
    config.workspace.mkdir(parents=True, exist_ok=True)
    prepared, problems = prepare(specs)
    controller = Controller(config, _registry(config), lambda update: None)
    works = [controller.observe(task, force=force) for task in prepared]
    needs = [work.prepared.need for work in works if work.action is Action.TRAIN]
    if config.ray_address:
        with ray_session(config):
            size = cluster_size(config)
    else:
        size = local_size(config)
    unchanged = tuple(work.task for work in works if work.action is Action.KEEP)
    return PlannedSubmission(_plan(needs, size, config), tuple(prepared), unchanged, tuple(problems))


def submit(
    specs: Sequence[TaskSpec],
    config: OrchestratorConfig | None = None,
    *,
    force: bool = False,
    on_update: Callable[[Update], None] = lambda update: None,
    on_plan: Callable[[PlannedSubmission], None] = lambda planned: None,
) -> SubmitResult:
    """Train, register, evaluate, judge and promote what changed. Started again after any crash, it continues.

    Tasks with bad data come back in `problems` while the others go on. Raises CapacityError when another submission runs
    in the workspace, RegistryError when MLflow cannot be reached, KeyboardInterrupt after workers have saved.
    """
    config = config or OrchestratorConfig.from_environment()
    config.workspace.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(config.workspace / "submit.lock", timeout=0):
            return _submit(specs, config, force, on_update, on_plan)
    except filelock.Timeout as error:
        raise CapacityError(f"another submit runs in {config.workspace}; wait for it, or use another --workspace") from error


def _submit(
    specs: Sequence[TaskSpec],
    config: OrchestratorConfig,
    force: bool,
    on_update: Callable[[Update], None],
    on_plan: Callable[[PlannedSubmission], None],
) -> SubmitResult:
    registry = _registry(config)
    registry.initialise()
    prepared, problems = prepare(specs)
    controller = Controller(config, registry, on_update)
    works = [controller.observe(task, force=force) for task in prepared]
    unchanged = tuple(work.task for work in works if work.action is Action.KEEP)
    if len(unchanged) == len(works):
        on_plan(PlannedSubmission(Plan((), ()), tuple(prepared), unchanged, tuple(problems)))
        outcomes = tuple(controller.outcome_of(work) for work in works)
        return SubmitResult(outcomes, tuple(problems), _standing_outcome(works), None, None)
    with ray_session(config):
        _check_storage(config)
        size = cluster_size(config)
        needs = [work.prepared.need for work in works if work.action is Action.TRAIN]
        planned = _plan(needs, size, config)
        on_plan(PlannedSubmission(planned, tuple(prepared), unchanged, tuple(problems)))
        checked = _carry_out(controller, works, planned, size)
    outcomes = tuple(controller.outcome_of(work) for work in works) + _untouched(registry, checked, works)
    facts = {
        "version": installed_version("adapter-orchestrator"),
        "commit": git_sha(),
        "base": ", ".join(sorted({task.spec.base.model for task in prepared})),
        "command": f"orchestrator submit {' '.join(f'{spec.name}.yaml' for spec in specs)}",
    }
    created = datetime.now(UTC)
    report = build_report(outcomes, created, facts)
    report_file = write_report(report, config.reports_dir / created.strftime("%Y%m%dT%H%M%S.%f"))
    return SubmitResult(outcomes, tuple(problems), Outcome(report["outcome"]), report, report_file)


def _standing_outcome(works: Sequence[TaskWork]) -> Outcome:
    """A refusal stands until something changes; submitting again must not turn it into a success."""
    refused = [work.run.tags.get(TAG_VERDICT) for work in works if work.run and work.status is Status.REJECTED]
    if any(verdict != VerdictKind.INCONCLUSIVE for verdict in refused):
        return Outcome.BLOCK
    return Outcome.HOLD if refused else Outcome.CLEAR


def _carry_out(controller: Controller, works: Sequence[TaskWork], planned: Plan, size: ClusterSize) -> dict[str, str]:
    refused = dict(planned.refused)
    for work in works:
        work.error = refused.get(work.task, "")
    to_train = [work for work in works if work.action is Action.TRAIN and not work.error]
    for work in to_train:
        controller.start_run(work)
    if to_train:
        controller.train(to_train, planned.groups, size)
    for work in works:
        if work.action is Action.REGISTER:
            controller.register(work)
    open_works = [work for work in works if work.action is not Action.KEEP and not work.error]
    missing = [work for work in open_works if controller.needs_evaluation(work)]
    gpus = max((group.gpus for group in planned.groups), default=0.0)
    checked = controller.evaluate(missing, cpus=1.0, gpus=gpus) if missing else {}
    for work in open_works:
        if not work.error and work.status in (Status.EVALUATED, Status.PROMOTED, Status.REJECTED):
            controller.judge(work)
    return checked


def _untouched(registry: Registry, checked: Mapping[str, str], works: Sequence[TaskWork]) -> tuple[TaskOutcome, ...]:
    """Outcomes of champions outside this submission that were bound again, canaries included."""
    champions, submitted = registry.champions(), {work.task for work in works}
    outcomes = []
    for key, error in sorted(checked.items()):
        task = key.partition("@")[0]
        if task in submitted or task not in champions:
            continue
        gate = GateSpec.model_validate_json(champions[task].tags.get("gate", "{}"))
        if error:
            outcomes.append(TaskOutcome(task, "", "failed", gate.metric, gate.min, gate.margin, None, key, error=error))
        else:
            outcomes.append(TaskOutcome(task, "", "verified", gate.metric, gate.min, gate.margin, key))
    return tuple(outcomes)


def _check_storage(config: OrchestratorConfig) -> None:
    """Found now, or by a worker after an epoch. Raises CapacityError."""
    blind = [node.name for node in probe_nodes(config.workspace) if not node.sees_workspace] if config.ray_address else []
    if blind:
        raise CapacityError(
            f"nodes {', '.join(blind)} do not see {config.workspace}: put the workspace on storage that all nodes share "
            "(--workspace); orchestrator doctor says more"
        )


def _plan(needs: Sequence[TaskNeed], size: ClusterSize, config: OrchestratorConfig) -> Plan:
    return plan_groups(needs, size, config.max_slots, Pace(config.pace_file).rates)


def _registry(config: OrchestratorConfig) -> Registry:
    return Registry(config.registry_uri, config.artifact_root)


__all__ = [
    "MultiLoraError",
    "OrchestratorConfig",
    "PlannedSubmission",
    "SubmitResult",
    "TaskStatus",
    "latest_report",
    "load",
    "plan",
    "query",
    "status",
    "submit",
]
