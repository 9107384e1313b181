"""Something is killed at random moments, MLflow's server among it; the registry ends as if nothing had happened.

`make chaos` runs many seeds (CHAOS_SEEDS) and prints what was killed when.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from mlflow import MlflowClient
from tiny_bases import build_t5

from e2e.conftest import CommandLine, kill_all, wait_for, write_spec
from e2e.test_survival import adapter_of, animal_rows, same_weights
from orchestrator.submissions import Submissions, SubmissionStatus

pytestmark = [pytest.mark.e2e, pytest.mark.long]
TASKS = ("animals", "beasts")
VICTIMS = ("worker", "driver", "submit", "mlflow", "everything")
LONGEST_PAUSE_S = 25.0
NUM_STEPS = 300


@dataclass
class MlflowServer:
    """A real server over sqlite, which can be killed and started again."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        argv = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
                "--artifacts-destination", str(self.folder / "files"), "--port", str(self.port), "--workers", "1"]  # fmt: skip
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self._answers, 120)

    def kill(self) -> None:
        assert self.process is not None
        kill_all([*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)])
        self.process.wait()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=1).status_code == 200
        except httpx.HTTPError:
            return False


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[MlflowServer]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = MlflowServer(tmp_path, free.getsockname()[1])
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("specs")
    build_t5(folder / "t5")
    train = {"epochs": 30, "learning_rate": 0.01, "batch_size": 8}
    labels = {"bird": None, "fish": None}
    return [write_spec(folder, task, animal_rows(160), "./t5", labels, **train, seed=seed) for seed, task in enumerate(TASKS)]


@pytest.fixture(scope="module")
def undisturbed(specs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    made = CommandLine(tmp_path_factory.mktemp("undisturbed") / "workspace")
    made.run("submit", *specs)
    return made


@pytest.mark.parametrize("seed", range(int(os.environ.get("CHAOS_SEEDS", "1"))))
def test_whatever_is_killed_the_registry_ends_as_undisturbed(
    seed: int, undisturbed: CommandLine, specs: list[Path], cli: CommandLine, mlflow_server: MlflowServer
) -> None:
    draw = random.Random(seed)
    chaotic = CommandLine(cli.workspace, {"MLFLOW_TRACKING_URI": mlflow_server.url})
    submit = chaotic.start("submit", *specs, "--checkpoint-every", "0.2")
    # MLflow is always among the victims: nothing else is as easy to lose results by.
    victims = ["mlflow", *draw.choices(VICTIMS, k=draw.randint(1, 3))]
    draw.shuffle(victims)
    began = time.monotonic()
    for victim in victims:
        time.sleep(draw.uniform(1.0, LONGEST_PAUSE_S))
        print(f"seed {seed}: {time.monotonic() - began:.0f} s: kill {victim} while {_state(chaotic)}", flush=True)  # noqa: T201
        if victim == "mlflow":
            mlflow_server.kill()
            time.sleep(draw.uniform(0.0, 10.0))
            mlflow_server.start()
        else:
            _kill(victim, submit)
        if submit.poll() is not None and _state(chaotic) != SubmissionStatus.DONE:
            submit = chaotic.start("submit", *draw.choice([["--resume"], specs]), "--checkpoint-every", "0.2")
    submit.communicate(timeout=600)
    if _state(chaotic) != SubmissionStatus.DONE:
        chaotic.run("submit", "--resume")

    assert chaotic.json("status")["tasks"] == undisturbed.json("status")["tasks"]
    client = MlflowClient(mlflow_server.url)
    for task in TASKS:
        assert same_weights(adapter_of(cli, task), adapter_of(undisturbed, task))
        (run,) = client.search_runs([client.get_experiment_by_name(task).experiment_id])
        steps = {loss.step for loss in client.get_metric_history(run.info.run_id, "train/loss")}
        # What a killed worker had not told yet is missing from its curve, a second at each kill.
        assert NUM_STEPS in steps
        assert len(steps) > 0.7 * NUM_STEPS
    assert "Nothing changed" in chaotic.run("submit", *specs)


def _state(cli: CommandLine) -> SubmissionStatus:
    found = Submissions(cli.workspace).all()
    return found[-1].state.status if found else SubmissionStatus.STARTING


def _kill(victim: str, submit: subprocess.Popen[str]) -> None:
    if submit.poll() is not None:
        return
    family = psutil.Process(submit.pid).children(recursive=True)
    drivers = [one for one in family if "drive" in _command(one)]
    workers = [one for one in family if "RayTrainWorker" in _command(one)]
    chosen = {
        "worker": workers,
        "driver": drivers,
        "submit": [psutil.Process(submit.pid)],
        "everything": [psutil.Process(submit.pid), *family],
    }[victim]
    for one in chosen:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    if victim in ("driver", "everything"):
        psutil.wait_procs(family, timeout=30)
    if victim in ("submit", "everything"):
        submit.communicate()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
