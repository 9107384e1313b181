"""A training group, and whether it has room beside the running ones. Pure; quick enough for thousands of groups and GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from multilora.spec import BaseSpec
from orchestrator.cluster_size import ClusterSize, Labels

Place = tuple[str | None, Labels]
"""Kind of GPU and labels: what a group asks of its nodes."""
GRACE_S, LOOK_EVERY_S = 600.0, 30.0
"""How long a group waits for a node that is gone to come back, and how often somebody looks."""
ROUNDING = 1e-6
"""Ten tenths of a GPU add up to a little more or less than one."""


@dataclass(frozen=True)
class TrainingGroup:
    """Adapters that train together, on one worker or data-parallel on several."""

    group_id: str
    base: BaseSpec
    members: tuple[str, ...]
    num_slots: int
    gpus: float
    """Of each worker, as `cpus` and `memory_bytes`."""
    cpus: float
    memory_bytes: int
    num_steps: int
    seconds: float
    accelerator: str | None = None
    """Kind of GPU that it must have."""
    priority: int = 0
    workers: int = 1
    node_labels: Labels = ()
    """What its nodes must have."""


class Room:
    """What groups leave of a cluster, CPUs and GPUs. A queue may be counted too: no more is taken than there is."""

    def __init__(self, size: ClusterSize, busy: Iterable[TrainingGroup] = ()) -> None:
        self._size = size
        self._taken: dict[Place, tuple[float, float]] = {}
        self._overlap = cache(self._find_overlap)
        for group in busy:
            self.take(group)

    def take(self, group: TrainingGroup) -> None:
        """Count a group."""
        self._add(group, 1)

    def give_back(self, group: TrainingGroup) -> None:
        """Count it no more."""
        self._add(group, -1)

    def fits(self, group: TrainingGroup) -> bool:
        """Whether the group can start beside those that are counted."""
        own = _place_of(group)
        needed = (group.workers * group.cpus, group.workers * group.gpus)
        limits = (self._size.max_cpus, self._size.max_gpus)
        free = list(self._overlap(own, own)[0])
        used = [0.0, 0.0]
        for place, taken in self._taken.items():
            there, elsewhere = self._overlap(place, own)
            for i in range(2):
                used[i] += taken[i]
                # What may run on other nodes too has taken these as far as there are not enough of the others.
                free[i] -= max(0.0, min(taken[i], there[i]) - elsewhere[i])
        return all(
            need <= left + ROUNDING and need <= limit - total + ROUNDING
            for need, left, limit, total in zip(needed, free, limits, used, strict=True)
        )

    def _add(self, group: TrainingGroup, sign: int) -> None:
        place = _place_of(group)
        cpus, gpus = self._taken.get(place, (0.0, 0.0))
        num = sign * group.workers
        self._taken[place] = (cpus + num * group.cpus, gpus + num * group.gpus)

    def _find_overlap(self, place: Place, own: Place) -> tuple[tuple[float, float], tuple[float, float]]:
        """CPUs and GPUs of all nodes of a place, and of those that are not in `own`."""
        there = self._size.nodes_for(*place)
        outside = [node for position, node in there.items() if position not in self._size.nodes_for(*own)]
        return (
            (sum(node.cpus for node in there.values()), sum(node.gpus for node in there.values())),
            (sum(node.cpus for node in outside), sum(node.gpus for node in outside)),
        )


class Homes:
    """Which groups no node can hold any more. Nodes go, and mostly come back: a group is lost after the grace time alone."""

    def __init__(self, groups: Sequence[TrainingGroup], clock: Callable[[], float], grace_s: float = GRACE_S) -> None:
        self._groups, self._clock, self._grace_s = groups, clock, grace_s
        self._since: dict[str, float] = {}
        self._looked_at = -math.inf

    def lost(self, size_now: Callable[[], ClusterSize]) -> dict[str, str]:
        """Say why, by task; looks at the cluster every half a minute."""
        now = self._clock()
        if now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at, size = now, size_now()
            homeless = {group.group_id for group in self._groups if not _has_home(group, size)}
            self._since = {name: self._since.get(name, now) for name in homeless}
        lost = [group for group in self._groups if now - self._since.get(group.group_id, now) >= self._grace_s]
        return {task: _loss(group, self._grace_s) for group in lost for task in group.members}


def _has_home(group: TrainingGroup, size: ClusterSize) -> bool:
    nodes = size.nodes_for(*_place_of(group)).values()
    return sum(node.num_workers(group.gpus, group.cpus) for node in nodes) >= group.workers


def _loss(group: TrainingGroup, grace_s: float) -> str:
    wanted = [f"{group.gpus:g} GPUs" if group.gpus else "", f"{group.cpus:g} CPUs", group.accelerator or ""]
    labels = [f"{name}={value}" for name, value in group.node_labels]
    needed = f"{group.workers} x {' '.join(filter(None, [*wanted, *labels]))}"
    return (
        f"no node has had room for {needed} for {grace_s / 60:.0f} minutes: "
        "add nodes or change resources, then submit again to continue"
    )


def _place_of(group: TrainingGroup) -> Place:
    return group.accelerator, group.node_labels
