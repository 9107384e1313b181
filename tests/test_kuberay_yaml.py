"""docs/kuberay.yaml, as far as it can be checked without Kubernetes: Ray reads it, and it agrees with cluster.yaml."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow.cli
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.scripts.scripts import start as ray_start

ROOT = Path(__file__).parents[1]
API_VERSIONS = {
    "PersistentVolumeClaim": "v1",
    "ConfigMap": "v1",
    "Service": "v1",
    "Deployment": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "RayCluster": "ray.io/v1",
}
ACCELERATOR = "accelerator_type:"


@pytest.fixture
def documents() -> list[dict[str, Any]]:
    """The objects of the file, in order."""
    return list(yaml.safe_load_all((ROOT / "docs" / "kuberay.yaml").read_text(encoding="utf-8")))


@pytest.fixture
def cluster(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The RayCluster as Kubernetes would hold it."""
    found = of_kind(documents, "RayCluster")["adapters"]
    return {**found, "metadata": {**found["metadata"], "namespace": "default"}}


@pytest.fixture
def aws() -> dict[str, Any]:
    """cluster.yaml."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return config


@pytest.fixture
def dockerfile() -> str:
    """The text of docs/Dockerfile."""
    return (ROOT / "docs" / "Dockerfile").read_text(encoding="utf-8")


def of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """Objects of a kind by name."""
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def groups_of(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The head's group and those of the workers."""
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def pods_of(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The spec of every pod that the file makes."""
    ray_groups = groups_of(of_kind(documents, "RayCluster")["adapters"])
    owners = [*(document["spec"] for document in of_kind(documents, "Deployment").values()), *ray_groups]
    return [owner["template"]["spec"] for owner in owners]


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def options_of(docker_options: list[str]) -> dict[str, str]:
    """Environment variables among Docker's options."""
    return dict(re.findall(r"-e (\w+)=(\S+)", " ".join(docker_options)))


def test_every_document_is_an_object_of_a_known_kind_with_a_name_of_its_own(documents: list[dict[str, Any]]) -> None:
    assert {document["kind"]: document["apiVersion"] for document in documents} == API_VERSIONS
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) for _, name in names)


def test_all_files_name_one_ray_version(cluster: dict[str, Any], aws: dict[str, Any], dockerfile: str) -> None:
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    assert cluster["spec"]["rayVersion"] == constraints["ray"] == ray.__version__
    base = re.search(r"^FROM (\S+)$", dockerfile, re.MULTILINE)
    assert base is not None
    assert base[1] == aws["docker"]["worker_image"] == f"rayproject/ray:{ray.__version__}-py311-gpu"


