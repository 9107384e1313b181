"""Evaluates candidates beside their champions and baselines, and finds out whether the untouched champions still bind."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from multilora.artifact import read_artifact
from multilora.errors import AdapterError, OutdatedAdapterError
from multilora.registry import Registry
from multilora.spec import BaseSpec
from orchestrator.cluster import evaluate_on_cluster
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import Controller
from orchestrator.eval_report import EvalItem, load_reports, store_reports
from orchestrator.state import Event, Status, Update
from orchestrator.work import TaskWork

logger = logging.getLogger(__name__)


class Evaluation:
    """Gets every answer that the judge needs."""

    def __init__(
        self, config: OrchestratorConfig, registry: Registry, controller: Controller, on_update: Callable[[Update], None]
    ) -> None:
        self._config, self._registry, self._controller, self._on_update = config, registry, controller, on_update

    def run(
        self, works: Sequence[TaskWork], cpus: float, gpus: float, check_stop: Callable[[], None]
    ) -> dict[str, str]:
        """Evaluate versions beside their champions and baselines.

        Returns the untouched champions of other tasks over the same bases, each with what is wrong with it ("" = verified).
        `check_stop` is called while it waits, and may raise.
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
            outcome = evaluate_on_cluster(base, base_items, others, cpus, gpus, check_stop)
            checked |= {f"{o.task}@{o.version}": outcome.errors.get(f"{o.task}@{o.version}", "") for o in others}
            for work in works:
                work.reports |= {system: report for (task, system), report in outcome.reports.items() if task == work.task}
                if work.version and (error := outcome.errors.get(work.version.key)):
                    self._controller.fail(work, error)
                if work.champion and (error := outcome.errors.get(work.champion.key)) and not work.error:
                    work.error = f"champion {work.champion.key} cannot be compared: {error}"
        for work in works:
            if work.version and work.version.key in work.reports:
                store_reports(self._config.answers_file(work.prepared.run_key), work.reports.values())
                self._log_evaluation(work)
                if work.status is Status.REGISTERED:
                    self._controller.move(work, Event.EVALUATED)
        return checked

    def is_needed(self, work: TaskWork) -> bool:
        """Whether an answer that the judge needs is missing."""
        if work.version is None or work.error:
            return False
        is_contested = work.champion is not None and work.champion.version != work.version.version
        needed = [work.version.key, "zero-shot", *([work.champion.key] if is_contested and work.champion else [])]
        return any(system not in work.reports for system in needed)

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
