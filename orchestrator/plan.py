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
from orchestrator.cluster_size import ClusterSize, Labels
from orchestrator.room import Room, TrainingGroup

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
    """Of all its candidates together."""
    batch_size: int
    tokens_per_example: float
    resources: ResourceSpec
    num_candidates: int = 1
    """Adapters that are trained for it, in one group; more than one where it is searched."""

    @property
    def num_steps(self) -> int:
        """Optimiser steps."""
        return -(-self.num_train // self.batch_size) * self.epochs

    @property
    def num_tokens(self) -> float:
        """Tokens through forward and backward."""
        return self.num_train * self.epochs * self.tokens_per_example

    @property
    def tokens_per_step(self) -> float:
        """Tokens of one step on one worker."""
        return -(-self.batch_size // self.resources.workers) * self.tokens_per_example

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
class Plan:
    """Groups to train, highest priority and longest first, and the tasks that cannot run here, with the reason."""

    groups: tuple[TrainingGroup, ...]
    refused: tuple[tuple[str, str], ...]
    makespan_s: float = 0.0
    """Seconds until the last group ends; groups wait in this order until the cluster has room."""

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs together."""
        return sum(group.workers * group.gpus * group.seconds for group in self.groups) / 3600


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
        resources = need.resources
        gpus, cpus = _worker_size(resources, cluster)
        if reason := _infeasible(need, gpus, cpus, cluster):
            refused.append((need.task, reason))
        else:
            where = (resources.accelerator, _labels(resources), resources.workers, gpus, cpus)
            alike.setdefault((need.base, resources.gradient_checkpointing, resources.priority, where), []).append(need)
    groups: list[TrainingGroup] = []
    for tasks in alike.values():
        resources = tasks[0].resources
        gpus, cpus = _worker_size(resources, cluster)
        num_lanes = min(_num_workers(resources, gpus, cpus, cluster) // resources.workers, len(tasks))
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
    room = Room(size)
    while waiting or running:
        if waiting and room.fits(waiting[0]):
            group = waiting.popleft()
            room.take(group)
            heappush(running, (now_s + group.seconds, len(waiting), group))
        else:
            now_s, _, group = heappop(running)
            room.give_back(group)
    return now_s


def _labels(resources: ResourceSpec) -> Labels:
    return tuple(sorted(resources.node_labels.items()))


def _worker_size(resources: ResourceSpec, cluster: ClusterSize) -> tuple[float, float]:
    nodes = cluster.nodes_for(resources.accelerator, _labels(resources)).values()
    gpus, cpus = resources.gpus, resources.cpus
    if gpus is None:
        gpus = float(resources.accelerator is not None or any(node.gpus >= 1 for node in nodes))
    if cpus is None:
        cpus = 1.0 if gpus else max([1.0, *(node.cpus for node in nodes)])
    return gpus, cpus


def _num_workers(resources: ResourceSpec, gpus: float, cpus: float, cluster: ClusterSize) -> int:
    """Count the workers of a size that run side by side."""
    nodes = cluster.nodes_for(resources.accelerator, _labels(resources)).values()
    limits = [limit // part for limit, part in ((cluster.max_gpus, gpus), (cluster.max_cpus, cpus)) if part]
    return int(min([sum(node.num_workers(gpus, cpus) for node in nodes), *limits]))


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
    resources, labels = need.resources, _labels(need.resources)
    labelled, nodes = (cluster.nodes_for(kind, labels).values() for kind in (None, resources.accelerator))
    if not labelled:
        # Every node has an id of its own, which says nothing.
        pairs = {pair for node in cluster.nodes for pair in node.labels if pair[0] != "ray.io/node-id"}
        found = _listed(tuple(sorted(pairs))) or "none"
        return f"needs nodes with labels {_listed(labels)}, the cluster has {found}; change resources.node_labels"
    if not nodes:
        kinds = sorted({node.accelerator for node in labelled if node.accelerator})
        counts = [(kind, sum(node.gpus for node in labelled if node.accelerator == kind)) for kind in kinds]
        found = ", ".join(f"{count:g} {kind}" for kind, count in counts) or "none that is named"
        where = f"the cluster with {_listed(labels)}" if labels else "the cluster"
        return f"needs {gpus:g} GPUs of kind {resources.accelerator}, {where} has {found}; change resources.accelerator"
    max_gpus, max_cpus = max(node.gpus for node in nodes), max(node.cpus for node in nodes)
    if gpus > max_gpus:
        return f"needs {gpus:g} GPUs on one node, the largest node has {max_gpus:g}; lower resources.gpus"
    if cpus > max_cpus:
        return f"needs {cpus:g} CPUs on one node, the largest node has {max_cpus:g}; lower resources.cpus"
    if resources.workers > (room := _num_workers(resources, gpus, cpus, cluster)):
        size = f"{resources.workers} workers of {gpus:g} GPUs and {cpus:g} CPUs each"
        limits = " within --max-gpus and --max-cpus" if cluster.is_limited else ""
        return f"needs {size}, the cluster has room for {room}{limits}; lower resources.workers, gpus or cpus"
    needed, budget = _memory_bytes([need], 1), _budget(gpus, cluster)
    if needed > budget:
        return (
            f"needs about {needed / 2**30:.1f} GiB, one worker has {budget / 2**30:.1f} GiB; "
            "use resources.gradient_checkpointing: true, base.quantization 8bit or 4bit, a smaller batch_size or max_length, "
            "or a larger machine"
        )
    return None


def _listed(labels: Labels) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels)


def _budget(gpus: float, cluster: ClusterSize) -> int:
    return int(gpus * cluster.memory_bytes_per_gpu) if gpus else cluster.memory_bytes_per_node


def _group(
    lane: Sequence[TaskNeed], gpus: float, cpus: float, cluster: ClusterSize, max_slots: int, rates: Mapping[str, float]
) -> TrainingGroup:
    num_slots = min(max_slots, sum(need.num_candidates for need in lane))
    while num_slots > 1 and _memory_bytes(lane, num_slots) > _budget(gpus, cluster):
        num_slots -= 1
    num_flops = sum(need.num_flops for need in lane)
    rate = rates.get(rate_key(lane[0].base, gpus), FLOPS_PER_S["gpu" if gpus else "cpu_core"])
    members, resources = tuple(need.task for need in lane), lane[0].resources
    return TrainingGroup(
        group_id=hashlib.sha256(" ".join([lane[0].base.model_dump_json(), *members]).encode()).hexdigest()[:8],
        base=lane[0].base,
        members=members,
        num_slots=num_slots,
        gpus=gpus,
        cpus=cpus,
        memory_bytes=_memory_bytes(lane, num_slots),
        num_steps=sum(need.num_steps for need in lane),
        seconds=START_UP_S + num_flops / (rate * (gpus or cpus) * resources.workers),
        accelerator=resources.accelerator,
        priority=resources.priority,
        workers=resources.workers,
        node_labels=_labels(resources),
    )


def _memory_bytes(lane: Sequence[TaskNeed], num_slots: int) -> int:
    """Estimate one worker: base once, adapters and optimiser of the slots, activations of the largest joint step."""
    first = lane[0]
    largest = sorted((need.tokens_per_step for need in lane for _ in range(need.num_candidates)), reverse=True)[:num_slots]
    adapters = num_slots * max(need.num_adapter_parameters for need in lane) * BYTES_PER_ADAPTER_PARAMETER
    activations = sum(largest) * first.activation_bytes_per_token
    return int(WORKER_BYTES + first.base_bytes + adapters + activations)
