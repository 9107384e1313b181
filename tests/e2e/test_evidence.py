"""`cross` and `explain` over a real registry, Ray and the running endpoint; the champions are tiny and need no training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_adapters import CARDS, MAIL, MOOD, SHORTEN, TinyTask

from e2e.conftest import CommandLine
from e2e.endpoint import free_port
from multilora.registry import CHAMPION, AdapterVersion, Registry
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import PYFUNC_CODE
from orchestrator.cross import load_matrices
from orchestrator.dataset import gate_fingerprint_of
from orchestrator.eval_report import EvalReport, store_reports
from orchestrator.gates import store_gate

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def crown(config: OrchestratorConfig, artifact, task: TinyTask, gate) -> AdapterVersion:
    """Make an adapter the task's champion, judged on `gate`."""
    registry = Registry(config.registry_uri, config.artifact_root)
    registry.initialise()
    run = registry.start_run(task.name, f"key-{task.name}", {}, {})
    version = registry.register(run, artifact.folder, artifact.digest, PYFUNC_CODE, task.name, {"run_key": run.run_key})
    registry.set_alias(version, CHAMPION)
    if gate:
        fingerprint = gate_fingerprint_of(gate)
        store_gate(config.gates_dir, fingerprint, gate)
        report = EvalReport(task.name, version.key, artifact.digest, fingerprint, tuple(label for label, _ in task.labels), ())
        store_reports(config.answers_file(run.run_key), [report])
    return version


def test_every_adapter_on_every_task_and_one_up_to_the_endpoint(cli: CommandLine, tiny_adapter) -> None:
    from test_cross import gate_of
    from test_ladder import text_item

    config = OrchestratorConfig(workspace=Path(cli.workspace))
    config.workspace.mkdir()
    crown(config, tiny_adapter("causal", CARDS, 0), CARDS, gate_of(CARDS))
    crown(config, tiny_adapter("causal", MOOD, 1), MOOD, gate_of(MOOD))
    crown(config, tiny_adapter("causal", MAIL, 2), MAIL, ())  # as a version of before gates were kept
    crown(config, tiny_adapter("causal", SHORTEN, 0), SHORTEN, text_item(tiny_adapter, "causal").gate)

    found = cli.json("cross", "--limit", 10)
    (matrix,) = found["matrices"]
    assert matrix["adapters"] == ["cards@1", "mood@1"]
    assert matrix["num_examples"] == {"cards": 10, "mood": 10}
    assert matrix["num_pairs"] == 2
    assert list(found["left_out"]) == ["mail", "shorten"]
    assert "submit the task again with --force" in found["left_out"]["mail"]
    assert [stored.num_right for stored in load_matrices(config.cross_file)] == [matrix["num_right"]]
    assert "nobody has no champion; champions: cards, mail, mood, shorten" in cli.run("cross", "nobody", code=1)
    assert "mail cannot be explained: the gate examples" in cli.run("explain", "mail", code=1)

    # Without an endpoint, then with one.
    shown = cli.run("explain", "cards", "--limit", 5)
    assert "start it with: orchestrator serve" in shown
    assert "cards@1 on 5 of 24 gate examples: training changes" in shown
    cli.run("serve", "--port", free_port())
    for task, num_examples in (("cards", 24), ("shorten", 4)):
        ladder = cli.json("explain", task)
        rungs = {rung["name"]: rung for rung in ladder["rungs"]}
        assert ladder["num_examples"] == num_examples
        assert rungs["offline"]["num_changed"] or rungs["offline"]["max_difference"] > 0.1
        for name in ("engine alone", "mixed batch", "endpoint"):
            assert rungs[name]["num_changed"] == 0
        assert f"0 flips on {num_examples} examples from offline to endpoint" in ladder["conclusion"]
        assert rungs["router"]["skipped"]

    # An endpoint that does not follow the champion is at fault.
    endpoint = json.loads(config.serve_file.read_text())
    other = OrchestratorConfig(workspace=config.workspace.parent / "other")
    other.workspace.mkdir()
    stale = replace(CARDS, rank=5)
    crown(other, tiny_adapter("causal", stale, 9), stale, gate_of(CARDS))
    other.serve_file.write_text(json.dumps(endpoint))
    ladder = replace_workspace(cli, other).json("explain", "cards", "--limit", 4)
    rung = next(rung for rung in ladder["rungs"] if rung["name"] == "endpoint")
    assert rung["is_fault"]
    assert "; endpoint gives no answer: it answers with cards@1" in ladder["conclusion"]

    _keys_shut_it(cli, json.loads(config.serve_file.read_text())["url"])


def _keys_shut_it(cli: CommandLine, url: str) -> None:
    """From the first key on, the next `serve` asks for one; `query` reads files and sends it."""
    file = cli.workspace.parent / "texts.txt"
    file.write_text("where is my new card\n\nI lost my wallet on the train\n", encoding="utf-8")
    rows = [json.loads(line) for line in cli.run("query", "cards", "--file", file, "--json").splitlines()]
    assert [row["input"] for row in rows] == ["where is my new card", "I lost my wallet on the train"]
    key = cli.json("key", "create", "tests", "--tasks", "cards")
    cli.run("stop")
    cli.run("serve", "--port", url.rpartition(":")[2])
    assert "send your API key" in cli.run("query", "cards", "hello", code=1)
    opened = replace(cli, settings={"ORCHESTRATOR_API_KEY": key["key"]})
    assert [json.loads(line) for line in opened.run("query", "cards", "--file", file, "--json").splitlines()] == rows
    assert "does not open task mood" in opened.run("query", "mood", "hello", code=1)
    cli.run("key", "revoke", key["id"])
    assert "not known here" in opened.run("query", "cards", "hello", code=1)
    log = (cli.workspace / "audit.log").read_text(encoding="utf-8")
    assert f"key={key['id']} task=cards version=1" in log
    assert "my wallet" not in log


def replace_workspace(cli: CommandLine, config: OrchestratorConfig) -> CommandLine:
    """The same command line over another workspace."""
    return replace(cli, workspace=config.workspace)
