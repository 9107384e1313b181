"""Searches while their candidates train: hears what happens, says who waits or ends early, gives the task the best adapter.

What is known of the candidates is kept on disk after every epoch, so that a worker that starts again decides as the one before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from multilora.artifact import digest_in
from orchestrator.adapter_run import now_ms
from orchestrator.group_task import Member, SearchTask, TrainEvent
from orchestrator.search import Fate, Result, Trail, fates, load_trails, store_trails, winner


@dataclass
class _Search:
    """One search and how far it is."""

    task: SearchTask
    members: dict[str, Member]
    trails: dict[str, Trail]
    has_ended: bool = False
    """Whether its task was told."""

    @property
    def fates(self) -> dict[str, Fate]:
        found = fates(list(self.trails.values()), self.task.eta)
        return dict.fromkeys(self.members, Fate.DROPPED) if self.has_ended else dict(zip(self.trails, found, strict=True))

    @property
    def is_over(self) -> bool:
        return not {Fate.TRAIN, Fate.WAIT} & set(self.fates.values())


class SearchRun:
    """The searches of one training group, on its first worker."""

    def __init__(self, searches: Sequence[SearchTask], members: Sequence[Member], tell: Callable[[TrainEvent], None]) -> None:
        """`tell` hears of every member's events and of what becomes of each search, as events of its task's own run."""
        self._tell = tell
        by_key = {member.run_key: member for member in members}
        self._searches = [_taken_up(task, {key: by_key[key] for key in task.candidates}) for task in searches]
        self._search_of = {key: search for search in self._searches for key in search.members}
        self._stopped, self._held = frozenset[str](), frozenset[str]()

    def begin(self) -> None:
        """End the searches that an earlier worker had only to end."""
        for search in self._searches:
            if search.is_over or digest_in(Path(search.task.adapter_dir)):
                self._end(search)
        self._decide()

    def stopped(self) -> frozenset[str]:
        """Run keys of candidates that are trained no further."""
        return self._stopped

    def held(self) -> frozenset[str]:
        """Run keys of candidates that wait for others."""
        return self._held

    def hear(self, event: TrainEvent) -> None:
        """Pass a member's event on, and act on it where it is a candidate's."""
        search = self._search_of.get(event.run_key)
        if search and event.kind == "stopped" and event.run_key in self._stopped:
            event = replace(event, kind="dropped")
            Path(search.members[event.run_key].checkpoint_file).unlink(missing_ok=True)
        self._tell(event)
        if search and event.kind in ("epoch", "finished", "failed") and not search.has_ended:
            search.trails[event.run_key] = _noted(search.trails[event.run_key], event)
            store_trails(Path(search.task.trails_file), search.trails)
            if search.is_over:
                self._end(search)
            self._decide()

    def _decide(self) -> None:
        """Look up once an epoch, and not once a step, who stops and who waits."""
        found = [pair for search in self._searches for pair in search.fates.items()]
        self._stopped, self._held = (
            frozenset(key for key, fate in found if fate is wanted) for wanted in (Fate.DROPPED, Fate.WAIT)
        )

    def _end(self, search: _Search) -> None:
        """Make the best candidate's adapter the task's own, say so, and clear the others away."""
        search.has_ended = True
        task, target, trails = search.task, Path(search.task.adapter_dir), list(search.trails.values())
        best = winner(trails)
        if not digest_in(target):
            if best is None:
                reason = f"no candidate of the search was trained to its end; the spec's own setting: {trails[0].reason}"
                self._tell(TrainEvent("failed", task.task, task.run_key, 0, 0, now_ms(), message=reason))
                return
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(search.members[task.candidates[best]].adapter_dir).replace(target)
        metrics = {} if best is None else trails[best].metrics
        self._tell(TrainEvent("finished", task.task, task.run_key, 0, 0, now_ms(), metrics, digest_in(target)))
        for member in search.members.values():
            shutil.rmtree(member.adapter_dir, ignore_errors=True)
            Path(member.checkpoint_file).unlink(missing_ok=True)


def _taken_up(task: SearchTask, members: dict[str, Member]) -> _Search:
    """A search as an earlier worker left it; one that failed begins again."""
    epochs = {key: member.spec.train.epochs for key, member in members.items()}
    search = _Search(task, members, load_trails(Path(task.trails_file), epochs))
    if not digest_in(Path(task.adapter_dir)):
        lost = [key for key, member in members.items() if not digest_in(Path(member.adapter_dir))]
        search.trails |= {key: replace(search.trails[key], end="") for key in lost if search.trails[key].end == "finished"}
        if search.is_over and winner(list(search.trails.values())) is None:
            search.trails = {key: Trail(count) for key, count in epochs.items()}
    return search


def _noted(trail: Trail, event: TrainEvent) -> Trail:
    """A candidate's trail with what an event tells."""
    if event.kind == "finished":
        return replace(trail, end="finished")
    if event.kind == "failed":
        return replace(trail, end="failed", reason=event.message)
    epoch = event.step * trail.epochs // event.num_steps
    # A worker that starts again from a checkpoint repeats epochs; what was decided on them stays.
    if any(result.epoch == epoch for result in trail.results):
        return trail
    values = [value for name, value in event.metrics.items() if name.startswith("select/") and name != "select/loss"]
    result = Result(epoch, values[0] if values else None, event.metrics["select/loss"], event.unix_ms)
    return replace(trail, results=(*trail.results, result))
