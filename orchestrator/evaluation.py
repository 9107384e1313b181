"""Evaluates candidates beside their champions and baselines, and finds out whether the other champions still answer as judged."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from multilora.artifact import AdapterArtifact, read_artifact
from multilora.errors import AdapterError, DataError, OutdatedAdapterError
from multilora.fingerprint import digest_of, fingerprint_of
from multilora.registry import AdapterVersion, Registry
from multilora.spec import BaseSpec
from orchestrator.cluster import evaluate_on_cluster
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import Controller
from orchestrator.dataset import Example
from orchestrator.eval_report import EvalItem, EvalOutcome, EvalReport, load_reports, store_reports
from orchestrator.gates import load_gate, store_gate
from orchestrator.history import Cell
from orchestrator.state import Event, Status, Update
from orchestrator.work import TaskWork

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Untouched:
    """A champion that is not on trial, found as the registry says."""

    version: AdapterVersion
    artifact: AdapterArtifact
    fingerprint: Mapping[str, str]
    """Everything that decides its answers here and now."""
    stored: EvalReport | None
    """Its newest answers; None where none are on disk, or its fingerprint is known to be the same."""
    gate_fingerprint: str
    """Of the gate split that it answered; empty where nothing is known."""

    @property
    def is_changed(self) -> bool:
        """Whether it would answer otherwise than when it was last evaluated: its serving fingerprint differs."""
        before = self.stored.fingerprint if self.stored else {}
        return bool(before) and before != self.fingerprint


@dataclass
class Checked:
    """What became of the champions that are not on trial; keys are task names."""

    verified: dict[str, AdapterVersion] = field(default_factory=dict)
    """Same fingerprint, bound again, canaries equal."""
    rechecked: dict[str, tuple[AdapterVersion, EvalReport, EvalReport]] = field(default_factory=dict)
    """Changed fingerprint: its stored answers and its answers now, on the same gate examples."""
    failed: dict[str, tuple[AdapterVersion, str]] = field(default_factory=dict)
    """Cannot be bound or compared any more, and why."""


class Evaluation:
    """Gets every answer that the judge needs."""

    def __init__(
        self, config: OrchestratorConfig, registry: Registry, controller: Controller, on_update: Callable[[Update], None]
    ) -> None:
        self._config, self._registry, self._controller, self._on_update = config, registry, controller, on_update

    def untouched(self, judged: Set[str], known: Mapping[str, Cell]) -> list[Untouched]:
        """The champions of all tasks but those in `judged`; what cannot be read is left to the endpoint to refuse.

        `known` are the newest cells of the history, which spare reading the answers of what did not change.
        """
        found = []
        for version in self._registry.champions().values():
            if version.task in judged:
                continue
            try:
                folder = self._registry.download(version, self._config.downloads_dir)
                artifact = read_artifact(folder, version.digest)
            except AdapterError as error:
                logger.warning("champion unreadable task=%s version=%s error=%s", version.task, version.version, error)
                continue
            fingerprint, cell, stored = fingerprint_of(artifact), known.get(version.task), None
            if cell and (cell.version, cell.fingerprint) == (version.key, digest_of(fingerprint)):
                gate = cell.gate_fingerprint
            else:
                stored = load_reports(self._config.answers_file(version.tags.get("run_key", ""))).get(version.key)
                gate = stored.gate_fingerprint if stored else ""
            found.append(Untouched(version, artifact, fingerprint, stored, gate))
        return found

    def run(
        self,
        works: Sequence[TaskWork],
        untouched: Sequence[Untouched],
        cpus: float,
        gpus: float,
        check_stop: Callable[[], None],
    ) -> Checked:
        """Evaluate versions beside their champions and baselines, and what changed of the untouched champions.

        Over every base that is loaded for it, the other champions are bound, which proves them by their canaries.
        `check_stop` is called while it waits, and may raise.
        """
        items: dict[BaseSpec, list[EvalItem]] = {}
        for base, item in (pair for work in works for pair in self._items_of(work)):
            items.setdefault(base, []).append(item)
        checked = Checked()
        others: dict[BaseSpec, list[EvalItem]] = {}
        for champion in untouched:
            base = champion.artifact.card.base
            item = self._item_of(champion, checked)
            if item.gate:
                items.setdefault(base, []).append(item)
            others.setdefault(base, []).append(item)
        for base, base_items in items.items():
            for item in base_items:
                self._on_update(Update(item.task, "EVALUATING", message=f"{item.task}@{item.version}"))
            verify = [item for item in others.get(base, ()) if not item.gate]
            outcome = evaluate_on_cluster(base, base_items, verify, cpus, gpus, check_stop)
            self._take_in(outcome, works)
            _take_in_untouched(outcome, [champion for champion in untouched if champion.artifact.card.base == base], checked)
        for work in works:
            if work.version and work.version.key in work.reports:
                dataset = work.prepared.dataset
                store_gate(self._config.gates_dir, dataset.gate_fingerprint, dataset.gate)
                store_reports(self._config.answers_file(work.prepared.run_key), work.reports.values())
                self._log_evaluation(work)
                if work.status is Status.REGISTERED:
                    self._controller.move(work, Event.EVALUATED)
        return checked

    def keep_rechecked(self, checked: Checked) -> None:
        """Make the new answers of champions those that the next submission compares with; once they are judged."""
        for version, _, after in checked.rechecked.values():
            store_reports(self._config.answers_file(version.tags["run_key"]), [after])

    def is_needed(self, work: TaskWork) -> bool:
        """Whether an answer that the judge needs is missing."""
        if work.version is None or work.error:
            return False
        is_contested = work.champion is not None and work.champion.version != work.version.version
        needed = [work.version.key, "zero-shot", *([work.champion.key] if is_contested and work.champion else [])]
        return any(system not in work.reports for system in needed)

    def _take_in(self, outcome: EvalOutcome, works: Sequence[TaskWork]) -> None:
        for work in works:
            work.reports |= {system: report for (task, system), report in outcome.reports.items() if task == work.task}
            if work.version and (error := outcome.errors.get(work.version.key)):
                self._controller.fail(work, error)
            if work.champion and (error := outcome.errors.get(work.champion.key)) and not work.error:
                work.error = f"champion {work.champion.key} cannot be compared: {error}"

    def _items_of(self, work: TaskWork) -> Iterable[tuple[BaseSpec, EvalItem]]:
        """The candidate with its baselines, and the champion where its answers are not stored or would be others now."""
        dataset, version, champion = work.prepared.dataset, work.version, work.champion
        assert version is not None
        gate, fingerprint = dataset.gate, dataset.gate_fingerprint
        folder = str(self._registry.download(version, self._config.downloads_dir))
        item = EvalItem(work.task, version.version, version.digest, folder, gate, fingerprint, dataset.train)
        yield work.prepared.spec.base, item
        if champion and champion.version != version.version:
            try:
                other = self._registry.download(champion, self._config.downloads_dir)
                artifact = read_artifact(other)
            except OutdatedAdapterError as error:
                # Nothing can serve it any more, so there is no production answer to compare with.
                logger.warning("champion outdated, judging as a first version task=%s error=%s", work.task, error)
                work.champion = None
            except AdapterError as error:
                work.error = f"champion {champion.key} cannot be compared: {error}"
            else:
                stored = load_reports(self._config.answers_file(champion.tags["run_key"])).get(champion.key)
                if stored and stored.gate_fingerprint == fingerprint and dict(stored.fingerprint) == fingerprint_of(artifact):
                    work.reports[champion.key] = stored
                else:
                    item = EvalItem(work.task, champion.version, champion.digest, str(other), gate, fingerprint)
                    yield artifact.card.base, item

    def _item_of(self, champion: Untouched, checked: Checked) -> EvalItem:
        """An untouched champion, with its gate split where it must answer again."""
        version = champion.version
        gate: tuple[Example, ...] = ()
        if champion.is_changed:
            try:
                gate = load_gate(self._config.gates_dir, champion.gate_fingerprint) or ()
                problem = "" if gate else "its gate examples are not in this workspace"
            except DataError as error:
                problem = str(error)
            if problem:
                message = f"its fingerprint changed and it cannot be evaluated again: {problem}; submit its task with --force"
                checked.failed[version.task] = version, message
        folder = str(champion.artifact.folder)
        return EvalItem(version.task, version.version, version.digest, folder, gate, champion.gate_fingerprint)

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


def _take_in_untouched(outcome: EvalOutcome, untouched: Sequence[Untouched], checked: Checked) -> None:
    for champion in untouched:
        version, stored = champion.version, champion.stored
        if version.task in checked.failed:
            continue
        if error := outcome.errors.get(version.key):
            checked.failed[version.task] = version, error
        elif after := outcome.reports.get((version.task, version.key)):
            assert stored is not None
            checked.rechecked[version.task] = version, stored, after
        else:
            checked.verified[version.task] = version
