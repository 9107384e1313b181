"""Each thing that goes wrong first is found, named, and comes with what to do. Ray itself is examined in the e2e tests."""

import socket
import sqlite3
from dataclasses import replace
from importlib.metadata import version

import pytest

from multilora.spec import BaseSpec, TaskSpec
from orchestrator import doctor
from orchestrator.cluster import LIBRARIES, NodeFacts
from orchestrator.config import OrchestratorConfig

HERE = {name: version(name) for name in LIBRARIES}
NODE = NodeFacts("10.0.0.7", 0.0, 0, HERE, sees_workspace=True)


def failing(checks):
    return {check.name: check for check in checks if not check.is_ok}


@pytest.fixture
def config(tmp_path):
    return OrchestratorConfig(workspace=tmp_path / "workspace")


def test_a_workspace_that_can_be_made_is_fine(config):
    check = doctor._workspace(config)
    assert check.is_ok
    assert config.workspace.is_dir()
    assert "GiB free" in check.finding


def test_a_workspace_below_a_file_is_not(tmp_path):
    (tmp_path / "file").write_text("")
    *_, check = doctor.examine(OrchestratorConfig(workspace=tmp_path / "file" / "workspace"))
    assert (check.name, check.is_ok, check.fix) == ("workspace", False, "choose another folder with --workspace")


def test_a_full_disk_is_found(config, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 1e9)
    check = doctor._workspace(config)
    assert (check.is_ok, check.fix) == (False, "free some disk, or choose another --workspace")


def test_a_fresh_store_is_made_and_a_broken_one_is_named(config):
    config.workspace.mkdir()
    assert doctor._mlflow(config).is_ok
    file = config.workspace.parent / "broken" / "mlflow.db"
    file.parent.mkdir()
    with sqlite3.connect(file) as database:
        database.execute("create table alembic_version (version_num varchar(32))")
        database.execute("insert into alembic_version values ('0123456789ab')")
    check = doctor._mlflow(config.model_copy(update={"workspace": file.parent}))
    assert not check.is_ok
    assert "0123456789ab" in check.finding
    assert "mlflow db upgrade" in check.fix


def test_a_server_that_is_away_is_found_at_once(config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        check = doctor._mlflow(config.model_copy(update={"tracking_uri": uri}))
    assert not check.is_ok
    assert check.finding.startswith(f"{uri} does not answer")


def test_bases_are_looked_for(config, base_folder, monkeypatch):
    monkeypatch.setattr(doctor, "_ray", lambda config: iter(()))
    specs = [
        TaskSpec(name=f"task-{i}", base=BaseSpec(model=model), data={"train": "x.jsonl"}, instruction="{text}")
        for i, model in enumerate([str(base_folder("encoder")), str(base_folder("encoder")), "/nowhere/at-all"])
    ]
    checks = {check.name: check for check in doctor.examine(config, specs)}
    assert [name for name in checks if name.startswith("base ")] == ["base /nowhere/at-all", f"base {base_folder('encoder')}"]
    assert checks[f"base {base_folder('encoder')}"].finding.startswith("encoder, ")
    assert "base /nowhere/at-all" in failing(checks.values())
    assert {"versions", "workspace", "memory", "mlflow"} <= set(checks)


def test_nodes_that_are_alike_are_fine(config):
    assert not failing(doctor._nodes([NODE, replace(NODE, name="10.0.0.8")], config))


@pytest.mark.parametrize(
    ("changes", "name", "finding"),
    [
        ({"error": "GetTimeoutError: no answer"}, "node 10.0.0.7", "GetTimeoutError: no answer"),
        ({"versions": {**HERE, "torch": "1.0"}}, "node 10.0.0.7 versions", f"torch 1.0, here {HERE['torch']}"),
        ({"sees_workspace": False}, "node 10.0.0.7 storage", "not visible"),
        ({"num_gpus": 2.0, "num_devices": 1}, "node 10.0.0.7 gpus", "Ray was told of 2, the node sees 1"),
    ],
)
def test_what_is_wrong_with_a_node_is_named(changes, name, finding, config):
    found = failing(doctor._nodes([replace(NODE, name="10.0.0.8"), replace(NODE, **changes)], config))
    assert list(found) == [name]
    assert finding in found[name].finding
    assert found[name].fix


def test_no_node_alive(config):
    assert list(failing(doctor._nodes([], config))) == ["nodes"]
