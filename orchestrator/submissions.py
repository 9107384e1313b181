"""Submissions on disk: what was asked for, how far each is, what happened, what it came to. Light: no torch, no Ray.

A submission is a folder in the workspace. Its driver holds `driver.lock` as long as it lives, so one that was killed is known
at once, on this machine or on another that shares the storage. Everyone else reads, or leaves a wish.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import filelock
from pydantic import TypeAdapter

from multilora.errors import CapacityError, Problem, RequestError
from multilora.spec import TaskSpec
from orchestrator.config import OrchestratorConfig
from orchestrator.files import write_whole
from orchestrator.plan import Plan

ALL = "_all"
"""The wish that concerns every task; no task's name has an underscore."""
START_TIMEOUT_S = 120.0
"""A driver that has not come to life after this time will not."""
LOCK_TIMEOUT_S = 60.0
OPEN = "open"
"""Folder of markers."""


class SubmissionStatus(StrEnum):
    """How far a submission has come."""

    STARTING = "STARTING"
    WAITING = "WAITING"
    RUNNING = "RUNNING"
    DONE = "DONE"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"
    LOST = "LOST"
    """Its driver died. Never written: found out."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self not in (SubmissionStatus.STARTING, SubmissionStatus.WAITING, SubmissionStatus.RUNNING)


@dataclass(frozen=True)
class Order:
    """What was asked for."""

    specs: tuple[TaskSpec, ...]
    config: OrchestratorConfig
    force: bool = False


@dataclass(frozen=True)
class State:
    """How far a submission is, and apart from it the reason."""

    status: SubmissionStatus
    reason: str = ""
    since: float = 0.0
    """Unix time of the last change."""


@dataclass(frozen=True)
class PlannedSubmission:
    """What a submission would do."""

    plan: Plan
    unchanged: tuple[str, ...]
    problems: tuple[Problem, ...] = ()
    num_examples: Mapping[str, int] | None = None
    """Task -> training examples."""
    notes: tuple[str, ...] = ()
    """What a person should know of the data."""


@dataclass(frozen=True)
class TaskResult:
    """What became of one task."""

    task: str
    state: str
    champion: str | None
    error: str = ""


@dataclass(frozen=True)
class SubmitResult:
    """What a submission did."""

    tasks: tuple[TaskResult, ...]
    problems: tuple[Problem, ...]
    outcome: str
    """CLEAR, HOLD, BLOCK or ERROR."""
    report_file: Path | None
    """The HTML page; None when nothing was judged."""

    @property
    def report(self) -> dict[str, Any] | None:
        """The report's object."""
        if self.report_file is None:
            return None
        found: dict[str, Any] = json.loads(self.report_file.with_name("report.json").read_text(encoding="utf-8"))
        return found


_ORDER, _STATE, _RESULT = TypeAdapter(Order), TypeAdapter(State), TypeAdapter(SubmitResult)
PLANNED = TypeAdapter(PlannedSubmission)


@dataclass(frozen=True)
class Submission:
    """One submission's folder."""

    folder: Path

    @property
    def id(self) -> str:
        """`submission-12`."""
        return self.folder.name

    @property
    def number(self) -> int:
        """Place in the order of arrival."""
        return int(self.id.rpartition("-")[2])

    @property
    def order(self) -> Order:
        """What was asked for."""
        return _ORDER.validate_json((self.folder / "order.json").read_bytes())

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks."""
        return tuple(spec.name for spec in self.order.specs)

    @property
    def state(self) -> State:
        """How far it is; LOST where its driver died."""
        state = self._written_state
        if state.status.is_over or self.is_driven:
            return state
        if state.status is SubmissionStatus.STARTING and time.time() - state.since < START_TIMEOUT_S:
            return state
        state = self._written_state  # it may have ended between the two looks
        if state.status.is_over:
            return state
        return replace(state, status=SubmissionStatus.LOST, reason=f"its driver died while {state.status}")

    @property
    def _written_state(self) -> State:
        return _STATE.validate_json((self.folder / "state.json").read_bytes())

    @property
    def is_driven(self) -> bool:
        """Whether its driver lives."""
        lock = filelock.FileLock(self.folder / "driver.lock")
        try:
            with lock.acquire(timeout=0):
                return False
        except filelock.Timeout:
            return True

    @property
    def result(self) -> SubmitResult | None:
        """What it came to, once it is DONE."""
        file = self.folder / "result.json"
        return _RESULT.validate_json(file.read_bytes()) if file.is_file() else None

    @property
    def events_file(self) -> Path:
        """One JSON object per line: the plan, and every update of a task."""
        return self.folder / "events.jsonl"

    def events(self, start: int = 0) -> tuple[list[dict[str, Any]], int]:
        """Events from byte `start` on, and the byte after the last whole one."""
        with self.events_file.open("rb") as stream:
            stream.seek(start)
            whole, newline, _ = stream.read().rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()], start + len(whole) + len(newline)

    @property
    def log_file(self) -> Path:
        """What the driver printed."""
        return self.folder / "driver.log"

    def worker_log(self, group_id: str) -> Path:
        """What a training group's worker logged."""
        return self.folder / f"worker-{group_id}.log"

    @property
    def job(self) -> str:
        """What runs its driver, as its `Runner` names it; empty where nobody started one."""
        file = self.folder / "job"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def set_job(self, job: str) -> None:
        """Write what runs its driver."""
        write_whole(self.folder / "job", job.encode())

    def set_state(self, status: SubmissionStatus, reason: str = "") -> None:
        """Write how far it is."""
        if not status.is_over:
            self._marker.parent.mkdir(exist_ok=True)
            self._marker.touch()
        write_whole(self.folder / "state.json", _STATE.dump_json(State(status, reason, time.time())))
        if status.is_over:
            self._marker.unlink(missing_ok=True)

    @property
    def _marker(self) -> Path:
        """There while it is not over, so that nobody has to look at thousands that are."""
        return self.folder.parent / OPEN / self.id

    def set_result(self, result: SubmitResult) -> None:
        """Write what it came to."""
        write_whole(self.folder / "result.json", _RESULT.dump_json(result))

    def wish(self, task: str, reason: str) -> None:
        """Ask the driver to end a task, or ALL."""
        write_whole(self.folder / f"wish-{task}", reason.encode())

    def wishes(self) -> dict[str, str]:
        """Tasks that shall end (ALL among them), with the reasons."""
        found = self.folder.glob("wish-*")
        return {file.name.removeprefix("wish-"): file.read_text(encoding="utf-8") for file in found}

    @contextmanager
    def driven(self) -> Iterator[None]:
        """Be its driver. Raises CapacityError where another driver lives."""
        try:
            with filelock.FileLock(self.folder / "driver.lock").acquire(timeout=2.0):
                yield
        except filelock.Timeout as error:
            raise CapacityError(f"{self.id} is driven by another process already") from error

    def renew(self) -> None:
        """Make it ready to be driven again."""
        for file in (*self.folder.glob("wish-*"), self.folder / "result.json", self.folder / "claims.json", self.folder / "job"):
            file.unlink(missing_ok=True)
        self.events_file.write_bytes(b"")
        self.set_state(SubmissionStatus.STARTING)


