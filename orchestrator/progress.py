"""What a person sees while a submission runs: a live table on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from orchestrator.state import Update

WAITING, AT_WORK = "waiting", ("TRAINING", "EVALUATING")


class Progress(Protocol):
    """Shows updates."""

    def update(self, update: Update) -> None:
        """Show one update."""

    def say(self, show: Callable[[], None]) -> None:
        """Print something else in between."""


class PlainLines:
    """One line per change of status and per finished epoch."""

    def update(self, update: Update) -> None:
        """Print status changes and epochs; single steps would drown a log."""
        if not update.step or "train/epoch_loss" in update.metrics:
            print(plain_line(update), flush=True)  # noqa: T201

    def say(self, show: Callable[[], None]) -> None:
        """Print it."""
        show()


def plain_line(update: Update) -> str:
    """Say it in one line."""
    numbers = " ".join(f"{name}={value:.3g}" for name, value in update.metrics.items())
    steps = f" step {update.step}/{update.num_steps}" if update.num_steps else ""
    return f"{update.task}: {update.status}{steps} {numbers} {update.message}".rstrip()


class LiveTable:
    """One row per task with status, bar, loss, select result, speed and time left; those at work come first."""

    def __init__(self, tasks: Sequence[str], live: Live) -> None:
        self._live = live
        self._rows: dict[str, Update] = {task: Update(task, WAITING) for task in tasks}
        self._numbers: dict[str, dict[str, float]] = {task: {} for task in tasks}
        self._started: dict[str, tuple[float, int]] = {}

    def update(self, update: Update) -> None:
        """Show the newest state of the update's task."""
        before = self._rows.get(update.task, update)
        if update.num_steps:
            self._started.setdefault(update.task, (time.monotonic(), update.step))
        else:
            update = replace(update, step=before.step, num_steps=before.num_steps)
        self._numbers.setdefault(update.task, {}).update(update.metrics)
        self._rows[update.task] = update
        self._live.update(self._table())

    def say(self, show: Callable[[], None]) -> None:
        """Print above the table."""
        self._live.stop()
        show()
        self._live.start()

    def _table(self) -> Table:
        counts = Counter(row.status for row in self._rows.values())
        caption = ", ".join(f"{count} {status}" for status, count in counts.items())
        table = Table(box=None, pad_edge=False, expand=False, caption=caption, caption_justify="left")
        for heading in ("task", "status", "progress", "loss", "select", "examples/s", "left", ""):
            table.add_column(heading, no_wrap=heading != "")
        # A terminal shows the first of many.
        for row in sorted(self._rows.values(), key=lambda row: (row.status not in AT_WORK, row.status == WAITING)):
            numbers = self._numbers[row.task]
            metrics = [value for name, value in numbers.items() if name.startswith("select/") and name != "select/loss"]
            steps_per_s = self._steps_per_s(row)
            table.add_row(
                row.task,
                row.status,
                ProgressBar(total=max(row.num_steps, 1), completed=row.step, width=24),
                f"{numbers['train/loss']:.3f}" if "train/loss" in numbers else "",
                f"{metrics[0]:.3f}" if metrics else "",
                f"{steps_per_s * row.batch_size:.1f}" if steps_per_s else "",
                _duration((row.num_steps - row.step) / steps_per_s) if steps_per_s else "",
                row.message[:60],
            )
        return table

    def _steps_per_s(self, row: Update) -> float:
        began, first_step = self._started.get(row.task, (0.0, 0))
        if row.status != "TRAINING" or row.step <= first_step:
            return 0.0
        return (row.step - first_step) / (time.monotonic() - began)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


@contextmanager
def progress_of(tasks: Sequence[str]) -> Iterator[Progress]:
    """Choose how to show progress by where the output goes."""
    if not sys.stdout.isatty():
        yield PlainLines()
    else:
        with Live(console=Console(), refresh_per_second=4) as live:
            yield LiveTable(tasks, live)
