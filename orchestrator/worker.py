"""The Ray Train shell around GroupTrainer: each worker holds the base once and trains its group. No logic of its own."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
import torch
import torch.distributed as dist

from multilora.base_model import load_base
from multilora.errors import MultiLoraError
from multilora.log import setup_logging
from orchestrator.adapter_run import now_ms
from orchestrator.group_task import GroupTask, TrainEvent
from orchestrator.ranks import Ranks
from orchestrator.search_run import SearchRun
from orchestrator.trainer import GroupTrainer

logger = logging.getLogger(__name__)
FLUSH_EVERY_S = 0.5


class _Line:
    """Buffers events, sends them twice a second, and remembers which adapters the controller wants to stop."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._buffer, self._sent_at = mailbox, list[TrainEvent](), 0.0
        self._stopped: frozenset[str] = frozenset()

    def add(self, event: TrainEvent) -> None:
        self._buffer.append(event)
        if event.kind != "progress":
            self.flush()

    def flush(self) -> None:
        self._stopped = ray.get(self._mailbox.post.remote(self._buffer))
        self._buffer, self._sent_at = [], time.monotonic()

    def stopped(self) -> frozenset[str]:
        if time.monotonic() - self._sent_at > FLUSH_EVERY_S:
            self.flush()
        return self._stopped


def train_group(config: dict[str, Any]) -> None:
    """Train one group until each of its adapters has ended or was stopped; the loop that ray.train runs on the worker."""
    task: GroupTask = ray.get(config["task"])
    setup_logging(log_file=task.log_file)
    torch.set_num_threads(task.num_threads)
    line = _Line(task.mailbox)
    searches = SearchRun(task.searches, task.members, line.add)
    try:
        try:
            base = load_base(task.base)
        except MultiLoraError as error:
            if dist.get_world_size() > 1:
                raise  # the other ranks may wait for this one
            for member in task.members:  # a second attempt would fail alike
                searches.hear(TrainEvent("failed", member.spec.name, member.run_key, 0, 0, now_ms(), message=str(error)))
            return
        ranks = Ranks.of_process_group(base.device)
        if ranks.rank == 0:
            searches.begin()
        trainer = GroupTrainer(base, task.members, task.num_slots, searches.hear, ranks)
        trainer.train(lambda: line.stopped() | searches.stopped(), task.checkpoint_every_s, searches.held)
    except Exception:
        logger.exception("worker ends")
        raise
    finally:
        line.flush()
