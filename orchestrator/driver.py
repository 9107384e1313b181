"""Drives one submission from its order to its result: waits for its turn, prepares, plans, trains, evaluates, judges, reports.

Killed at any moment and driven again, it ends where an undisturbed one would have.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version as installed_version

from multilora.errors import CapacityError, DataError, MultiLoraError, Problem
from multilora.registry import Registry
from orchestrator.cluster import OverlapSearch, cluster_size, probe_nodes
from orchestrator.cluster_size import ClusterSize
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import TAG_VERDICT, Controller
from orchestrator.curves import Curves
from orchestrator.dataset import Example
from orchestrator.evaluation import Checked, Evaluation, Untouched
from orchestrator.gates import load_gate
from orchestrator.history import read_events
from orchestrator.judge import Outcome, Release, VerdictKind
from orchestrator.pace import Pace
from orchestrator.plan import Plan, TaskNeed, plan_groups
from orchestrator.prepare import PreparedTask, git_sha, prepare
from orchestrator.release import ReleaseRecord, judge_release, results_of
from orchestrator.room import Homes
from orchestrator.session import RaySession, held_interrupt
from orchestrator.state import Action, Status, Update
from orchestrator.submissions import (
    ALL,
    PLANNED,
    PlannedSubmission,
    Submission,
    Submissions,
    SubmissionStatus,
    SubmitResult,
)
from orchestrator.training import Training
from orchestrator.turns import Turns
from orchestrator.work import TaskWork

logger = logging.getLogger(__name__)
WAIT_S = 0.5
STOPPED = "interrupted; submit again to continue"
MAX_UPDATES_PER_S = 20
"""Steps that are written down, over all tasks; changes of status are never left out."""


class Driver:
    """Drives one submission; `run` does it all."""

    def __init__(
        self,
        submission: Submission,
        session: RaySession,
        on_update: Callable[[Update], None] = lambda update: None,
        on_plan: Callable[[PlannedSubmission], None] = lambda planned: None,
    ) -> None:
        """The callbacks hear what is also written to the submission's events."""
        self._submission, self._session, self._on_update, self._on_plan = submission, session, on_update, on_plan
        self._order = submission.order
        self._config = self._order.config
        self._submissions = Submissions(self._config.workspace)
        self._is_interrupted = threading.Event()
        self._shown_at: dict[str, float] = {}
        self._registry = Registry(
            self._config.registry_uri, self._config.artifact_root, self._config.mlflow_patience_s, self._on_away
        )

    def run(self) -> SubmitResult:
        """Drive to the end. Raises KeyboardInterrupt once workers have saved, when asked to stop; what else ends it is noted."""
        with self._submission.driven(), held_interrupt() as self._is_interrupted:
            try:
                self._wait_for_turn()
                result = self._carry_out()
            except KeyboardInterrupt:
                self._submission.set_state(SubmissionStatus.CANCELLED, self._wishes().get(ALL, STOPPED))
                raise
            except MultiLoraError as error:
                self._submission.set_state(SubmissionStatus.FAILED, str(error))
                raise
            except BaseException as error:
                self._submission.set_state(SubmissionStatus.FAILED, f"{type(error).__name__}: {error}")
                raise
            self._submission.set_result(result)
            self._submission.set_state(SubmissionStatus.DONE, result.outcome)
            return result

    def _wait_for_turn(self) -> None:
        said = ""
        while True:
            self._check_stop()
            with self._submissions.lock():
                others = self._submissions.in_the_way(self._submission, is_shared=bool(self._config.ray_address))
                if not others:
                    self._submission.set_state(SubmissionStatus.RUNNING)
                    return
                reason = f"waits for {', '.join(other.id for other in others)}"
                if reason != said:
                    said = reason
                    self._submission.set_state(SubmissionStatus.WAITING, reason)
            time.sleep(WAIT_S)

    def _carry_out(self) -> SubmitResult:
        order, config = self._order, self._config
        self._registry.initialise()
        self._hand_over_curves()
        prepared, problems = prepare(order.specs)
        controller = Controller(config, self._registry, self._update, self._submission.id)
        works = [controller.observe(task, force=order.force) for task in prepared]
        unchanged = tuple(work.task for work in works if work.action is Action.KEEP)
        evaluation = Evaluation(config, self._registry, controller, self._update)
        untouched = self._untouched(evaluation, works)
        if len(unchanged) == len(works) and not any(champion.is_changed for champion in untouched):
            self._say_plan(planned_submission(Plan((), ()), prepared, unchanged, problems))
            outcomes = tuple(controller.outcome_of(work) for work in works)
            return SubmitResult(results_of(outcomes), tuple(problems), str(_standing_outcome(works)), None)
        self._session.wait()
        self._check_stop()
        _check_storage(config)
        size = cluster_size(config)
        plan = plan_of([work.prepared.need for work in works if work.action is Action.TRAIN], size, config)
        self._say_plan(planned_submission(plan, prepared, unchanged, problems))
        search = self._search_overlaps(works, untouched)
        self._train_all(controller, works, plan, size)
        checked, release = self._judge_all(controller, evaluation, works, plan, size)
        facts = {
            "version": installed_version("adapter-orchestrator"),
            "commit": git_sha(),
            "base": ", ".join(sorted({task.spec.base.model for task in prepared})),
            "command": f"orchestrator submit {' '.join(f'{spec.name}.yaml' for spec in order.specs)}",
            "submission": self._submission.id,
        }
        record = ReleaseRecord(config, self._registry, search.sentences(self._check_stop))
        result = record.write(controller, works, checked, release, facts)
        evaluation.keep_rechecked(checked)
        return replace(result, problems=tuple(problems))

    def _untouched(self, evaluation: Evaluation, works: Sequence[TaskWork]) -> list[Untouched]:
        """The champions that are not on trial."""
        events = read_events(self._config.history_dir)
        known = events[-1].cells if events else {}
        return evaluation.untouched({work.task for work in works if work.action is not Action.KEEP}, known)

    def _search_overlaps(self, works: Sequence[TaskWork], untouched: Sequence[Untouched]) -> OverlapSearch:
        """Compare the training examples of this submission with every gate split that is known."""
        gate = {work.task: _texts(work.prepared.dataset.gate) for work in works}
        for champion in untouched:
            task = champion.version.task
            try:
                gate.setdefault(task, _texts(load_gate(self._config.gates_dir, champion.gate_fingerprint) or ()))
            except DataError as error:
                logger.warning("gate split not compared task=%s error=%s", task, error)
        train = {work.task: _texts(work.prepared.dataset.train) for work in works}
        return OverlapSearch(train, gate)

    def _train_all(self, controller: Controller, works: Sequence[TaskWork], plan: Plan, size: ClusterSize) -> None:
        refused = dict(plan.refused)
        for work in works:
            work.error = refused.get(work.task, "")
        to_train = [work for work in works if work.action is Action.TRAIN and not work.error]
        if to_train:
            self._train(controller, to_train, plan, size)
        self._check_stop()
        for work in works:
            if work.action is Action.REGISTER:
                controller.register(work)

    def _judge_all(
        self,
        controller: Controller,
        evaluation: Evaluation,
        works: Sequence[TaskWork],
        plan: Plan,
        size: ClusterSize,
    ) -> tuple[Checked, Release]:
        open_works = [work for work in works if work.action is not Action.KEEP and not work.error]
        missing = [work for work in open_works if evaluation.is_needed(work)]
        gpus = max((group.gpus for group in plan.groups), default=0.0)
        cpus = 1.0 if gpus else max(1.0, *(node.cpus for node in size.nodes))
        # Looked up again: another submission may have moved aliases while this one trained.
        checked = evaluation.run(missing, self._untouched(evaluation, works), cpus, gpus, self._check_stop)
        wishes = self._wishes()
        for work in open_works:
            if work.task in wishes:
                work.error = wishes[work.task]  # trained, and not judged
        judged = (Status.EVALUATED, Status.PROMOTED, Status.REJECTED)
        return checked, judge_release(
            controller, [work for work in open_works if not work.error and work.status in judged], checked
        )

    def _train(self, controller: Controller, works: Sequence[TaskWork], plan: Plan, size: ClusterSize) -> None:
        config, submission = self._config, self._submission
        curves = Curves(submission.folder / "curves", Registry(config.registry_uri, config.artifact_root), self._registry)
        turns = Turns(self._submissions, submission, size, limited(size, config))
        homes = Homes(plan.groups, time.monotonic)

        def wishes() -> Mapping[str, str]:
            found = self._wishes()
            if config.ray_address:  # this machine does not lose itself
                found = {**homes.lost(lambda: cluster_size(config)), **found}
            return dict.fromkeys((work.task for work in works), found[ALL]) if ALL in found else found

        Training(config, controller, curves, self._update).run(works, plan.groups, turns.next, wishes, submission.worker_log)

    def _hand_over_curves(self) -> None:
        """What a submission that was killed did not get into MLflow, and did not go on to."""
        for folder in {file.parent for file in self._config.workspace.glob("submissions/*/curves/*.jsonl")}:
            if Submission(folder.parent).state.status.is_over:
                Curves(folder, self._registry, self._registry).flush()

    def _wishes(self) -> dict[str, str]:
        """Tasks that shall end, ALL among them."""
        return {ALL: STOPPED} if self._is_interrupted.is_set() else self._submission.wishes()

    def _check_stop(self) -> None:
        if ALL in self._wishes():
            raise KeyboardInterrupt

    def _on_away(self, message: str) -> None:
        """MLflow is away: say so, and hear a wish to stop."""
        logger.warning("%s; trying again", message)
        self._write({"warning": f"{message}; trying again, nothing is lost"})
        self._check_stop()

    def _update(self, update: Update) -> None:
        """Write an update down, unless it is one of too many steps."""
        is_step = bool(update.step) and "train/epoch_loss" not in update.metrics and update.step < update.num_steps
        now, pause_s = time.monotonic(), max(0.25, len(self._shown_at) / MAX_UPDATES_PER_S)
        if is_step and now - self._shown_at.get(update.task, 0.0) < pause_s:
            return
        self._shown_at[update.task] = now
        self._write(asdict(update))
        self._on_update(update)

    def _say_plan(self, planned: PlannedSubmission) -> None:
        self._write({"plan": json.loads(PLANNED.dump_json(planned))})
        self._on_plan(planned)

    def _write(self, event: Mapping[str, object]) -> None:
        with self._submission.events_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")


