"""The Python API that the command line is a thin layer over: load, plan, submit, status, latest_report, cross, explain, query.

from orchestrator.api import load, query, submit
result = submit(load(["tasks/client-talk.yaml"]))
print(result.outcome, result.report_file)
# after `orchestrator serve`:
print(query("client-talk", "I have been thinking about cutting down.")["results"][0]["label"])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from multilora.errors import MultiLoraError
from multilora.registry import Registry
from multilora.spec import TaskSpec
from multilora.spec_files import load_task_specs
from orchestrator.cluster import cluster_size, local_size
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import Controller
from orchestrator.driver import Driver, plan_of, planned_submission
from orchestrator.evidence import CrossResult, cross, explain
from orchestrator.prepare import prepare
from orchestrator.report_page import latest_report
from orchestrator.rungs import Ladder
from orchestrator.services import query
from orchestrator.session import RaySession, ray_session
from orchestrator.state import Action, Update
from orchestrator.status import TaskStatus, status
from orchestrator.submissions import Order, PlannedSubmission, Submissions, SubmitResult

load = load_task_specs
"""Load task specs; see `multilora.spec_files.load_task_specs`."""


def plan(specs: Sequence[TaskSpec], config: OrchestratorConfig | None = None, *, force: bool = False) -> PlannedSubmission:
    """Show what `submit` would train, on this machine or the configured cluster, without training."""
    config = config or OrchestratorConfig.from_environment()
    config.workspace.mkdir(parents=True, exist_ok=True)
    prepared, problems = prepare(specs)
    controller = Controller(config, Registry(config.registry_uri, config.artifact_root), lambda update: None)
    works = [controller.observe(task, force=force) for task in prepared]
    needs = [work.prepared.need for work in works if work.action is Action.TRAIN]
    if config.ray_address:
        with ray_session(config):
            size = cluster_size(config)
    else:
        size = local_size(config)
    unchanged = tuple(work.task for work in works if work.action is Action.KEEP)
    return planned_submission(plan_of(needs, size, config), prepared, unchanged, problems)


def submit(
    specs: Sequence[TaskSpec],
    config: OrchestratorConfig | None = None,
    *,
    force: bool = False,
    on_update: Callable[[Update], None] = lambda update: None,
    on_plan: Callable[[PlannedSubmission], None] = lambda planned: None,
) -> SubmitResult:
    """Train, register, evaluate, judge and promote what changed, in this process; started again after a crash, it continues.

    Tasks with bad data come back in `problems` while the others go on. Waits for the submissions that are in its way.
    Raises RegistryError when MLflow cannot be reached, KeyboardInterrupt after workers have saved.
    """
    config = config or OrchestratorConfig.from_environment()
    submission = Submissions(config.workspace).create(Order(tuple(specs), config, force))
    with RaySession(config) as session:
        return Driver(submission, session, on_update, on_plan).run()


__all__ = [
    "CrossResult",
    "Ladder",
    "MultiLoraError",
    "OrchestratorConfig",
    "PlannedSubmission",
    "SubmitResult",
    "TaskStatus",
    "cross",
    "explain",
    "latest_report",
    "load",
    "plan",
    "query",
    "status",
    "submit",
]
