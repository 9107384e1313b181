"""The connected cluster: measure it, probe its nodes, run groups and evaluations on it."""

from __future__ import annotations

import logging
import platform
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from multilora.spec import BaseSpec
from orchestrator import entry
from orchestrator.cluster_size import ClusterSize, Node
from orchestrator.config import OrchestratorConfig
from orchestrator.eval_report import EvalItem, EvalOutcome
from orchestrator.group_task import GroupTask
from orchestrator.room import TrainingGroup

logger = logging.getLogger(__name__)
LIBRARIES = ("torch", "transformers", "ray", "safetensors", "tokenizers", "bitsandbytes")
"""What training depends on, so that it must be the same on every node."""
PROBE_TIMEOUT_S = 120.0
ACCELERATOR = "accelerator_type:"
"""What Ray calls a node's kind of GPU among its resources."""


def local_size(config: OrchestratorConfig) -> ClusterSize:
    """Size of this machine, for a plan without Ray."""
    node = Node(float(psutil.cpu_count() or 1), float(num_gpu_devices()))
    memory = psutil.virtual_memory().available
    return ClusterSize((node,), memory, int(config.gpu_memory_gib * 2**30), is_named=False)


def cluster_size(config: OrchestratorConfig) -> ClusterSize:
    """Size of the connected cluster, with the nodes that its autoscaler may add: a group that waits for one makes it come."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [_node_of(node["Resources"], node["Labels"]) for node in alive]
    return ClusterSize(
        nodes=(*nodes, *nodes_to_come(config.cluster_file, nodes)),
        memory_bytes_per_node=int(max(node["Resources"].get("memory", 0.0) for node in alive)),
        memory_bytes_per_gpu=int(config.gpu_memory_gib * 2**30),
    )


def nodes_to_come(cluster_file: Path, nodes: Sequence[Node]) -> list[Node]:
    """Nodes that `available_node_types` of a cluster file allows beside those that are there; none without the file.

    Open-source Ray tells nobody but its autoscaler; `ray up` leaves the file on the head.
    """
    if not cluster_file.is_file():
        return []
    there = Counter((node.cpus, node.gpus, node.accelerator) for node in nodes)
    types = yaml.safe_load(cluster_file.read_text(encoding="utf-8"))["available_node_types"].values()
    found = []
    for kind in types:
        node = _node_of(kind.get("resources", {}), kind.get("labels", {}))
        missing = kind.get("max_workers", 0) - there[node.cpus, node.gpus, node.accelerator]
        found += [node] * missing
    return found


def _node_of(resources: Mapping[str, float], labels: Mapping[str, str]) -> Node:
    kinds = [name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)]
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    return Node(cpus, gpus, kinds[0] if kinds else None, tuple(sorted(labels.items())))


@dataclass(frozen=True)
class NodeFacts:
    """What one node of the cluster has."""

    name: str
    """Address, and the beginning of its id: several nodes may share an address."""
    num_gpus: float
    """As Ray was told."""
    num_devices: int
    """NVIDIA devices that the node itself sees."""
    versions: Mapping[str, str]
    sees_workspace: bool
    error: str = ""
    """Why it gave no answer."""


def probe_nodes(workspace: Path) -> list[NodeFacts]:
    """Ask every node of the connected cluster for its versions and devices, and whether it sees `workspace`."""
    file, content = workspace / f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex
    workspace.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        asked = [
            _facts.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(str(file))
            for node in nodes
        ]
        found = []
        for node, answer in zip(nodes, asked, strict=True):
            name, num_gpus = f"{node['NodeManagerAddress']} {node['NodeID'][:8]}", node["Resources"].get("GPU", 0.0)
            try:
                versions, num_devices, seen = ray.get(answer, timeout=PROBE_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                found.append(NodeFacts(name, num_gpus, 0, {}, False, f"{type(error).__name__}: {error}".splitlines()[0]))
            else:
                found.append(NodeFacts(name, num_gpus, num_devices, versions, seen == content))
        return found
    finally:
        file.unlink(missing_ok=True)


@ray.remote(num_cpus=0)
def _facts(file: str) -> tuple[dict[str, str], int, str | None]:
    versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    seen = Path(file).read_text(encoding="utf-8") if Path(file).is_file() else None
    return versions, num_gpu_devices(), seen


def num_gpu_devices() -> int:
    """NVIDIA devices that this machine sees."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


