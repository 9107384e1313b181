"""Training curves on their way to MLflow: on disk first, so that none is lost while MLflow is away or a driver is killed."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from multilora.errors import RegistryAwayError, RegistryError
from multilora.registry import Registry
from orchestrator.group_task import TrainEvent

logger = logging.getLogger(__name__)
RETRY_S = 15.0
Point = tuple[str, float, int, int]
"""Name, value, step, unix time in ms."""


class Curves:
    """One file of points per run, emptied whenever MLflow has taken them."""

    def __init__(self, folder: Path, registry: Registry, patient: Registry) -> None:
        """`registry` gives up at once where MLflow is away; `patient` is asked at the end."""
        self._folder, self._registry, self._patient = folder, registry, patient
        self._again_at = 0.0

    def add(self, run_id: str, event: TrainEvent) -> None:
        """Keep an event's metrics."""
        if event.metrics:
            self._folder.mkdir(parents=True, exist_ok=True)
            points = [[name, value, event.step, event.unix_ms] for name, value in event.metrics.items()]
            with self._file(run_id).open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(point) + "\n" for point in points))

    def try_flush(self) -> None:
        """Hand all points over, or keep them for later where MLflow is away."""
        started = time.monotonic()
        if started < self._again_at:
            return
        try:
            self._flush(self._registry)
        except RegistryAwayError as error:
            self._again_at = time.monotonic() + RETRY_S
            logger.warning("training goes on, its curves wait on disk: %s", error)
        else:
            # With a thousand curves a round takes seconds; most of the time is for other work.
            self._again_at = time.monotonic() + 4 * (time.monotonic() - started)

    def flush(self) -> None:
        """Hand all points over, however long it takes."""
        self._flush(self._patient)

    def _flush(self, registry: Registry) -> None:
        for file in sorted(self._folder.glob("*.jsonl")):
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            # A line that a kill cut short has no end.
            points: list[Point] = [tuple(json.loads(line)) for line in lines if line.endswith("\n")]
            try:
                registry.log_metrics(file.stem, points)
            except RegistryAwayError:
                raise
            except RegistryError as error:
                logger.warning("curve of run %s dropped: %s", file.stem, error)  # the run was deleted, say
            file.unlink()

    def _file(self, run_id: str) -> Path:
        return self._folder / f"{run_id}.jsonl"
