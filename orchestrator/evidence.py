"""Ask champions again what they were judged on: every adapter on every task, and one champion from the base to the endpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from multilora.artifact import read_artifact
from multilora.errors import AdapterError, CapacityError, DataError, RequestError, UnknownTaskError
from multilora.registry import AdapterVersion, Registry
from multilora.spec import BaseSpec
from orchestrator import background, entry
from orchestrator.cluster import stream_on_cluster
from orchestrator.config import OrchestratorConfig
from orchestrator.cross import CrossColumn, CrossMatrix, store_matrices
from orchestrator.dataset import Example
from orchestrator.eval_report import EvalItem, load_reports
from orchestrator.gates import evenly_chosen, load_gate
from orchestrator.rungs import Ladder, Reply, RungAnswers, build_rungs
from orchestrator.services import query
from orchestrator.session import ray_session

CROSS_LIMIT, LADDER_LIMIT = 100, 300
NUM_INPUTS_PER_REQUEST = 64


@dataclass(frozen=True)
class Champion:
    """A champion with the gate examples that it was judged on."""

    item: EvalItem
    base: BaseSpec
    labels: tuple[str, ...]
    """Empty for a free-text task."""


@dataclass(frozen=True)
class CrossResult:
    """A matrix per base, and what is in none."""

    matrices: tuple[CrossMatrix, ...]
    left_out: Mapping[str, str]
    """Task -> why."""


def cross(
    config: OrchestratorConfig | None = None,
    tasks: Iterable[str] = (),
    *,
    limit: int = CROSS_LIMIT,
    on_progress: Callable[[str], None] = lambda message: None,
) -> CrossResult:
    """Score every champion (or those of `tasks`) on every task over its base, and store the matrices in the workspace.

    At most `limit` gate examples of each task. Raises UnknownTaskError for a task without a champion, DataError where there
    is nothing to score.
    """
    config = config or OrchestratorConfig.from_environment()
    champions, left_out = _champions(config, tasks)
    by_base: dict[BaseSpec, list[EvalItem]] = {}
    for one in champions:
        if one.labels:
            by_base.setdefault(one.base, []).append(replace(one.item, gate=evenly_chosen(one.item.gate, limit)))
        else:
            left_out[one.item.task] = "it answers with free text, so it has no labels to choose from"
    if not by_base:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in left_out.items())
        raise DataError(f"there is nothing to cross: {reasons or 'no task has a champion yet'}")
    matrices = []
    with ray_session(config):
        for base, items in by_base.items():
            columns = list[CrossColumn]()
            on_progress(f"{base_name(base)}: loading {len(items)} adapters")
            for column in stream_on_cluster(entry.cross_columns, base, items):
                columns.append(column)
                on_progress(column.error or f"{column.task}: {len(column.num_right)} systems on {column.num_examples} examples")
            left_out |= {column.task: column.error for column in columns if column.error}
            versions = {item.task: item.version for item in items}
            matrices.append(CrossMatrix.of(base_name(base), versions, columns, _now()))
    store_matrices(config.cross_file, matrices)
    return CrossResult(tuple(matrices), dict(sorted(left_out.items())))


def explain(
    task: str,
    config: OrchestratorConfig | None = None,
    *,
    limit: int | None = LADDER_LIMIT,
    on_progress: Callable[[str], None] = lambda message: None,
) -> Ladder:
    """Ask a task's champion its gate examples from the zero-shot base to the running endpoint, and say who owns each flip.

    Raises UnknownTaskError for a task without a champion, DataError where its gate examples are not stored.
    """
    config = config or OrchestratorConfig.from_environment()
    wanted, left_out = _champions(config, [task])
    if left_out:
        raise DataError(f"{task} cannot be explained: {left_out[task]}")
    one, item = wanted[0], replace(wanted[0].item, gate=evenly_chosen(wanted[0].item.gate, limit))
    others = [
        replace(other.item, gate=evenly_chosen(other.item.gate, len(item.gate)))
        for other in _champions(config)[0]
        if other.item.task != task and other.base == one.base and bool(other.labels) == bool(one.labels)
    ]
    found = list[RungAnswers]()
    with ray_session(config):
        on_progress(f"{item.task}@{item.version}: {len(item.gate)} gate examples; loading {base_name(one.base)}")
        for answers in stream_on_cluster(entry.climb, item, others):
            found.append(answers)
            on_progress(f"{answers.name}: {answers.skipped or 'done'}")
    found.append(_endpoint_answers(config, one, item.gate))
    found.append(RungAnswers("router", "", skipped="there is no automatic routing: a request names its task"))
    rungs = build_rungs(found, item.gate)
    return Ladder(task, f"{task}@{item.version}", base_name(one.base), len(item.gate), len(one.item.gate), rungs, _now())


def base_name(base: BaseSpec) -> str:
    """A base for people: what differs from the plain model is named."""
    parts = (base.model, base.revision, base.dtype if base.dtype != "float32" else None)
    return " ".join([part for part in parts if part] + ([base.quantization] if base.quantization != "none" else []))


def _champions(config: OrchestratorConfig, tasks: Iterable[str] = ()) -> tuple[list[Champion], dict[str, str]]:
    """Champions that can be asked again, and why others cannot, by task."""
    registry = Registry(config.registry_uri, config.artifact_root)
    versions = registry.champions()
    wanted = set(tasks) or set(versions)
    if unknown := sorted(wanted - set(versions)):
        raise UnknownTaskError(f"{', '.join(unknown)} has no champion; champions: {', '.join(versions) or 'none'}")
    champions, left_out = list[Champion](), dict[str, str]()
    for task in sorted(wanted):
        try:
            champions.append(_champion(config, registry, versions[task]))
        except (AdapterError, DataError) as error:
            left_out[task] = str(error)
    return champions, left_out


def _champion(config: OrchestratorConfig, registry: Registry, version: AdapterVersion) -> Champion:
    report = load_reports(config.answers_file(version.tags.get("run_key", ""))).get(version.key)
    gate = load_gate(config.gates_dir, report.gate_fingerprint) if report else None
    if report is None or gate is None:
        raise DataError("the gate examples that it was judged on are not in this workspace; submit the task again with --force")
    folder = registry.download(version, config.downloads_dir)
    card = read_artifact(folder, version.digest).card
    item = EvalItem(version.task, version.version, version.digest, str(folder), gate, report.gate_fingerprint)
    return Champion(item, card.base, tuple(label for label, _ in card.labels))


def _endpoint_answers(config: OrchestratorConfig, champion: Champion, gate: Sequence[Example]) -> RungAnswers:
    item, name, how = champion.item, "endpoint", "HTTP to the running endpoint"
    if background.find(config.serve_file) is None:
        return RungAnswers(name, how, skipped="no endpoint runs for this workspace; start it with: orchestrator serve")
    replies = list[Reply]()
    for first in range(0, len(gate), NUM_INPUTS_PER_REQUEST):
        inputs = [example.columns for example in gate[first : first + NUM_INPUTS_PER_REQUEST]]
        try:
            body = query(item.task, inputs, config, truncate=True)
        except (RequestError, CapacityError) as error:
            return RungAnswers(name, how, skipped=str(error), is_fault=True)
        if body["digest"] != item.digest:
            seen = f"it answers with {item.task}@{body['version']} {body['digest'][:12]}"
            expected = f"the champion is {item.task}@{item.version} {item.digest[:12]}"
            return RungAnswers(name, how, skipped=f"{seen}, {expected}", is_fault=True)
        for result in body["results"]:
            probabilities = tuple(result["probabilities"][label] for label in champion.labels)
            replies.append(Reply(result["label"] if champion.labels else result["text"], probabilities))
    return RungAnswers(name, how, tuple(replies))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
