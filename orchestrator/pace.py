"""How fast groups really train: measured in every submission, kept in the workspace, used by the next plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.files import write_whole
from orchestrator.group_task import TrainEvent
from orchestrator.plan import rate_key
from orchestrator.room import TrainingGroup

MIN_SECONDS = 5.0
"""Shorter trainings say more of their start than of their pace."""


class Pace:
    """Operations a second, by base and kind of device; the newest measurement counts as much as all before it."""

    def __init__(self, file: Path) -> None:
        """Read what earlier submissions measured; `file` need not exist."""
        self._file = file
        self.rates: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self._first: dict[str, TrainEvent] = {}
        self._last: dict[str, TrainEvent] = {}

    def note(self, event: TrainEvent) -> None:
        """Take notice of a step."""
        if event.kind == "progress":
            self._first.setdefault(event.task, event)
            self._last[event.task] = event

    def learn(self, groups: Sequence[TrainingGroup], num_flops: Mapping[str, float]) -> None:
        """Turn the steps of `groups` into rates and keep them. `num_flops`: task -> operations of its whole training."""
        for group in groups:
            seen = [task for task in group.members if task in self._first]
            if not seen:
                continue
            spans = [(self._first[task], self._last[task]) for task in seen]
            seconds = (max(last.unix_ms for _, last in spans) - min(first.unix_ms for first, _ in spans)) / 1000
            if seconds >= MIN_SECONDS:
                # Resumed, stopped and failed trainings count for the steps that they did.
                done = sum(num_flops[first.task] * (last.step - first.step) / last.num_steps for first, last in spans)
                key, rate = rate_key(group.base, group.gpus), done / seconds / (group.workers * (group.gpus or group.cpus))
                self.rates[key] = (self.rates.get(key, rate) + rate) / 2
        write_whole(self._file, (json.dumps(self.rates, indent=1, sort_keys=True) + "\n").encode())
