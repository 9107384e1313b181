"""What goes wrong first, looked at before anything is trained: disk, memory, MLflow, bases, and every node of the cluster."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import httpx
import psutil

from multilora.base_files import find_base
from multilora.errors import MultiLoraError
from multilora.registry import Registry
from multilora.spec import TaskSpec
from orchestrator.cluster import LIBRARIES, NodeFacts, num_gpu_devices, probe_nodes
from orchestrator.config import OrchestratorConfig
from orchestrator.jobs import RayJobs
from orchestrator.session import ray_session

MIN_DISK_GIB, MIN_MEMORY_GIB = 2.0, 3.0
"""Less than this and even a small base with a few adapters gets into trouble."""
HEALTH_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    is_ok: bool
    finding: str
    fix: str = ""
    """What to do where it is not right."""


def examine(config: OrchestratorConfig, specs: Sequence[TaskSpec] = ()) -> Iterator[Check]:
    """Look at everything that `submit` needs; the bases are those of `specs`. Takes seconds: yields as it goes."""
    yield Check("versions", True, ", ".join(f"{name} {version(name)}" for name in (*LIBRARIES, "mlflow")))
    yield _workspace(config)
    if not os.access(config.workspace, os.W_OK):
        return  # MLflow's store and the nodes' probe are written there
    free_gib = psutil.virtual_memory().available / 2**30
    fix = "close other programs, or train on a larger machine"
    yield Check("memory", free_gib >= MIN_MEMORY_GIB, f"{free_gib:.1f} GiB free", fix)
    yield _mlflow(config)
    for base in sorted({spec.base for spec in specs}, key=lambda base: base.model):
        try:
            files = find_base(base)
        except MultiLoraError as error:
            yield Check(f"base {base.model}", False, str(error), "see above")
        else:
            millions = files.num_parameters / 1e6
            finding = f"{files.family}, {millions:.0f}M parameters, fingerprint {files.fingerprint[:12]}"
            yield Check(f"base {base.model}", True, finding)
    yield from _ray(config)


def _workspace(config: OrchestratorConfig) -> Check:
    try:
        config.workspace.mkdir(parents=True, exist_ok=True)
        free_gib = shutil.disk_usage(config.workspace).free / 2**30
    except OSError as error:
        return Check("workspace", False, f"{config.workspace}: {error.strerror}", "choose another folder with --workspace")
    is_writable = os.access(config.workspace, os.W_OK)
    finding = f"{config.workspace}: {free_gib:.1f} GiB free" + ("" if is_writable else ", not writable")
    return Check("workspace", is_writable and free_gib >= MIN_DISK_GIB, finding, "free some disk, or choose another --workspace")


def _mlflow(config: OrchestratorConfig) -> Check:
    fix = "start the server or correct MLFLOW_TRACKING_URI; after an upgrade run: mlflow db upgrade URI"
    if config.tracking_uri and config.tracking_uri.startswith("http"):
        try:  # MLflow's client itself goes on trying for minutes
            httpx.get(f"{config.tracking_uri.rstrip('/')}/health", timeout=HEALTH_TIMEOUT_S).raise_for_status()
        except httpx.HTTPError as error:
            return Check("mlflow", False, f"{config.tracking_uri} does not answer: {error}", fix)
    try:
        Registry(config.registry_uri, config.artifact_root).initialise()
    except MultiLoraError as error:
        return Check("mlflow", False, str(error), fix)
    return Check("mlflow", True, config.registry_uri)


def _ray(config: OrchestratorConfig) -> Iterator[Check]:
    where = config.ray_address or "a local Ray"
    try:
        with ray_session(config) as dashboard:
            yield Check("ray", True, f"{where} answers")
            fix = "start Ray with its dashboard: without it, GPUs of a killed run stay taken"
            yield Check("dashboard", bool(dashboard), dashboard or "off", fix)
            if config.ray_address:
                RayJobs(config)
                yield Check("jobs", True, "the cluster takes jobs")
            yield from _nodes(probe_nodes(config.workspace), config)
    except MultiLoraError as error:
        fix = "start it, or correct RAY_ADDRESS; where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        yield Check("ray", False, str(error), fix)


def _nodes(nodes: Sequence[NodeFacts], config: OrchestratorConfig) -> Iterator[Check]:
    expected = {name: version(name) for name in LIBRARIES}
    for node in nodes:
        name = f"node {node.name}"
        if node.error:
            yield Check(name, False, node.error, "look at its raylet's log, or stop the node")
            continue
        others = [f"{lib} {node.versions[lib]}, here {mine}" for lib, mine in expected.items() if node.versions[lib] != mine]
        yield Check(f"{name} versions", not others, "; ".join(others) or "as here", "install constraints.txt on every node")
        finding = f"{config.workspace} is {'visible' if node.sees_workspace else 'not visible'}"
        yield Check(f"{name} storage", node.sees_workspace, finding, "put the workspace on storage that all nodes share")
        is_same = node.num_gpus <= node.num_devices
        finding = f"Ray was told of {node.num_gpus:g}, the node sees {node.num_devices}"
        yield Check(f"{name} gpus", is_same, finding, "check the driver and the node's --num-gpus")
    if not nodes:
        yield Check("nodes", False, "none is alive", "start a node")
    if num_gpu_devices() and not any(node.num_gpus for node in nodes):
        yield Check("gpus", False, "this machine has GPUs that Ray was not told of", "start Ray with --num-gpus")
