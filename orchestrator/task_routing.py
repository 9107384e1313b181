"""Trains, judges and promotes the router of `model: auto`. A "no" of the gate is a value here, too.

The router learns the champions' training texts; the select splits choose temperature and threshold; the gate splits that
the champions were judged on judge it, task by task against the router that answers now: the recall of no old task may fall.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from multilora.base_model import load_base
from multilora.errors import AdapterError, DataError, Problem, RequestError, SpecError
from multilora.registry import ADAPTER_PATH, CHALLENGER, CHAMPION, ROUTER, TAG_STATUS, AdapterVersion, Registry
from multilora.spec import BaseSpec, GateSpec, TaskSpec
from multilora.task_router import ABSTAINED, RouterCard, TaskRouter, read_router, text_of
from orchestrator.comparison import Evidence
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import TAG_PREVIOUS, TAG_VERDICT
from orchestrator.dataset import Example, gate_fingerprint_of
from orchestrator.eval_report import EvalReport, Graded
from orchestrator.gates import load_gate
from orchestrator.history import read_events
from orchestrator.judge import Release, judge
from orchestrator.prepare import PreparedTask, prepare
from orchestrator.router_fit import PRECISION, RouterData, Splits, fit_router, routes_of
from orchestrator.state import Status
from serve.engine import Engine

logger = logging.getLogger(__name__)

MIN_RECALL = 0.3
"""Of a task that the router before did not know; such a task has nothing to be compared with."""
MARGIN = 0.05
"""How much less recall of an old task still counts as not worse."""
PYFUNC_CODE = Path(__file__).resolve().parents[1] / "serve" / "pyfunc_router.py"
EngineOf = Callable[[BaseSpec], Engine]


@dataclass(frozen=True)
class RouterResult:
    """What came of training a router."""

    version: AdapterVersion
    card: RouterCard
    release: Release
    """A verdict per task, as for adapters; the metric is the recall."""
    is_promoted: bool
    left_out: Mapping[str, str]
    """Task -> why the router does not know it."""
    problems: Sequence[Problem] = ()


def train_router(specs: Sequence[TaskSpec], config: OrchestratorConfig, precision: float = PRECISION) -> RouterResult:
    """Train a router over the tasks that have a champion, judge it, and promote it where it passes.

    Raises RequestError for fewer than two such tasks, or where a task that the router knows now is not among the specs, or
    its data is broken.
    """
    registry = Registry(config.registry_uri, config.artifact_root)
    registry.initialise()
    prepared, problems = prepare(specs)
    champions = registry.champions()
    known = [task for task in prepared if task.spec.name in champions]
    names = [task.spec.name for task in known]
    broken = f" ({'; '.join(map(str, problems))})" if problems else ""
    if len(known) < 2:
        rule = f"a router needs two tasks with champions, there is {', '.join(names) or 'none'}: submit them first"
        raise RequestError(rule + broken)

    @cache
    def engine_of(base: BaseSpec) -> Engine:
        return Engine(load_base(base), num_slots=1, max_rank=1)

    champion = registry.by_alias(ROUTER, CHAMPION)
    before = _usable(config, registry, champion, engine_of) if champion else None
    missing = [task for task in (before.card.tasks if before else ()) if task in champions and task not in names]
    if missing:
        raise RequestError(f"the router that answers now knows {', '.join(missing)}: give their specs, too{broken}")
    data = _data_of(known, _stored_gates(config, known), precision)
    # MLflow keeps the folder under its own name, where Registry.download looks for it.
    folder = config.router_dir / data.fingerprint[:16] / ADAPTER_PATH
    router = fit_router(data, engine_of(data.base), folder)
    release = judge_router(data.gate, router, before, engine_of)
    version = _register(registry, router, folder)
    is_promoted = _conclude(registry, version, champion, release)
    left_out = {task.spec.name: "it has no champion: submit it first" for task in prepared if task not in known}
    left_out |= {task: "its spec was not given" for task in champions if task not in names}
    return RouterResult(version, router.card, release, is_promoted, left_out, problems)


def judge_router(gate: Splits, router: TaskRouter, before: TaskRouter | None, engine_of: Callable[[BaseSpec], Engine]) -> Release:
    """Judge a router task by task on the gate texts: old tasks against the router before, new ones by MIN_RECALL."""
    evidences = []
    for task, examples in gate.items():
        is_new = before is None or task not in before.card.tasks
        candidate = _report(task, examples, router, engine_of(router.card.base))
        if is_new or before is None:
            answers = tuple(replace(graded, answer=ABSTAINED) for graded in candidate.answers)
            reference = replace(candidate, system="none", digest="", answers=answers, fingerprint={})
        else:
            reference = _report(task, examples, before, engine_of(before.card.base))
        rule = GateSpec(min=MIN_RECALL if is_new else 0.0, margin=MARGIN)
        is_changed = before is None or router.digest != before.digest
        evidences.append(Evidence(task, rule, candidate, reference, is_new, is_changed))
    release = judge(evidences)
    first = {
        task: replace(
            verdict, reasons=(f"new to the router: recall {evidence.candidate.value('accuracy'):.3f}, at least {MIN_RECALL}",)
        )
        for evidence in evidences
        if (task := evidence.task) in release.verdicts
        and evidence.is_first_version
        and (verdict := release.verdicts[task]).is_promoted
    }
    return replace(release, verdicts={**release.verdicts, **first})


def champion_router(config: OrchestratorConfig) -> tuple[AdapterVersion, RouterCard, tuple[str, ...]]:
    """The router that answers, its card, and the tasks with a champion that it does not know. Raises RequestError."""
    registry = Registry(config.registry_uri, config.artifact_root)
    version = registry.by_alias(ROUTER, CHAMPION)
    if version is None:
        raise RequestError("there is no router yet: orchestrator router train tasks/*.yaml")
    card = read_router(registry.download(version, config.downloads_dir), version.digest).card
    return version, card, tuple(task for task in registry.champions() if task not in card.tasks)


def _usable(config: OrchestratorConfig, registry: Registry, version: AdapterVersion, engine_of: EngineOf) -> TaskRouter | None:
    """A registered router; None where nothing can serve it any more, so that there is nothing to be compared with."""
    try:
        router = read_router(registry.download(version, config.downloads_dir), version.digest)
        engine = engine_of(router.card.base)
        router.check_base(engine.base.files.fingerprint, engine.embed)
    except (AdapterError, SpecError) as error:
        logger.warning("router unusable, judging its successor as the first one version=%s error=%s", version.key, error)
        return None
    return router


def _stored_gates(config: OrchestratorConfig, tasks: Sequence[PreparedTask]) -> dict[str, Sequence[Example]]:
    """The gate split that each task's champion was judged on; the spec's own where this workspace does not have it."""
    events = read_events(config.history_dir)
    cells = events[-1].cells if events else {}
    gates: dict[str, Sequence[Example]] = {}
    for task in tasks:
        cell = cells.get(task.spec.name)
        stored = load_gate(config.gates_dir, cell.gate_fingerprint) if cell and cell.gate_fingerprint else None
        gates[task.spec.name] = stored or task.dataset.gate
    return gates


def _data_of(tasks: Sequence[PreparedTask], gate: Splits, precision: float) -> RouterData:
    """All texts, over the base that most tasks have; what is a gate text of any task trains and chooses nothing.

    Raises DataError where a task has no other texts.
    """
    judged = {text_of(example.columns) for examples in gate.values() for example in examples}

    def without_gate(examples: Sequence[Example]) -> list[Example]:
        return [example for example in examples if text_of(example.columns) not in judged]

    (base, _), *_ = Counter(task.spec.base for task in tasks).most_common(1)
    files = next(task.base_files for task in tasks if task.spec.base == base)
    length = max(task.spec.train.max_length for task in tasks)
    train = {task.spec.name: without_gate(task.dataset.train) for task in tasks}
    select = {task.spec.name: without_gate(task.dataset.select) for task in tasks}
    if lacking := [name for name in train if not train[name] or not select[name]]:
        raise DataError(f"all train or select texts of {', '.join(lacking)} are gate texts, too: give these tasks other examples")
    return RouterData(
        base=base,
        max_length_tokens=min(length, files.max_positions or length),
        precision=precision,
        train=train,
        select=select,
        gate=gate,
    )


def _report(task: str, examples: Sequence[Example], router: TaskRouter, engine: Engine) -> EvalReport:
    """Where a task's gate texts go, as answers whose gold label is the task."""
    answers = tuple(
        Graded(example.id, text_of(example.columns), task, to, None, ())
        for example, to in zip(examples, routes_of(router, examples, engine), strict=True)
    )
    fingerprint = {"router": router.digest}
    labels = (*router.card.tasks, ABSTAINED)
    return EvalReport(task, ROUTER, router.digest, gate_fingerprint_of(examples), labels, answers, fingerprint=fingerprint)


