"""A command's connection to Ray, started early because it takes seconds, and its interrupts. Imports nothing that is slow."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import ray

from multilora.errors import CapacityError
from orchestrator.config import OrchestratorConfig

PACKAGES = ("multilora", "serve", "orchestrator")
WORKER_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
"""Threads that wait must sleep: spinning ones made a small product 6 to 18 times slower beside one other busy process.

oneDNN remembers 1024 shapes of products by default; training on batches of 400 shapes then took 2.2 GB, with 32 of them 1.2.
"""
LOCAL_ENV = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""On one machine nobody preempts; the watcher is a process more."""


class RaySession:
    """Connects to the configured cluster, or starts a local Ray, in the background; ends it with the `with` block."""

    def __init__(self, config: OrchestratorConfig) -> None:
        self._config = config
        # The thread lives as long as the session: Ray's processes end with the thread that started them.
        self._thread = ThreadPoolExecutor(1)
        self._started: Future[str] | None = None

    def start(self) -> None:
        """Begin, if it has not begun."""
        if self._started is None:
            self._started = self._thread.submit(self._start)

    def wait(self) -> str:
        """Wait until Ray is there; returns its dashboard's address. Raises CapacityError."""
        self.start()
        assert self._started is not None
        try:
            return self._started.result()
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = self._config.ray_address or "this machine"
            raise CapacityError(f"Ray at {where} cannot be used: {error}") from error

    def __enter__(self) -> RaySession:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started is not None:
            self._started.exception()  # waits
            ray.shutdown()
        self._thread.shutdown()

    def _start(self) -> str:
        address, root = self._config.ray_address, Path(__file__).resolve().parents[1]
        remote_env = {"py_modules": [str(root / package) for package in PACKAGES], "env_vars": WORKER_ENV}
        if not address:
            # Ray's processes on this machine inherit the environment.
            os.environ.update({name: value for name, value in (WORKER_ENV | LOCAL_ENV).items() if name not in os.environ})
        # The dashboard stays on: without it Ray Train cannot free the resources of a run whose driver died.
        context = ray.init(
            address=address or "local",
            include_dashboard=None if address else True,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=remote_env if address else None,
        )
        return str(context.dashboard_url or "")


@contextmanager
def ray_session(config: OrchestratorConfig) -> Iterator[str]:
    """Be connected for as long as the block lasts; gives the dashboard's address. Raises CapacityError."""
    with RaySession(config) as session:
        yield session.wait()


@contextmanager
def held_interrupt() -> Iterator[threading.Event]:
    """Note a Ctrl-C instead of raising KeyboardInterrupt wherever the program happens to be; the second one is raised.

    Raised inside a destructor or a callback of a library it would be lost, inside a write to MLflow half a step undone.
    Ignored it stays, as shells have it for what they start in the background.
    """
    is_interrupted = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():  # which alone hears of signals
        yield is_interrupted
        return

    def note(number: int, frame: object) -> None:
        is_interrupted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield is_interrupted
    finally:
        signal.signal(signal.SIGINT, before)