class RunningGroup:
    """One training group on Ray Train, followed from a thread because `fit` blocks."""

    def __init__(self, config: OrchestratorConfig, group: TrainingGroup, task: GroupTask, name: str) -> None:
        """Start the group; `name` must be new, since Ray Train resumes an old run of the same name without a word."""
        self.group = group
        self.error: Exception | None = None
        resources = {"CPU": group.cpus, "GPU": group.gpus}
        self._trainer: TorchTrainer = TorchTrainer(
            entry.train_group,
            # Behind a reference: Ray Train's controller process unpacks what it is given, and would import torch and more for it.
            train_loop_config={"task": ray.put(task)},
            # For what ranks say to each other. Whether there is CUDA, so that NCCL can add up gradients, only the workers know:
            # a GPU that was declared may not be there. They find out together (ranks.py).
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(
                num_workers=group.workers,
                use_gpu=group.gpus > 0,
                resources_per_worker=resources,
                accelerator_type=group.accelerator,
                label_selector=dict(group.node_labels) or None,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(config.workspace / "ray"),
                failure_config=FailureConfig(
                    max_failures=config.max_failures, max_preemption_failures=-1, controller_failure_limit=-1
                ),
            ),
        )
        self._thread = threading.Thread(target=self._fit, name=name, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """False once the run ended, with `error` set if it failed."""
        return self._thread.is_alive()

    def wait(self, timeout_s: float) -> None:
        """Wait for the run's end."""
        self._thread.join(timeout_s)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # noqa: BLE001  whatever ended the worker, the controller turns it into an end reason
            self.error = error


def evaluate_on_cluster(
    base: BaseSpec,
    items: Sequence[EvalItem],
    untouched: Sequence[EvalItem],
    cpus: float,
    gpus: float,
    check_stop: Callable[[], None],
) -> EvalOutcome:
    """Run `orchestrator.evaluate.evaluate` where there is room for it; `check_stop` is called meanwhile, and may raise."""
    remote: Any = ray.remote(entry.evaluate).options(num_cpus=cpus, num_gpus=gpus, max_retries=2)
    running = remote.remote(base, items, untouched)
    while not ray.wait([running], timeout=0.5)[0]:
        check_stop()
    outcome: EvalOutcome = ray.get(running)
    return outcome


class OverlapSearch:
    """Looks for training examples in gate splits on some node, while others train."""

    def __init__(self, train: Mapping[str, Sequence[str]], gate: Mapping[str, Sequence[str]]) -> None:
        """Start it; it takes no place from training."""
        remote: Any = ray.remote(entry.find_overlaps).options(num_cpus=0, max_retries=2)
        self._running = remote.remote(train, gate)

    def sentences(self, check_stop: Callable[[], None]) -> dict[str, tuple[str, ...]]:
        """Wait for what it found, in words by task; `check_stop` is called meanwhile, and may raise.

        It informs and decides nothing, so a search that fails costs no submission its report.
        """
        while not ray.wait([self._running], timeout=0.5)[0]:
            check_stop()
        try:
            found: dict[str, tuple[str, ...]] = ray.get(self._running)
        except ray.exceptions.RayError as error:
            logger.warning("training texts were not compared with gate splits error=%r", error)
            return {}
        return found


def stream_on_cluster(function: Callable[..., Iterator[Any]], *arguments: object) -> Iterator[Any]:
    """Run a generator on a worker of the connected cluster, a GPU's where there is one; gives what it yields as it comes."""
    nodes = [_node_of(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]
    gpus = min(1.0, max(node.gpus for node in nodes))
    cpus = 1.0 if gpus else max(1.0, *(node.cpus for node in nodes))
    remote: Any = ray.remote(_each).options(num_cpus=cpus, num_gpus=gpus, max_retries=2)
    for found in remote.remote(function, *arguments):
        yield ray.get(found)


def _each(function: Callable[..., Iterator[Any]], *arguments: object) -> Iterator[Any]:
    # Ray sends its statistics into the generator after each value; where that one yields from a list they would be an error.
    for found in function(*arguments):  # noqa: UP028
        yield found