def _register(registry: Registry, router: TaskRouter, folder: Path) -> AdapterVersion:
    """Keep the router with a run of its own; the same router is the same version."""
    card, run_key = router.card, router.digest[:16]
    params = {
        "tasks": ", ".join(card.tasks),
        "base.model": card.base.model,
        "temperature": card.temperature,
        "threshold": card.threshold,
    }
    run = registry.find_run(ROUTER, run_key) or registry.start_run(ROUTER, run_key, params, {})
    now = int(time.time() * 1000)
    points = [(f"gate/{task}_recall", card.gate.recall(task), 0, now) for task in card.tasks]
    points += [("gate/abstained", card.gate.abstained, 0, now), ("gate/precision", card.gate.precision, 0, now)]
    registry.log_metrics(run.run_id, points)
    version = registry.register(run, folder, router.digest, PYFUNC_CODE, "which task a text belongs to", {"run_key": run_key})
    registry.end_run(run.run_id, is_ok=True)
    return version


def _conclude(registry: Registry, version: AdapterVersion, champion: AdapterVersion | None, release: Release) -> bool:
    """Write the verdicts down, and move the alias where every task passes: a router is promoted whole or not at all."""
    is_promoted = not release.errors and all(verdict.is_promoted for verdict in release.verdicts.values())
    reasons = [f"{task}: {verdict.kind} {'; '.join(verdict.reasons)}" for task, verdict in release.verdicts.items()]
    tags = {TAG_VERDICT: str(release.outcome), "reasons": "\n".join(reasons)}
    if champion and champion.version != version.version:
        tags[TAG_PREVIOUS] = str(champion.version)
    registry.tag_version(version, tags)
    registry.set_tags(version.run_id, {TAG_STATUS: str(Status.PROMOTED if is_promoted else Status.REJECTED)})
    registry.set_alias(version, CHAMPION if is_promoted else CHALLENGER)
    if is_promoted:
        registry.drop_alias(ROUTER, CHALLENGER)
    return is_promoted