def planned_submission(
    plan: Plan, prepared: Sequence[PreparedTask], unchanged: Sequence[str], problems: Sequence[Problem]
) -> PlannedSubmission:
    """What a person should see of a plan."""
    sizes = {task.spec.name: len(task.dataset.train) for task in prepared}
    notes = [f"{task.spec.name}: {note}" for task in prepared for note in task.dataset.notes]
    notes += [
        f"{task.spec.name}: search of {task.need.num_candidates} candidates in one group, {task.need.epochs} epochs at most"
        for task in prepared
        if task.spec.search and task.spec.name not in unchanged
    ]
    return PlannedSubmission(plan, tuple(unchanged), tuple(problems), sizes, tuple(notes))


def plan_of(needs: Sequence[TaskNeed], size: ClusterSize, config: OrchestratorConfig) -> Plan:
    """Plan with the rates that earlier submissions measured."""
    return plan_groups(needs, limited(size, config), config.max_slots, Pace(config.pace_file).rates)


def limited(size: ClusterSize, config: OrchestratorConfig) -> ClusterSize:
    """The cluster with what one submission may use of it."""
    return replace(size, max_gpus=config.max_gpus or math.inf, max_cpus=config.max_cpus or math.inf)


def _standing_outcome(works: Sequence[TaskWork]) -> Outcome:
    """A refusal stands until something changes; submitting again must not turn it into a success."""
    refused = [work.run.tags.get(TAG_VERDICT) for work in works if work.run and work.status is Status.REJECTED]
    if any(verdict != VerdictKind.INCONCLUSIVE for verdict in refused):
        return Outcome.BLOCK
    return Outcome.HOLD if refused else Outcome.CLEAR


def _texts(examples: Sequence[Example]) -> list[str]:
    return ["\n".join(example.columns.values()) for example in examples]


def _check_storage(config: OrchestratorConfig) -> None:
    """Found now, or by a worker after an epoch. Raises CapacityError."""
    blind = [node.name for node in probe_nodes(config.workspace) if not node.sees_workspace] if config.ray_address else []
    if blind:
        raise CapacityError(
            f"nodes {', '.join(blind)} do not see {config.workspace}: put the workspace on storage that all nodes share "
            "(--workspace); orchestrator doctor says more"
        )
