"""Compare ways to solve one task on its own gate examples: prompts, baselines, adapters, what they cost, what labels would buy.

The parts run one after another on a worker of the cluster. Every row is stored when it comes; a part that raises costs only
its own rows, and the next call of the same command goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import time

from ray.exceptions import RayTaskError

from multilora.errors import MultiLoraError, RequestError, SpecError
from multilora.registry import TAG_STATUS, Registry
from multilora.spec_files import load_task_specs
from orchestrator import entry
from orchestrator.cluster import stream_on_cluster
from orchestrator.compare_page import faces, write_faces
from orchestrator.compare_result import PARTS, CompareOrder, MethodComparison
from orchestrator.compare_store import CompareStore, PartRows, check_row
from orchestrator.config import OrchestratorConfig
from orchestrator.evidence import base_name
from orchestrator.methods import Bench, MethodRow, Part
from orchestrator.prepare import PreparedTask, git_sha, prepare
from orchestrator.report_words import cut, share
from orchestrator.session import ray_session
from orchestrator.status import COMPARED

logger = logging.getLogger(__name__)
VERSION = 2
"""Raise it when a method of any part answers otherwise than before, so that stored rows are not taken for new ones."""
SEEDS, SIZES = (0, 1, 2), (25, 50, 100, 200, 500)
MAX_REASON, MAX_METRIC = 300, 200
Rows = Callable[[Part, Bench], Iterator[MethodRow]]


def compare(
    config: OrchestratorConfig,
    spec_file: Path,
    *,
    parts: Sequence[Part] = PARTS,
    seeds: Sequence[int] = SEEDS,
    sizes: Sequence[int] = SIZES,
    on_progress: Callable[[str], None] = lambda message: None,
    rows_of: Rows = entry.compare_part,
) -> MethodComparison:
    """Run the parts that are not finished yet, and give everything that is known of this task, data, base, seeds and sizes.

    `rows_of` is what a worker runs for a part. Raises SpecError with all that is wrong with spec and data, RequestError for a
    free-text task, CapacityError where another command compares the task or Ray is away, RegistryError where MLflow is.
    """
    task = _prepared(spec_file)
    registry = Registry(config.registry_uri, config.artifact_root)
    registry.initialise()
    order = _order(task, seeds, sizes)
    store = CompareStore(config.compare_dir / order.task / order.key)
    with store.opened(order):
        bench = Bench(task.spec, task.dataset, store.folder, order.seeds, order.sizes, config.max_slots)
        missing = [part for part in PARTS if part in parts and not store.part(part).is_finished]
        on_progress(f"{order.task}: {', '.join(missing) or 'nothing'} to do, {len(order.gold)} gate examples, {store.folder}")
        if missing:
            with ray_session(config):
                for part in missing:
                    run_part(store, bench, part, stream_on_cluster(rows_of, part, bench), on_progress)
                    write_faces(faces(store.load()), store.folder)
        found = store.load()
        files = faces(found)
        on_progress(f"page: {write_faces(files, store.folder)}")
        record(registry, task, found, files)
    return found


def run_part(
    store: CompareStore,
    bench: Bench,
    part: Part,
    rows: Iterable[MethodRow],
    on_progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Store the rows of a part as they come, and that it came to its end, or what it raised instead.

    Rows that an earlier command stored before it was killed stay until this one has others, or has come to the end.
    """
    before = {_identity(row): row for row in store.part(part).rows}
    fresh: dict[tuple[str, int, int], MethodRow] = {}
    try:
        for row in rows:
            check_row(row, part, len(bench.gold))
            fresh[_identity(row)] = row
            store.put(part, PartRows(tuple((before | fresh).values())))
            on_progress(_line(row, bench.gold))
    except Exception as error:  # whatever ended the part, the others go on
        reason = reason_of(error)
        logger.warning("part failed part=%s", part, exc_info=error)
        store.put(part, PartRows(tuple((before | fresh).values()), error=reason))
        on_progress(f"{part}: failed: {reason}")
    else:
        store.put(part, PartRows(tuple(fresh.values()), is_finished=True))


def reason_of(error: BaseException) -> str:
    """What a part raised, on one line; Ray's wrapping taken off."""
    cause: BaseException | None = error
    while isinstance(cause, RayTaskError) and cause.cause is not None and cause.cause is not cause:
        cause = cause.cause
    first, *_ = str(cause).strip().splitlines() or [""]
    text = first if isinstance(cause, MultiLoraError) else f"{type(cause).__name__}: {first}"
    return cut("".join(char if char.isprintable() else "?" for char in text), MAX_REASON)


def record(registry: Registry, task: PreparedTask, found: MethodComparison, files: dict[str, str]) -> None:
    """Keep a comparison as one run of the task's experiment: a metric per method over its number of examples, and the files."""
    order = found.order
    run = registry.find_run(order.task, order.key)
    if run is None:
        settings = {"seeds": len(order.seeds), "sizes": ", ".join(map(str, order.sizes))}
        run = registry.start_run(order.task, order.key, {**task.params, **settings}, {TAG_STATUS: COMPARED})
    now, names = int(time() * 1000), metric_names(found)
    points = [
        (names[summary.part, summary.method], summary.accuracy, summary.num_train, now)
        for summary in found.summaries
        if summary.num_seeds
    ]
    registry.log_metrics(run.run_id, points)
    registry.log_texts(run.run_id, files)
    registry.end_run(run.run_id, is_ok=not found.failed)


def metric_names(found: MethodComparison) -> dict[tuple[Part, str], str]:
    """A name that MLflow takes for every method, no two the same."""
    names: dict[tuple[Part, str], str] = {}
    for summary in found.summaries:
        kept = re.sub(r"[^A-Za-z0-9 _-]+", " ", summary.method)
        stem = name = f"accuracy/{summary.part}/{'-'.join(kept.split())[:MAX_METRIC] or 'method'}"
        number = 1
        while name in names.values() and (summary.part, summary.method) not in names:
            number += 1
            name = f"{stem}-{number}"
        names.setdefault((summary.part, summary.method), name)
    return names


def _prepared(spec_file: Path) -> PreparedTask:
    (spec,) = load_task_specs([spec_file])
    if spec.labels is None:
        raise RequestError(f"{spec.name} answers with free text; compare holds labels against labels")
    prepared, problems = prepare([spec])
    if problems:
        raise SpecError.of(problems)
    return prepared[0]


def _order(task: PreparedTask, seeds: Sequence[int], sizes: Sequence[int]) -> CompareOrder:
    num_train = len(task.dataset.train)
    fitting = tuple(sorted({size for size in sizes if size < num_train}))
    decisive = [VERSION, task.run_key, list(seeds), fitting]
    return CompareOrder(
        task=task.spec.name,
        key=hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16],
        base=base_name(task.spec.base),
        labels=tuple(task.spec.labels or ()),
        gold=tuple(example.label for example in task.dataset.gate),
        num_train=num_train,
        seeds=tuple(seeds),
        sizes=fitting,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=git_sha(),
    )


def _identity(row: MethodRow) -> tuple[str, int, int]:
    return row.method, row.num_train, row.seed


def _line(row: MethodRow, gold: Sequence[str]) -> str:
    examples = f" ({row.num_train} examples)" if row.num_train > 1 else ""
    result = f"skipped: {row.skipped}" if row.skipped else share(row.accuracy(gold))
    return f"{row.part}: {row.method}{examples}, seed {row.seed}: {result}"
