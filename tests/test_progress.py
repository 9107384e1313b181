"""What a person sees while a submission runs."""

import io

import pytest
from rich.console import Console
from rich.live import Live

from orchestrator import progress as module
from orchestrator.progress import LiveTable, PlainLines
from orchestrator.state import Update


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def shown(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table._table())
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_the_table_shows_speed_and_time_left_and_those_at_work_first(clock):
    table = LiveTable(["waits", "works", "done"], Live(console=Console(file=io.StringIO())))
    table.update(Update("done", "PROMOTED"))
    table.update(Update("works", "TRAINING", 10, 100, {"train/loss": 0.5}, "", 8))
    clock[0] += 5
    table.update(Update("works", "TRAINING", 20, 100, {"train/loss": 0.25, "select/accuracy": 0.75, "select/loss": 9.0}, "", 8))
    header, works, done, waits, caption = shown(table)
    assert header == ["task", "status", "progress", "loss", "select", "examples/s", "left"]
    assert [works[0], works[1], *works[-5:]] == ["works", "TRAINING", "0.250", "0.750", "16.0", "40", "s"]
    assert (done[0], waits[0]) == ("done", "waits")
    assert " ".join(caption) == "1 waiting, 1 TRAINING, 1 PROMOTED"
    # A change of status keeps the bar where it was, and a training that ended has no speed.
    table.update(Update("works", "REGISTERED"))
    assert table._rows["works"].step == 20
    assert "16.0" not in shown(table)[1]


def test_plain_lines_say_changes_and_epochs_and_no_single_steps(capsys):
    lines = PlainLines()
    lines.update(Update("mood", "TRAINING", 3, 9, {"train/loss": 0.5}))
    lines.update(Update("mood", "TRAINING", 4, 9, {"train/loss": 0.5, "train/epoch_loss": 0.125}))
    lines.update(Update("mood", "FAILED", message="worker ended"))
    assert capsys.readouterr().out.splitlines() == [
        "mood: TRAINING step 4/9 train/loss=0.5 train/epoch_loss=0.125",
        "mood: FAILED  worker ended",
    ]