class Submissions:
    """All submissions of a workspace."""

    def __init__(self, workspace: Path) -> None:
        self._root = workspace / "submissions"

    def create(self, order: Order) -> Submission:
        """Store an order as the next submission."""
        self._root.mkdir(parents=True, exist_ok=True)
        with self.lock():
            numbers = [submission.number for submission in self.all()]
            submission = Submission(self._root / f"submission-{max(numbers, default=0) + 1}")
            staging = self._root / f".new-{os.getpid()}"
            staging.mkdir(exist_ok=True)
            (staging / "order.json").write_bytes(_ORDER.dump_json(order, indent=1))
            (staging / "events.jsonl").touch()
            (staging / "state.json").write_bytes(_STATE.dump_json(State(SubmissionStatus.STARTING, since=time.time())))
            staging.rename(submission.folder)
            submission.set_state(SubmissionStatus.STARTING)
        return submission

    def all(self) -> list[Submission]:
        """All, in the order of arrival."""
        found = (Submission(folder) for folder in self._root.glob("submission-*"))
        return sorted(found, key=lambda submission: submission.number)

    def open(self) -> list[tuple[Submission, State]]:
        """Those that something still happens to, in the order of arrival."""
        found = (Submission(self._root / marker.name) for marker in (self._root / OPEN).glob("submission-*"))
        pairs = [(submission, submission.state) for submission in sorted(found, key=lambda submission: submission.number)]
        return [(submission, state) for submission, state in pairs if not state.status.is_over]

    def recent(self) -> list[tuple[Submission, State]]:
        """The open ones and the newest that is over."""
        is_open = {submission for submission, _ in self.open()}
        over = [submission for submission in self.all() if submission not in is_open]
        shown = sorted([*is_open, *over[-1:]], key=lambda submission: submission.number)
        return [(submission, submission.state) for submission in shown]

    def find(self, name: str | None = None) -> Submission:
        """The submission of this id, or the newest. Raises RequestError where there is none."""
        found = [submission for submission in self.all() if name in (None, submission.id)]
        if not found:
            raise RequestError(f"there is no {name or 'submission'} in {self._root.parent}; see: orchestrator status")
        return found[-1]

    def with_task(self, task: str) -> list[Submission]:
        """Those that a task is part of, newest first."""
        return [submission for submission in reversed(self.all()) if task in submission.tasks]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Decide alone. Raises CapacityError where the storage's locks do not work."""
        self._root.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(self._root / ".lock").acquire(timeout=LOCK_TIMEOUT_S):
                yield
        except filelock.Timeout as error:
            raise CapacityError(f"{self._root / '.lock'} has been held by another process for {LOCK_TIMEOUT_S:.0f} s") from error

    def in_the_way(self, submission: Submission, is_shared: bool) -> list[Submission]:
        """Those that must end before this one begins: on a shared cluster where they have a task in common, else all.

        A running one counts whenever it came (this one may have been resumed), a waiting one only if it came before.
        """
        tasks = set(submission.tasks)
        return [
            other
            for other, state in self.open()
            if other != submission
            and (state.status is SubmissionStatus.RUNNING or other.number < submission.number)
            and not (is_shared and tasks.isdisjoint(other.tasks))
        ]
