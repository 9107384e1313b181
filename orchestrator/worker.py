"""The Ray Train shell around GroupTrainer: each worker holds the base once and trains its group. No logic of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from multilora.base_model import load_base
from multilora.log import setup_logging
from multilora.spec import BaseSpec
from orchestrator.adapter_run import Member, TrainEvent
from orchestrator.ranks import Ranks
from orchestrator.trainer import GroupTrainer

FLUSH_EVERY_S = 0.5


@dataclass(frozen=True)
class GroupTask:
    """Everything a worker needs: plain values and the mailbox handle."""

    base: BaseSpec
    members: tuple[Member, ...]
    num_slots: int
    num_threads: int
    checkpoint_every_s: float
    mailbox: Any


@ray.remote(num_cpus=0)
class Mailbox:
    """Carries events from workers to the controller, and the wish to stop the other way."""

    def __init__(self) -> None:
        self._events: list[TrainEvent] = []
        self._is_stopped = False

    def post(self, events: Sequence[TrainEvent]) -> bool:
        """Hand events over; returns whether the worker should stop."""
        self._events += events
        return self._is_stopped

    def take(self) -> list[TrainEvent]:
        """Take all events that came since the last call."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """Ask every worker to save and end."""
        self._is_stopped = True


class _Line:
    """Buffers events, sends them twice a second, and remembers whether the controller wants to stop."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._buffer, self._sent_at, self._is_stopped = mailbox, list[TrainEvent](), 0.0, False

    def add(self, event: TrainEvent) -> None:
        self._buffer.append(event)
        if event.kind != "progress":
            self.flush()

    def flush(self) -> None:
        self._is_stopped = ray.get(self._mailbox.post.remote(self._buffer))
        self._buffer, self._sent_at = [], time.monotonic()

    def should_stop(self) -> bool:
        if time.monotonic() - self._sent_at > FLUSH_EVERY_S:
            self.flush()
        return self._is_stopped


def train_group(config: dict[str, Any]) -> None:
    """Train one group to its end, or until the controller asks to stop; the loop that ray.train runs on the worker."""
    task: GroupTask = ray.get(config["task"])
    setup_logging()
    torch.set_num_threads(task.num_threads)
    line = _Line(task.mailbox)
    base = load_base(task.base)
    trainer = GroupTrainer(base, task.members, task.num_slots, line.add, Ranks.of_process_group(base.device))
    try:
        trainer.train(line.should_stop, task.checkpoint_every_s)
    finally:
        line.flush()
