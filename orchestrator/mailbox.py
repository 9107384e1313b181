"""Carries events from workers to the controller, and the wish to stop the other way. A process of its own: loads no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import ray

from orchestrator.group_task import TrainEvent


@ray.remote(num_cpus=0)
class Mailbox:
    """One per submission."""

    def __init__(self) -> None:
        self._events: list[TrainEvent] = []
        self._stopped: frozenset[str] = frozenset()

    def post(self, events: Sequence[TrainEvent]) -> frozenset[str]:
        """Hand events over; returns the run keys of the adapters that should stop."""
        self._events += events
        return self._stopped

    def take(self) -> list[TrainEvent]:
        """Take all events that came since the last call."""
        events, self._events = self._events, []
        return events

    def stop(self, run_keys: Collection[str]) -> None:
        """Ask the workers to save these adapters and go on without them."""
        self._stopped |= frozenset(run_keys)
