"""Answer millions of rows through Ray Data with the engine that serves: one pool of actors, each with the base and the adapter.

The rows stay on disk: what travels through Ray is which bytes of the input an actor answers next. Every finished part is
a file, so a batch that was killed goes on where it stopped. On a cluster input and output lie where all nodes see them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import ray
import ray.data
from ray.exceptions import RayError, RayTaskError

from multilora.artifact import read_artifact
from multilora.base_model import load_base
from multilora.errors import AdapterError, CapacityError, DataError, MultiLoraError, RequestError, UnknownTaskError
from multilora.registry import CHAMPION, AdapterVersion, Registry
from orchestrator.batch_files import (
    BatchInput,
    Origin,
    Part,
    PartsFolder,
    beside,
    item_of,
    lines_of,
    look_through,
    read_row,
    write_part,
)
from orchestrator.config import OrchestratorConfig
from orchestrator.session import ray_session
from serve.answer import Answer
from serve.engine import Engine, Work

ROWS_PER_CALL = 512
"""The engine sorts so many rows by length at once."""
CPUS_PER_WORKER = 2
"""Cores of a worker without a GPU. One is a fifth faster where memory has room for a base per core."""


@dataclass(frozen=True)
class BatchSummary:
    """What became of a batch."""

    task: str
    version: int
    digest: str
    num_rows: int
    num_errors: int
    num_resumed: int
    """Rows that an earlier command had answered."""
    seconds: float
    """Of answering the others, start of the workers included."""
    output: str


@dataclass(frozen=True)
class Adapter:
    """The version that answers, found once."""

    folder: str
    digest: str
    version: int


class Answerer:
    """An actor's part of the work: the base, one adapter, and a part of the input at a time."""

    def __init__(self, adapter: Adapter, file: str, parts_folder: str) -> None:
        artifact = read_artifact(Path(adapter.folder), adapter.digest)
        self._adapter, self._file, self._parts_folder = adapter, Path(file), Path(parts_folder)
        self._engine = Engine(load_base(artifact.card.base), 1, artifact.card.rank)
        self._key = self._engine.bind(artifact, adapter.version)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        """Answer the parts that a batch names; what goes back are their sizes."""
        counted: dict[str, list[int]] = {"num_rows": [], "num_errors": []}
        for number, first_line, start, end in zip(*(batch[name].tolist() for name in Part.__annotations__), strict=True):
            lines = lines_of(self._file, start, end)
            rows = answered(self._engine, self._key, self._adapter, lines, first_line)
            for name, count in zip(counted, write_part(self._parts_folder, number, rows), strict=True):
                counted[name].append(count)
        return counted


def answered(engine: Engine, key: str, adapter: Adapter, lines: Sequence[bytes], first_line: int) -> list[dict[str, Any]]:
    """Each line as a row with its answer, or with what is wrong with it."""
    rows: list[dict[str, Any]] = []
    works: dict[int, Work] = {}
    for place, line in enumerate(lines):
        row: dict[str, Any] = {}
        try:
            row = read_row(line)
            works[place] = Work(key, engine.prompt(key, item_of(row, engine.bound(key).prompt_format)))
        except (DataError, RequestError) as error:
            row = beside(row, {"error": f"line {first_line + place}: {error}"})
        rows.append(row)
    places = list(works)
    for first in range(0, len(places), ROWS_PER_CALL):
        some = places[first : first + ROWS_PER_CALL]
        for place, answer in zip(some, engine.classify([works[place] for place in some]), strict=True):
            rows[place] = beside(rows[place], _fields(answer, adapter))
    return rows


def _fields(answer: Answer, adapter: Adapter) -> dict[str, Any]:
    known = {"is_truncated": answer.is_truncated, "version": adapter.version, "digest": adapter.digest}
    if not answer.labels:
        return {"text": answer.label, "is_cut_off": answer.is_cut_off, **known}
    probabilities = dict(zip(answer.labels, answer.probabilities, strict=True))
    return {"label": answer.label, "probabilities": probabilities, **known}


