"""Processes that outlive the command that started them (endpoint, MLflow page): start, find, stop. No shell, no pid guessing."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

from multilora.errors import CapacityError

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class BackgroundProcess:
    """A started process and the address it answers on."""

    pid: int
    created: float
    """Start time as the system gives it; tells a reused pid."""
    url: str
    log_file: str

    @property
    def is_running(self) -> bool:
        """Whether this very process still lives."""
        return is_running(self.pid, self.created)


def is_running(pid: int, created: float) -> bool:
    """Whether the process that got this pid at this time still lives."""
    try:
        process = psutil.Process(pid)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(state_file: Path, argv: Sequence[str], url: str, ready_path: str) -> BackgroundProcess:
    """Start a process and wait until it answers; the one already running under `state_file` is returned as it is.

    Raises CapacityError where the port is taken, or the process ends or does not get ready; its log's end is in the message.
    """
    running = find(state_file)
    if running:
        return running
    host, _, port = url.removeprefix("http://").rpartition(":")
    if is_port_taken(host, int(port)):
        raise CapacityError(f"port {port} on {host} is taken; choose another with --port")
    log_file = state_file.with_suffix(".log")
    state_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb") as log:
        child = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    found = BackgroundProcess(child.pid, psutil.Process(child.pid).create_time(), url, str(log_file))
    state_file.write_text(json.dumps(asdict(found)), encoding="utf-8")
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            state_file.unlink(missing_ok=True)
            raise CapacityError(f"the process ended while starting; end of {log_file}:\n{tail(log_file)}")
        if _answers(url + ready_path):
            return found
        time.sleep(0.2)
    stop(state_file)
    raise CapacityError(f"no answer from {url} within {START_TIMEOUT_S:.0f} s; end of {log_file}:\n{tail(log_file)}")


def find(state_file: Path) -> BackgroundProcess | None:
    """The running process of `state_file`, if it runs."""
    try:
        found = BackgroundProcess(**json.loads(state_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.is_running else None


def stop(state_file: Path) -> bool:
    """End the process and its children, first asking, then by force; False where none ran."""
    found = find(state_file)
    state_file.unlink(missing_ok=True)
    if found is None:
        return False
    end_family(found.pid)
    return True


def end_family(pid: int) -> None:
    """End a process and its children, first asking, then by force."""
    leader = psutil.Process(pid)
    family = [leader, *leader.children(recursive=True)]
    leader.terminate()
    psutil.wait_procs([leader], timeout=STOP_TIMEOUT_S)
    _, alive = psutil.wait_procs(family, timeout=5.0)
    for process in alive:
        process.kill()


def is_port_taken(host: str, port: int) -> bool:
    """Whether somebody listens there already."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False


def tail(log_file: Path, num_lines: int = 20) -> str:
    """End of a log."""
    return "\n".join(log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])
