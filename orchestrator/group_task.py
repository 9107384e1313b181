"""What a training worker is given and what it tells: plain values, so that they travel without torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from multilora.spec import BaseSpec, TaskSpec
from orchestrator.dataset import Example

RunKeys = Callable[[], Collection[str]]
"""Whom something concerns now, by run key."""


@dataclass(frozen=True)
class Member:
    """One adapter to train: plain values, so that it can travel to a worker."""

    spec: TaskSpec
    run_key: str
    train: tuple[Example, ...]
    select: tuple[Example, ...]
    data_fingerprint: str
    adapter_dir: str
    checkpoint_file: str


@dataclass(frozen=True)
class TrainEvent:
    """What happened to one adapter.

    `kind` is started, progress, halved (micro-batches), epoch, finished, failed, stopped, or dropped from its search.
    """

    kind: str
    task: str
    run_key: str
    step: int
    num_steps: int
    unix_ms: int
    metrics: dict[str, float] = field(default_factory=dict)
    message: str = ""
    batch_size: int = 0
    """Examples of one step."""


@dataclass(frozen=True)
class SearchTask:
    """A task whose adapter is the best of several members."""

    task: str
    run_key: str
    """Of the task's own run; events with it tell what became of the search."""
    candidates: tuple[str, ...]
    """Run keys of the members, the spec's own setting first."""
    eta: int
    """See `SearchSpec`."""
    adapter_dir: str
    """Where the best one's adapter goes."""
    trails_file: str
    """Where the candidates' results are kept."""


@dataclass(frozen=True)
class GroupTask:
    """Everything that one group's worker needs."""

    base: BaseSpec
    members: tuple[Member, ...]
    num_slots: int
    num_threads: int
    checkpoint_every_s: float
    mailbox: Any
    """Handle of the `Mailbox` actor."""
    log_file: str
    searches: tuple[SearchTask, ...] = ()