def run_batch(
    config: OrchestratorConfig,
    task: str,
    source: Path,
    output: Path,
    *,
    version: int | None = None,
    is_forced: bool = False,
    num_workers: int | None = None,
    on_start: Callable[[int, int, str], None] = lambda num_rows, num_done, note: None,
    on_rows: Callable[[int], None] = lambda num_rows: None,
) -> BatchSummary:
    """Answer every row of `source` by a task's champion, or by the version that is named; `output` appears when all are done.

    `num_workers` hold the base each; default: one per GPU, else one per two cores.
    `on_start` hears of all rows, of those answered earlier, and why nothing of an earlier batch could be used.
    Raises UnknownTaskError, RequestError, DataError, AdapterError, CapacityError.
    """
    if output.exists() and not is_forced:
        raise RequestError(f"{output} exists already; name another file, or replace it with --force")
    registry = Registry(config.registry_uri, config.artifact_root)
    registry.initialise()
    chosen = resolve(registry, task, version)
    batch = look_through(source.resolve())
    parts = PartsFolder(output.resolve())
    lock = parts.folder.with_suffix(".lock")
    stamp = batch.file.stat()
    parts.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(lock, timeout=0):
            note = parts.open(Origin(batch.sha256, len(batch.parts), chosen.key, chosen.digest))
            resumed = parts.finished()
            num_resumed = sum(num_rows for num_rows, _, _ in resumed.values())
            on_start(batch.num_rows, num_resumed, note)
            started = time.monotonic()
            adapter = _fetched(registry, chosen, config.downloads_dir)
            todo = [part for part in batch.parts if part.number not in resumed]
            if todo:
                with ray_session(config):
                    _answer(todo, batch, adapter, parts, num_workers, on_rows)
            _check_whole(batch, parts, stamp.st_mtime_ns)
            num_errors = sum(num_errors for _, num_errors, _ in parts.finished().values())
            parts.join()
            lock.unlink()
    except filelock.Timeout as error:
        raise CapacityError(f"another batch is writing {output}") from error
    seconds = time.monotonic() - started
    return BatchSummary(chosen.task, chosen.version, chosen.digest, batch.num_rows, num_errors, num_resumed, seconds, str(output))


def resolve(registry: Registry, task: str, version: int | None) -> AdapterVersion:
    """The version that answers: `task@version`, `version`, or else the champion. Raises UnknownTaskError, RequestError."""
    name, at, number = task.partition("@")
    if at and (version is not None or not number.isdecimal()):
        raise RequestError(f"{task}: name a version as TASK@3 or with --version 3")
    wanted = int(number) if at else version
    if wanted is None:
        champion = registry.by_alias(name, CHAMPION)
        if champion is None:
            raise UnknownTaskError(f"{name} has no champion; champions: {', '.join(registry.champions()) or 'none yet'}")
        return champion
    versions = {found.version: found for found in registry.versions(name)}
    if wanted not in versions:
        known = ", ".join(map(str, versions)) or "none"
        raise UnknownTaskError(f"{name} has no version {wanted}; its versions: {known}")
    return versions[wanted]


def _fetched(registry: Registry, chosen: AdapterVersion, downloads_dir: Path) -> Adapter:
    """Fetch the version and see that it is whole before any worker starts. Raises AdapterError."""
    folder = registry.download(chosen, downloads_dir)
    return Adapter(str(folder), read_artifact(folder, chosen.digest).digest, chosen.version)


def _answer(
    todo: Sequence[Part],
    batch: BatchInput,
    adapter: Adapter,
    parts: PartsFolder,
    wanted_workers: int | None,
    on_rows: Callable[[int], None],
) -> None:
    """Let a pool of actors answer the parts. Raises what an actor raised."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    num_gpus, num_cpus = (int(ray.cluster_resources().get(name, 0)) for name in ("GPU", "CPU"))
    # More workers than there is room for would wait for ever.
    num_workers = min(len(todo), num_gpus or num_cpus, wanted_workers or num_gpus or max(1, num_cpus // CPUS_PER_WORKER))
    items = [dict(zip(Part.__annotations__, (part.number, part.first_line, part.start, part.end), strict=True)) for part in todo]
    counts = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Answerer,
        batch_size=1,
        fn_constructor_args=(adapter, str(batch.file), str(parts.folder)),
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_gpus=1 if num_gpus else None,
        num_cpus=1 if num_gpus else min(CPUS_PER_WORKER, num_cpus // num_workers),
    )
    try:
        for row in counts.iter_rows():
            on_rows(int(row["num_rows"]))
    except RayTaskError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, MultiLoraError):
            cause = cause.cause if isinstance(cause, RayTaskError) else cause.__cause__
        raise cause or _worker_ended(error) from error
    except RayError as error:
        raise _worker_ended(error) from error


def _worker_ended(error: Exception) -> CapacityError:
    # Ray's message is a whole traceback, whose last line says what it was.
    said = str(error).strip().splitlines()[-1]
    return CapacityError(f"a worker ended: {said}; the finished parts are kept, so the same command goes on from there")


def _check_whole(batch: BatchInput, parts: PartsFolder, mtime_ns: int) -> None:
    """Refuse to join what does not belong together."""
    if batch.file.stat().st_mtime_ns != mtime_ns:
        raise DataError(f"{batch.file} was changed while it was read; run it again")
    num_rows = sum(num_rows for num_rows, _, _ in parts.finished().values())
    if num_rows != batch.num_rows:
        raise AdapterError(f"{num_rows} of {batch.num_rows} rows were answered; delete {parts.folder} and run it again")
