"""What Prometheus reads at /metrics. Replicas on one machine share a folder, so whichever of them is asked tells of all.

Where PROMETHEUS_MULTIPROC_DIR names no folder when the process starts, a process tells of itself alone. Labels are tasks and
bases that are served, never what a caller sent.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OTHER = "other"
"""Task of requests that name none that is served."""


class Metrics:
    """The numbers of one replica."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests", "route", "task", "status")
        self.request_s = self._histogram(
            "request_seconds", "From the request's first byte to the answer's last", SECONDS, "route", "task"
        )
        self.inputs = self._counter("inputs", "Inputs that were admitted", "task")
        self.abstentions = self._counter("abstentions", "Inputs whose label was below abstain_below", "task")
        self.queue_s = self._histogram("queue_seconds", "From queueing an input to the start of its batch", SECONDS, "task")
        self.batch_s = self._histogram("batch_seconds", "One forward pass over a batch of labels", SECONDS, "base")
        self.batch_inputs = self._histogram("batch_inputs", "Inputs in a batch", COUNTS, "base")
        self.batch_tasks = self._histogram("batch_tasks", "Adapters in a batch", COUNTS, "base")
        self.loads = self._counter("loads", "Adapters brought into host memory, from registry or disk", "task", "result")
        self.load_s = self._histogram("load_seconds", "Bringing an adapter into host memory, canaries included", SECONDS)
        self.slot_loads = self._counter("slot_loads", "Adapters copied from host memory into a device slot", "base")
        self.waiting = self._gauge("waiting_inputs", "Inputs that wait for a batch", "base")
        self.adapters = self._gauge("resident", "Adapters in host memory and in device slots", "base", "tier")
        _forget_dead_processes()

    def exposition(self) -> bytes:
        """All numbers in Prometheus' text format."""
        if FOLDER_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"adapters_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"adapters_{name}", text, labels, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"adapters_{name}", text, labels, multiprocess_mode="livesum", registry=self._registry)


def _forget_dead_processes() -> None:
    """A replica that was killed must not go on waiting and residing for ever; what it counted stays counted."""
    folder = os.environ.get(FOLDER_VARIABLE)
    for file in Path(folder).glob("gauge_live*_*.db") if folder else ():
        pid = int(file.stem.rpartition("_")[2])
        if not psutil.pid_exists(pid):
            mark_process_dead(pid)  # type: ignore[no-untyped-call]
