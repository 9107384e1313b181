"""A person's decisions about which version answers: promote one by force, roll one back, look at a task's history."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from multilora.artifact import read_artifact
from multilora.errors import RequestError
from multilora.registry import CHALLENGER, CHAMPION, ROUTER, TAG_REASON, TAG_STATUS, AdapterVersion, Registry, RunRecord
from multilora.task_router import read_router
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import TAG_PREVIOUS, TAG_VERDICT
from orchestrator.history import Cell, PromotionEvent, append_event, current_user, next_cells, read_events
from orchestrator.release import stored_cells
from orchestrator.state import Event, Status, advance
from orchestrator.submissions import Submissions

JUDGED = (Status.EVALUATED, Status.PROMOTED, Status.REJECTED)


@dataclass(frozen=True)
class Moved:
    """A champion alias that a person moved."""

    task: str
    before: str | None
    """`task@version` that answered; None where nothing did."""
    after: str


@dataclass(frozen=True)
class VersionRow:
    """One version of a task, as its history shows it."""

    version: str
    alias: str
    verdict: str
    reasons: str
    value: str
    """Of the gate's metric, when it was judged."""
    decision: str
    """What a person did with it, when and why; empty where nobody did."""


class Aliases:
    """Moves champion aliases as a person wants, and writes down who, when and why."""

    def __init__(self, config: OrchestratorConfig) -> None:
        """Raises RegistryError where MLflow cannot be reached."""
        self._config = config
        self._registry = Registry(config.registry_uri, config.artifact_root)

    def promote(self, task: str, version: int | None, reason: str) -> Moved:
        """Make a version the champion past the gate: the one named, or the challenger. Raises RequestError, AdapterError."""
        with self._alone(task):
            if version is None:
                wanted = self._registry.by_alias(task, CHALLENGER)
                if wanted is None:
                    raise RequestError(f"{task} has no challenger; name a version: {task}@N (see: orchestrator history {task})")
            else:
                wanted = self._version(task, version)
            return self._move("promote", self._registry.by_alias(task, CHAMPION), wanted, reason)

    def roll_back(self, task: str, version: int | None, reason: str) -> Moved:
        """Make the champion before, or the version named, answer again. Raises RequestError, AdapterError."""
        with self._alone(task):
            champion = self._registry.by_alias(task, CHAMPION)
            if champion is None:
                raise RequestError(f"{task} has no champion to roll back; see: orchestrator history {task}")
            before = champion.tags.get(TAG_PREVIOUS, "")
            if version is None and not before:
                raise RequestError(f"nothing answered before {champion.key}; name a version with --to, or leave it")
            wanted = self._version(task, int(before) if version is None else version)
            return self._move("rollback", champion, wanted, reason)

    def history(self, task: str) -> tuple[list[tuple[PromotionEvent, Cell]], list[VersionRow]]:
        """What answered for a task after every event, oldest first, and its versions, newest first. Raises RequestError."""
        events = [(event, event.cells[task]) for event in read_events(self._config.history_dir) if task in event.cells]
        versions = self._registry.versions(task)
        if not events and not versions:
            raise RequestError(f"there is no task {task}; tasks are {', '.join(self._registry.tasks()) or 'none yet'}")
        aliases = {found.version: alias for alias in (CHALLENGER, CHAMPION) if (found := self._registry.by_alias(task, alias))}
        return events, [_row(version, aliases.get(version.version, "")) for version in reversed(versions)]

    def _move(
        self, kind: Literal["promote", "rollback"], champion: AdapterVersion | None, wanted: AdapterVersion, reason: str
    ) -> Moved:
        if champion and champion.version == wanted.version:
            raise RequestError(f"{wanted.key} is the champion already")
        folder = self._registry.download(wanted, self._config.downloads_dir)
        (read_router if wanted.task == ROUTER else read_artifact)(folder, wanted.digest)
        run = self._run_of(wanted)
        if run is not None and run.status not in JUDGED:
            raise RequestError(f"the run of {wanted.key} is {run.status}: only what was evaluated can answer")
        now, who = datetime.now(UTC), current_user()
        if kind == "promote":
            word = "promoted by force"
            self._registry.tag_version(wanted, {TAG_PREVIOUS: str(champion.version) if champion else ""})
        else:
            assert champion is not None
            word = f"rolled back to from {champion.key}"
            # Before the alias: a run that counts as promoted and is not champion would be judged, and promoted, again.
            if (fallen := self._run_of(champion)) is not None:
                self._set_status(fallen, Status.REJECTED, f"rolled back by {who}: {reason}")
        if run is not None:
            self._set_status(run, Status.PROMOTED, f"{word} by {who}: {reason}")
        self._registry.tag_version(wanted, {"decision": f"{word} by {who} at {now.isoformat(timespec='seconds')}: {reason}"})
        challenger = self._registry.by_alias(wanted.task, CHALLENGER)
        if challenger and challenger.version == wanted.version:
            self._registry.drop_alias(wanted.task, CHALLENGER)
        self._registry.set_alias(wanted, CHAMPION)
        self._record(kind, wanted, f"{wanted.key} {word}: {reason}", who, now)
        return Moved(wanted.task, champion.key if champion else None, wanted.key)

    def _record(self, kind: Literal["promote", "rollback"], wanted: AdapterVersion, reason: str, who: str, now: datetime) -> None:
        events = read_events(self._config.history_dir)
        cells = {**(events[-1].cells if events else {}), **stored_cells(self._config, {wanted.task: wanted})}
        champions = {task: version.key for task, version in self._registry.champions().items()}
        event = PromotionEvent(
            id=now.strftime("%Y%m%dT%H%M%S.%f"),
            kind=kind,
            created=now.isoformat(timespec="seconds"),
            who=who,
            outcome="FORCED",
            reason=reason,
            cells=next_cells(cells, {}, set(), champions),
        )
        append_event(self._config.history_dir, event)

    def _run_of(self, version: AdapterVersion) -> RunRecord | None:
        return next((run for run in self._registry.runs(version.task) if run.run_id == version.run_id), None)

    def _set_status(self, run: RunRecord, status: Status, reason: str) -> None:
        """Make a version's run say what became of it, so that no later submission decides otherwise."""
        if run.status != status:
            event = Event.PROMOTED if status is Status.PROMOTED else Event.REJECTED
            self._registry.set_tags(run.run_id, {TAG_STATUS: str(advance(Status(run.status), event)), TAG_REASON: reason})

    def _version(self, task: str, number: int) -> AdapterVersion:
        versions = {version.version: version for version in self._registry.versions(task)}
        if number not in versions:
            known = ", ".join(str(version) for version in sorted(versions)) or "none"
            raise RequestError(f"{task} has no version {number}; its versions: {known}")
        return versions[number]

    @contextmanager
    def _alone(self, task: str) -> Iterator[None]:
        """Keep submissions from starting, and refuse where one works on the task: MLflow has no compare-and-swap."""
        submissions = Submissions(self._config.workspace)
        with submissions.lock():
            for submission, _ in submissions.open():
                if task in submission.tasks:
                    raise RequestError(f"{submission.id} works on {task}; wait for it, or: orchestrator cancel {submission.id}")
            yield


def _row(version: AdapterVersion, alias: str) -> VersionRow:
    tags = version.tags
    value = next((f"{name} {tags[name]}" for name in ("accuracy", "macro_f1", "token_f1") if name in tags), "")
    return VersionRow(version.key, alias, tags.get(TAG_VERDICT, ""), tags.get("reasons", ""), value, tags.get("decision", ""))
