"""Which adapters train together, where, and what that will take. Pure: the same input gives the same plan; no torch, no Ray.

Estimates come from arithmetic (operations per parameter and token, values stored per token) and, where there are any, from the
rates of earlier trainings.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace

from multilora.spec import BaseSpec, ResourceSpec

FLOPS_PER_S = {"cpu_core": 4e10, "gpu": 4e13}
"""Sustained rates that the estimates assume where none was measured: one CPU core in float32, one data-centre GPU in bfloat16."""
START_UP_S = 25.0
"""Ray and a training worker from nothing to the first step."""
BYTES_PER_ADAPTER_PARAMETER = 20
"""float32 weight, gradient, two Adam moments and the best epoch's weight."""
BYTES_PER_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.02, "4bit": 0.52}
ACTIVATION_BYTES_PER_TOKEN = 34 * 4
"""Per layer and hidden unit. Source: arXiv 2205.05198 (34 values per token, layer and hidden unit), float32."""
WORKER_BYTES = 1 << 30
"""Python, torch and Ray in one worker process."""


@dataclass(frozen=True)
class TaskNeed:
    """What the plan must know of one task."""

    task: str
    base: BaseSpec
    num_base_parameters: int
    num_quantised_parameters: int
    """Those of them that 8-bit and 4-bit loading shrinks."""
    num_layers: int
    hidden_size: int
    num_adapter_parameters: int
    num_train: int
    epochs: int
    batch_size: int
    tokens_per_example: float
    resources: ResourceSpec

    @property
    def num_steps(self) -> int:
        """Optimiser steps."""
        return -(-self.num_train // self.batch_size) * self.epochs

    @property
    def num_tokens(self) -> float:
        """Tokens through forward and backward."""
        return self.num_train * self.epochs * self.tokens_per_example

    @property
    def num_flops(self) -> float:
        """Forward and backward over a frozen base take 4 operations per parameter and token, a second forward 2 more."""
        return (6 if self.resources.gradient_checkpointing else 4) * self.num_base_parameters * self.num_tokens

    @property
    def activation_bytes_per_token(self) -> int:
        """What the backward pass needs: the insides of all layers, or of one layer and the inputs of all in float32."""
        num_bytes = ACTIVATION_BYTES_PER_TOKEN * self.num_layers
        if self.resources.gradient_checkpointing:
            num_bytes = ACTIVATION_BYTES_PER_TOKEN + 4 * self.num_layers
        return num_bytes * self.hidden_size

    @property
    def base_bytes(self) -> float:
        """The base in memory."""
        num_shrunk = 0 if self.base.quantization == "none" else self.num_quantised_parameters
        kept = (self.num_base_parameters - num_shrunk) * BYTES_PER_WEIGHT[self.base.dtype]
        return kept + num_shrunk * BYTES_PER_WEIGHT.get(self.base.quantization, 0.0)


@dataclass(frozen=True)
class ClusterSize:
    """What the cluster has; per-node limits bound a single worker."""

    num_cpus: float
    num_gpus: float
    max_cpus_per_node: float
    max_gpus_per_node: float
    memory_bytes_per_node: int
    memory_bytes_per_gpu: int
    accelerators: tuple[tuple[str, float], ...] | None = None
    """GPUs of each kind; None where it is not known."""

    def num_gpus_of(self, accelerator: str | None) -> float:
        """GPUs of a kind, or all."""
        if accelerator is None or self.accelerators is None:
            return self.num_gpus
        return dict(self.accelerators).get(accelerator, 0.0)


@dataclass(frozen=True)
class TrainingGroup:
    """Adapters that train together on one worker."""

    group_id: str
    base: BaseSpec
    members: tuple[str, ...]
    num_slots: int
    gpus: float
    cpus: float
    memory_bytes: int
    num_steps: int
    seconds: float
    accelerator: str | None = None
    """Kind of GPU that it must have."""
    priority: int = 0


@dataclass(frozen=True)
class Plan:
    """Groups to train, highest priority and longest first, and the tasks that cannot run here, with the reason."""

    groups: tuple[TrainingGroup, ...]
    refused: tuple[tuple[str, str], ...]
    makespan_s: float = 0.0
    """Seconds until the last group ends; groups wait in this order until the cluster has room."""

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs together."""
        return sum(group.gpus * group.seconds for group in self.groups) / 3600


def rate_key(base: BaseSpec, gpus: float) -> str:
    """Name of what a training rate belongs to."""
    return f"{'gpu' if gpus else 'cpu'} {base.model_dump_json()}"


def plan_groups(
    needs: Sequence[TaskNeed], cluster: ClusterSize, max_slots: int, rates: Mapping[str, float] | None = None
) -> Plan:
    """Put every task into exactly one group, or refuse it. Longest work is placed first, on the least loaded worker.

    `rates` are measured operations a second on one core or GPU, by `rate_key`.
    """
    refused: list[tuple[str, str]] = []
    alike: dict[tuple[object, ...], list[TaskNeed]] = {}
    for need in sorted(needs, key=lambda n: (-n.num_tokens * n.num_base_parameters, n.task)):
        gpus, cpus = _worker_size(need.resources, cluster)
        if reason := _infeasible(need, gpus, cpus, cluster):
            refused.append((need.task, reason))
        else:
            resources = need.resources
            kind = (need.base, resources.gradient_checkpointing, resources.accelerator, resources.priority, gpus, cpus)
            alike.setdefault(kind, []).append(need)
    groups: list[TrainingGroup] = []
    for tasks in alike.values():
        gpus, cpus = _worker_size(tasks[0].resources, cluster)
        num_lanes = max(1, min(_num_workers(tasks[0].resources.accelerator, gpus, cpus, cluster), len(tasks)))
        lanes: list[list[TaskNeed]] = [[] for _ in range(num_lanes)]
        loads = [(0.0, index) for index in range(num_lanes)]  # a heap
        for need in tasks:
            load, index = loads[0]
            lanes[index].append(need)
            heapreplace(loads, (load + need.num_tokens, index))
        fitting = [part for lane in lanes for part in _fitting_parts(lane, _budget(gpus, cluster))]
        groups += [_group(part, gpus, cpus, cluster, max_slots, rates or {}) for part in fitting]
    ordered = sorted(groups, key=lambda group: (-group.priority, -group.seconds, group.group_id))
    return Plan(tuple(ordered), tuple(sorted(refused)), _makespan_s(ordered, cluster))


def _makespan_s(groups: Sequence[TrainingGroup], size: ClusterSize) -> float:
    """Play the schedule through: the next group starts as soon as it has room."""
    waiting, running, now_s = deque(groups), list[tuple[float, int, TrainingGroup]](), 0.0
    while waiting or running:
        if waiting and has_room(waiting[0], [group for _, _, group in running], size):
            group = waiting.popleft()
            heappush(running, (now_s + group.seconds, len(waiting), group))
        else:
            now_s = heappop(running)[0]
    return now_s


def has_room(group: TrainingGroup, busy: Sequence[TrainingGroup], size: ClusterSize) -> bool:
    """Whether a group can start beside the running ones."""
    # Ten tenths of a GPU add up to a little more or less than one.
    free_cpus = size.num_cpus - sum(other.cpus for other in busy) + 1e-9
    taken: dict[str | None, float] = {}
    for other in busy:
        taken[other.accelerator] = taken.get(other.accelerator, 0.0) + other.gpus
    # A queue for one kind counts among the busy; it takes no more than there is of the kind.
    of_kinds = sum(min(gpus, size.num_gpus_of(kind)) for kind, gpus in taken.items() if kind is not None)
    anywhere = taken.get(None, 0.0)
    free_gpus = size.num_gpus - of_kinds - anywhere + 1e-9
    if group.accelerator is not None:
        # What asks for no kind may have taken this one, as far as there are not enough of the others.
        num_of_kind = size.num_gpus_of(group.accelerator)
        spilled = max(0.0, anywhere - (size.num_gpus - num_of_kind))
        free_gpus = min(free_gpus, num_of_kind - taken.get(group.accelerator, 0.0) - spilled + 1e-9)
    return group.cpus <= free_cpus and group.gpus <= free_gpus


def _worker_size(resources: ResourceSpec, cluster: ClusterSize) -> tuple[float, float]:
    gpus = resources.gpus if resources.gpus is not None else float(cluster.num_gpus >= 1)
    cpus = resources.cpus if resources.cpus is not None else (1.0 if gpus else max(1.0, cluster.max_cpus_per_node))
    return float(gpus), float(cpus)


def _num_workers(accelerator: str | None, gpus: float, cpus: float, cluster: ClusterSize) -> int:
    """Count the workers that run side by side; a fraction of a GPU lies on one GPU."""
    num_gpus = cluster.num_gpus_of(accelerator)
    if 0 < gpus < 1:
        return int(num_gpus) * int(1 / gpus + 1e-9)
    return int(num_gpus // gpus if gpus else cluster.num_cpus // cpus)


def _fitting_parts(lane: list[TaskNeed], budget: int) -> list[list[TaskNeed]]:
    """Split a lane in which one task's adapter and another's step are too large to share even one slot."""
    if _memory_bytes(lane, 1) <= budget:
        return [lane]
    parts: list[list[TaskNeed]] = []
    for need in lane:
        part = next((part for part in parts if _memory_bytes([*part, need], 1) <= budget), None)
        if part is None:
            parts.append([need])
        else:
            part.append(need)
    return parts


def _infeasible(need: TaskNeed, gpus: float, cpus: float, cluster: ClusterSize) -> str | None:
    if need.resources.workers > 1:
        return "resources.workers above 1 (data-parallel training) is not available in this version; set it to 1"
    accelerator = need.resources.accelerator
    if accelerator is not None and gpus > cluster.num_gpus_of(accelerator):
        found = ", ".join(f"{count:g} {kind}" for kind, count in cluster.accelerators or ()) or "none that is named"
        return f"needs {gpus:g} GPUs of kind {accelerator}, the cluster has {found}; change resources.accelerator"
    if gpus > cluster.max_gpus_per_node:
        return f"needs {gpus:g} GPUs on one node, the largest node has {cluster.max_gpus_per_node:g}; lower resources.gpus"
    if cpus > cluster.max_cpus_per_node:
        return f"needs {cpus:g} CPUs on one node, the largest node has {cluster.max_cpus_per_node:g}; lower resources.cpus"
    needed, budget = _memory_bytes([need], 1), _budget(gpus, cluster)
    if needed > budget:
        return (
            f"needs about {needed / 2**30:.1f} GiB, one worker has {budget / 2**30:.1f} GiB; "
            "use resources.gradient_checkpointing: true, base.quantization 8bit or 4bit, a smaller batch_size or max_length, "
            "or a larger machine"
        )
    return None


def _budget(gpus: float, cluster: ClusterSize) -> int:
    return int(gpus * cluster.memory_bytes_per_gpu) if gpus else cluster.memory_bytes_per_node


def _group(
    lane: Sequence[TaskNeed], gpus: float, cpus: float, cluster: ClusterSize, max_slots: int, rates: Mapping[str, float]
) -> TrainingGroup:
    num_slots = min(max_slots, len(lane))
    while num_slots > 1 and _memory_bytes(lane, num_slots) > _budget(gpus, cluster):
        num_slots -= 1
    num_flops = sum(need.num_flops for need in lane)
    rate = rates.get(rate_key(lane[0].base, gpus), FLOPS_PER_S["gpu" if gpus else "cpu_core"])
    members = tuple(need.task for need in lane)
    return TrainingGroup(
        group_id=hashlib.sha256(" ".join([lane[0].base.model_dump_json(), *members]).encode()).hexdigest()[:8],
        base=lane[0].base,
        members=members,
        num_slots=num_slots,
        gpus=gpus,
        cpus=cpus,
        memory_bytes=_memory_bytes(lane, num_slots),
        num_steps=sum(need.num_steps for need in lane),
        seconds=START_UP_S + num_flops / (rate * (gpus or cpus)),
        accelerator=lane[0].resources.accelerator,
        priority=lane[0].resources.priority,
    )


def _memory_bytes(lane: Sequence[TaskNeed], num_slots: int) -> int:
    """Estimate one worker: base once, adapters and optimiser of the slots, activations of the largest joint step."""
    first = lane[0]
    largest = sorted((need.batch_size * need.tokens_per_example for need in lane), reverse=True)[:num_slots]
    adapters = num_slots * max(need.num_adapter_parameters for need in lane) * BYTES_PER_ADAPTER_PARAMETER
    activations = sum(largest) * first.activation_bytes_per_token
    return int(WORKER_BYTES + first.base_bytes + adapters + activations)
