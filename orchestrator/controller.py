"""The one writer: observes each task's run and writes what becomes of it, up to the alias that moves.

Every act can be repeated: a run is found again by its run key, a version by its run, evaluations and adapters are files
that appear whole. Killed at any moment and started again, a submission ends where an undisturbed one would have.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from multilora.artifact import digest_in, read_artifact
from multilora.errors import MultiLoraError
from multilora.fingerprint import changed_parts, digest_of
from multilora.registry import CHALLENGER, CHAMPION, TAG_REASON, TAG_STATUS, Registry
from multilora.spec_hash import spec_hash
from orchestrator.comparison import Evidence
from orchestrator.config import OrchestratorConfig
from orchestrator.eval_report import load_reports
from orchestrator.files import write_whole
from orchestrator.judge import Verdict
from orchestrator.prepare import PreparedTask, git_sha
from orchestrator.report import TaskOutcome
from orchestrator.search_record import SearchRecord, found_in
from orchestrator.state import Action, Event, RunFacts, Status, Update, advance, next_action
from orchestrator.work import TaskWork

logger = logging.getLogger(__name__)
TAG_GATE, TAG_VERDICT, TAG_SUBMISSION, TAG_PREVIOUS = "gate_hash", "verdict", "submission", "previous_champion"
PYFUNC_CODE = Path(__file__).resolve().parents[1] / "serve" / "pyfunc_model.py"


@dataclass(frozen=True)
class StoredVerdict:
    """A verdict on disk, and what it was given to."""

    belongs_to: tuple[str, ...]
    verdict: Verdict


STORED_VERDICT = TypeAdapter(StoredVerdict)


class Controller:
    """Writes what becomes of prepared tasks: runs, versions, aliases."""

    def __init__(
        self, config: OrchestratorConfig, registry: Registry, on_update: Callable[[Update], None], submission: str = ""
    ) -> None:
        """`submission` is the id of the one that is driven."""
        self._config, self._registry, self._on_update, self._submission = config, registry, on_update, submission
        self._searches = SearchRecord(config, registry)

    def observe(self, prepared: PreparedTask, *, force: bool = False) -> TaskWork:
        """Look up what is known of the task's run and decide what comes next; `force` forgets what other submissions trained."""
        task, run_key = prepared.spec.name, prepared.run_key
        run = self._registry.find_run(task, run_key)
        if force and (run is None or run.tags.get(TAG_SUBMISSION) != self._submission):
            for key in (run_key, *prepared.trainings):
                shutil.rmtree(self._config.adapter_dir(key), ignore_errors=True)
                self._config.checkpoint_file(key).unlink(missing_ok=True)
            self._config.trails_file(run_key).unlink(missing_ok=True)
            run = None
        champion = self._registry.by_alias(task, CHAMPION)
        status = Status(run.status) if run and run.status else Status.NEW
        version = self._registry.version_of_run(run) if run else None
        work = TaskWork(prepared, run, status, Action.TRAIN, champion, version)
        work.reports = load_reports(self._config.answers_file(run_key)) if run else {}
        work.found = found_in(run.tags) if run else None
        if status is Status.EVALUATED and not work.reports:
            work.status = Status.REGISTERED  # the workspace with the stored answers is gone
        is_champion = bool(champion and version and champion.version == version.version)
        is_gate_changed = bool(run and run.tags.get(TAG_GATE, prepared.gate_hash) != prepared.gate_hash)
        has_artifact = bool(digest_in(self._config.adapter_dir(run_key)))
        work.action = next_action(RunFacts(work.status, has_artifact, is_champion, is_gate_changed))
        return work

    def start_run(self, work: TaskWork) -> None:
        """Create or reopen the MLflow run of a task whose training begins."""
        prepared = work.prepared
        if work.run is None:
            tags = {
                "spec_hash": spec_hash(prepared.spec),
                "data_fingerprint": prepared.dataset.fingerprint,
                "base_fingerprint": prepared.base_files.fingerprint,
                "git_sha": git_sha(),
                TAG_SUBMISSION: self._submission,
                TAG_STATUS: str(Status.NEW),
            }
            work.run = self._registry.start_run(work.task, prepared.run_key, prepared.params, tags)
            self._registry.log_texts(work.run.run_id, {"spec.json": prepared.spec.model_dump_json(indent=2)})
        self.move(work, Event.STARTED)

    def candidate_run(self, work: TaskWork, run_key: str) -> str:
        """The id of the MLflow run of one candidate of a task's search."""
        return self._searches.run_of(work, run_key)

    def register(self, work: TaskWork) -> None:
        """Make the finished adapter a version of the task, alias challenger."""
        assert work.run is not None
        prepared = work.prepared
        try:
            if work.status is Status.TRAINING:
                self.move(work, Event.FINISHED)
            folder = self._config.adapter_dir(prepared.run_key)
            artifact = read_artifact(folder)
            work.found = self._searches.close(work)
            tags = {
                "run_key": prepared.run_key,
                "base": prepared.spec.base.model,
                "rank": str(artifact.card.rank),
                "data_fingerprint": prepared.dataset.fingerprint[:16],
                "gate": prepared.spec.gate.model_dump_json(),
                **({"search": work.found.sentence} if work.found else {}),
            }
            description = prepared.spec.description or work.task
            work.version = self._registry.register(work.run, folder, artifact.digest, PYFUNC_CODE, description, tags)
            self._registry.set_alias(work.version, CHALLENGER)
            self.move(work, Event.REGISTERED)
            # A worker killed between writing the adapter and deleting its checkpoint leaves one behind.
            self._config.checkpoint_file(prepared.run_key).unlink(missing_ok=True)
            self._registry.end_run(work.run.run_id, is_ok=True)
        except MultiLoraError as error:
            self.fail(work, str(error))

    def evidence_of(self, work: TaskWork) -> Evidence:
        """What the judge needs to know of an evaluated task."""
        assert work.version is not None
        is_first = work.champion is None or work.champion.version == work.version.version
        work.reference = work.reports["zero-shot"] if is_first or not work.champion else work.reports[work.champion.key]
        candidate = work.reports[work.version.key]
        is_changed = dict(candidate.fingerprint) != dict(work.reference.fingerprint) or not candidate.fingerprint
        return Evidence(work.task, work.prepared.spec.gate, candidate, work.reference, is_first, is_changed)

    def stored_verdict(self, work: TaskWork) -> Verdict | None:
        """The verdict that a submission which was killed before it could act on it gave this run against this champion."""
        file = self._config.verdict_file(work.prepared.run_key)
        if not file.is_file():
            return None
        stored = STORED_VERDICT.validate_json(file.read_bytes())
        return stored.verdict if stored.belongs_to == self._belongs_to(work) else None

    def store_verdict(self, work: TaskWork, verdict: Verdict) -> None:
        """Keep a verdict before anybody acts on it."""
        stored = StoredVerdict(self._belongs_to(work), verdict)
        write_whole(self._config.verdict_file(work.prepared.run_key), STORED_VERDICT.dump_json(stored))

    def _belongs_to(self, work: TaskWork) -> tuple[str, ...]:
        assert work.version is not None
        assert work.reference is not None
        return (work.prepared.gate_hash, work.version.digest, work.reference.system, work.reference.digest)

    def conclude(self, work: TaskWork, verdict: Verdict) -> None:
        """Write a verdict down, and move the alias when it passes."""
        assert work.run is not None
        assert work.version is not None
        if work.status in (Status.PROMOTED, Status.REJECTED):
            self.move(work, Event.RECONSIDERED)
        work.verdict = verdict
        gate, candidate = work.prepared.spec.gate, work.reports[work.version.key]
        reason = "; ".join(verdict.reasons)
        value, num_examples = f"{candidate.value(gate.metric):.4f}", str(len(candidate.answers))
        tags = {
            TAG_VERDICT: str(verdict.kind),
            "reasons": reason,
            gate.metric: value,
            "num_gate_examples": num_examples,
            "fingerprint": digest_of(candidate.fingerprint),
        }
        self._registry.tag_version(work.version, tags)
        text = f"**{verdict.kind}** {reason}. {gate.metric} {value} on {num_examples} gate examples."
        self._registry.describe_version(work.version, text)
        self._registry.set_tags(work.run.run_id, {TAG_GATE: work.prepared.gate_hash, TAG_VERDICT: str(verdict.kind)})
        if not verdict.is_promoted:
            self.move(work, Event.REJECTED, reason)
            return
        is_other = work.champion is not None and work.champion.version != work.version.version
        before = str(work.champion.version) if work.champion and is_other else ""
        self._registry.tag_version(work.version, {TAG_PREVIOUS: before})
        # The alias moves last: killed before it, the run is PROMOTED and not champion, which is judged again.
        self.move(work, Event.PROMOTED, reason)
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
            policy=spec.gate.policy,
            changed=self._changed(work),
            run_id=work.run.run_id if work.run else "",
            search=work.found,
        )

    def _changed(self, work: TaskWork) -> tuple[str, ...]:
        """Parts of the fingerprint in which a candidate differs from the champion before it."""
        candidate = work.reports.get(work.version.key) if work.version else None
        if not candidate or not work.reference or work.reference.system == "zero-shot":
            return ()
        return changed_parts(work.reference.fingerprint, candidate.fingerprint)

    def fail(self, work: TaskWork, reason: str) -> None:
        """Say that a task's run failed; the others go on."""
        work.error = reason
        self.move(work, Event.FAILED, reason)
        self._searches.close(work)
        if work.run:
            self._registry.end_run(work.run.run_id, is_ok=False)

    def cancel(self, work: TaskWork, reason: str) -> None:
        """Say that somebody ended a task's training; its checkpoint stays."""
        work.error = reason or "cancelled; submit again to continue"
        if work.status is Status.TRAINING and work.run:
            self.move(work, Event.CANCELLED, work.error)
            self._searches.close(work)
            self._registry.end_run(work.run.run_id, is_ok=False)
        else:  # it never began
            self._on_update(Update(work.task, str(Status.CANCELLED), message=work.error))

    def move(self, work: TaskWork, event: Event, reason: str = "") -> None:
        """Apply an event to a run: its new status, and apart from it the reason."""
        assert work.run is not None
        work.status = advance(work.status, event)
        self._registry.set_tags(work.run.run_id, {TAG_STATUS: str(work.status), TAG_REASON: reason})
        logger.info("run %s task=%s run=%s reason=%s", work.status, work.task, work.run.run_id, reason)
        self._on_update(Update(work.task, str(work.status), message=reason))
