"""The one writer: observes each task's run, asks `next_action`, and acts until every run is judged.

Every act can be repeated: a run is found again by its run key, a version by its run, evaluations and adapters are files
that appear whole. Killed at any moment and started again, a submission ends where an undisturbed one would have.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ray

from multilora.artifact import read_artifact
from multilora.errors import AdapterError, MultiLoraError, OutdatedAdapterError
from multilora.registry import CHALLENGER, CHAMPION, TAG_REASON, TAG_STATUS, Registry
from multilora.spec import BaseSpec, spec_hash
from orchestrator.adapter_run import Member, TrainEvent
from orchestrator.cluster import RunningGroup, evaluate_on_cluster, held_interrupt
from orchestrator.config import OrchestratorConfig
from orchestrator.evaluate import EvalItem, load_reports, store_reports
from orchestrator.judge import GateInput, judge
from orchestrator.pace import Pace
from orchestrator.plan import ClusterSize, TrainingGroup, has_room
from orchestrator.prepare import PreparedTask, git_sha
from orchestrator.report import TaskOutcome
from orchestrator.state import Action, Event, RunFacts, Status, advance, next_action
from orchestrator.work import TaskWork, Update
from orchestrator.worker import GroupTask, Mailbox

logger = logging.getLogger(__name__)
POLL_S = 0.3
STOP_TIMEOUT_S = 60.0
TAG_GATE, TAG_VERDICT = "gate_hash", "verdict"
PYFUNC_CODE = Path(__file__).resolve().parents[1] / "serve" / "pyfunc_model.py"


class Controller:
    """Carries prepared tasks from spec to champion in one workspace."""

    def __init__(self, config: OrchestratorConfig, registry: Registry, on_update: Callable[[Update], None]) -> None:
        self._config = config
        self._registry = registry
        self._on_update = on_update
        self._pace = Pace(config.pace_file)

    def observe(self, prepared: PreparedTask, *, force: bool = False) -> TaskWork:
        """Look up what is known of the task's run and decide what comes next; `force` forgets an earlier training."""
        task, run_key = prepared.spec.name, prepared.run_key
        if force:
            shutil.rmtree(self._config.adapter_dir(run_key), ignore_errors=True)
            self._config.checkpoint_file(run_key).unlink(missing_ok=True)
        run = None if force else self._registry.find_run(task, run_key)
        champion = self._registry.by_alias(task, CHAMPION)
        status = Status(run.status) if run and run.status else Status.NEW
        version = self._registry.version_of_run(run) if run else None
        work = TaskWork(prepared, run, status, Action.TRAIN, champion, version)
        work.reports = load_reports(self._config.answers_file(run_key)) if run else {}
        if status is Status.EVALUATED and not work.reports:
            work.status = Status.REGISTERED  # the workspace with the stored answers is gone
        is_champion = bool(champion and version and champion.version == version.version)
        is_gate_changed = bool(run and run.tags.get(TAG_GATE, prepared.gate_hash) != prepared.gate_hash)
        work.action = next_action(RunFacts(work.status, self._has_artifact(run_key), is_champion, is_gate_changed))
        return work

    def start_run(self, work: TaskWork) -> None:
        """Create or reopen the MLflow run of a task that will be trained."""
        prepared = work.prepared
        if work.run is None:
            tags = {
                "spec_hash": spec_hash(prepared.spec),
                "data_fingerprint": prepared.dataset.fingerprint,
                "base_fingerprint": prepared.base_files.fingerprint,
                "git_sha": git_sha(),
                TAG_STATUS: str(Status.NEW),
            }
            work.run = self._registry.start_run(work.task, prepared.run_key, prepared.params, tags)
            self._registry.log_texts(work.run.run_id, {"spec.json": prepared.spec.model_dump_json(indent=2)})
        self._move(work, Event.STARTED)

    def train(self, works: Sequence[TaskWork], groups: Sequence[TrainingGroup], size: ClusterSize) -> None:
        """Train groups side by side as far as the cluster has room, registering every adapter as it finishes.

        Groups wait here and not in Ray, which gives up on a worker that finds no room in time. On Ctrl-C
        workers save and end, runs become CANCELLED, and KeyboardInterrupt is raised.
        """
        by_key = {work.prepared.run_key: work for work in works}
        by_task = {work.task: work for work in works}
        mailbox: Any = Mailbox.remote()  # type: ignore[attr-defined]
        waiting, running = list(groups), list[RunningGroup]()
        with held_interrupt() as is_interrupted:
            while not is_interrupted.is_set() and (waiting or any(started.is_running for started in running)):
                busy = [started.group for started in running if started.is_running]
                if waiting and has_room(waiting[0], busy, size):
                    running.append(self._start_group(waiting.pop(0), by_task, mailbox))
                self._handle(ray.get(mailbox.take.remote()), by_key)
                is_interrupted.wait(POLL_S)
        if is_interrupted.is_set():
            ray.get(mailbox.stop.remote())
            for started in running:
                started.wait(STOP_TIMEOUT_S)
            self._handle(ray.get(mailbox.take.remote()), by_key)
            for work in works:
                if work.status is Status.TRAINING:
                    self._move(work, Event.CANCELLED, "interrupted; submit again to continue")
            raise KeyboardInterrupt
        self._handle(ray.get(mailbox.take.remote()), by_key)
        for started in running:
            for name in started.group.members:
                if by_task[name].status is Status.TRAINING:
                    self._fail(by_task[name], f"worker ended: {started.error or 'no result'}")
        self._pace.learn(groups, {work.task: work.prepared.need.num_flops for work in works})

    def register(self, work: TaskWork) -> None:
        """Make the finished adapter a version of the task, alias challenger."""
        assert work.run is not None
        prepared = work.prepared
        try:
            if work.status is Status.TRAINING:
                self._move(work, Event.FINISHED)
            folder = self._config.adapter_dir(prepared.run_key)
            artifact = read_artifact(folder)
            tags = {
                "run_key": prepared.run_key,
                "base": prepared.spec.base.model,
                "rank": str(prepared.spec.lora.rank),
                "data_fingerprint": prepared.dataset.fingerprint[:16],
                "gate": prepared.spec.gate.model_dump_json(),
            }
            description = prepared.spec.description or work.task
            work.version = self._registry.register(work.run, folder, artifact.digest, PYFUNC_CODE, description, tags)
            self._registry.set_alias(work.version, CHALLENGER)
            self._move(work, Event.REGISTERED)
            # A worker killed between writing the adapter and deleting its checkpoint leaves one behind.
            self._config.checkpoint_file(prepared.run_key).unlink(missing_ok=True)
            self._registry.end_run(work.run.run_id, is_ok=True)
        except MultiLoraError as error:
            self._fail(work, str(error))

    def evaluate(self, works: Sequence[TaskWork], cpus: float, gpus: float) -> dict[str, str]:
        """Evaluate versions beside their champions and baselines.

        Returns the untouched champions of other tasks over the same bases, each with what is wrong with it ("" = verified).
        """
        untouched = self._items_of_untouched({work.task for work in works})
        items: dict[BaseSpec, list[EvalItem]] = {}
        for work in works:
            for base, item in self._items_of(work):
                items.setdefault(base, []).append(item)
        checked: dict[str, str] = {}
        for base, base_items in items.items():
            for item in base_items:
                self._on_update(Update(item.task, "EVALUATING", message=f"{item.task}@{item.version}"))
            others = [item for other, item in untouched.items() if other[0] == base]
            outcome = evaluate_on_cluster(base, base_items, others, cpus, gpus)
            checked |= {f"{o.task}@{o.version}": outcome.errors.get(f"{o.task}@{o.version}", "") for o in others}
            for work in works:
                work.reports |= {system: report for (task, system), report in outcome.reports.items() if task == work.task}
                if work.version and (error := outcome.errors.get(work.version.key)):
                    self._fail(work, error)
                if work.champion and (error := outcome.errors.get(work.champion.key)) and not work.error:
                    work.error = f"champion {work.champion.key} cannot be compared: {error}"
        for work in works:
            if work.version and work.version.key in work.reports:
                store_reports(self._config.answers_file(work.prepared.run_key), work.reports.values())
                self._log_evaluation(work)
                if work.status is Status.REGISTERED:
                    self._move(work, Event.EVALUATED)
        return checked

    def needs_evaluation(self, work: TaskWork) -> bool:
        """Whether an answer that the judge needs is missing."""
        if work.version is None or work.error:
            return False
        is_contested = work.champion is not None and work.champion.version != work.version.version
        needed = [work.version.key, "zero-shot", *([work.champion.key] if is_contested and work.champion else [])]
        return any(system not in work.reports for system in needed)

    def judge(self, work: TaskWork) -> None:
        """Judge the candidate against the champion, and move the alias when it passes."""
        assert work.run is not None
        assert work.version is not None
        if work.status in (Status.PROMOTED, Status.REJECTED):
            self._move(work, Event.RECONSIDERED)
        gate = work.prepared.spec.gate
        candidate = work.reports[work.version.key]
        is_first = work.champion is None or work.champion.version == work.version.version
        reference = work.reports["zero-shot"] if is_first or not work.champion else work.reports[work.champion.key]
        verdict = judge(
            GateInput(
                candidate_correct=candidate.correct,
                reference_correct=reference.correct,
                candidate_value=candidate.value(gate.metric),
                reference_value=reference.value(gate.metric),
                minimum=gate.min,
                margin=gate.margin,
                is_first_version=is_first,
            )
        )
        work.verdict, work.reference = verdict, reference
        reason = "; ".join(verdict.reasons)
        value, num_examples = f"{candidate.value(gate.metric):.4f}", str(len(candidate.answers))
        tags = {TAG_VERDICT: str(verdict.kind), "reasons": reason, gate.metric: value, "num_gate_examples": num_examples}
        self._registry.tag_version(work.version, tags)
        text = f"**{verdict.kind}** {reason}. {gate.metric} {value} on {num_examples} gate examples."
        self._registry.describe_version(work.version, text)
        self._registry.set_tags(work.run.run_id, {TAG_GATE: work.prepared.gate_hash, TAG_VERDICT: str(verdict.kind)})
        if not verdict.is_promoted:
            self._move(work, Event.REJECTED, reason)
            return
        before = work.champion.version if work.champion and not is_first else ""
        self._registry.tag_version(work.version, {"previous_champion": str(before)})
        # The alias moves last: killed before it, the run is PROMOTED and not champion, which is judged again.
        self._move(work, Event.PROMOTED, reason)
        self._registry.drop_alias(work.task, CHALLENGER)
        self._registry.set_alias(work.version, CHAMPION)
        work.champion = work.version

    def outcome_of(self, work: TaskWork) -> TaskOutcome:
        """What the report says of a task."""
        spec = work.prepared.spec
        state = "failed" if work.error else "judged" if work.verdict else "unchanged"
        baselines = tuple(work.reports[name] for name in ("zero-shot", "majority", "tf-idf") if name in work.reports)
        return TaskOutcome(
            task=work.task,
            description=spec.description,
            state=state,  # type: ignore[arg-type]
            metric=spec.gate.metric,
            minimum=spec.gate.min,
            margin=spec.gate.margin,
            champion=work.champion.key if work.champion else None,
            candidate=work.version.key if work.version else None,
            reference=work.reference.system if work.reference else None,
            verdict=work.verdict,
            candidate_report=work.reports.get(work.version.key) if work.version else None,
            reference_report=work.reference,
            baselines=baselines,
            error=work.error,
        )

    def _start_group(self, group: TrainingGroup, by_task: dict[str, TaskWork], mailbox: Any) -> RunningGroup:
        members = tuple(self._member(by_task[name].prepared) for name in group.members)
        task = GroupTask(group.base, members, group.num_slots, max(1, int(group.cpus)), self._config.checkpoint_every_s, mailbox)
        return RunningGroup(self._config, group, task, f"{group.group_id}-{time.time_ns()}")

    def _handle(self, events: Iterable[TrainEvent], by_key: dict[str, TaskWork]) -> None:
        points: dict[str, list[tuple[str, float, int, int]]] = {}
        for event in events:
            self._pace.note(event)
            work = by_key[event.run_key]
            assert work.run is not None
            if work.status is not Status.TRAINING:
                continue  # a worker that died starts again with all members, and reports the finished ones once more
            named = [(name, value, event.step, event.unix_ms) for name, value in event.metrics.items()]
            points.setdefault(work.run.run_id, []).extend(named)
            if event.kind == "finished":
                self._move(work, Event.FINISHED)
                self.register(work)
            elif event.kind == "failed":
                self._fail(work, event.message)
            else:
                metrics = dict(event.metrics)
                self._on_update(Update(work.task, str(work.status), event.step, event.num_steps, metrics))
        for run_id, named in points.items():
            self._registry.log_metrics(run_id, named)

    def _fail(self, work: TaskWork, reason: str) -> None:
        work.error = reason
        self._move(work, Event.FAILED, reason)
        if work.run:
            self._registry.end_run(work.run.run_id, is_ok=False)

    def _move(self, work: TaskWork, event: Event, reason: str = "") -> None:
        assert work.run is not None
        work.status = advance(work.status, event)
        self._registry.set_tags(work.run.run_id, {TAG_STATUS: str(work.status), TAG_REASON: reason})
        logger.info("run %s task=%s run=%s reason=%s", work.status, work.task, work.run.run_id, reason)
        self._on_update(Update(work.task, str(work.status), message=reason))

    def _member(self, prepared: PreparedTask) -> Member:
        return Member(
            spec=prepared.spec,
            run_key=prepared.run_key,
            train=prepared.dataset.train,
            select=prepared.dataset.select,
            data_fingerprint=prepared.dataset.fingerprint,
            adapter_dir=str(self._config.adapter_dir(prepared.run_key)),
            checkpoint_file=str(self._config.checkpoint_file(prepared.run_key)),
        )

    def _items_of(self, work: TaskWork) -> Iterable[tuple[BaseSpec, EvalItem]]:
        """The candidate with its baselines, and the champion where its answers on this gate split are not stored."""
        dataset, version, champion = work.prepared.dataset, work.version, work.champion
        assert version is not None
        gate, fingerprint = dataset.gate, dataset.gate_fingerprint
        folder = str(self._registry.download(version, self._config.downloads_dir))
        item = EvalItem(work.task, version.version, version.digest, folder, gate, fingerprint, dataset.train)
        yield work.prepared.spec.base, item
        if champion and champion.version != version.version:
            stored = load_reports(self._config.answers_file(champion.tags["run_key"])).get(champion.key)
            if stored and stored.gate_fingerprint == fingerprint:
                work.reports[champion.key] = stored
            else:
                try:
                    other = self._registry.download(champion, self._config.downloads_dir)
                    base = read_artifact(other).card.base
                except OutdatedAdapterError as error:
                    # Nothing can serve it any more, so there is no production answer to compare with.
                    logger.warning("champion outdated, judging as a first version task=%s error=%s", work.task, error)
                    work.champion = None
                except AdapterError as error:
                    work.error = f"champion {champion.key} cannot be compared: {error}"
                else:
                    yield base, EvalItem(work.task, champion.version, champion.digest, str(other), gate, fingerprint)

    def _items_of_untouched(self, judged: set[str]) -> dict[tuple[BaseSpec, str], EvalItem]:
        items = {}
        for task, version in self._registry.champions().items():
            if task not in judged:
                try:
                    folder = self._registry.download(version, self._config.downloads_dir)
                    base = read_artifact(folder, version.digest).card.base
                except AdapterError as error:
                    logger.warning("champion unreadable task=%s version=%s error=%s", task, version.version, error)
                    continue
                items[base, task] = EvalItem(task, version.version, version.digest, str(folder), (), "")
        return items

    def _has_artifact(self, run_key: str) -> bool:
        try:
            read_artifact(self._config.adapter_dir(run_key))
        except AdapterError:
            return False
        return True

    def _log_evaluation(self, work: TaskWork) -> None:
        assert work.run is not None
        assert work.version is not None
        metric, now = work.prepared.spec.gate.metric, int(time.time() * 1000)
        points = []
        for system, report in work.reports.items():
            name = f"gate/{metric}" if system == work.version.key else f"gate/{system.replace('@', '-v')}_{metric}"
            points.append((name, report.value(metric), 0, now))
        points += [(f"gate/{name}", error, 0, now) for name, error in work.reports[work.version.key].calibration_errors.items()]
        self._registry.log_metrics(work.run.run_id, points)
        self._registry.log_texts(work.run.run_id, {"gate_answers.json": work.reports[work.version.key].to_json()})
