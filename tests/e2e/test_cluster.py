"""Several nodes, one of them with GPUs of the wanted kind (declared; training itself runs on the CPU, on two workers)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.cluster_utils import Cluster
from tiny_bases import build_t5

from e2e.conftest import CommandLine, write_spec
from e2e.test_survival import animal_rows

pytestmark = pytest.mark.e2e


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without GPU and a node with two L4."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True})
    made.add_node(num_cpus=2, num_gpus=2, resources={"accelerator_type:L4": 1}, labels={"zone": "eu-1"})
    yield made
    made.shutdown()


def test_a_cluster_is_examined_and_trains_on_the_wanted_gpu(cluster: Cluster, cli: CommandLine, tmp_path: Path) -> None:
    on_cluster = CommandLine(cli.workspace, {"RAY_ADDRESS": cluster.address})
    build_t5(tmp_path / "t5")
    train = {"epochs": 6, "learning_rate": 0.01, "batch_size": 8}
    wanted = write_spec(tmp_path, "animals", animal_rows(120), "./t5", {"bird": None, "fish": None}, **train)
    spec = yaml.safe_load(wanted.read_text(encoding="utf-8"))
    spec["resources"] = {"accelerator": "L4", "node_labels": {"zone": "eu-1"}, "workers": 2}
    wanted.write_text(yaml.safe_dump(spec), encoding="utf-8")
    missing, elsewhere = tmp_path / "missing.yaml", tmp_path / "elsewhere.yaml"
    missing.write_text(yaml.safe_dump({**spec, "name": "missing", "resources": {"accelerator": "H100"}}), encoding="utf-8")
    labels = {"node_labels": {"zone": "us-1"}}
    elsewhere.write_text(yaml.safe_dump({**spec, "name": "elsewhere", "resources": labels}), encoding="utf-8")

    # Both nodes answer; that one declares a GPU which it has not is what the doctor is for.
    checks = {check["name"]: check["is_ok"] for check in on_cluster.json("doctor", wanted, code=1)["checks"]}
    nodes = {name: is_ok for name, is_ok in checks.items() if name.startswith("node ")}
    fine = ["gpus", "storage", "storage", "versions", "versions"]
    assert sorted(name.rpartition(" ")[2] for name, is_ok in nodes.items() if is_ok) == fine
    assert [name.rpartition(" ")[2] for name, is_ok in nodes.items() if not is_ok] == ["gpus"]
    assert all(is_ok for name, is_ok in checks.items() if name not in nodes)

    planned = on_cluster.json("plan", wanted, missing, elsewhere, code=1)
    assert [(group["members"], group["accelerator"], group["workers"]) for group in planned["groups"]] == [(["animals"], "L4", 2)]
    assert planned["gpu_hours"] > 0
    assert planned["refused"] == {
        "missing": "needs 1 GPUs of kind H100, the cluster has 2 L4; change resources.accelerator",
        "elsewhere": "needs nodes with labels zone=us-1, the cluster has zone=eu-1; change resources.node_labels",
    }
    report = on_cluster.json("submit", wanted)
    assert [task["decision"] for task in report["tasks"]] == ["promoted"]
