"""Interrupted and killed submissions continue, and end where an undisturbed one ends; for the seq2seq and encoder families."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_bases import build_t5

from e2e.conftest import CommandLine, demo_task, kill_all, needs_minilm, wait_for, write_spec
from multilora.artifact import WEIGHTS

pytestmark = [pytest.mark.e2e, pytest.mark.long]
ANIMALS = {"bird": ["robin", "heron", "owl", "finch", "crane"], "fish": ["trout", "cod", "eel", "perch", "tuna"]}


def animal_rows(num_rows: int) -> list[dict[str, str]]:
    """Sentences about a bird or a fish: learnable by a base with random weights."""
    draw = random.Random(0)
    rows = []
    for number in range(num_rows):
        label = ("bird", "fish")[number % 2]
        rows.append({"text": f"note {number}: I saw a {draw.choice(ANIMALS[label])}", "label": label})
    return rows


@needs_minilm()
def test_lost_worker_then_interrupt_then_kill_then_continue(cli: CommandLine, tmp_path: Path) -> None:
    build_t5(tmp_path / "t5")
    rows = animal_rows(240)
    train = {"epochs": 40, "learning_rate": 0.01, "batch_size": 8}
    t5 = write_spec(tmp_path, "animals", rows, "./t5", {"bird": None, "fish": None}, **train)
    # The one with many steps goes first, so that it is the one that is killed in the middle.
    t5.write_text(t5.read_text(encoding="utf-8") + "resources: {priority: 1}\n", encoding="utf-8")
    minilm = demo_task(tmp_path, "question-type", epochs=2, learning_rate=2e-3, max_examples=120)

    undisturbed = CommandLine(tmp_path / "undisturbed")
    report = undisturbed.json("submit", t5, minilm)
    assert {task["task"]: task["decision"] for task in report["tasks"]} == {"animals": "promoted", "question-type": "promoted"}

    # A worker dies: Ray Train starts another one, which goes on from the checkpoints.
    checkpoints = cli.workspace / "checkpoints"
    process = cli.start("submit", t5, minilm, "--checkpoint-every", "0.2")
    wait_for(lambda: saved_steps(checkpoints), 180)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 1
    workers[0].kill()
    reached = saved_steps(checkpoints)
    wait_for(lambda: saved_steps(checkpoints) > reached, 180)

    # Ctrl-C: workers save, runs say so, the command says how to continue.
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "run the same command to continue" in err
    assert "CANCELLED" in {row["status"] for row in cli.json("status")["tasks"]}

    # kill -9 of the command alone: its driver goes on. kill -9 of all: nothing goes on, and it can be told.
    reached = saved_steps(checkpoints)
    process = cli.start("submit", t5, minilm, "--checkpoint-every", "0.2")
    wait_for(lambda: saved_steps(checkpoints) > reached, 180)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    reached = saved_steps(checkpoints)
    wait_for(lambda: saved_steps(checkpoints) > reached, 60)
    assert [row["status"] for row in cli.json("status")["submissions"]] == ["CANCELLED", "RUNNING"]
    kill_all(family)
    assert [row["status"] for row in cli.json("status")["submissions"]] == ["LOST"]

    events = _events(cli, "--resume")
    first_steps = {e["task"]: e["step"] for e in reversed(events) if e.get("num_steps")}
    assert max(first_steps.values()) > 0, "training started from nothing instead of its checkpoint"
    assert cli.json("status")["tasks"] == undisturbed.json("status")["tasks"]
    for task in ("animals", "question-type"):
        assert same_weights(adapter_of(cli, task), adapter_of(undisturbed, task))
    assert not list(checkpoints.glob("*.safetensors"))
    assert not list(cli.workspace.glob("submissions/*/curves/*"))
    assert "Nothing changed" in cli.run("submit", t5, minilm)


def saved_steps(checkpoints: Path) -> int:
    """Steps that all checkpoints together hold; 0 where there is none."""
    total = 0
    for file in checkpoints.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            total += json.loads(stream.metadata()["facts"])["step"]
    return total


def _events(cli: CommandLine, *words: object) -> list[dict]:
    process = cli.start("submit", *words, "--json")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return [json.loads(line) for line in err.splitlines() if line.startswith("{")]


def adapter_of(cli: CommandLine, task: str) -> Path:
    return next(cli.workspace.glob(f"downloads/{task}/1-*/artifacts/adapter"))


def same_weights(first: Path, second: Path) -> bool:
    a, b = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    return a.keys() == b.keys() and all((a[key] - b[key]).abs().max() <= 1e-5 for key in a)
