"""What a cluster has: plain values, for a plan without Ray."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

Labels = tuple[tuple[str, str], ...]
"""Names and values, of a node or wanted of it."""


@dataclass(frozen=True)
class Node:
    """What one node of the cluster has."""

    cpus: float
    gpus: float
    accelerator: str | None = None
    """Kind of its GPUs."""
    labels: Labels = ()

    def has_labels(self, wanted: Labels) -> bool:
        """Whether it meets Ray's label selectors; where a label is missing, only a negated one is met."""
        labels = dict(self.labels)
        for key, rule in wanted:
            values = re.split(", ?", rule.removeprefix("!").removeprefix("in(").removesuffix(")"))
            if (labels.get(key) in values) == rule.startswith("!"):
                return False
        return True

    def num_workers(self, gpus: float, cpus: float) -> int:
        """Count the workers that it has room for; a fraction of a GPU lies on one GPU."""
        by_cpus = int(self.cpus / cpus + 1e-9)
        by_gpus = int(self.gpus) * int(1 / gpus + 1e-9) if 0 < gpus < 1 else int(self.gpus // gpus) if gpus else by_cpus
        return min(by_gpus, by_cpus)


@dataclass(frozen=True)
class ClusterSize:
    """What the cluster has; a worker lies on one node."""

    nodes: tuple[Node, ...]
    memory_bytes_per_node: int
    memory_bytes_per_gpu: int
    is_named: bool = True
    """Whether kinds of GPUs and labels are known; if not, any may be there."""
    max_gpus: float = math.inf
    """Most that one submission uses at once, as `max_cpus`."""
    max_cpus: float = math.inf

    @property
    def is_limited(self) -> bool:
        """Whether a submission may use a part only."""
        return min(self.max_gpus, self.max_cpus) < math.inf

    def nodes_for(self, accelerator: str | None, labels: Labels) -> dict[int, Node]:
        """The nodes that have this kind of GPU and these labels, by position."""
        return {
            position: node
            for position, node in enumerate(self.nodes)
            if not self.is_named or (accelerator in (None, node.accelerator) and node.has_labels(labels))
        }
