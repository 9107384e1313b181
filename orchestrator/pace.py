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
            self._first.setdefault(event.run_key, event)
            self._last[event.run_key] = event

    def learn(self, groups: Sequence[TrainingGroup], num_flops: Mapping[str, float]) -> None:
        """Turn the steps of `groups` into rates and keep them. `num_flops`: run key -> operations of its whole training."""
        for group in groups:
            spans = [(first, self._last[key]) for key, first in self._first.items() if first.task in group.members]
            if not spans:
                continue
            seconds = (max(last.unix_ms for _, last in spans) - min(first.unix_ms for first, _ in spans)) / 1000
            if seconds >= MIN_SECONDS:
                # Resumed, stopped and failed trainings count for the steps that they did.
                done = sum(num_flops[first.run_key] * (last.step - first.step) / last.num_steps for first, last in spans)
                key, rate = rate_key(group.base, group.gpus), done / seconds / (group.workers * (group.gpus or group.cpus))
                self.rates[key] = (self.rates.get(key, rate) + rate) / 2
        write_whole(self._file, (json.dumps(self.rates, indent=1, sort_keys=True) + "\n").encode())
