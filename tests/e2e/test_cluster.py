"""Several nodes (real Ray processes on this machine, declared GPUs; training itself runs on the CPU)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import yaml
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from tiny_bases import build_t5

from e2e.conftest import CommandLine, kill_all, wait_for, write_spec
from e2e.test_survival import adapter_of, animal_rows, same_weights, saved_steps
from orchestrator.submissions import Submissions

pytestmark = [pytest.mark.e2e, pytest.mark.long]
LABELS = {"bird": None, "fish": None}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head whose only work are drivers."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True})
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_cluster_is_examined_trains_on_the_wanted_gpu_and_gives_it_back(
    cluster: Cluster, cli: CommandLine, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=2, num_gpus=2, resources={"accelerator_type:L4": 1}, labels={"zone": "eu-1"})
    on_cluster = CommandLine(cli.workspace, {"RAY_ADDRESS": cluster.address})
    build_t5(tmp_path / "t5")
    train = {"epochs": 6, "learning_rate": 0.01, "batch_size": 8}
    wanted = write_spec(tmp_path, "animals", animal_rows(120), "./t5", LABELS, **train)
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

    # Detached, and cancelled while its worker starts: the GPU comes back.
    ray.init(address=cluster.address, log_to_driver=False)
    detached = on_cluster.json("submit", wanted, "--detach")
    assert detached == {"submission": "submission-1", "tasks": ["animals"]}
    submission = cli.workspace / "submissions" / "submission-1"
    wait_for(_holding, 120)
    assert "CANCELLED" in on_cluster.run("cancel", "animals")
    wait_for(lambda: not _holding(), 30)
    assert ray.available_resources()["GPU"] == 2.0
    # The task itself has a run only if its worker had begun it before it heard of the end.
    assert [row["status"] for row in on_cluster.json("status")["submissions"]] == ["CANCELLED"]

    # kill -9 of the job's driver while its worker starts: Ray ends what it held.
    on_cluster.json("submit", "--resume", "--detach")
    wait_for(_holding, 120)
    drivers = [one for one in psutil.process_iter(["cmdline"]) if (one.info["cmdline"] or [])[-2:] == ["drive", str(submission)]]
    kill_all(drivers)
    assert len(drivers) == 1
    wait_for(lambda: not _holding(), 60)
    assert [row["status"] for row in on_cluster.json("status")["submissions"]] == ["LOST"]

    report = on_cluster.json("submit", "--resume")
    assert [task["decision"] for task in report["tasks"]] == ["promoted"]
    log = on_cluster.run("logs", "animals")
    assert "animals: PROMOTED" in log
    assert "step 48/48" in log
    assert not _holding()


def test_two_submissions_share_a_cluster_that_loses_a_node(cluster: Cluster, cli: CommandLine, tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=2, num_gpus=2) for _ in range(3)]
    build_t5(tmp_path / "t5")
    specs = []
    for seed in range(6):
        train = {"epochs": 30, "learning_rate": 0.01, "batch_size": 8, "seed": seed}
        specs.append(write_spec(tmp_path, f"animals-{seed}", animal_rows(120), "./t5", LABELS, **train))
        specs[-1].write_text(specs[-1].read_text(encoding="utf-8") + "resources: {cpus: 1}\n", encoding="utf-8")
    # Undisturbed, on this machine: adapters one after another on one core each, as every group has it on the cluster.
    undisturbed = CommandLine(tmp_path / "undisturbed")
    undisturbed.python(
        "from orchestrator.api import OrchestratorConfig, load, submit\n"
        "config = OrchestratorConfig.from_environment().model_copy(update={'max_slots': 1})\n"
        f"submit(load({list(map(str, specs))}), config)"
    )

    on_cluster = CommandLine(cli.workspace, {"RAY_ADDRESS": cluster.address})
    options = ("--json", "--checkpoint-every", "0.2")
    submits = [on_cluster.start("submit", *specs[first : first + 3], *options) for first in (0, 3)]
    checkpoints = cli.workspace / "checkpoints"
    # Not all six: the first may have ended when the last one starts.
    wait_for(lambda: len(list(checkpoints.glob("*.safetensors"))) >= 3 and saved_steps(checkpoints) > 30, 300)
    assert [str(state.status) for _, state in Submissions(cli.workspace).open()] == ["RUNNING", "RUNNING"]
    cluster.remove_node(nodes[1], allow_graceful=False)
    for process in submits:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert {task["decision"] for task in json.loads(out)["tasks"] if task["state"] == "judged"} == {"promoted"}
        events = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
        plan = next(event["plan"]["plan"] for event in events if "plan" in event)
        assert [(len(group["members"]), group["gpus"]) for group in plan["groups"]] == [(1, 1.0)] * 3
    assert on_cluster.json("status")["tasks"] == undisturbed.json("status")["tasks"]
    for seed in range(6):
        assert same_weights(adapter_of(cli, f"animals-{seed}"), adapter_of(undisturbed, f"animals-{seed}"))
    ray.init(address=cluster.address, log_to_driver=False)
    assert not _holding()


def _holding() -> list[dict]:
    """Placement groups that hold or want something."""
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
