"""Whose turn it is on a shared cluster: which training group of which submission may start now. `startable` is pure.

Every driver writes which groups it runs and which it waits for into its submission's folder, and decides under one lock, so
the order holds across submissions and a driver that was killed gives its place back at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from orchestrator.cluster_size import ClusterSize
from orchestrator.files import write_whole
from orchestrator.room import Room, TrainingGroup
from orchestrator.submissions import Submission, Submissions


@dataclass(frozen=True)
class Claim:
    """A group's claim to a place in the cluster."""

    group: TrainingGroup
    is_running: bool
    submission: int = 0
    """Number of its submission."""


_CLAIMS = TypeAdapter(tuple[Claim, ...])


def startable(claims: Sequence[Claim], size: ClusterSize) -> list[TrainingGroup]:
    """The waiting groups that may start now: higher priority first, then the earlier submission, then the longer group.

    One that finds no room keeps its place: a later one starts only beside it, where room for both remains.
    """
    room = Room(size, (claim.group for claim in claims if claim.is_running))
    waiting = [claim for claim in claims if not claim.is_running]
    found = []
    for claim in sorted(waiting, key=lambda claim: (-claim.group.priority, claim.submission, -claim.group.seconds)):
        if room.fits(claim.group):
            found.append(claim.group)
        room.take(claim.group)
    return found


class Turns:
    """One submission's part in the sharing of a cluster."""

    def __init__(self, submissions: Submissions, submission: Submission, size: ClusterSize, own_size: ClusterSize) -> None:
        """`own_size` is the part of the cluster that this submission may use."""
        self._submissions, self._submission, self._size, self._own_size = submissions, submission, size, own_size

    def next(self, waiting: Sequence[TrainingGroup], running: Sequence[TrainingGroup]) -> list[TrainingGroup]:
        """Those of the waiting groups that start now; they count as running from here on."""
        with self._submissions.lock():
            others = [
                claim
                for other, _ in self._submissions.open()
                if other != self._submission and other.is_driven
                for claim in _read(other)
            ]
            own = [Claim(group, group in running, self._submission.number) for group in (*running, *waiting)]
            may_start = startable([*others, *own], self._size)
            started, own_room = list[TrainingGroup](), Room(self._own_size, running)
            for group in waiting:
                if group in may_start and own_room.fits(group):
                    own_room.take(group)
                    started.append(group)
            claims = tuple(Claim(claim.group, claim.is_running or claim.group in started, claim.submission) for claim in own)
            write_whole(_file(self._submission), _CLAIMS.dump_json(claims))
        return started


def _file(submission: Submission) -> Path:
    return submission.folder / "claims.json"


def _read(submission: Submission) -> tuple[Claim, ...]:
    file = _file(submission)
    return _CLAIMS.validate_json(file.read_bytes()) if file.is_file() else ()