def test_the_image_holds_the_project_with_pinned_versions(dockerfile: str) -> None:
    lines = re.findall(r"^COPY --chown=1000:100 (.+) \S+$", dockerfile, re.MULTILINE)
    copied = [word for line in lines for word in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {"pyproject.toml", "constraints.txt", "tasks", project["project"]["readme"]}
    assert {*needed, *project["project"]["license-files"], *project["tool"]["setuptools"]["packages"]} <= set(copied)
    installs = re.findall(r"pip install .*", dockerfile)
    assert installs
    assert all("-c constraints.txt" in install for install in installs)


def test_all_ray_pods_run_the_image_that_the_header_builds(documents: list[dict[str, Any]]) -> None:
    text = (ROOT / "docs" / "kuberay.yaml").read_text(encoding="utf-8")
    built = re.search(r"docker build -f docs/Dockerfile -t (\S+) \.", text)
    assert built is not None
    assert {container["image"] for pod in pods_of(documents) for container in pod["containers"]} == {built[1]}
    assert built[1] in (ROOT / "docs" / "Dockerfile").read_text(encoding="utf-8")


def test_rays_autoscaler_reads_the_same_cluster_as_in_cluster_yaml(cluster: dict[str, Any], aws: dict[str, Any]) -> None:
    derived = _derive_autoscaling_config_from_ray_cr(cluster)
    mine = {name.replace("-", "_"): node for name, node in derived["available_node_types"].items()}
    assert mine.pop(derived["head_node_type"])["resources"]["CPU"] == 0
    theirs = dict(aws["available_node_types"])
    assert theirs.pop(aws["head_node_type"])["resources"] == {"CPU": 0}
    assert {name: size_of(node) for name, node in mine.items()} == {name: size_of(node) for name, node in theirs.items()}
    assert derived["max_workers"] == aws["max_workers"]
    assert derived["idle_timeout_minutes"] == aws["idle_timeout_minutes"]
    assert derived["upscaling_speed"] == aws["upscaling_speed"]


def size_of(node: dict[str, Any]) -> tuple[int, int, dict[str, int]]:
    """Fewest and most workers of a node type, and the GPUs of one, with their kind."""
    gpus = {name: count for name, count in node["resources"].items() if name == "GPU" or name.startswith(ACCELERATOR)}
    return node["min_workers"], node["max_workers"], gpus


def test_rays_autoscaler_refuses_a_group_of_unknown_size(cluster: dict[str, Any]) -> None:
    # Shows that the check above can fail.
    broken = copy.deepcopy(cluster)
    del broken["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]
    with pytest.raises(ValueError, match="failed to detect `CPU` resources for group gpu-worker"):
        _derive_autoscaling_config_from_ray_cr(broken)


def test_workers_scale_and_have_one_gpu_of_a_named_kind(cluster: dict[str, Any]) -> None:
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert 1 <= group["minReplicas"] <= group["maxReplicas"]
        pod = group["template"]["spec"]
        resources = pod["containers"][0]["resources"]
        # Kubernetes refuses a GPU that is requested without a limit, or with another one.
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "1"
        kind = next(name.removeprefix(ACCELERATOR) for name in group["resources"] if name.startswith(ACCELERATOR))
        assert pod["nodeSelector"] == {"nvidia.com/gpu.product": f"NVIDIA-{kind}"}
        assert any(toleration["key"] == "nvidia.com/gpu" for toleration in pod["tolerations"])
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]
    assert "nvidia.com/gpu" not in {**head["requests"], **head["limits"]}


def test_ray_start_accepts_every_parameter(cluster: dict[str, Any]) -> None:
    for group in groups_of(cluster):
        parameters = dict(group["rayStartParams"])
        # KubeRay hands values of the group's own field on like this.
        parameters["resources"] = json.dumps({name: int(count) for name, count in group.get("resources", {}).items()})
        assert all(isinstance(value, str) for value in parameters.values())
        arguments = [f"--{name}={value}" for name, value in parameters.items()]
        assert ray_start.make_context("start", arguments).params["resources"] == parameters["resources"]
    with pytest.raises(Exception, match="No such option"):
        ray_start.make_context("start", ["--no-such-thing=1"])


def test_token_auth_is_on(cluster: dict[str, Any], aws: dict[str, Any]) -> None:
    assert cluster["spec"]["authOptions"]["mode"] == options_of(aws["docker"]["run_options"])["RAY_AUTH_MODE"] == "token"


def test_every_mount_has_a_volume_and_every_volume_a_claim(documents: list[dict[str, Any]]) -> None:
    claims, used = of_kind(documents, "PersistentVolumeClaim"), set()
    for pod in pods_of(documents):
        volumes = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        mounts = [mount for container in pod["containers"] for mount in container["volumeMounts"]]
        assert {mount["name"] for mount in mounts} == set(volumes)
        used |= set(volumes.values())
    assert used == set(claims)


def test_all_pods_share_one_storage_at_the_same_path(documents: list[dict[str, Any]], aws: dict[str, Any]) -> None:
    claims = of_kind(documents, "PersistentVolumeClaim")
    shared = {name for name, claim in claims.items() if claim["spec"]["accessModes"] == ["ReadWriteMany"]}
    assert len(shared) == 1
    paths = dict(re.findall(r"-v (\S+):(\S+)", " ".join(aws["docker"]["run_options"])))
    for pod in pods_of(documents):
        volume = next(volume["name"] for volume in pod["volumes"] if volume["persistentVolumeClaim"]["claimName"] in shared)
        for container in pod["containers"]:
            mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounted[volume] in paths.values()


def test_environment_is_that_of_cluster_yaml(
    documents: list[dict[str, Any]], cluster: dict[str, Any], aws: dict[str, Any]
) -> None:
    mine = of_kind(documents, "ConfigMap")["adapters-environment"]["data"]
    assert all(isinstance(value, str) for value in mine.values())
    # KubeRay sets what token auth needs; MLflow's address differs.
    theirs = options_of(aws["docker"]["run_options"])
    theirs = {name: value for name, value in theirs.items() if not name.startswith("RAY_AUTH_")}
    assert {name: value for name, value in mine.items() if name != "MLFLOW_TRACKING_URI"} == theirs
    for group in groups_of(cluster):
        container = group["template"]["spec"]["containers"][0]
        assert container["envFrom"] == [{"configMapRef": {"name": "adapters-environment"}}]


def test_mlflow_answers_to_its_name_and_keeps_sqlite_off_the_shared_storage(documents: list[dict[str, Any]]) -> None:
    address = urlsplit(of_kind(documents, "ConfigMap")["adapters-environment"]["data"]["MLFLOW_TRACKING_URI"])
    service = of_kind(documents, "Service")[address.hostname]
    # A service's name becomes variables in every pod, and mlflow reads MLFLOW_PORT and others.
    assert not address.hostname.startswith("mlflow")
    assert service["spec"]["ports"][0]["port"] == address.port
    deployment = of_kind(documents, "Deployment")["adapters-mlflow"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["selector"]["matchLabels"] == labels
    container = deployment["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in ports
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}

    server = mlflow.cli.cli.commands["server"]
    assert container["command"] == ["mlflow", "server"]
    options = dict(argument.split("=", 1) for argument in container["args"])
    assert set(options) <= {name for parameter in server.params for name in parameter.opts}
    assert int(options["--port"]) == ports["http"]
    assert address.netloc in options["--allowed-hosts"].split(",")
    # One writer, and a disk that is no network storage.
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (1, "Recreate")
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    database = Path(options["--backend-store-uri"].removeprefix("sqlite:///")).parent
    volumes = deployment["template"]["spec"]["volumes"]
    claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in volumes}
    modes = {name: claim["spec"]["accessModes"] for name, claim in of_kind(documents, "PersistentVolumeClaim").items()}
    assert modes[claims[mounts[str(database)]]] == ["ReadWriteOnce"]
    assert modes[claims[mounts["/mnt/shared"]]] == ["ReadWriteMany"]
    assert options["--artifacts-destination"].startswith("/mnt/shared/")


def test_nothing_is_reachable_from_outside(documents: list[dict[str, Any]], cluster: dict[str, Any]) -> None:
    assert cluster["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert all(service["spec"]["type"] == "ClusterIP" for service in of_kind(documents, "Service").values())
    opening = {"enableIngress", "hostNetwork", "hostPort", "nodePort", "externalIPs", "loadBalancerIP", "privileged"}
    assert not opening & {key for key, _ in walk(documents)}
    # MLflow has no login, Ray's ports take code to run: only pods of the cluster come in.
    policies = [policy["spec"] for policy in of_kind(documents, "NetworkPolicy").values()]
    inside = {"podSelector": {"matchLabels": {"ray.io/cluster": cluster["metadata"]["name"]}}}
    assert all(rule["from"] == [inside] for policy in policies for rule in policy["ingress"])
    guarded = [policy["podSelector"]["matchLabels"] for policy in policies]
    mlflow_pods = of_kind(documents, "Service")["adapters-mlflow"]["spec"]["selector"]
    assert guarded == [mlflow_pods, inside["podSelector"]["matchLabels"]]


def test_every_container_has_requests_limits_and_few_rights(documents: list[dict[str, Any]], cluster: dict[str, Any]) -> None:
    for pod in pods_of(documents):
        assert pod["securityContext"]["runAsNonRoot"] is True
        # The user and group of the image own the project's folder and the storage.
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (1000, 100)
    options = cluster["spec"]["autoscalerOptions"]
    for container in [options, *(container for pod in pods_of(documents) for container in pod["containers"])]:
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
