"""A search as a person runs it: one group, child runs in MLflow, kill -9 in the middle, and nothing to do the second time."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient
from tiny_bases import build_t5

from e2e.conftest import CommandLine, wait_for, write_spec
from e2e.test_survival import animal_rows

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def test_a_search_is_killed_goes_on_and_is_logged_as_child_runs(cli: CommandLine, tmp_path: Path) -> None:
    build_t5(tmp_path / "t5")
    train = {"epochs": 8, "learning_rate": 1e-4, "batch_size": 8}
    spec = write_spec(tmp_path, "animals", animal_rows(240), "./t5", {"bird": None, "fish": None}, **train)
    with spec.open("a", encoding="utf-8") as stream:
        stream.write("search: {learning_rate: [1.0e-3, 1.0e-2], rank: [4, 8]}\n")

    planned = cli.json("plan", spec)
    assert [(group["members"], group["num_slots"]) for group in planned["groups"]] == [(["animals"], 5)]
    assert planned["notes"] == ["animals: search of 5 candidates in one group, 30 epochs at most"]

    # kill -9 of everything once the first results are known; the same command goes on.
    process = cli.start("submit", spec, "--checkpoint-every", "0.2")
    wait_for(lambda: list(cli.workspace.glob("searches/*.json")), 180)
    cli.kill(process)
    report = cli.json("submit", spec)
    (task,) = report["tasks"]
    assert (task["decision"], task["champion"]) == ("promoted", "animals@1")
    found = task["search"]
    assert (found["num_candidates"], found["is_own"], found["metric"]) == (5, False, "accuracy")
    assert found["num_dropped"] >= 1
    assert found["select"] >= found["own_select"]
    assert f"chosen learning_rate {found['chosen']['learning_rate']:g}, rank {found['chosen']['rank']:g}" in found["sentence"]
    assert found["sentence"] in cli.run("status")
    assert [row["search"] for row in cli.json("status")["tasks"]] == [found["sentence"]]

    _look_into_mlflow(cli, found)
    assert not list(cli.workspace.glob("checkpoints/*"))
    assert len(list(cli.workspace.glob("adapters/*/adapter"))) == 1

    # Nothing is trained again, and the search is part of what is asked for: another one would be trained.
    assert "Nothing changed" in cli.run("submit", spec)
    assert cli.json("plan", spec, "--search")["unchanged"] == ["animals"]
    wider = tmp_path / "wider.yaml"
    wider.write_text(spec.read_text(encoding="utf-8").replace("rank: [4, 8]", "rank: [4, 8, 16]"), encoding="utf-8")
    assert cli.json("plan", wider)["unchanged"] == []


def _look_into_mlflow(cli: CommandLine, found: dict) -> None:
    """One run of the task; below it one for each candidate, with its setting and its select curve; one version."""
    client = MlflowClient(f"sqlite:///{cli.workspace / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("animals")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    (parent,) = parents
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    settings = {(run.data.params["train.learning_rate"], run.data.params["lora.rank"]) for run in children}
    assert settings == {("0.0001", "8"), ("0.001", "4"), ("0.001", "8"), ("0.01", "4"), ("0.01", "8")}
    assert len(children) == 5
    for run in children:
        curve = [point.step for point in client.get_metric_history(run.info.run_id, "search/value")]
        assert curve == list(range(1, len(curve) + 1))
        assert client.get_metric_history(run.info.run_id, "train/loss")
    ends = [run.data.tags["candidate"] for run in children]
    assert ends.count("chosen") == 1
    assert ends.count("ended early") == found["num_dropped"]
    (chosen,) = [run for run in children if run.data.tags["candidate"] == "chosen"]
    assert max(point.value for point in client.get_metric_history(chosen.info.run_id, "search/value")) == found["select"]
    for name in ("learning_rate", "rank", "epochs"):
        assert float(parent.data.params[f"chosen.{name}"]) == found["chosen"][name]
    (version,) = client.search_model_versions("name = 'animals'")
    assert version.tags["rank"] == f"{found['chosen']['rank']:g}"
