"""cluster.yaml is what `ray up` accepts: Ray's own defaults, schema and checks, without network, cloud account or boto3."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER_FILE = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture
def written() -> dict[str, Any]:
    """The file as it is written."""
    config: dict[str, Any] = yaml.safe_load(CLUSTER_FILE.read_text(encoding="utf-8"))
    return config


@pytest.fixture
def prepared(written: dict[str, Any]) -> dict[str, Any]:
    """The file with Ray's defaults filled in, as `ray up` uses it."""
    config: dict[str, Any] = prepare_config(copy.deepcopy(written))
    return config


def test_ray_accepts_the_file(prepared: dict[str, Any]) -> None:
    validate_config(prepared)


def test_ray_refuses_fewer_workers_than_the_types_need(prepared: dict[str, Any]) -> None:
    # Shows that the check above can fail.
    with pytest.raises(ValueError, match="smaller than the sum of `min_workers`"):
        validate_config({**prepared, "max_workers": 0})


def test_one_head_without_gpu(prepared: dict[str, Any]) -> None:
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["max_workers"] == 0
    assert head["resources"].get("GPU", 0) == 0
    # Drivers, MLflow and the cluster's own processes have the head to themselves.
    assert head["resources"]["CPU"] == 0


def test_gpu_workers_scale_within_the_limit(prepared: dict[str, Any]) -> None:
    types = prepared["available_node_types"]
    gpu_types = [types[name] for name in types if name != prepared["head_node_type"] and types[name]["resources"].get("GPU")]
    assert gpu_types
    for node_type in gpu_types:
        assert 1 <= node_type["min_workers"] <= node_type["max_workers"] <= prepared["max_workers"]
        kinds = [name for name in node_type["resources"] if name.startswith("accelerator_type:")]
        assert len(kinds) == 1


def test_every_node_installs_the_pinned_versions(prepared: dict[str, Any]) -> None:
    installs = [command for command in prepared["setup_commands"] if "~/project" in command]
    assert installs
    assert all(command.startswith("pip install -q -c ~/project/constraints.txt ") for command in installs)


def test_every_node_has_token_auth_and_the_shared_workspace(prepared: dict[str, Any]) -> None:
    options = " ".join(prepared["docker"]["run_options"])
    environment = dict(re.findall(r"-e (\w+)=(\S+)", options))
    volumes = dict(re.findall(r"-v (\S+):(\S+)", options))
    assert environment["RAY_AUTH_MODE"] == "token"
    token_path = environment["RAY_AUTH_TOKEN_PATH"]
    assert token_path.replace("/home/ray/", "~/") in prepared["file_mounts"]
    shared = next(target for target in volumes.values() if environment["ORCHESTRATOR_HOME"].startswith(f"{target}/"))
    mounted = " ".join(prepared["initialization_commands"])
    assert "mount -t nfs4" in mounted
    assert f"mountpoint -q {shared}" in mounted


def test_mlflow_starts_on_the_head_and_workers_are_told_where(prepared: dict[str, Any]) -> None:
    head = " ".join(prepared["head_start_ray_commands"])
    assert "mlflow server" in head
    # sqlite on the shared storage would lose its locks.
    volumes = re.findall(r"-v \S+:(\S+)", " ".join(prepared["docker"]["head_run_options"]))
    database = re.search(r"sqlite:///(/\S+)", head)
    assert database is not None
    assert any(database[1].startswith(f"{volume}/") for volume in volumes)
    worker = " ".join(prepared["worker_start_ray_commands"])
    assert "MLFLOW_TRACKING_URI=http://$RAY_HEAD_IP:5000" in worker


def test_head_runs_the_autoscaler(prepared: dict[str, Any]) -> None:
    start = next(command for command in prepared["head_start_ray_commands"] if "ray start" in command)
    assert "--head" in start
    assert "--autoscaling-config=" in start


def test_image_has_the_ray_version_that_is_installed(written: dict[str, Any]) -> None:
    images = [written["docker"]["head_image"], written["docker"]["worker_image"]]
    assert all(image.startswith(f"rayproject/ray:{ray.__version__}-") for image in images)
