"""Drives training groups on Ray: starts each when its turn comes, takes what workers tell, stops what shall stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster import RunningGroup
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import Controller
from orchestrator.curves import Curves
from orchestrator.group_task import GroupTask, Member, SearchTask, TrainEvent
from orchestrator.mailbox import Mailbox
from orchestrator.pace import Pace
from orchestrator.prepare import PreparedTask
from orchestrator.room import TrainingGroup
from orchestrator.state import Update
from orchestrator.work import TaskWork

POLL_S = 0.3
STOP_TIMEOUT_S = 120.0
"""A worker that was asked to stop while it starts hears of it once its base is loaded."""
NextGroups = Callable[[Sequence[TrainingGroup], Sequence[TrainingGroup]], Sequence[TrainingGroup]]
"""(waiting, running) -> those of the waiting that start now."""


class Training:
    """Trains one submission's groups and hands every finished adapter to the controller."""

    def __init__(
        self, config: OrchestratorConfig, controller: Controller, curves: Curves, on_update: Callable[[Update], None]
    ) -> None:
        self._config, self._controller, self._curves, self._on_update = config, controller, curves, on_update
        self._pace = Pace(config.pace_file)
        self._begun, self._over = set[str](), set[str]()
        """Run keys of adapters that a worker began, and that ended one way or the other."""
        self._newest: dict[str, dict[str, TrainEvent]] = {}
        """Task that is searched -> run key -> newest event of a candidate."""

    def run(
        self,
        works: Sequence[TaskWork],
        groups: Sequence[TrainingGroup],
        next_groups: NextGroups,
        wishes: Callable[[], Mapping[str, str]],
        log_of: Callable[[str], Path],
    ) -> None:
        """Train groups as `next_groups` lets them start, until every task of `works` is registered, failed or cancelled.

        Groups wait here and not in Ray, which gives up on a worker that finds no room in time. `wishes` names tasks that
        shall stop, with the reason; their workers save them first. `log_of`: group id -> the worker's log file.
        """
        by_key = {key: work for work in works for key in (work.prepared.run_key, *work.prepared.trainings)}
        by_task = {work.task: work for work in works}
        # Beside the driver: on any other node it would be lost with it.
        beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox: Any = Mailbox.options(scheduling_strategy=beside).remote()  # type: ignore[attr-defined]
        waiting, running, claimed = list(groups), list[RunningGroup](), list[TrainingGroup]()
        asked: dict[str, float] = {}
        while True:
            wished = [task for task in wishes() if task in by_task and task not in asked]
            if wished:
                asked |= dict.fromkeys(wished, time.monotonic())
                ray.get(mailbox.stop.remote([key for task in wished for key in by_task[task].prepared.trainings]))
                waiting = [group for group in waiting if not asked.keys() >= set(group.members)]
            busy = [started.group for started in running if started.is_running]
            # Workers that do not hear end with the driver.
            overdue = {task for task, since in asked.items() if time.monotonic() - since > STOP_TIMEOUT_S}
            if not waiting and all(overdue >= set(group.members) for group in busy):
                break
            if waiting or busy != claimed:
                started_now = next_groups(waiting, busy)
                for group in started_now:
                    waiting.remove(group)
                    running.append(self._start_group(group, by_task, mailbox, log_of(group.group_id)))
                claimed = [*busy, *started_now]
            self.handle(ray.get(mailbox.take.remote()), by_key)
            time.sleep(POLL_S)
        next_groups((), ())
        self.handle(ray.get(mailbox.take.remote()), by_key)
        reasons = wishes()
        errors = {name: started.error for started in running for name in started.group.members}
        for work in works:
            if work.prepared.run_key in self._over:
                continue
            if work.task in asked:
                self._controller.cancel(work, reasons.get(work.task, ""))
            else:
                self._begin(work)
                self._controller.fail(work, f"worker ended: {errors.get(work.task) or 'no result'}")
        self._curves.flush()
        self._pace.learn(groups, {key: flops for work in works for key, flops in work.prepared.num_flops.items()})

    def handle(self, events: Iterable[TrainEvent], by_key: Mapping[str, TaskWork]) -> None:
        """Act on what workers told. Of a task's steps only the newest is shown, all are kept."""
        steps: dict[str, Update] = {}
        for event in events:
            self._pace.note(event)
            work = by_key[event.run_key]
            if work.prepared.run_key in self._over:
                continue  # a worker that died starts again with all members, and reports the finished ones once more
            self._begin(work)
            assert work.run is not None
            if event.run_key != work.prepared.run_key:
                self._curves.add(self._controller.candidate_run(work, event.run_key), event)
                steps[work.task] = self._search_update(work, event)
                continue
            self._curves.add(work.run.run_id, event)
            if event.kind in ("finished", "failed", "stopped") and work.task in steps:
                self._on_update(steps.pop(work.task))
            if event.kind == "finished":
                self._over.add(event.run_key)
                self._controller.register(work)
            elif event.kind == "failed":
                self._over.add(event.run_key)
                self._controller.fail(work, event.message)
            elif event.kind != "stopped":
                before = steps[work.task].metrics if work.task in steps else {}
                metrics, status = {**before, **event.metrics}, str(work.status)
                numbers = (event.step, event.num_steps, metrics, event.message, event.batch_size)
                steps[work.task] = Update(work.task, status, *numbers)
        for update in steps.values():
            self._on_update(update)
        self._curves.try_flush()

    def _search_update(self, work: TaskWork, event: TrainEvent) -> Update:
        """How far a search is: its steps are those of all candidates, its metrics those of the newest epoch."""
        newest = self._newest.setdefault(work.task, {})
        newest[event.run_key] = event
        step = sum(one.step for one in newest.values())
        keys = list(work.prepared.trainings)
        message = f"search: candidate {keys.index(event.run_key) + 1} of {len(keys)}"
        if event.kind in ("finished", "failed", "dropped"):
            message = f"{message} {event.kind} {event.message if event.kind == 'failed' else ''}".rstrip()
        metrics = event.metrics if event.kind == "epoch" else {}
        num_steps = max(step, work.prepared.need.num_steps)
        return Update(work.task, str(work.status), step, num_steps, metrics, message, event.batch_size)

    def _begin(self, work: TaskWork) -> None:
        """An adapter's run begins when a worker begins it: until then it waits, whatever it is called elsewhere."""
        if work.prepared.run_key not in self._begun:
            self._begun.add(work.prepared.run_key)
            self._controller.start_run(work)

    def _start_group(self, group: TrainingGroup, by_task: Mapping[str, TaskWork], mailbox: Any, log_file: Path) -> RunningGroup:
        prepared = [by_task[name].prepared for name in group.members]
        members = tuple(member for task in prepared for member in members_of(task, self._config))
        searches = tuple(search for task in prepared if (search := search_of(task, self._config)))
        num_threads, every_s = max(1, int(group.cpus)), self._config.checkpoint_every_s
        task = GroupTask(group.base, members, group.num_slots, num_threads, every_s, mailbox, str(log_file), searches)
        return RunningGroup(self._config, group, task, f"{group.group_id}-{time.time_ns()}")


def members_of(prepared: PreparedTask, config: OrchestratorConfig) -> tuple[Member, ...]:
    """What a worker must know of a task's adapters: of one, or of all candidates of its search. No gate example is among it."""
    return tuple(
        Member(
            spec=spec,
            run_key=run_key,
            train=prepared.dataset.train,
            select=prepared.dataset.select,
            data_fingerprint=prepared.dataset.fingerprint,
            adapter_dir=str(config.adapter_dir(run_key)),
            checkpoint_file=str(config.checkpoint_file(run_key)),
        )
        for run_key, spec in prepared.trainings.items()
    )


def search_of(prepared: PreparedTask, config: OrchestratorConfig) -> SearchTask | None:
    """What a worker must know of a task's search; None where it has none."""
    if prepared.spec.search is None:
        return None
    run_key, files = prepared.run_key, (config.adapter_dir(prepared.run_key), config.trails_file(prepared.run_key))
    return SearchTask(prepared.spec.name, run_key, tuple(prepared.trainings), prepared.spec.search.eta, *map(str, files))
